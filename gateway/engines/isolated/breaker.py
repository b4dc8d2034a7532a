"""When an instance that keeps failing is started again: at once, then later and later, and after many times much later.

A pure function of what it is told and when. A crash is no fault of the instance as long as batches succeed between
crashes, so that poison among good requests stops nobody; what trips it is a row of crashes, or of starts, without one.
"""

from __future__ import annotations

from dataclasses import dataclass

_FREE = 8  # crashes in a row that are followed by a start at once: a batch of 32 is bisected in 6
_FIRST_DELAY, _LAST_DELAY = 0.05, 1.0  # seconds
_CRASHES, _STARTS = 24, 4  # in a row
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0  # seconds


@dataclass(slots=True)
class Breaker:
    """Told of one instance's fortunes. While it is open nothing is tried; then one start is, and one run."""

    open_until: float = 0.0
    _crashes: int = 0
    _starts: int = 0
    _pause: float = _FIRST_PAUSE

    def succeeded(self) -> None:
        """A batch ran."""
        self._crashes = self._starts = 0
        self._pause = _FIRST_PAUSE

    def started(self) -> None:
        """The instance is up, and passed its self-test."""
        self._starts = 0

    def crashed(self, now: float) -> float:
        """The instance ended; the seconds until it is to be started again."""
        self._crashes += 1
        if self._crashes >= _CRASHES:
            return self._trip(now)
        late = self._crashes - _FREE
        return 0.0 if late <= 0 else min(_FIRST_DELAY * 2.0 ** (late - 1), _LAST_DELAY)

    def not_started(self, now: float) -> float:
        """The instance could not be started; the seconds until that is to be tried again."""
        self._starts += 1
        if self._starts >= _STARTS:
            return self._trip(now)
        return min(_FIRST_DELAY * 2.0 ** (self._starts - 1), _LAST_DELAY)

    def retry_after(self, now: float) -> float | None:
        """The seconds until something is tried again, while it is open."""
        return self.open_until - now if now < self.open_until else None

    def _trip(self, now: float) -> float:
        pause, self._pause = self._pause, min(2 * self._pause, _LAST_PAUSE)
        self.open_until = now + pause
        return pause
