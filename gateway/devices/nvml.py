"""The GPUs of this process and what they report, by NVML, NVIDIA's management library (package `nvidia-ml-py`).

It makes no CUDA context and takes no GPU memory. Without the package, a driver or a GPU there is nothing, and no error.
GPUs are numbered as CUDA numbers them under CUDA_VISIBLE_DEVICES, where CUDA_DEVICE_ORDER is PCI_BUS_ID or all GPUs are
of one model: NVML does not know CUDA's "fastest first". Blocking; a broken driver may not answer for a long time.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gateway.config.environment import visible_gpus
from gateway.telemetry import log_event

_TIMEOUT = 10
_LOST, _RESET = 15, 16
# Errors of the GPU or its driver. Any other is of one figure, which this GPU, driver or container does not tell.
_FATAL = {1, 9, _LOST, _RESET, 18, 28}  # not initialised, not loaded, ..., mismatch of versions, not found
_SECONDS = 20.0  # a cold driver of eight GPUs without its persistence daemon takes several

THROTTLES = {
    0x0004: "sw_power_cap",
    0x0008: "hw_slowdown",
    0x0020: "sw_thermal",
    0x0040: "hw_thermal",
    0x0080: "hw_power_brake",
}
"""Why a GPU's clocks are lower than they could be: NVML's bits that have to do with its state."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `name` is the gateway's ("gpu:0"), `sm` the compute capability without its point; bytes of memory."""

    name: str
    uuid: str
    model: str
    sm: str
    memory: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a GPU reports now; None for what it does not tell. Watts, joules (since the driver was loaded), Celsius.

    `fault` says in words why nothing can be read; empty when it can. `xids` are the errors that the driver has reported
    since the reading before.
    """

    utilization: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    power: float | None = None
    power_limit: float | None = None
    energy: float | None = None
    temperature: int | None = None
    slowdown_temperature: int | None = None
    throttles: frozenset[str] = frozenset()
    xids: tuple[int, ...] = ()
    fault: str = ""


class Nvml:
    """An open NVML. Used by one thread at a time."""

    def __init__(self, module: Any) -> None:
        """`module` is pynvml, or has its functions. Raises its `NVMLError` where there is no driver."""
        self._nvml = module
        module.nvmlInit()
        self._handles = dict(_visible(module, visible_gpus()))
        self.gpus = tuple(self._describe(name, handle) for name, handle in self._handles.items())
        self._names = {gpu.uuid: gpu.name for gpu in self.gpus}
        self._events = self._watch()

    def read(self) -> dict[str, Reading]:
        """What each GPU reports, by name."""
        xids = self._xids()
        return {name: self._reading(handle, tuple(xids.get(name, ()))) for name, handle in self._handles.items()}

    def close(self) -> None:
        """Let go of the library."""
        if self._events is not None:
            self._ask("nvmlEventSetFree", self._events)
        self._ask("nvmlShutdown")

    def _describe(self, name: str, handle: Any) -> Gpu:
        nvml = self._nvml
        uuid = nvml.nvmlDeviceGetUUID(handle)
        whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if uuid.startswith("MIG-") else handle
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(whole)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)  # a GPU that shares the CPU's has none to tell of
        return Gpu(name, uuid, nvml.nvmlDeviceGetName(handle), f"{major}{minor}", 0 if memory is None else memory.total)

    def _reading(self, handle: Any, xids: tuple[int, ...]) -> Reading:
        nvml = self._nvml
        try:
            use = self._ask("nvmlDeviceGetUtilizationRates", handle)
            memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
            return Reading(
                utilization=None if use is None else use.gpu / 100,
                memory_used=None if memory is None else memory.used,
                memory_total=None if memory is None else memory.total,
                power=_thousandth(self._ask("nvmlDeviceGetPowerUsage", handle)),
                power_limit=_thousandth(self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)),
                energy=_thousandth(self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)),
                temperature=self._ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
                slowdown_temperature=self._ask(
                    "nvmlDeviceGetTemperatureThreshold", handle, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
                ),
                throttles=frozenset(word for bit, word in THROTTLES.items() if reasons & bit),
                xids=xids,
            )
        except nvml.NVMLError as problem:
            return Reading(xids=xids, fault=_fault(problem))

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What a function returns, None where GPU or driver have no answer. Raises `NVMLError` for a broken GPU."""
        if not hasattr(self._nvml, function):
            return None  # packages of other years have other functions
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError as problem:
            if problem.value in _FATAL:
                raise
            return None

    def _watch(self) -> Any:
        """Have the driver keep Xid errors for this process; None where it does not, as inside of many containers."""
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
            for handle in self._handles.values():
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError as problem:
            log_event("xid_errors_not_watched", logging.DEBUG, reason=str(problem))
            return None
        return events

    def _xids(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        while self._events is not None:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
                name = self._names.get(self._nvml.nvmlDeviceGetUUID(event.device), "")
            except self._nvml.NVMLError as problem:
                if problem.value != _TIMEOUT:  # a GPU that is gone says so in its own reading
                    log_event("xid_errors_not_read", logging.DEBUG, reason=str(problem))
                break
            found.setdefault(name, []).append(int(event.eventData))
        return found


def open_nvml(module: Any = None) -> Nvml | None:
    """NVML, opened; None where there are no GPUs, or nothing to ask them with. The reason is said at debug level."""
    if module is None and not _has_driver():
        log_event("no_gpus", logging.DEBUG, reason="there is no NVIDIA driver")
        return None
    try:
        module = module or importlib.import_module("pynvml")
    except ImportError:
        log_event("no_gpus", logging.DEBUG, reason="the package nvidia-ml-py is not installed")
        return None
    try:
        nvml = _in_time(lambda: Nvml(module))
    except (module.NVMLError, TimeoutError) as problem:
        log_event("no_gpus", logging.DEBUG, reason=str(problem))
        return None
    if nvml.gpus:
        return nvml
    nvml.close()
    return None


@lru_cache(1)
def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this process. They are looked for once."""
    nvml = open_nvml()
    if nvml is None:
        return ()
    nvml.close()
    return nvml.gpus


def _has_driver() -> bool:
    # The package takes 35 ms of CPU to be imported, and says the same.
    try:
        ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _in_time(work: Callable[[], Nvml]) -> Nvml:
    """Do work that a broken driver may never end, on a thread that nobody then waits for. Raises what it raises."""
    ended: list[Nvml | Exception] = []

    def run() -> None:
        try:
            ended.append(work())
        except Exception as problem:  # noqa: BLE001 - it is raised again by whoever waits
            ended.append(problem)

    thread = threading.Thread(target=run, name="nvml", daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if not ended:
        raise TimeoutError(f"the driver did not answer in {_SECONDS:.0f} s")
    (result,) = ended
    if isinstance(result, Exception):
        raise result
    return result


def _visible(nvml: Any, wanted: str | None) -> Iterator[tuple[str, Any]]:
    """Names and handles of what CUDA shows under this CUDA_VISIBLE_DEVICES. As in CUDA a bad entry ends the list."""
    handles = [handle for index in range(nvml.nvmlDeviceGetCount()) for handle in _handle(nvml, index)]
    if wanted is None:
        yield from ((f"gpu:{number}", handle) for number, handle in enumerate(handles))
        return
    known = {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    for number, entry in enumerate(each.strip() for each in wanted.split(",")):
        if entry.isdecimal():
            found = handles[int(entry) : int(entry) + 1]
        elif entry.startswith("MIG-"):
            found = _slice(nvml, entry)
        else:
            found = [handle for uuid, handle in known.items() if entry and uuid.startswith(entry)]
        if len(found) != 1:
            return
        yield f"gpu:{number}", found[0]


def _handle(nvml: Any, index: int) -> list[Any]:
    """Nothing for a GPU that is broken, which CUDA passes over too."""
    try:
        return [nvml.nvmlDeviceGetHandleByIndex(index)]
    except nvml.NVMLError as problem:
        log_event("gpu_left_out", logging.WARNING, index=index, reason=str(problem))
        return []


def _slice(nvml: Any, uuid: str) -> list[Any]:
    try:
        return [nvml.nvmlDeviceGetHandleByUUID(uuid)]
    except nvml.NVMLError:
        return []


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000


def _fault(problem: Any) -> str:
    if problem.value == _LOST:
        return "it has fallen off the bus; restart the machine"
    if problem.value == _RESET:
        return "it must be reset before it can be used again; run `nvidia-smi --gpu-reset`, or restart the machine"
    return f"the driver does not read it: {problem}"
