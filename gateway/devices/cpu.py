"""The processors and the memory of the machine, what its hypervisor and control groups take away, and the energy used.

Read from /proc and /sys; what is not there, or may not be read, as energy by others than root, is None. Ratios are means
since the last reading, since boot on the first. Blocking: 1 ms of CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gateway.devices import cgroup


@dataclass(frozen=True, slots=True)
class CpuReading:
    """Ratios are of all cores' time; `energy` is in joules since the first reading, by package."""

    utilization: float | None = None
    steal: float | None = None
    memory_total: int | None = None
    memory_used: int | None = None
    quota: float | None = None  # cores
    throttling: cgroup.Throttling | None = None
    memory: cgroup.Memory | None = None
    energy: Mapping[str, float] = field(default_factory=dict)


def core_cache(root: Path = Path("/")) -> int:
    """The bytes of cache that a run on one core can count on; 0 where nobody says. `root` is where /sys is.

    That is the second level, over the logical processors that share it: the last one is everybody's.
    """
    for cpu in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*")):
        if shares := [share for folder in cpu.glob("cache/index*") if (share := _share(folder))[1]]:
            return dict(shares).get(2) or max(shares)[1]
    return 0


def _share(folder: Path) -> tuple[int, int]:
    """The level of a cache, and a processor's share of its bytes."""
    try:
        level, size, sharing = ((folder / name).read_text().strip() for name in ("level", "size", "shared_cpu_map"))
        return int(level), int(size.removesuffix("K")) * 1024 // int(sharing.replace(",", ""), 16).bit_count()
    except (OSError, ValueError, ZeroDivisionError):
        return 0, 0


class CpuMeter:
    """Reads the machine. Used by one thread at a time."""

    def __init__(self, root: Path = Path("/")) -> None:
        """`root` is where /proc and /sys are."""
        self._root = root
        self._busy = self._stolen = self._ticks = 0
        self._packages: dict[Path, _Package] = {}

    def read(self) -> CpuReading:
        """How the machine fares now."""
        utilization, steal = self._times()
        total, used = self._memory()
        return CpuReading(
            utilization,
            steal,
            total,
            used,
            min(cgroup.cpu_quotas(self._root), default=None),
            cgroup.throttling(self._root),
            cgroup.memory(self._root),
            self._energy(),
        )

    def _times(self) -> tuple[float | None, float | None]:
        try:
            # user nice system idle iowait irq softirq steal; the guest columns after them are part of user.
            line = (self._root / "proc/stat").read_text().splitlines()[0]
            columns = [int(column) for column in line.split()[1:9]]
            ticks, idle, stolen = sum(columns), columns[3] + columns[4], columns[7]
        except (OSError, LookupError, ValueError):
            return None, None
        elapsed = ticks - self._ticks
        busy, taken = ticks - idle - self._busy, stolen - self._stolen
        self._ticks, self._busy, self._stolen = ticks, ticks - idle, stolen
        return (busy / elapsed, taken / elapsed) if elapsed > 0 else (0.0, 0.0)

    def _memory(self) -> tuple[int | None, int | None]:
        try:
            lines = (line.split() for line in (self._root / "proc/meminfo").read_text().splitlines())
            sizes = {key: int(kib) * 1024 for key, kib, *_ in lines}
            return sizes["MemTotal:"], sizes["MemTotal:"] - sizes["MemAvailable:"]
        except (OSError, LookupError, ValueError):
            return None, None

    def _energy(self) -> dict[str, float]:
        """RAPL: counters of whole packages, which begin again from 0 when they are full."""
        energy = {}
        for folder in sorted(self._root.glob("sys/class/powercap/intel-rapl:?")):
            try:
                counter = int((folder / "energy_uj").read_text())
                if folder not in self._packages:
                    name, most = (folder / "name").read_text().strip(), (folder / "max_energy_range_uj").read_text()
                    self._packages[folder] = _Package(name, int(most), counter)
            except (OSError, ValueError):
                continue
            package = self._packages[folder]
            energy[package.name] = package.joules(counter)
        return energy


@dataclass(slots=True)
class _Package:
    """One processor's energy counter, in microjoules."""

    name: str
    most: int
    last: int
    total: int = 0

    def joules(self, counter: int) -> float:
        """How much was used since the first look."""
        self.total += counter - self.last if counter >= self.last else counter + self.most - self.last
        self.last = counter
        return self.total / 1e6
