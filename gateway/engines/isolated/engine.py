"""`IsolatedEngine`: one instance in a child process, started again whenever that ends.

A run whose process ends raises `EngineCrashed`; runs that come while another process starts wait for it, unless the
breaker says that there is no use. A process counts as started when it has loaded the model and answered the golden
input as the first one did. The reasons for everything are counted and logged here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial

from gateway import errors
from gateway.engines.base import EngineCrashed, EngineSpec, Once, Results
from gateway.engines.calling import call
from gateway.engines.isolated import limits
from gateway.engines.isolated.breaker import Breaker
from gateway.engines.isolated.calls import CallServer
from gateway.engines.isolated.children import Children
from gateway.engines.isolated.desks import NeverSeen
from gateway.engines.isolated.golden import Golden
from gateway.engines.isolated.home import Home
from gateway.engines.isolated.life import Backend, Life, Origin, WrongAnswer
from gateway.engines.isolated.patience import Patience
from gateway.engines.threads import EngineThread
from gateway.statistics import VersionStatistics
from gateway.telemetry import log_event
from gateway.types import Batch, BatchResult, Infer, InferRequest, Responses

_FAREWELL = 4.0  # seconds that a model has to finish
_A_MOMENT = 1.0  # seconds
_FROM_OUTSIDE = ("killed", "silent")
_SMALL = 64 << 20  # bytes of a model that may share a process


async def start(spec: EngineSpec, count: int, children: Children, backend: Backend) -> list[IsolatedEngine]:
    """Start `count` instances of a version, each loaded and tested. Raises what the first that fails raised."""
    golden = Golden.of(spec.config)
    created = []
    for index in range(count):
        name = f"{spec.config.name}/{spec.version}#{index}"
        created.append(IsolatedEngine(Origin(name, spec, backend, children, EngineThread(name), golden)))
    try:
        async with asyncio.TaskGroup() as tasks:
            for engine in created:
                tasks.create_task(engine.open())
    except BaseException as problem:
        for engine in created:
            await engine.close()
        if isinstance(problem, BaseExceptionGroup):
            raise problem.exceptions[0] from None
        raise
    return created


class IsolatedEngine:
    """See the module. `open` it once."""

    concurrency = 1
    contained = True

    def __init__(self, origin: Origin) -> None:
        config, children = origin.spec.config, origin.children
        self.provider = ""
        self.artefact = origin.spec.artefact
        self.warnings: tuple[str, ...] = ()
        self.widest = 1
        self.ahead = False
        self.name = origin.name
        self._origin = origin
        self._children = children
        self._tasks: asyncio.TaskGroup = children.tasks
        self._patience = Patience(limits.patience(config))
        self._shares = origin.backend.shares and origin.spec.device == "cpu" and not limits.limited(config)
        self._alone = False  # lost its last process while others were at work there too
        self._breaker = Breaker()
        self._life: Life | None = None
        self._changed = asyncio.Event()
        self._closing = False
        self._keeper: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start it for the first time. Raises why that failed."""
        self._shares = self._shares and await self._origin.thread.call(self._small)
        tested = self._origin.golden.inputs is not None
        try:
            life = await self._start()
        except EngineCrashed as problem:
            if self._origin.golden.inputs is not None or not tested:
                raise errors.Unavailable(
                    f"model '{self._origin.spec.config.name}' does not load: {problem}; the server's log has the details"
                ) from problem
            life = await self._start()
        self._keeper = self._tasks.create_task(self._keep(life))
        self._children.at_end(self._stop)

    def run(self, batch: Batch) -> Results:
        """See `Engine.run`."""
        life = self._life
        return self._run(batch) if life is None or life.ready.answers else Once(self._computed(life, batch))

    async def _run(self, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        life = await self._begin()
        if not life.ready.answers:
            yield await self._computed(life, batch)
            return
        given = False
        while True:
            try:
                async with aclosing(life.link.answer(batch, self._limit(batch), self._hung)) as results:
                    async for result in results:
                        given = True
                        self._learn(batch, result)
                        yield result
            except EngineCrashed as crash:
                if given or not isinstance(crash, NeverSeen):
                    raise await self._explained(crash, life) from None
                life = await self._begin()  # it ended at a batch that nobody waited for any more
            else:
                return

    async def close(self) -> None:
        """See `Engine.close`. The process ends, if no other model lives in it."""
        self._stop()
        life, self._life = self._life, None
        if life is not None:
            try:
                if life.ready.answers and not life.link.running:
                    life.link.finish()
                    await asyncio.wait([life.lost], timeout=_FAREWELL)
            finally:
                if life.link.running:
                    life.home.kill("closed", self.name)
                life.end()
            if not life.home.names:
                await self._gone(life.home)
        if self._keeper is not None:
            await asyncio.wait([self._keeper])
        await self._origin.thread.close()

    # --- a run

    async def _computed(self, life: Life, batch: Batch) -> BatchResult:
        golden = self._origin.golden
        try:
            while True:
                try:
                    result = await life.link.compute(batch, self._limit(batch), self._hung)
                    break
                except NeverSeen:
                    life = await self._begin()
                except EngineCrashed:
                    if self._closing or not life.home.innocent(self.name):
                        raise
                    # Whoever was at work in the process may have ended it. Tried alone, it is known who.
                    self._alone = True
                    life = await self._begin()
            self._learn(batch, result)
            if golden.inputs is None and not golden.varies:
                with suppress(NeverSeen):  # it ended at another batch, and this one went well
                    await life.keep_golden(batch, result, self._limit(batch))
        except EngineCrashed as crash:
            raise await self._explained(crash, life) from None
        return result

    async def _explained(self, crash: EngineCrashed, life: Life) -> Exception:
        """The crash and its cause, which is known a moment later. Whoever kills a process from outside may do so again."""
        if self._closing:
            return self._closed()
        with suppress(TimeoutError):
            async with asyncio.timeout(_A_MOMENT):
                cause = await life.home.cause()
                return EngineCrashed(f"{crash} ({cause})", sure=cause not in _FROM_OUTSIDE)
        return crash

    async def _begin(self) -> Life:
        """The instance in its process; waits while it is being started."""
        while (life := self._life) is None:
            if self._closing:
                raise self._closed()
            if (pause := self._breaker.retry_after(time.monotonic())) is not None:
                raise errors.Unavailable(
                    f"model '{self._origin.spec.config.name}' keeps failing and is given a pause; try again later",
                    pause,
                )
            await self._changed.wait()
        return life

    def _limit(self, batch: Batch) -> float:
        return self._patience.limit(batch.rows, batch.predicted)

    def _learn(self, batch: Batch, result: BatchResult) -> None:
        self._breaker.succeeded()
        self._patience.learn(batch.rows, (result.finished_ns - result.stacked_ns) / 1e9)

    def _hung(self) -> None:
        life = self._life
        if life is None:
            return
        if life.calls is not None and life.calls.waiting:  # for models that have watchdogs of their own
            life.link.be_patient(self._patience.least)
        else:
            life.home.kill("hang", self.name)

    # --- its process

    async def _keep(self, life: Life) -> None:
        """Start it again and again, until `close`."""
        while not self._closing:
            why = await asyncio.shield(life.lost)
            ended = time.monotonic()
            try:
                self._count(await life.home.cause(), why)
            finally:
                life.end()
            delay = self._breaker.crashed(time.monotonic())
            while not await self._paused(delay):
                try:
                    life = await self._start()
                except Exception as problem:  # noqa: BLE001 - whatever it is, trying again is all there is
                    delay = self._breaker.not_started(time.monotonic())
                    self._count("self_test" if isinstance(problem, WrongAnswer) else "start", str(problem))
                else:
                    self._statistics.restarts += 1
                    seconds = round(time.monotonic() - ended, 3)
                    log_event("engine_restarted", instance=self.name, down_seconds=seconds)
                    break

    async def _start(self) -> Life:
        """Have it in a process, loaded and tested. Raises why not."""
        origin = self._origin
        preload = [origin.backend.module] if origin.backend.shares else []
        home = await self._children.home(origin.name, preload, shares=self._shares and not self._alone)
        life = Life(origin, home, self._lost)
        calls = None
        if origin.backend.calls and origin.spec.infer is not None:
            ours = self._children
            calls = partial(CallServer, partial(self._call, origin.spec.infer), self._wanted, ours.tasks, ours.measures)
        try:
            seconds = await life.begin(calls, self._patience.limit())
        except OSError as problem:
            raise errors.Unavailable(f"the process for the model is gone: {problem}") from problem
        self.provider, self.warnings, self.widest = life.ready.provider, life.ready.warnings, life.ready.widest
        self.ahead = not life.ready.answers
        if seconds is not None:
            self._patience.learn(1, seconds)
        if life.lost.done():
            life.end()
            raise EngineCrashed("the engine's process ended as soon as it had started")
        self._breaker.started()
        self._life = life
        self._tell()
        return life

    def _lost(self, life: Life) -> None:
        if self._life is life:
            self._life = None
            self._tell()

    async def _paused(self, seconds: float) -> bool:
        """Wait so long; True when it is closed meanwhile."""
        if seconds:
            self._tell()
            if self._breaker.open_until > time.monotonic():
                log_event("engine_paused", logging.ERROR, instance=self.name, seconds=round(seconds, 3))
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while not self._closing:
                        await self._changed.wait()
        return self._closing

    async def _gone(self, home: Home) -> None:
        done, _ = await asyncio.wait([home.child.exited], timeout=_FAREWELL)
        if not done:
            home.kill("closed", self.name)
            await asyncio.wait([home.child.exited], timeout=_FAREWELL)

    def _stop(self) -> None:
        if not self._closing:
            self._closing = True
            if self._keeper is not None:
                self._children.not_at_end(self._stop)
                self._keeper.cancel()
            self._tell()

    def _wanted(self, place: int) -> bool:
        batch = self._batch
        return batch is not None and place < len(batch.requests) and batch.wanted(place)

    def _call(self, infer: Infer, request: InferRequest) -> Responses:
        """Call another model for the one that runs here."""
        if (batch := self._batch) is None:
            raise errors.Unavailable("a model calls others only for a batch that somebody waits for")
        return call(infer, batch, self._origin.spec.config.name, request)

    @property
    def _batch(self) -> Batch | None:
        """What runs, if somebody waits for it."""
        return None if self._life is None else self._life.link.batch

    def _closed(self) -> errors.Unavailable:
        return errors.Unavailable("the engine is closed; it takes no more work")

    def _tell(self) -> None:
        """Have everybody who waits look again."""
        self._changed.set()
        self._changed.clear()

    def _small(self) -> bool:
        name = self._origin.spec.config.default_model_filename
        path = self._origin.spec.path / (self._origin.spec.artefact.file if self._origin.spec.artefact else name)
        try:
            return path.stat().st_size <= _SMALL
        except OSError:
            return True  # the load says what is wrong with it

    def _count(self, cause: str, why: str) -> None:
        crashes = self._statistics.crashes
        crashes[cause] = crashes.get(cause, 0) + 1
        log_event("engine_died", logging.ERROR, instance=self.name, cause=cause, reason=why)

    @property
    def _statistics(self) -> VersionStatistics:
        return self._children.statistics.of(self._origin.spec.config.name, self._origin.spec.version)
