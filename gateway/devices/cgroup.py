"""The control groups of this process, version 1 and 2: their limits, and what those cost. `root` is where /proc and /sys are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # bytes; version 1 has no other word for it


@dataclass(frozen=True, slots=True)
class Throttling:
    """How often and for how many seconds the processes of a group had to wait for the next period of their CPU quota."""

    periods: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Memory:
    """The limit that is met first, and what counts towards it now. Bytes."""

    limit: int
    used: int


def cpu_quotas(root: Path) -> list[float]:
    """The CPU quotas, in cores, of this process's control groups and all above them."""
    quotas = []
    for folder in _folders(root, "cpu"):
        limit, _, period = _text(folder / "cpu.max").partition(" ")
        if not limit:
            limit, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if limit and period and limit not in ("max", "-1"):
            quotas.append(int(limit) / int(period))
    return quotas


def throttling(root: Path) -> Throttling | None:
    """The sum over this process's groups and those above, since they were made; None where none has a quota."""
    if not cpu_quotas(root):
        return None
    periods, seconds = 0, 0.0
    for folder in _folders(root, "cpu"):
        lines = (line.split() for line in _text(folder / "cpu.stat").splitlines())
        figures = {words[0]: int(words[1]) for words in lines if len(words) == 2}
        periods += figures.get("nr_throttled", 0)
        seconds += figures.get("throttled_usec", 0) / 1e6 + figures.get("throttled_time", 0) / 1e9
    return Throttling(periods, seconds)


def memory(root: Path) -> Memory | None:
    """What this process and those it shares its groups with may use and do; None where there is no limit."""
    found = []
    for folder in _folders(root, "memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdecimal() and used.isdecimal() and int(limit) < _UNLIMITED:
            found.append(Memory(int(limit), int(used)))
    return min(found, key=lambda each: each.limit - each.used, default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The groups that limit this process, each followed by those above it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        # In a container the path may be the host's, so what is not there counts as the root.
        folder = mount / group.lstrip("/")
        while True:
            yield folder
            if folder == mount:
                break
            folder = folder.parent


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
