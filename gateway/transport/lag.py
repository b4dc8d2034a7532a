"""How far the event loop is behind with what another thread hands to it."""

from __future__ import annotations

from gateway.service import Behind

_FRESH = 0.02  # seconds; what was measured longer ago than this, and than the lag itself, tells nothing of now


class Lag:
    """The delay of one event loop, measured by what is handed to it: no timer runs while there is nothing.

    All times are of `time.monotonic`. Both threads call it with nothing but the GIL between them: a figure that is
    read while the other writes is as good as the one before or after.
    """

    def __init__(self) -> None:
        self._seconds = 0.0  # what the loop took last had waited this long
        self._taken = 0.0  # and was taken then
        self._oldest = 0.0  # handed over then and not taken yet; 0 for nothing
        self._handed = 0  # so many were handed over,
        self._took = 0  # and so many taken

    def handed(self, now: float) -> None:
        """Something is on its way to the loop."""
        self._handed += 1
        if not self._oldest:
            self._oldest = now

    def taken(self, handed: float, now: float, count: int = 1) -> None:
        """The loop has taken this and what was handed over before it, so many in all; `handed` is when."""
        self._seconds = now - handed
        self._taken = now
        self._oldest = 0.0
        self._took += count

    def behind(self, now: float) -> Behind:
        """How far the loop is behind: at least as long as what is on its way waits already."""
        oldest = self._oldest
        waits = now - oldest if oldest else 0.0
        waited = self._seconds
        seconds = waits if now - self._taken > waited + _FRESH else max(waits, waited)
        return Behind(seconds, self._handed - self._took)
