"""One version of one model while it is loaded: its engines, its lane and the tasks that serve it.

The life is `load` (engines created and warm), `serve` (take jobs and run them), then either `drain` (nothing
more will come: answer all that was accepted) or `retire` (a successor serves the same lane: finish what was
taken). The `Worker` owns the order of these steps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import starmap
from typing import Any

from msgspec.structs import replace

from gateway import engines, errors
from gateway.config.sequences import model_side
from gateway.engines.base import Engine, EngineSpec
from gateway.engines.fallback import FallbackEngine
from gateway.engines.isolated.children import Children
from gateway.placement import Placement
from gateway.queues.base import Capacity, Consumer, InstanceState, Job, Lane, Queue
from gateway.scheduling.base import Place
from gateway.statistics import Statistics
from gateway.telemetry import log_event
from gateway.types import InferRequest
from gateway.worker.explain import explain, foresee
from gateway.worker.instance import Instance
from gateway.worker.lane import limits, places
from gateway.worker.ordering import Order
from gateway.worker.priors import Prior, Priors, key
from gateway.worker.probe import measure
from gateway.worker.running import count, digest, state, where
from gateway.worker.siblings import Siblings
from gateway.worker.slots import Seat, Slots
from gateway.worker.source import Source
from gateway.worker.warmup import measurable, warm_up

_CLOSE_SECONDS = 5.0  # how long a run in progress may hold up the end of its engine
_FEW = 3  # runs
_ALL = 1 << 30  # what the queue lets this worker have costs nothing to take, and the scheduler sees all of it
_AHEAD = 3  # batches for each that runs: one runs, one is ready, one comes
_LEAST = 16  # requests


class Host:
    """A loaded version and the tasks that serve it."""

    reason = ""  # why it cannot answer now

    def __init__(
        self,
        source: Source,
        queue: Queue,
        statistics: Statistics,
        slots: Slots,
        *,
        measures: bool,
        persists: bool,
        children: Children | None = None,
    ) -> None:
        """With `measures` its batch sizes are timed once it is ready; with `persists` what was learned is kept on disk.

        Its engines live in `children`, or all in this process.
        """
        self.source = source
        self._model = model_side(source.config)
        self.instances: tuple[InstanceState, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.digest = ""  # see `VersionState`
        self.lane = Lane(source.config.name, source.version)
        self._queue = queue
        self._statistics = statistics.of(*self.lane)
        self._slots = slots
        self._children = children
        self._measures = measures and measurable(source.config)
        self._persists = persists
        self._priors: Priors | None = None
        self.asks_all = False
        batching = source.config.batching
        orders = batching is not None and batching.preserve_ordering
        self._order = slots.orders.setdefault(self.lane, Order()) if orders else None
        self._places: list[Place] = []
        self._row = 0.0  # seconds, when it was warmed up
        self._engines: list[tuple[Engine, Placement]] = []
        self._consumer: Consumer | None = None
        self._measuring: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._working: Sequence[tuple[Engine, Placement]] = ()  # those that the scheduler counts on
        self._seats: list[tuple[Seat, Engine, Placement]] = []
        self._moved = asyncio.Event()
        self._mixed = False  # what was learned of batch times is of more than one engine
        self.changed: Callable[[], None] = lambda: None  # called when `instances` are others

    async def load(self, placements: Sequence[Placement]) -> None:
        """Create and warm up the engines. Raises why that failed, with nothing left behind."""
        rows: dict[str, float] = {}  # seconds of one row on each device
        try:
            for placement in placements:
                for engine in await engines.create(self._spec(placement), placement.count):
                    self._engines.append((engine, placement))
            for engine, placement in self._engines:
                cores = tuple(sorted({placement.threads, placement.cores}))
                row = await warm_up(engine, self._model, self.source.path.parent, cores)
                if row is not None:
                    rows[where(engine, placement)[0]] = row
            priors = await self._read_priors() if self._persists else {}
            self._slots.require(self, self._engines)
        except BaseException:
            await self._close_engines()
            raise
        self.instances = tuple(starmap(state, self._engines))
        self.digest = digest(self.source.digest, [engine for engine, _ in self._engines])
        self.warnings = tuple(dict.fromkeys(warning for engine, _ in self._engines for warning in engine.warnings))
        self._open_lane(priors, rows if self._measures else {})
        self._row = max(rows.values(), default=0.0)
        self._consumer = self._open_consumer()

    def admit(self, request: InferRequest) -> None:
        """See `Admission.admit`."""
        self._slots.admit(self, request, request.id)

    def turn_away(self, deadline: float) -> float | None:
        """See `Admission.turn_away`."""
        return self._slots.scheduler.turn_away(self, deadline)

    def turned_away(self, times: int) -> None:
        """See `Admission.turned_away`."""
        self._slots.scheduler.turned_away(self, times, time.monotonic())

    def settle(self, request: InferRequest) -> None:
        """See `Admission.settle`."""
        self._slots.scheduler.settle(self, request, time.monotonic())
        if self._order is not None:
            self._order.leave(request)

    def explain(self, seconds: float) -> Mapping[str, Any]:
        """See `Admission.explain`."""
        if self._stopped.is_set():
            raise errors.stopping()
        devices = [place.device for place in self._places]
        told = explain(self._slots.scheduler, self, devices)
        return {**told, "next": foresee(self._slots.scheduler, self, self.source.config, seconds)}

    def capacity(self) -> Capacity | None:
        """See `Admission.capacity`: as the place that answers most has it, for all of them."""
        if self._stopped.is_set():
            return None
        found: list[Capacity] = []
        if self._stopped.is_set():
            return None
        for place in self._places:
            model = self._slots.scheduler.latency(self, place.device)
            if model.known:
                found.append(Capacity(*model.fit, model.tail, model.efficient, place.count))
        if not found:
            return None
        best = max(found, key=lambda each: each.places * each.rows / each.seconds(each.rows))
        return replace(best, places=sum(each.places for each in found))

    def report(self) -> None:
        """Let the statistics say how good predictions are, and which engines answered."""
        count([engine for engine, _ in self._engines], self._statistics)
        if self._stopped.is_set():
            self._statistics.predictions = None
        else:
            report = self._slots.scheduler.report(self)
            self._statistics.predictions = round(report.error, 4), report.trusted

    async def serve(self) -> None:
        """Take and run jobs; return after `drain` or `retire`. Call it once, after `load`."""
        assert self._consumer is not None
        try:
            async with asyncio.TaskGroup() as tasks:
                serving = [tasks.create_task(self._read(self._consumer))]
                siblings = Siblings(self._place)
                for engine, placement in self._engines:
                    serving.append(tasks.create_task(self._serve(engine, placement, siblings)))
                    if isinstance(engine, FallbackEngine):
                        serving.append(tasks.create_task(engine.tend(self._move)))
                # A measurement waits in line like a request, and would count against the model's own limit on that.
                if self._measures and not self.asks_all:
                    self._measuring = tasks.create_task(self._measure())
                await self._stopped.wait()
                for task in serving:
                    task.cancel()
        finally:
            self._stopped.set()
            self.report()
            self._consumer.close()
            self._close_lane()
            await self._close_engines()

    async def _serve(self, engine: Engine, placement: Placement, siblings: Siblings[Instance]) -> None:
        """Serve with as many runs at once as the engine allows; a chain may allow more later."""
        source = self.source
        instance = Instance(engine, source.config, source.version, self._statistics, self.digest, siblings=siblings)
        async with asyncio.TaskGroup() as tasks:
            seats = 0
            while True:
                self._moved.clear()
                for _ in range(seats, instance.engine.concurrency):
                    seat = self._slots.seat(self, where(instance.engine, placement)[0], instance.engine)
                    self._seats.append((seat, instance.engine, placement))
                    tasks.create_task(instance.serve(seat))
                seats = max(seats, instance.engine.concurrency)
                await self._moved.wait()

    def _move(self) -> None:
        """An engine runs on something else now."""
        self._mixed = True
        self.instances = tuple(starmap(state, self._engines))
        self._open_places(self._working)
        for seat, engine, placement in self._seats:
            self._slots.move(seat, where(engine, placement)[0])
        self._moved.set()
        self.changed()

    async def drain(self) -> None:
        """Answer all that was accepted, then stop. The caller has stopped gateways from sending more."""
        await self._queue.drained(self.lane)
        await self.retire()

    async def retire(self) -> None:
        """Take no more, finish what was taken, then stop."""
        assert self._consumer is not None
        self._consumer.close()
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.wait([self._measuring])
        await self._settled()
        if self._stopped.is_set():
            return  # by another who waited for the same
        learned = self._learned()
        self._stopped.set()
        if self._priors is not None:
            await self._priors.keep(learned)

    def _open_lane(self, priors: Mapping[str, Prior], rows: Mapping[str, float]) -> None:
        """A lane of this host's own: while a successor takes over, the two finish what each has taken."""
        bounds = limits(self.source.config)
        # An order must hear of every request that is given up.
        self.asks_all = self._order is not None or any(
            policy.max_size for policy in (bounds.queue, *bounds.priority_queues.values())
        )
        self._open_places(list(self._engines))
        for device, prior in priors.items():
            self._slots.scheduler.seed(self, device, prior)
        for device, seconds in rows.items():
            self._slots.scheduler.warmed(self, device, 1, seconds)

    def _open_consumer(self) -> Consumer:
        return self._queue.consumer([self.lane], self._credits(), contained=self._contained())

    def _contained(self) -> bool:
        return all(engine.contained for engine, _ in self._engines)

    def _open_places(self, engines: Sequence[tuple[Engine, Placement]]) -> None:
        self._working = engines
        self._places = places(engines)
        self._slots.open(self, limits(self.source.config), self._places)

    def _place(self, working: Collection[Instance]) -> None:
        """Have the scheduler count on these instances only."""
        if not self._stopped.is_set():
            there = {id(instance.engine) for instance in working}
            self._open_places([(engine, placement) for engine, placement in self._engines if id(engine) in there])

    def _credits(self) -> int:
        """How many requests to have here: enough that no instance waits for the next, few enough for others to help."""
        rows = max(self.source.config.max_batch_size, 1) if self.source.config.batching is not None else 1
        return max(_LEAST, _AHEAD * rows * sum(place.count for place in self._places))

    async def _read(self, consumer: Consumer) -> None:
        while jobs := await consumer.take(_ALL):
            try:
                self._take_in(jobs)
            except Exception:
                for job in jobs:  # in nobody's hands now, and the fault ends this version
                    job.fail(errors.Internal(f"model '{self.lane.model}' could not take the request"))
                raise

    def _take_in(self, jobs: list[Job]) -> None:
        self._slots.add(self, jobs if self._order is None else self._order.enter(jobs))

    async def _settled(self) -> None:
        """Wait until nothing that was taken waits or runs."""
        await self._slots.settled(self)

    def _close_lane(self) -> None:
        """Hand back what was taken and does not run."""
        self._slots.close(self)

    async def _measure(self) -> None:
        instances = len(
            self._engines
        )  # and not the runs that each may have open: a server far away is not to be flooded
        async with self._slots.measuring:
            largest = await measure(self._slots, self, self.source.config, instances, self._row)
        log_event("measured", logging.DEBUG, model=self.lane.model, version=self.lane.version, rows=largest)
        if self._priors is not None:
            await self._priors.keep(self._learned())

    async def _read_priors(self) -> Mapping[str, Prior]:
        def opened() -> Priors:
            runtime, files = engines.runtime(self.source.config.backend), self.source.fingerprint
            on = {p.device: engine for engine, p in self._engines if where(engine, p)[0] == p.device.name}
            return Priors(
                self.source.path,
                {device.name: key(device, e.provider, runtime, files, e.artefact) for device, e in on.items()},
            )

        self._priors = await asyncio.to_thread(opened)
        return await self._priors.read()

    def _learned(self) -> dict[str, Prior]:
        """What is worth keeping: of one or two runs it is not, nor where it is of several engines."""
        if self._mixed:
            return {}
        models = {place.device: self._slots.scheduler.latency(self, place.device) for place in self._places}
        return {device: model.to_prior() for device, model in models.items() if model.batches >= _FEW}

    async def _close_engines(self) -> None:
        while self._engines:
            engine, _ = self._engines.pop()
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await engine.close()
            except TimeoutError:
                # A thread that hangs inside a model cannot be ended; it is a daemon and dies with the process.
                log_event("engine_hangs", logging.ERROR, model=self.lane.model, version=self.lane.version)

    def _spec(self, placement: Placement) -> EngineSpec:
        return EngineSpec(
            config=self._model,
            version=self.source.version,
            path=self.source.path,
            device=placement.instead_of or placement.device.name,
            threads=placement.threads,
            cores=placement.cores,
            cpu_cores=placement.cpu_cores,
            infer=None if self._children is None else self._children.infer,
            children=self._children,
        )
