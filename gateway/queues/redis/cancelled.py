"""The calls that were cancelled lately, for the requests of them that are yet to be read."""

from __future__ import annotations

from collections import deque

_REMEMBERED = 60.0  # seconds; a request that waits longer is run in vain
_MOST = 100_000


class Cancelled:
    """Ids of calls whose callers have gone."""

    def __init__(self) -> None:
        self._ids: set[bytes] = set()
        self._ages: deque[tuple[float, bytes]] = deque()

    def add(self, call: bytes, now: float) -> None:
        """Remember a call for a while."""
        if call not in self._ids:
            self._ids.add(call)
            self._ages.append((now, call))
        while self._ages and (now - self._ages[0][0] > _REMEMBERED or len(self._ages) > _MOST):
            self._ids.discard(self._ages.popleft()[1])

    def __contains__(self, call: bytes) -> bool:
        return call in self._ids
