"""NVML without GPUs, for tests: an object with the functions of the module `pynvml`, and its ways to fail.

A `FakeGpu` is changed freely between calls. With `refuses` each call about it raises that error, with `lacks` only the
functions that are named do, as GPUs and drivers without a figure have it. While `hangs` is set and not released, every
call waits.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

NOT_SUPPORTED, DRIVER_NOT_LOADED, TIMEOUT, GPU_IS_LOST, RESET_REQUIRED = 3, 9, 10, 15, 16
_TEXTS = {
    NOT_SUPPORTED: "Not Supported",
    DRIVER_NOT_LOADED: "Driver Not Loaded",
    TIMEOUT: "Timeout",
    GPU_IS_LOST: "GPU is lost",
    RESET_REQUIRED: "GPU requires reset",
}


class FakeError(Exception):
    """`pynvml.NVMLError`: `value` is the library's code."""

    def __init__(self, value: int) -> None:
        super().__init__(_TEXTS.get(value, "Unknown Error"))
        self.value = value


@dataclass(eq=False)
class FakeGpu:
    """One GPU, in NVML's units: percent, bytes, milliwatts, millijoules, degrees Celsius, bits."""

    uuid: str
    name: str = "NVIDIA Fake"
    capability: tuple[int, int] = (9, 0)
    utilization: int = 0
    memory_used: int = 1 << 30
    memory_total: int = 80 << 30
    power: int = 75_000
    power_limit: int = 700_000
    energy: int = 1_000_000
    temperature: int = 40
    slowdown: int = 89
    throttle: int = 0
    refuses: int = 0
    lacks: set[str] = field(default_factory=set)
    xids: deque[int] = field(default_factory=deque)


class FakeNvml:
    """The module. `fails` is the error of `nvmlInit`; `opened` counts its successes that were not shut down."""

    NVMLError: ClassVar[type[FakeError]] = FakeError
    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1
    nvmlEventTypeXidCriticalError = 8

    def __init__(self, *gpus: FakeGpu, fails: int = 0) -> None:
        self.gpus = list(gpus)
        self.fails = fails
        self.opened = 0
        self.hangs: threading.Event | None = None

    def nvmlInit(self) -> None:
        """Open the library."""
        self._wait()
        if self.fails:
            raise FakeError(self.fails)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        """Close it."""
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        """How many GPUs the machine has."""
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        """A handle, here the GPU itself. Raises `FakeError` for a broken one."""
        if self.gpus[index].refuses:
            raise FakeError(self.gpus[index].refuses)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        """A handle by UUID. Raises `FakeError` (not found)."""
        found = [gpu for gpu in self.gpus if gpu.uuid == uuid]
        if not found:
            raise FakeError(6)
        return found[0]

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        """Its UUID, which is known of a lost GPU too."""
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        """Its model."""
        return gpu.name

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, gpu: FakeGpu) -> FakeGpu:
        """The GPU that a MIG device is a part of."""
        return gpu

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:
        """Major and minor."""
        return gpu.capability

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> Any:
        """Percent."""
        return SimpleNamespace(gpu=self._tell(gpu, "nvmlDeviceGetUtilizationRates", gpu.utilization), memory=0)

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:
        """Bytes."""
        used = self._tell(gpu, "nvmlDeviceGetMemoryInfo", gpu.memory_used)
        return SimpleNamespace(total=gpu.memory_total, used=used, free=gpu.memory_total - used)

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:
        """Milliwatts."""
        return self._tell(gpu, "nvmlDeviceGetPowerUsage", gpu.power)

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: FakeGpu) -> int:
        """Milliwatts."""
        return self._tell(gpu, "nvmlDeviceGetEnforcedPowerLimit", gpu.power_limit)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGpu) -> int:
        """Millijoules since the driver was loaded."""
        return self._tell(gpu, "nvmlDeviceGetTotalEnergyConsumption", gpu.energy)

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, _sensor: int) -> int:
        """Degrees Celsius."""
        return self._tell(gpu, "nvmlDeviceGetTemperature", gpu.temperature)

    def nvmlDeviceGetTemperatureThreshold(self, gpu: FakeGpu, _threshold: int) -> int:
        """Degrees Celsius."""
        return self._tell(gpu, "nvmlDeviceGetTemperatureThreshold", gpu.slowdown)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: FakeGpu) -> int:
        """Bits."""
        return self._tell(gpu, "nvmlDeviceGetCurrentClocksThrottleReasons", gpu.throttle)

    def nvmlEventSetCreate(self) -> list[FakeGpu]:
        """A set of events, here the GPUs that it is of."""
        return []

    def nvmlDeviceRegisterEvents(self, gpu: FakeGpu, _types: int, events: list[FakeGpu]) -> None:
        """Have a GPU's events kept in the set."""
        self._tell(gpu, "nvmlDeviceRegisterEvents", 0)
        events.append(gpu)

    def nvmlEventSetWait_v2(self, events: list[FakeGpu], _milliseconds: int) -> Any:
        """The next event. Raises `FakeError` (timeout) when there is none."""
        self._wait()
        for gpu in events:
            if gpu.xids:
                return SimpleNamespace(
                    device=gpu, eventType=self.nvmlEventTypeXidCriticalError, eventData=gpu.xids.popleft()
                )
        raise FakeError(TIMEOUT)

    def nvmlEventSetFree(self, events: list[FakeGpu]) -> None:
        """Forget the set."""
        events.clear()

    def _tell(self, gpu: FakeGpu, function: str, value: int) -> int:
        self._wait()
        if gpu.refuses:
            raise FakeError(gpu.refuses)
        if function in gpu.lacks:
            raise FakeError(NOT_SUPPORTED)
        return value

    def _wait(self) -> None:
        if self.hangs is not None:
            self.hangs.wait()
