"""Who used the machine's cores during a run: the server, this benchmark with its generators, and everybody else.

On a shared machine the last figure decides whether a run is worth anything, so it stands in every result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

QUIET_CORES = 0.15  # what an idle machine's housekeeping may use


def busy_seconds() -> float:
    """CPU seconds that all cores of this machine have spent working so far, for anyone, stolen time included."""
    times = psutil.cpu_times()
    named = (times.user, times.system, times.nice, times.irq, times.softirq, times.steal)
    return float(sum(named))


def own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Meter:
    """Counts from its creation until `read`."""

    def __init__(self, server: Callable[[], float]) -> None:
        self._server = server
        self._start = (time.perf_counter(), busy_seconds(), own_seconds(), server())

    def read(self) -> tuple[float, float, float]:
        """Wall seconds, CPU seconds of the server, and cores that others used on average."""
        wall, busy, own, server = self._start
        wall, busy, own = time.perf_counter() - wall, busy_seconds() - busy, own_seconds() - own
        server = self._server() - server
        return wall, server, max(0.0, (busy - own - server) / wall)


def wait_quiet(limit: float, idle: float = 0.25) -> float:
    """Wait until nobody else works, at most `limit` seconds; cores that were in use when the wait ended."""
    deadline = time.monotonic() + limit
    while True:
        meter = Meter(lambda: 0.0)
        time.sleep(idle)
        used = meter.read()[2]
        if used <= QUIET_CORES or time.monotonic() >= deadline:
            return used
