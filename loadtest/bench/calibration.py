"""A fixed piece of work, timed right before each run: how fast this core is at this moment.

Absolute figures of two runs may be compared only as far as this figure agrees. Wall time above CPU time means that somebody else
had the core.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Calibration:
    """Milliseconds the fixed work took, and milliseconds of CPU it used."""

    wall_ms: float
    cpu_ms: float


def _work() -> None:
    """About half pure Python, half numpy on one thread (no BLAS); the same on every machine, forever."""
    table: dict[int, int] = {}
    for i in range(60_000):
        table[i & 1023] = (table.get(i & 1023, 0) * 31 + i) & 0xFFFF
    a = np.linspace(-1, 1, 40_000, dtype=np.float32)
    for _ in range(20):
        a = np.sort(np.tanh(a * 1.01)[::-1])


def calibrate(core: int | None = None) -> Calibration:
    """Time the fixed work, on the core given."""
    before = os.sched_getaffinity(0)
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        wall, cpu = time.perf_counter(), time.thread_time()
        _work()
        return Calibration((time.perf_counter() - wall) * 1e3, (time.thread_time() - cpu) * 1e3)
    finally:
        os.sched_setaffinity(0, before)
