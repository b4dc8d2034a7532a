"""A core for each thread of a run that has all of them.

A kernel may put a thread that wakes up onto the core of the one that woke it and leave it there for milliseconds: a lone
EfficientNet on two cores, 30 ms after the last one, took 9.4 ms because one core did all the work, and takes 4.2 with its
threads on cores of their own. Where a run is to have fewer cores than its process may use, because of a quota or a flag, the
kernel chooses which: it sees what else runs there. Places are those at the load of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_LINUX = hasattr(os, "sched_setaffinity")


def places(threads: int) -> tuple[int, ...]:
    """The core of each of so many threads, if those are all the cores that this process may use; else none."""
    usable = sorted(os.sched_getaffinity(0)) if _LINUX else []
    return tuple(usable) if len(usable) == threads > 1 else ()


@contextmanager
def stay(core: int | None) -> Iterator[None]:
    """Keep the calling thread on this core, if there is one to keep it on and it may go there."""
    before: set[int] = set()
    if core is not None:
        with suppress(OSError):  # the operator took the core away meanwhile
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        if before:
            with suppress(OSError):
                os.sched_setaffinity(0, before)
