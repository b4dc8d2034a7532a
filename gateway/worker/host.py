"""One version of one model while it is loaded: its engines, its stage and the tasks that serve it.

The life is `load` (engines created and warm), `serve` (take jobs and run them), then either `drain` (nothing
more will come: answer all that was accepted) or `retire` (a successor serves the same lane: finish what was
taken). The `Worker` owns the order of these steps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway import engines
from gateway.config.model import ModelConfig
from gateway.engines.base import Engine, EngineSpec
from gateway.placement import Placement
from gateway.queues.base import Consumer, InstanceState, Lane, Queue
from gateway.statistics import Statistics
from gateway.telemetry import log_event
from gateway.worker.instance import Instance
from gateway.worker.slots import Slots
from gateway.worker.stage import Stage
from gateway.worker.warmup import warm_up

_CLOSE_SECONDS = 5.0  # how long a run in progress may hold up the end of its engine
_CREDITS = 1 << 30  # in one process the stage is the queue: taking all costs nothing, and the policy sees all


@dataclass(frozen=True, slots=True)
class Source:
    """What a version is loaded from; equal fingerprints need no reload."""

    config: ModelConfig
    version: str
    path: Path
    fingerprint: object


class Host:
    """A loaded version and the tasks that serve it."""

    def __init__(self, source: Source, queue: Queue, statistics: Statistics, slots: Mapping[str, Slots]) -> None:
        self.source = source
        self.instances: tuple[InstanceState, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self._lane = Lane(source.config.name, source.version)
        self._queue = queue
        self._statistics = statistics.of(*self._lane)
        self._slots = slots
        self._engines: list[tuple[Engine, Placement]] = []
        self._stage: Stage | None = None
        self._consumer: Consumer | None = None
        self._stopped = asyncio.Event()

    async def load(self, placements: Sequence[Placement]) -> None:
        """Create and warm up the engines. Raises why that failed, with nothing left behind."""
        try:
            for placement in placements:
                for engine in await engines.create(self._spec(placement), placement.count):
                    self._engines.append((engine, placement))
            for engine, placement in self._engines:
                cores = tuple(sorted({placement.threads, placement.cores}))
                await warm_up(engine, self.source.config, self.source.path.parent, cores)
        except BaseException:
            await self._close_engines()
            raise
        self.instances = tuple(InstanceState(placement.device.name, e.provider) for e, placement in self._engines)
        self.warnings = tuple(dict.fromkeys(warning for engine, _ in self._engines for warning in engine.warnings))
        self._stage = Stage(
            self.source.config,
            len(self._engines),
            max(placement.device.long_run for placement in placements),
        )
        self._consumer = self._queue.consumer([self._lane])

    async def serve(self) -> None:
        """Take and run jobs; return after `drain` or `retire`. Call it once, after `load`."""
        assert self._stage is not None
        assert self._consumer is not None
        try:
            async with asyncio.TaskGroup() as tasks:
                serving = [tasks.create_task(self._read(self._consumer, self._stage))]
                for engine, placement in self._engines:
                    instance = Instance(engine, self.source.config, self.source.version, self._statistics)
                    slots = self._slots[placement.device.name]
                    seats = [
                        slots.seat(self._stage, placement.threads, engine.widest) for _ in range(engine.concurrency)
                    ]
                    serving += [tasks.create_task(instance.serve(seat)) for seat in seats]
                await self._stopped.wait()
                for task in serving:
                    task.cancel()
        finally:
            self._consumer.close()
            self._stage.release()
            await self._close_engines()

    async def drain(self) -> None:
        """Answer all that was accepted, then stop. The caller has stopped gateways from sending more."""
        await self._queue.drained(self._lane)
        await self.retire()

    async def retire(self) -> None:
        """Take no more, finish what was taken, then stop."""
        assert self._stage is not None
        assert self._consumer is not None
        self._consumer.close()
        await self._stage.settled()
        self._stopped.set()

    async def _read(self, consumer: Consumer, stage: Stage) -> None:
        devices = {placement.device.name for _, placement in self._engines}
        while jobs := await consumer.take(_CREDITS):
            stage.extend(jobs)
            for device in devices:
                self._slots[device].wake()

    async def _close_engines(self) -> None:
        while self._engines:
            engine, _ = self._engines.pop()
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await engine.close()
            except TimeoutError:
                # A thread that hangs inside a model cannot be ended; it is a daemon and dies with the process.
                log_event("engine_hangs", logging.ERROR, model=self._lane.model, version=self._lane.version)

    def _spec(self, placement: Placement) -> EngineSpec:
        return EngineSpec(
            config=self.source.config,
            version=self.source.version,
            path=self.source.path,
            device=placement.device.name,
            threads=placement.threads,
            cores=placement.cores,
        )
