"""How many requests may be sent again: a share of those sent lately, so that retries never make an outage worse.

After Finagle's `RetryBudget` (a token bucket whose deposits expire; 10 s here as there, its 20 % are 10 % here) and
Envoy's `retry_budget`. Pure state: who asks brings the time.
"""

from __future__ import annotations

from collections import deque

_SHARE = 0.1
_LEAST = 1.0  # retries a second that are always allowed, for a client that sends little
_WINDOW = 10.0  # seconds
_SLICE = 1.0


class RetryBudget:
    """Counts requests and retries of the last ten seconds."""

    def __init__(self) -> None:
        self._slices: deque[list[float]] = deque()  # since when, requests, retries

    def sent(self, now: float) -> None:
        """A request was sent for the first time."""
        self._slice(now)[1] += 1

    def withdraw(self, now: float) -> bool:
        """Whether one may be sent again; if so, it counts."""
        current = self._slice(now)
        requests = sum(each[1] for each in self._slices)
        retries = sum(each[2] for each in self._slices)
        if retries + 1 > requests * _SHARE + _LEAST * _WINDOW:
            return False
        current[2] += 1
        return True

    def _slice(self, now: float) -> list[float]:
        while self._slices and self._slices[0][0] <= now - _WINDOW:
            self._slices.popleft()
        if not self._slices or self._slices[-1][0] <= now - _SLICE:
            self._slices.append([now, 0, 0])
        return self._slices[-1]
