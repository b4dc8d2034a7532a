"""`Watchdog`: tells of a run that takes too long."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Watchdog:
    """Of one run after the other. On the event loop."""

    def __init__(self, hung: Callable[[], None]) -> None:
        """`hung` is called where a run names nothing else."""
        self._loop = asyncio.get_running_loop()
        self._hung = hung
        self._due = math.inf
        self._alarm: asyncio.TimerHandle | None = None

    def watch(self, seconds: float, hung: Callable[[], None] | None = None) -> None:
        """Call `hung`, or what was to be called last, unless this is called again within so many seconds, or `rest`."""
        # One timer for many runs, because to set one and take it back for each costs more than the rest of this.
        self._hung = hung or self._hung
        self._due = self._loop.time() + seconds
        if self._alarm is not None and self._alarm.when() > self._due:
            self.close()
        if self._alarm is None:
            self._alarm = self._loop.call_at(self._due, self._look)

    def rest(self) -> None:
        """Nothing runs."""
        self._due = math.inf

    def close(self) -> None:
        """Never tell."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _look(self) -> None:
        self._alarm = None
        if self._loop.time() >= self._due:
            self._hung()
        elif self._due < math.inf:
            self._alarm = self._loop.call_at(self._due, self._look)
