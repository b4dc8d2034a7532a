"""How far the event loop is behind: a deadline counts from a request's arrival, not from when its turn comes."""

from __future__ import annotations

import asyncio
import time

_FRESH = 0.02  # seconds; what was measured longer ago than this, and than the lag itself, tells nothing of now


class Lag:
    """The delay of one event loop, measured by requests as they come: no timer runs while there are none."""

    def __init__(self) -> None:
        self._seconds = 0.0  # what was queued last waited for its turn this long
        self._asked = 0.0
        self._answered = 0.0

    def arrived(self) -> float:
        """When the request whose turn it is now reached this process, in `time.monotonic` seconds."""
        now = time.monotonic()
        if not self._asked:
            self._asked = now
            asyncio.get_running_loop().call_soon(self._answer)
        return now - self._at(now)

    def seconds(self) -> float:
        """How far the loop is behind now."""
        return self._at(time.monotonic())

    def _at(self, now: float) -> float:
        return self._seconds if now - self._answered <= self._seconds + _FRESH else 0.0

    def _answer(self) -> None:
        self._answered = time.monotonic()
        self._seconds = self._answered - self._asked
        self._asked = 0.0
