"""How fast requests come: rows per second, averaged over the last moments."""

from __future__ import annotations

import math

_SECONDS = 0.2  # arrivals are averaged over this long
_BIN_SECONDS = 0.005  # and counted in bins of this length


class Arrivals:
    """The arrivals of one lane."""

    __slots__ = ("_average", "_count", "_counted_at", "_counting_until", "_rate", "_weight")

    def __init__(self) -> None:
        self._count = 0  # rows that arrived in this bin
        self._counted_at = -math.inf
        self._counting_until = -math.inf
        self._average = 0.0
        self._weight = 0.2  # as if nothing had come for a moment before the first: a single burst is no rate
        self._rate = 0.0

    def add(self, rows: int, now: float) -> None:
        """Count an arrival, admitted or not."""
        if now >= self._counting_until:
            self._recount(now)
        self._count += rows

    def rate(self, now: float) -> float:
        """Rows that arrive per second, averaged over the last fifth of a second or what there is of it."""
        if now >= self._counting_until:
            self._recount(now)
        return self._rate

    def _recount(self, now: float) -> None:
        if self._counted_at == -math.inf:
            self._counted_at = now - _BIN_SECONDS
        seen = now - self._counted_at
        kept = math.exp(-seen / _SECONDS)
        # The weights of what was counted sum up to this much so far; dividing by it takes the slow start out.
        self._weight = self._weight * kept + 1 - kept
        self._average = self._average * kept + (1 - kept) * self._count / seen
        self._rate = self._average / self._weight
        self._count = 0
        self._counted_at = now
        self._counting_until = now + _BIN_SECONDS
