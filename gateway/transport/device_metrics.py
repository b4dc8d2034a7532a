"""The metrics of this machine's GPUs and CPU, under Triton's names and our own.

They are of the machine of the process that answers and never summed over processes: each that runs there tells the same.
In queries over several of them take `max by (gpu_uuid)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias

from gateway.devices.cpu import CpuMeter, CpuReading
from gateway.devices.monitor import GpuState, Monitor
from gateway.devices.nvml import THROTTLES
from gateway.telemetry import Family

_Kind: TypeAlias = Literal["counter", "gauge"]

_GPU: tuple[tuple[str, _Kind, str, Callable[[GpuState], float | None]], ...] = (
    ("nv_gpu_utilization", "gauge", "GPU utilization rate [0.0 - 1.0)", lambda each: each.reading.utilization),
    ("nv_gpu_memory_total_bytes", "gauge", "GPU total memory, in bytes", lambda each: each.reading.memory_total),
    ("nv_gpu_memory_used_bytes", "gauge", "GPU used memory, in bytes", lambda each: each.reading.memory_used),
    ("nv_gpu_power_usage", "gauge", "GPU power usage in watts", lambda each: each.reading.power),
    ("nv_gpu_power_limit", "gauge", "GPU power management limit in watts", lambda each: each.reading.power_limit),
    (
        "nv_energy_consumption",
        "counter",
        "GPU energy consumption in joules since the server started",
        lambda each: each.energy,
    ),
    ("gateway_gpu_temperature_celsius", "gauge", "GPU temperature", lambda each: each.reading.temperature),
    (
        "gateway_gpu_healthy",
        "gauge",
        "0 while the GPU has failed, else 1; the log's event gpu_health says why",
        lambda each: int(each.verdict.state != "failed"),
    ),
    (
        "gateway_gpu_degraded",
        "gauge",
        "1 while the GPU answers more slowly than it could",
        lambda each: int(each.verdict.state == "degraded"),
    ),
)
_THROTTLED = "1 while the GPU's clocks are held down, by why"
_XIDS = "Number of errors that the driver reported of the GPU, by Xid"

_CPU_GAUGES: tuple[tuple[str, str, Callable[[CpuReading], float | None]], ...] = (
    ("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", lambda cpu: cpu.utilization),
    ("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", lambda cpu: cpu.memory_total),
    ("nv_cpu_memory_used_bytes", "CPU used memory (RAM), in bytes", lambda cpu: cpu.memory_used),
    (
        "gateway_cpu_steal_ratio",
        "Share of the CPU time that the hypervisor gave to others [0.0 - 1.0]",
        lambda cpu: cpu.steal,
    ),
    ("gateway_cpu_quota_cores", "CPU quota of the control group, in cores", lambda cpu: cpu.quota),
    (
        "gateway_memory_limit_bytes",
        "Memory limit of the control group, in bytes",
        lambda cpu: None if cpu.memory is None else cpu.memory.limit,
    ),
    (
        "gateway_memory_used_bytes",
        "Memory that counts towards the limit of the control group, in bytes",
        lambda cpu: None if cpu.memory is None else cpu.memory.used,
    ),
)
_CPU_COUNTERS: tuple[tuple[str, str, Callable[[CpuReading], float | None]], ...] = (
    (
        "gateway_cpu_throttled_periods_total",
        "Number of times the control group's CPU quota was used up",
        lambda cpu: None if cpu.throttling is None else cpu.throttling.periods,
    ),
    (
        "gateway_cpu_throttled_seconds_total",
        "Time that processes of the control group waited for its CPU quota",
        lambda cpu: None if cpu.throttling is None else cpu.throttling.seconds,
    ),
)
_CPU_ENERGY = "Energy that a processor has used since the server's first look, in joules (RAPL)"


def gpu_metrics(states: Iterable[GpuState]) -> list[Family]:
    """Every GPU's figures; none without GPUs, and none that a GPU does not tell."""
    gpus = [({"gpu_uuid": each.gpu.uuid}, each) for each in states]
    if not gpus:
        return []
    throttles = [
        ({**labels, "reason": reason}, int(reason in each.reading.throttles))
        for labels, each in gpus
        for reason in THROTTLES.values()
    ]
    xids = [({**labels, "xid": str(xid)}, count) for labels, each in gpus for xid, count in sorted(each.xids.items())]
    families = [
        _family(name, kind, text, [(labels, read(each)) for labels, each in gpus]) for name, kind, text, read in _GPU
    ]
    families += [
        _family("gateway_gpu_throttled", "gauge", _THROTTLED, throttles),
        _family("gateway_gpu_xid_errors_total", "counter", _XIDS, xids),
    ]
    return [family for family in families if family.samples]


def cpu_metrics(cpu: CpuReading) -> list[Family]:
    """The machine's processors, memory and energy, as far as they are known."""
    families = [_family(name, "gauge", text, [({}, read(cpu))]) for name, text, read in _CPU_GAUGES]
    families += [_family(name, "counter", text, [({}, read(cpu))]) for name, text, read in _CPU_COUNTERS]
    energy = [({"package": package}, joules) for package, joules in cpu.energy.items()]
    families.append(_family("gateway_cpu_energy_joules_total", "counter", _CPU_ENERGY, energy))
    return [family for family in families if family.samples]


def _family(name: str, kind: _Kind, text: str, samples: Iterable[tuple[Mapping[str, str], float | None]]) -> Family:
    return Family(name, kind, text, [(labels, value) for labels, value in samples if value is not None])


class DeviceMetrics:
    """The families of one machine."""

    def __init__(self, monitor: Monitor | None = None, meter: CpuMeter | None = None) -> None:
        """Without a `monitor` there is nothing of GPUs, without a `meter` nothing of the CPU."""
        self._monitor = monitor
        self._meter = meter

    def gpus(self) -> list[Family]:
        """As they were when they were read last. Call it on the event loop, whose the readings are."""
        return [] if self._monitor is None else gpu_metrics(self._monitor.states.values())

    def cpu(self) -> list[Family]:
        """Reads files: call it off the event loop."""
        return [] if self._meter is None else cpu_metrics(self._meter.read())
