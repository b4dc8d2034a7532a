"""One link of a chain while it serves: its engines, loaded when they are needed, and runs on them.

A batch that does not fit into memory is run in parts, and later ones are cut before they run. Whether the link is used is
not decided here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from gateway.engines.base import Engine, EngineSpec
from gateway.engines.chain import Link
from gateway.engines.fallback.health import Health, Room, Times
from gateway.engines.fallback.parts import Part, cut, joined, told
from gateway.engines.tensorrt.background import PlanKeeper
from gateway.telemetry import log_event
from gateway.types import Batch, BatchResult

Start = Callable[[EngineSpec, int], Awaitable[Sequence[Engine]]]
"""Loads a version as a link says, and returns so many engines that share it."""

_PAUSES = {"remote": 1.0}  # seconds: the longest between probes of what costs nothing to try
_PAUSE = 60.0
_CLOSE_SECONDS = 5.0


class LiveLink:
    """A link, for `count` instances."""

    def __init__(self, link: Link, count: int, start: Start) -> None:
        self.name = link.name
        self.config = link.spec.config
        self.artefact = link.spec.artefact
        self.device, self.threads = link.spec.device, link.spec.threads
        self.engines: Sequence[Engine] = ()  # none: not loaded
        self.health = Health(_PAUSES.get(self.config.backend, _PAUSE))
        self.times = Times()
        self.keeper = PlanKeeper(link.spec) if self.config.backend == "tensorrt" else None
        self.refused = asyncio.Event()  # by its backend, when it was to be loaded
        self._spec = link.spec
        self._count = count
        self._start = start
        self._loading = asyncio.Lock()
        self._room = Room()

    @property
    def used(self) -> bool:
        """Whether batches are run here."""
        return not self.health.trouble

    async def load(self) -> None:
        """Have the engines there. Raises what their backend does."""
        async with self._loading:
            if not self.engines:
                try:
                    self.engines = await self._start(self._spec, self._count)
                except Exception:
                    self.refused.set()
                    raise
                self.times.forget()

    async def unload(self) -> None:
        """Close the engines, and forget them."""
        async with self._loading:
            engines, self.engines = self.engines, ()
            await asyncio.gather(*(self._close(engine) for engine in engines))

    async def close(self, instance: int) -> None:
        """Close one instance's engine for good, if there is one."""
        async with self._loading:
            if self.engines:
                await self.engines[instance].close()

    @property
    def is_plain(self) -> bool:
        """Whether its engines can be called as they are: they are there, and batches of any size fit as far as is known."""
        return bool(self.engines) and not self._room.rows

    def halves(self, batch: Batch, problem: Exception) -> bool:
        """Whether a batch that an engine was given whole is to be run again, in parts, because it did not fit."""
        return isinstance(problem, MemoryError) and self.is_plain and bool(self._smaller(Part(batch), problem))

    async def run(self, instance: int, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        """Run a batch on one engine, loaded if need be, and in parts if it does not fit; see `Engine.run`.

        Raises MemoryError when not even one row fits.
        """
        engine = await self._loaded(instance)
        whole = Part(batch)
        waiting = deque([whole])
        done: list[tuple[Part, BatchResult]] = []
        while waiting:
            part, began = self._next(waiting), False
            try:
                async with aclosing(engine.run(part.batch)) as results:
                    async for result in results:
                        if part is not whole and result.answers is None:
                            done.append((part, result))
                            continue
                        began = True
                        yield result if part is whole else told(part, result)
            except MemoryError as problem:
                parts = [] if began else self._smaller(part, problem)
                if not parts:
                    raise
                waiting.extendleft(reversed(parts))
            else:
                self._room.fitted(part.batch.rows)
        if done:
            yield joined(done)

    async def _loaded(self, instance: int) -> Engine:
        if not self.engines:
            await self.load()
        return self.engines[instance]

    def _next(self, waiting: deque[Part]) -> Part:
        """The next part to run, cut to what fits."""
        part = waiting.popleft()
        if self._room.holds(part.batch.rows):
            return part
        first, *rest = self._cut(part, self._room.rows)
        waiting.extendleft(reversed(rest))
        return first

    def _cut(self, part: Part, limit: int) -> list[Part]:
        return cut(part, limit) if self.config.by_rows else [part]

    def _smaller(self, part: Part, problem: MemoryError) -> list[Part]:
        """The part in halves, because it did not fit; none when it cannot be halved."""
        parts = self._cut(part, max(1, part.batch.rows // 2))
        if len(parts) == 1:
            return []
        rows = self._room.refuse(part.batch.rows)
        log_event(
            "batch_halved", logging.WARNING, model=self.config.name, engine=self.name, rows=part.batch.rows,
            next=rows, reason=str(problem),
        )  # fmt: skip
        return parts

    async def _close(self, engine: Engine) -> None:
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await engine.close()
        except TimeoutError:
            log_event("engine_hangs", logging.ERROR, model=self.config.name, engine=self.name)
