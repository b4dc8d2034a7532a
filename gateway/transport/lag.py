"""How far the event loop is behind: a deadline counts from a request's arrival, not from when its turn comes."""

from __future__ import annotations

import asyncio
import time


class Lag:
    """The delay of one event loop, measured by requests as they come: no timer runs while there are none."""

    def __init__(self) -> None:
        self.seconds = 0.0  # what was queued last waited for its turn this long
        self._asked = 0.0

    def arrived(self) -> float:
        """When the request whose turn it is now reached this process, in `time.monotonic` seconds."""
        now = time.monotonic()
        if not self._asked:
            self._asked = now
            asyncio.get_running_loop().call_soon(self._answer)
        return now - self.seconds

    def _answer(self) -> None:
        self.seconds = time.monotonic() - self._asked
        self._asked = 0.0
