"""What kind of device a name stands for: the kinds between which a kernel's speed and rounding differ.

Two processors of one kind run the same integer kernels, so that what was measured on one holds on the other. Without
VNNI (or I8MM, or the dot product) x86's INT8 kernels saturate at 16 bits, and the same file gives other answers.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

from gateway.devices.nvml import gpus

_MACHINES = {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "aarch64"}
# The best first: a name, and the flags of /proc/cpuinfo that it takes.
_LEVELS = {
    "x86-64": (
        ("amx_int8", {"amx_int8"}),
        ("avx512_vnni", {"avx512_vnni"}),
        ("avx_vnni", {"avx_vnni"}),
        ("avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        ("avx2", {"avx2", "fma"}),
        ("avx", {"avx"}),
        ("sse4_1", {"sse4_1"}),
    ),
    "aarch64": (("i8mm", {"i8mm"}), ("dotprod", {"asimddp"}), ("neon", {"asimd"})),
}


def device_kind(name: str) -> str:
    """The kind of a device of this machine: "cpu:x86-64:avx2", "gpu:sm90"; ends in "unknown" where nothing tells.

    Blocking on first use: reads /proc/cpuinfo, or asks the driver.
    """
    if not name.startswith("gpu:"):
        return _cpu_kind()
    return next((gpu_kind(gpu.sm) for gpu in gpus() if gpu.name == name), "gpu:unknown")


def cpu_kind(machine: str, cpuinfo: str) -> str:
    """The kind of a CPU from `platform.machine()` and the text of /proc/cpuinfo."""
    family = _MACHINES.get(machine.lower(), machine.lower() or "unknown")
    flags = _flags(cpuinfo)
    level = next((name for name, needed in _LEVELS.get(family, ()) if needed <= flags), "unknown")
    return f"cpu:{family}:{level}"


def _flags(cpuinfo: str) -> set[str]:
    """What every core can do: cores may differ, and a thread may run on any."""
    cores = [
        set(value.split())
        for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return set.intersection(*cores) if cores else set()


@lru_cache(1)
def _cpu_kind() -> str:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        cpuinfo = ""
    return cpu_kind(platform.machine(), cpuinfo)


def gpu_kind(sm: str) -> str:
    """The kind of a GPU of this compute capability, e.g. "90"."""
    return f"gpu:sm{sm}"
