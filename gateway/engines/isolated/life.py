"""`Life`: one instance in one child process, from its start to its end.

A life begins with the load and a test: the answer to the golden input must be that of the first life. What an instance
is started from, again and again, is its `Origin`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from gateway.engines.base import EngineCrashed, EngineSpec
from gateway.engines.isolated.area import Area
from gateway.engines.isolated.calls import CallServer
from gateway.engines.isolated.children import Children
from gateway.engines.isolated.frames import Ready
from gateway.engines.isolated.golden import Golden
from gateway.engines.isolated.home import Home
from gateway.engines.isolated.link import Link
from gateway.engines.isolated.memory import Memory
from gateway.engines.threads import EngineThread
from gateway.telemetry import log_event
from gateway.types import Batch, BatchResult

_LOAD = 600.0  # seconds


Calls: TypeAlias = Callable[[Area | None], CallServer]


@dataclass(frozen=True, slots=True)
class Backend:
    """What a child runs: the module, what to do when a package it imports is missing, whether its models may share one."""

    module: str
    install: str
    shares: bool = False
    calls: bool = False  # its models call others


@dataclass(frozen=True, slots=True)
class Origin:
    """What one instance is started from, each time."""

    name: str
    spec: EngineSpec
    backend: Backend
    children: Children
    thread: EngineThread  # on which large batches are copied
    golden: Golden  # of all instances of the version


class WrongAnswer(EngineCrashed):
    """The process answers the golden input otherwise than the first one did."""


class Life:
    """See the module. `lost` says why it ended, once it has; `on_lost` is called with it at that moment."""

    ready: Ready
    link: Link

    def __init__(self, origin: Origin, home: Home, on_lost: Callable[[Life], None]) -> None:
        self.home = home
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.calls: CallServer | None = None
        self._origin = origin
        self._on_lost = on_lost

    async def begin(self, calls: Calls | None, patience: float) -> float | None:
        """Load the model and test it, each run of that within `patience` seconds. Raises why that failed, ended.

        Returns how many seconds the test ran, None without one. `calls` answers the model's calls of others.
        """
        origin = self._origin
        self.home.at_work.add(origin.name)  # a load may keep the interpreter to itself, and the heartbeat waiting
        try:
            await self._move_in(calls)
            async with asyncio.timeout(_LOAD):
                self.ready = await self.link.load(origin.spec, origin.backend.module, origin.backend.install)
            seconds = None
            if not self.ready.answers:
                async with origin.golden.lock:
                    seconds = await self._test(patience)
        except BaseException:
            if hasattr(self, "link") and self.link.running:
                self.home.kill("start", origin.name)
            self.end()
            raise
        self.home.at_work.discard(origin.name)
        return seconds

    def end(self) -> None:
        """Have it end, if it has not, and give back all it had."""
        if hasattr(self, "link"):
            self.link.close()
        if self.calls is not None:
            self.calls.close()
        self.home.leave(self._origin.name)

    async def keep_golden(self, batch: Batch, result: BatchResult, patience: float) -> None:
        """Test with this batch, which went well, from now on, if it is fit for that."""
        golden = self._origin.golden
        inputs = await self._origin.thread.call(batch.stack)
        if golden.offer(inputs, result.outputs):
            again = golden.batch()
            assert again is not None
            try:
                await self._test_golden(again, patience)
            except BaseException:
                golden.withdraw()  # nobody knows whether the answer varies, or whether a process outlives it
                raise

    async def _move_in(self, calls: Calls | None) -> None:
        """Have a line, memory and, if need be, a line for calls. Raises OSError when the process is gone."""
        name, children = self._origin.name, self._origin.children
        ours, theirs = socket.socketpair()
        memory = Memory(children.short)
        self.link = Link(ours, memory, self._origin.thread, self._end, self._works)
        areas = memory.descriptors
        given = [theirs.fileno(), *areas]
        called: socket.socket | None = None
        try:
            if calls is not None:
                callers, called = socket.socketpair()
                area = Area.create() if areas else None
                given += [called.fileno(), *([] if area is None else [area.descriptor])]
                loop = asyncio.get_running_loop()
                _, self.calls = await loop.create_connection(lambda: calls(area), sock=callers)
            self.home.host(name, given, areas=bool(areas), calls=called is not None)
        finally:
            theirs.close()
            if called is not None:
                called.close()

    async def _test(self, patience: float) -> float | None:
        golden, name = self._origin.golden, self._origin.name
        batch = golden.batch()
        if batch is None:
            return None
        known = golden.ready
        try:
            result = await self._run(batch, patience)
        except Exception as problem:  # a model may raise anything; it need not bear zeros
            crashed = isinstance(problem, EngineCrashed)
            if not known:
                golden.inputs = None
                level = logging.WARNING if crashed else logging.DEBUG
                log_event("not_tested", level, instance=name, reason=f"it does not run on zeros: {problem}")
            elif not crashed:
                raise WrongAnswer(f"it fails where the first process did not: {problem}") from problem
            if crashed:
                raise
            return None
        if not golden.judge(result.outputs):
            raise WrongAnswer("it answers the golden input otherwise than the first process did")
        if not known:
            await self._test_golden(batch, patience)
        return (result.finished_ns - result.stacked_ns) / 1e9

    async def _test_golden(self, batch: Batch, patience: float) -> None:
        """See whether the model answers the same input twice the same."""
        again = await self._run(batch, patience)
        if not self._origin.golden.judge(again.outputs):
            self._origin.golden.varies = True
            reason = "it answers the same input differently each time"
            log_event("not_tested", instance=self._origin.name, reason=reason)

    async def _run(self, batch: Batch, patience: float) -> BatchResult:
        return await self.link.compute(batch, patience, lambda: self.home.kill("hang", self._origin.name))

    def _works(self, works: bool) -> None:
        """The instance has something to do from now on, or has no more."""
        if works:
            self.home.at_work.add(self._origin.name)
        else:
            self.home.at_work.discard(self._origin.name)

    def _end(self, why: str) -> None:
        if why not in ("ended", "closed"):
            self.home.kill("protocol", self._origin.name)
        if not self.lost.done():
            self.lost.set_result(why)
        self._on_lost(self)
