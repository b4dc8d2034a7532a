"""Where a result came from: the machine, the commit, the versions, the command and the date.

Every JSON file that `loadtest` writes carries what `provenance()` returns, so a figure can be judged long after the run.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "lockgate", "numpy", "onnxruntime", "granian", "fastapi", "uvicorn", "uvloop", "httptools", "msgspec", "orjson",
    "pysimdjson", "grpcio", "pygrpc-native", "protobuf", "tritonclient", "locust", "gevent", "psutil", "redis",
)  # fmt: skip


def _output(*command: str) -> str:
    """What a command prints, or the empty text when it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip() if done.returncode in (0, 1) else ""


def commit() -> str:
    """The commit of this checkout, with `+dirty` when tracked files differ from it."""
    head = _output("git", "rev-parse", "--verify", "-q", "HEAD")
    if not head:
        return "none"
    return head + ("+dirty" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def versions() -> dict[str, str]:
    """Versions of the packages and tools that move the figures; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for tool, flag in (("wrk", "-v"), ("h2load", "--version")):
        text = _output(tool, flag)
        if text:
            found[tool] = text.splitlines()[0].split("[", maxsplit=1)[0].strip()
    return found


def _field(path: str, key: str) -> str:
    """The value of the first `key : value` line of a file under /proc."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def cores() -> int:
    """Cores this process may use: its affinity, not what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str | int | list[float]]:
    """The machine, in the terms that decide a figure."""
    flags = set(_field("/proc/cpuinfo", "flags").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cpu_family_model": f"{_field('/proc/cpuinfo', 'cpu family')}/{_field('/proc/cpuinfo', 'model')}",
        "vector": " ".join(flag for flag in wanted if flag in flags),
        "cores": os.cpu_count() or 1,
        "cores_usable": cores(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def provenance() -> dict[str, object]:
    """Everything a reader needs to repeat a run or to distrust it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }
