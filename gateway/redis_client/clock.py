"""`Clock`: Redis' time of day, estimated here without asking it each time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_SAMPLES = 8


class Clock:
    """Offsets between the server's clock and our monotonic one, of which the least delayed is believed."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)
        self._offset = time.time() - monotonic()  # until the server was asked, its clock is ours

    def now(self) -> float:
        """Seconds since 1970 by the server's clock."""
        return self._monotonic() + self._offset

    def sample(self, sent: float, received: float, server: float) -> None:
        """The server said `server` somewhere between `sent` and `received` of our monotonic clock."""
        self._samples.append((received - sent, server - (sent + received) / 2))
        self._offset = min(self._samples)[1]

    def forget(self) -> None:
        """Another server answers now: only what it says from here on counts."""
        self._samples.clear()
