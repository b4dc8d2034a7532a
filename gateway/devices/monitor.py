"""Reads the GPUs of this process at an interval, so that metrics and health need no waiting for a driver.

Reading happens on a thread of its own. A driver that does not answer is a failed GPU, and nothing waits for it, not even
the end of the process. What is read is of whole GPUs: every process on the machine that asks is told the same.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from gateway.devices.health import Verdict, judge
from gateway.devices.nvml import Gpu, Nvml, Reading
from gateway.telemetry import log_event

_PATIENCE = 5.0  # seconds for one reading of all GPUs


@dataclass(slots=True)
class GpuState:
    """What is known of one GPU; `energy` is in joules since the monitor began."""

    gpu: Gpu
    reading: Reading = field(default_factory=Reading)
    verdict: Verdict = field(default_factory=Verdict)
    xids: Counter[int] = field(default_factory=Counter)
    energy: float | None = None
    _before: float | None = None

    def update(self, reading: Reading) -> None:
        """Take a new reading; a verdict that changes is logged."""
        self.reading = reading
        self.xids.update(reading.xids)
        if reading.energy is not None:
            self._before = reading.energy if self._before is None else self._before
            self.energy = reading.energy - self._before
        before, self.verdict = self.verdict, judge(reading, self.xids)
        if self.verdict != before:
            level = logging.INFO if self.verdict.state == "ok" else logging.WARNING
            log_event("gpu_health", level, device=self.gpu.name, state=self.verdict.state, reason=self.verdict.reason)


class Monitor:
    """The GPUs' latest readings. It has none until it was `running`."""

    def __init__(self, nvml: Nvml | None, interval: float = 2.0) -> None:
        """`interval` is in seconds; without an `nvml` there are no GPUs."""
        self._nvml = nvml
        self._interval = interval
        self._states = {} if nvml is None else {gpu.name: GpuState(gpu) for gpu in nvml.gpus}

    @property
    def states(self) -> Mapping[str, GpuState]:
        """Every GPU by name."""
        return self._states

    def verdict(self, device: str) -> Verdict:
        """The verdict on a device; of one that is not watched, such as the CPU, nothing bad is known."""
        state = self._states.get(device)
        return Verdict() if state is None else state.verdict

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Monitor]:
        """Read the GPUs for the duration of the block, once before it begins."""
        if self._nvml is None:
            yield self
            return
        async with asyncio.TaskGroup() as tasks:
            first = asyncio.Event()
            watching = tasks.create_task(self._watch(self._nvml, first))
            await first.wait()
            try:
                yield self
            finally:
                watching.cancel()

    async def _watch(self, nvml: Nvml, first: asyncio.Event) -> None:
        while True:
            reading = _read(nvml)
            try:
                async with asyncio.timeout(_PATIENCE):
                    readings = await asyncio.shield(reading)
            except TimeoutError:
                silent = Reading(fault=f"the driver does not answer within {_PATIENCE:.0f} s; restart the machine")
                self._take(dict.fromkeys(self._states, silent))
                first.set()
                readings = await reading  # it may yet
            self._take(readings)
            first.set()
            await asyncio.sleep(self._interval)

    def _take(self, readings: Mapping[str, Reading]) -> None:
        for name, reading in readings.items():
            self._states[name].update(reading)


def _read(nvml: Nvml) -> asyncio.Future[dict[str, Reading]]:
    """Read on a thread that dies with the process, whatever the driver does to it."""
    loop = asyncio.get_running_loop()
    reading: asyncio.Future[dict[str, Reading]] = loop.create_future()

    def settle(result: dict[str, Reading]) -> None:
        if not reading.done():
            reading.set_result(result)

    def work() -> None:
        try:
            result = nvml.read()
        except Exception as problem:  # noqa: BLE001 - a reading that fails is what there is to report of the GPUs
            result = {gpu.name: Reading(fault=f"the driver cannot be asked: {problem}") for gpu in nvml.gpus}
        with suppress(RuntimeError):  # the event loop is closed: nobody wants to know any more
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=work, name="gpus", daemon=True).start()
    return reading
