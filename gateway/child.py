"""Child processes that do not outlive us, however we end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Asks for SIGKILL at the death of its parent, which must still be the one that asked, and becomes the command.
_SHIM = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.getppid() == int(sys.argv[1]) or sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])"""


def mortal(command: Sequence[str]) -> list[str]:
    """`command`, its first word a path, as one that is killed when the thread that starts it ends.

    So start it from the main thread, which is where the event loop runs. Only Linux can do that; elsewhere it
    is the command itself.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *command]
