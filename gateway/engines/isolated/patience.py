"""`Patience`: how long a run may take before it is taken for hung. A pure function of what it is told."""

from __future__ import annotations

_FIRST = 60.0  # seconds, while no run has succeeded: the first one may load, compile and allocate
_TIMES = 10  # as long as expected


class Patience:
    """Of one instance; `least` seconds it has always."""

    def __init__(self, least: float) -> None:
        self.least = least
        self._longest = 0.0  # seconds
        self._row = 0.0  # seconds of the last run, for each of its rows

    def learn(self, rows: int, seconds: float) -> None:
        """A run of so many rows took so long, and went well."""
        self._longest = max(self._longest, seconds)
        self._row = seconds / max(rows, 1)

    def limit(self, rows: int = 1, predicted: float | None = None) -> float:
        """Seconds after which such a run has hung; `predicted` is how long it is expected to take, if that is known."""
        if not self._longest:
            return max(_FIRST, self.least, _TIMES * (predicted or 0.0))
        expected = max(self._longest, self._row * rows) if predicted is None else predicted
        return max(self.least, _TIMES * expected)
