"""The ways in which the fake backend can take its process down, or have it hang, for tests of what contains that."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Mapping

import numpy as np

_TOO_MUCH = 1 << 46  # bytes


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _segfault() -> None:
    ctypes.string_at(0)


def _exit() -> None:
    os._exit(3)


def _hang_gil() -> None:
    ctypes.PyDLL(None).pause()  # unlike CDLL it keeps the interpreter's lock


def _oom() -> None:
    np.ones(_TOO_MUCH, np.uint8)


WAYS: Mapping[str, Callable[[], None]] = {
    "kill": _kill,
    "abort": os.abort,
    "segfault": _segfault,
    "exit": _exit,
    "hang_gil": _hang_gil,
    "oom": _oom,
}
"""By the parameter whose value asks for it. `oom` raises MemoryError; after the others there is no way back."""
