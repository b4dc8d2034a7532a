"""`IsolatedEngine`: one instance in a child process, started again whenever that ends.

A run whose process ends raises `EngineCrashed`; runs that come while another process starts wait for it, unless the
breaker says that there is no use. A process counts as started when it has loaded the model and answered the golden
input as the first one did. The reasons for everything are counted and logged here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass

from gateway import errors
from gateway.engines.base import EngineCrashed, EngineSpec
from gateway.engines.isolated import limits
from gateway.engines.isolated.breaker import Breaker
from gateway.engines.isolated.calls import CallServer
from gateway.engines.isolated.children import Children
from gateway.engines.isolated.frames import Ready
from gateway.engines.isolated.golden import Golden
from gateway.engines.isolated.home import Home
from gateway.engines.isolated.link import Link, Memory, NeverSeen
from gateway.engines.threads import EngineThread
from gateway.statistics import VersionStatistics
from gateway.telemetry import log_event
from gateway.types import Batch, BatchResult

_FIRST_RUN = 60.0  # seconds that a run may take while none has succeeded
_TIMES = 10  # as long as it was expected to take
_LOAD = 600.0  # seconds
_FAREWELL = 4.0  # seconds that a model has to finish
_SMALL = 64 << 20  # bytes of a model that may share a process


@dataclass(frozen=True, slots=True)
class Backend:
    """What a child runs: the module, what to do when a package it imports is missing, whether its models may share one."""

    module: str
    install: str
    shares: bool = False
    calls: bool = False  # its models call others


class _WrongAnswer(EngineCrashed):
    """The process answers the golden input otherwise than the first one did."""


async def start(spec: EngineSpec, count: int, children: Children, backend: Backend) -> list[IsolatedEngine]:
    """Start `count` instances of a version, each loaded and tested. Raises what the first that fails raised."""
    golden = Golden.of(spec.config)
    created = [IsolatedEngine(spec, index, children, backend, golden) for index in range(count)]
    tasks = [asyncio.ensure_future(engine.open()) for engine in created]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in created:
            await engine.close()
        raise
    return created


class _Life:
    """An instance in one child."""

    link: Link

    def __init__(self, home: Home, calls: CallServer | None) -> None:
        self.home = home
        self.calls = calls
        self.ready: Ready | None = None
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self, name: str) -> None:
        """Have it end, if it has not, and give back all it had."""
        self.link.close()
        if self.calls is not None:
            self.calls.close()
        self.home.leave(name)


class IsolatedEngine:
    """See the module. `open` it once."""

    concurrency = 1

    def __init__(self, spec: EngineSpec, index: int, children: Children, backend: Backend, golden: Golden) -> None:
        self.provider = ""
        self.warnings: tuple[str, ...] = ()
        self.widest = 1
        self.name = f"{spec.config.name}/{spec.version}#{index}"
        self._spec = spec
        self._children = children
        self._backend = backend
        self._golden = golden
        self._patience = limits.patience(spec.config)
        self._shares = backend.shares and spec.device == "cpu" and not limits.limited(spec.config)
        self._alone = False  # lost its last process while others were at work there too
        self._thread = EngineThread(self.name)
        self._turn = asyncio.Lock()
        self._breaker = Breaker()
        self._life: _Life | None = None
        self._working: _Life | None = None
        self._changed = asyncio.Event()
        self._closing = False
        self._keeper: asyncio.Task[None] | None = None
        self._longest: float | None = None  # seconds of a run that went well
        self._waits: Callable[[], None] = self._tell

    async def open(self) -> None:
        """Start it for the first time. Raises why that failed."""
        self._shares = self._shares and await asyncio.to_thread(self._small)
        try:
            await self._start()
        except EngineCrashed as problem:
            if self._golden.ready or not self.provider:
                raise self._unavailable(problem) from problem
            # It may be what the test does to it, which the model need not bear.
            log_event("not_tested", logging.WARNING, instance=self.name, reason="its process ends on a row of zeros")
            self._golden.inputs = None
            await self._start()
        self._keeper = self._children.tasks.create_task(self._keep())
        self._children.at_end(self._stop)

    async def run(self, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        """See `Engine.run`."""
        await self._turn.acquire()
        try:
            life = await self._begin()
            assert life.ready is not None
            self._waits = batch.waits
            if life.ready.answers:
                async with aclosing(life.link.answer(batch, self._limit(batch), self._hung)) as results:
                    async for result in results:
                        yield result
            else:
                yield await self._computed(life, batch)
            self._breaker.succeeded()
        except EngineCrashed:
            if self._closing:
                raise self._closed() from None
            raise
        finally:
            self._leave()

    async def close(self) -> None:
        """See `Engine.close`. The process ends, if no other model lives in it."""
        self._stop()
        life, self._life = self._life, None
        if life is not None:
            try:
                if life.ready is not None and life.ready.answers and not life.link.running:
                    life.link.finish()
                    await asyncio.wait([life.lost], timeout=_FAREWELL)
            finally:
                if life.link.running:
                    life.home.kill("closed", self.name)
                life.end(self.name)
            if not life.home.names:
                await self._gone(life.home)
        if self._keeper is not None:
            await asyncio.wait([self._keeper])
        await self._thread.close()

    # --- a run

    async def _computed(self, life: _Life, batch: Batch) -> BatchResult:
        while True:
            try:
                result = await life.link.compute(batch, self._limit(batch), self._hung)
            except NeverSeen:
                life = await self._begin()
                continue
            except EngineCrashed:
                if self._closing or not life.home.innocent(self.name):
                    raise
                # Whoever was at work in the process may have ended it. Tried alone, it is known who.
                self._alone = True
                life = await self._begin()
                continue
            seconds = (result.finished_ns - result.stacked_ns) / 1e9
            if self._longest is None or seconds > self._longest:
                self._longest = seconds
            if self._golden.inputs is None and not self._golden.varies:
                await self._keep_golden(life, batch, result)
            return result

    async def _begin(self) -> _Life:
        """The instance in its process, which has something to do from now on; waits while it is being started."""
        while (life := self._life) is None:
            if self._closing:
                raise self._closed()
            if (pause := self._breaker.retry_after(time.monotonic())) is not None:
                raise errors.Unavailable(
                    f"model '{self._spec.config.name}' keeps failing and is given a pause; try again later", pause
                )
            await self._changed.wait()
        life.home.at_work.add(self.name)
        self._working = life
        return life

    def _leave(self) -> None:
        """Let the next run begin, once the process has done with this one."""
        life, self._working = self._working, None
        if life is None:
            self._turn.release()
            return
        if life.link.running and life.calls is not None:
            life.calls.abandon()
        life.link.when_idle(lambda: self._left(life))

    def _left(self, life: _Life) -> None:
        if not life.lost.done():
            life.home.at_work.discard(self.name)
        self._turn.release()

    def _limit(self, batch: Batch) -> float:
        """Seconds after which a run is taken for hung."""
        expected = self._longest if batch.predicted is None else batch.predicted
        return max(_FIRST_RUN if self._longest is None else 0.0, _TIMES * (expected or 0.0), self._patience)

    def _hung(self) -> None:
        if self._life is not None:
            self._life.home.kill("hang", self.name)

    # --- its process

    async def _keep(self) -> None:
        """Start it again and again, until `close`."""
        while (life := self._life) is not None:
            why = await asyncio.shield(life.lost)
            ended = time.monotonic()
            try:
                self._count(await life.home.cause(), why)
            finally:
                life.end(self.name)
            delay = self._breaker.crashed(time.monotonic())
            while not await self._paused(delay):
                try:
                    await self._start()
                except Exception as problem:  # noqa: BLE001 - whatever it is, trying again is all there is
                    delay = self._breaker.not_started(time.monotonic())
                    self._count("self_test" if isinstance(problem, _WrongAnswer) else "start", str(problem))
                else:
                    self._statistics.restarts += 1
                    seconds = round(time.monotonic() - ended, 3)
                    log_event("engine_restarted", instance=self.name, down_seconds=seconds)
                    break

    async def _start(self) -> None:
        """Have it in a process, loaded and tested. Raises why not."""
        backend = self._backend
        shares = self._shares and not self._alone
        home = await self._children.home(self.name, [backend.module] if backend.shares else [], shares=shares)
        try:
            life = await self._moved_in(home)
        except OSError as problem:
            home.leave(self.name)
            raise errors.Unavailable(f"the process for the model is gone: {problem}") from problem
        try:
            async with asyncio.timeout(_LOAD):
                life.ready = await life.link.load(self._spec, backend.module, backend.install)
            self.provider, self.warnings, self.widest = life.ready.provider, life.ready.warnings, life.ready.widest
            if not life.ready.answers:
                async with self._golden.lock:
                    await self._test(life)
        except BaseException:
            if life.link.running:
                home.kill("start", self.name)
            life.end(self.name)
            raise
        self._breaker.started()
        self._life = life
        self._tell()

    async def _moved_in(self, home: Home) -> _Life:
        """An instance in this process, nothing loaded yet. Raises OSError when the process is gone."""
        ours, theirs = socket.socketpair()
        memory = Memory(self._children.short)
        given = [theirs.fileno(), *(area.descriptor for area in memory.areas or ())]
        called: socket.socket | None = None
        calls: CallServer | None = None
        try:
            if self._backend.calls and (infer := self._spec.infer) is not None:
                callers, called = socket.socketpair()
                _, calls = await asyncio.get_running_loop().create_connection(
                    lambda: CallServer(infer, self._children.tasks, self._wait), sock=callers
                )
                given.append(called.fileno())
            home.host(self.name, given, areas=memory.areas is not None, calls=calls is not None)
        except BaseException:
            ours.close()
            memory.close()
            if calls is not None:
                calls.close()
            raise
        finally:
            theirs.close()
            if called is not None:
                called.close()
        life = _Life(home, calls)
        life.link = Link(ours, memory, self._thread, lambda why: self._lost(life, why))
        return life

    async def _test(self, life: _Life) -> None:
        """Run the golden input. Raises `EngineCrashed` when the answer is another than that of the first process."""
        golden = self._golden
        batch = golden.batch()
        if batch is None:
            return
        known = golden.ready
        try:
            result = await self._alone_with(life, batch)
        except EngineCrashed:
            raise
        except Exception as problem:
            if known:
                raise _WrongAnswer(f"it fails where the first process did not: {problem}") from problem
            golden.inputs = None
            log_event("not_tested", logging.DEBUG, instance=self.name, reason=f"it does not run on zeros: {problem}")
            return
        if not golden.judge(result.outputs):
            raise _WrongAnswer("it answers the golden input otherwise than the first process did")
        self._longest = max(self._longest or 0.0, (result.finished_ns - result.stacked_ns) / 1e9)
        if not known:
            await self._test_golden(life, batch)

    async def _keep_golden(self, life: _Life, batch: Batch, result: BatchResult) -> None:
        """Test with this batch from now on, if it is fit for that."""
        inputs = await self._thread.call(batch.stack)
        if self._golden.offer(inputs, result.outputs):
            again = self._golden.batch()
            assert again is not None
            await self._test_golden(life, again)

    async def _test_golden(self, life: _Life, batch: Batch) -> None:
        """See whether the model answers the same input twice the same."""
        again = await self._alone_with(life, batch)
        if not self._golden.judge(again.outputs):
            self._golden.varies = True
            log_event("not_tested", instance=self.name, reason="it answers the same input differently each time")

    async def _alone_with(self, life: _Life, batch: Batch) -> BatchResult:
        return await life.link.compute(batch, self._limit(batch), lambda: life.home.kill("hang", self.name))

    def _lost(self, life: _Life, why: str) -> None:
        """The process has ended, or is of no more use."""
        if why not in ("ended", "closed"):
            life.home.kill("protocol", self.name)
        if not life.lost.done():
            life.lost.set_result(why)
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

    def _wait(self) -> None:
        """The run has to wait for another model."""
        self._waits()

    def _closed(self) -> errors.Unavailable:
        return errors.Unavailable("the engine is closed; it takes no more work")

    def _unavailable(self, problem: Exception) -> errors.Unavailable:
        return errors.Unavailable(
            f"model '{self._spec.config.name}' does not load: {problem}; the server's log has the details"
        )

    def _tell(self) -> None:
        """Have everybody who waits look again."""
        self._changed.set()
        self._changed.clear()

    def _small(self) -> bool:
        name = self._spec.config.default_model_filename
        path = self._spec.path / (self._spec.artefact.file if self._spec.artefact else name)
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
        return self._children.statistics.of(self._spec.config.name, self._spec.version)
