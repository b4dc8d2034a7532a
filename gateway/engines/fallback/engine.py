"""`FallbackEngine`: the chain as an engine. A batch goes to the best link that is in use, and in the same call to the next
when that cannot run it.

What is a request's own fault is raised and tried nowhere else: an invalid input, or a batch that crashed its process, which
the worker divides. `run` raises only when no link could do it. A link that fails goes out of use; `tend` tries it off the
request path and takes it back. Every answer that is not the first link's says so.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import chain, zip_longest
from typing import TypeAlias

from gateway import errors
from gateway.artefacts import Artefact
from gateway.engines.base import Engine, EngineCrashed, Results, identity
from gateway.engines.chain import Chain
from gateway.engines.fallback.link import LiveLink, Start
from gateway.engines.fallback.tender import Tender
from gateway.types import Batch, BatchResult

_OWN = (errors.InvalidArgument, errors.Unsupported, errors.Cancelled)
_GONE = (errors.Unavailable, errors.NotFound, errors.Unauthenticated, errors.PermissionDenied)
_MARGIN = 1.25  # what a run may take more than expected,
_WAY = 0.002  # the seconds that it takes to begin,
_SHARE = 0.9  # and the part of the time left that is not kept for an event loop that is behind


async def open_chain(links: Chain, count: int, start: Start) -> list[FallbackEngine]:
    """Load the best link that loads, and return `count` engines of the chain.

    Raises `Unavailable` with every link's reason when none does.
    """
    tender = Tender([LiveLink(link, count, start) for link in links.links])
    await tender.begin()
    return [FallbackEngine(tender, index, links.warnings) for index in range(count)]


_Turn: TypeAlias = tuple[LiveLink, float | None]
"""A link to try, and the seconds after which the next one should have its turn."""


class _TooSlow(Exception):
    """A run was given up after so many seconds, so that the next link can still answer in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"it gave no answer in {seconds:.3f} s")
        self.seconds = seconds


class FallbackEngine:
    """One instance's engines, one of each link. All that `open_chain` returns together share what is known of the links.

    `link` is the name of the link that runs now, and `reason` why it is not the first, in words; empty if it is.
    """

    def __init__(self, tender: Tender, index: int, warnings: tuple[str, ...]) -> None:
        self._tender = tender
        self._index = index
        self._warnings = warnings
        self._closed = False
        self._latest = tender.current.engines[index]

    @property
    def _engine(self) -> Engine:
        """What runs now; where nothing does, what ran last."""
        if self._tender.current.engines:
            self._latest = self._tender.current.engines[self._index]
        return self._latest

    @property
    def link(self) -> str:
        """See the class."""
        return self._tender.current.name

    @property
    def reason(self) -> str:
        """See the class."""
        return self._tender.reason

    @property
    def device(self) -> str:
        """The device that it runs on now, and its runs compete for."""
        return self._tender.current.device

    @property
    def threads(self) -> int:
        """How many cores of that a run takes when it is loaded."""
        return self._tender.current.threads

    @property
    def provider(self) -> str:
        """What it runs on now."""
        return self._engine.provider

    @property
    def artefact(self) -> Artefact | None:
        """The file it runs now."""
        return self._engine.artefact

    @property
    def intended(self) -> Artefact | None:
        """The file that it should run: the first link's."""
        return self._tender.links[0].artefact

    @property
    def widest(self) -> int:
        """The most cores that a run can use now."""
        return self._engine.widest

    @property
    def concurrency(self) -> int:
        """How many runs may be open at once now."""
        return self._engine.concurrency

    @property
    def ahead(self) -> bool:
        """Whether it takes a batch more now."""
        return self._engine.ahead

    @property
    def contained(self) -> bool:
        """Whether this process outlives whatever a run does on the links that are loaded."""
        return all(engine.contained for link in self._tender.links for engine in link.engines)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know; the link that it runs on, if that is not the first."""
        moved = (f"runs on {self.link}, {self.reason}",) if self.reason else ()
        return (*self._warnings, *moved, *self._engine.warnings)

    async def run(self, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        """See `Engine.run`. Raises the last link's error when all failed."""
        first = self._tender.links[0]
        failed: list[tuple[LiveLink, str]] = []
        problem: Exception = errors.Unavailable("the engine is closed; it takes no more work")
        candidates: Iterator[_Turn] = self._candidates(batch, failed)
        while (turn := next(candidates, None)) is not None:
            (link, limit), given = turn, False
            try:
                async with aclosing(self._runs(link, batch, limit)) as results:
                    async for result in results:
                        if not given:
                            given = True
                            link.times.learn(batch.rows, (result.finished_ns - result.started_ns) / 1e9)
                        if link is not first:
                            self._sign(result, link, failed)
                        yield result
            except Exception as error:  # an engine may raise anything; what it means is judged
                if given or self._closed:
                    raise
                problem = error
                candidates = chain(self._again(turn, batch, error, failed), candidates)
            else:
                self._tender.answered(link, failed, len(batch.requests))
                return
        raise problem

    async def tend(self, changed: Callable[[], None]) -> None:
        """Bring links back, and load those that may be needed soon, until cancelled.

        `changed` is called when `link` is another. Only one of the engines that share a chain has anything to do.
        """
        if self._index == 0:
            await self._tender.run(changed)

    def counted(self) -> tuple[Counter[str], Counter[str]]:
        """Requests by the link that answered them, and by the reason why that was not the first; since the last call."""
        return self._tender.counted()

    async def close(self) -> None:
        """Close this instance's engine of every link."""
        self._closed = True
        await asyncio.gather(*(link.close(self._index) for link in self._tender.links))

    # --- which links, and for how long

    def _candidates(self, batch: Batch, failed: list[tuple[LiveLink, str]]) -> Iterator[_Turn]:
        """The links to try, best first.

        Those that are out of use or too slow come last, the most dependable of them first: they are the only hope left.
        """
        if self._closed:
            return
        links = [link for link in self._tender.links if link.used]
        tried = []
        for link, following in zip_longest(links, links[1:]):
            limit = _limit(following, batch)
            expected = None if limit is None else link.times.at_least(batch.rows)
            if limit is not None and expected is not None and expected > limit:
                self._tender.doubt(link)
                failed.append((link, "deadline"))
            else:
                tried.append(link)
                yield link, limit
        for link in reversed(self._tender.links):
            if link not in tried:
                yield link, None

    def _again(
        self, turn: _Turn, batch: Batch, error: Exception, failed: list[tuple[LiveLink, str]]
    ) -> Sequence[_Turn]:
        """What to try next after a turn that failed: the same link in parts, or none but the other links."""
        link, _ = turn
        if link.halves(batch, error):
            return (turn,)
        failed.append((link, self._judge(link, batch, error)))
        return ()

    def _runs(self, link: LiveLink, batch: Batch, limit: float | None) -> Results:
        """A run on one link. Raises `_TooSlow` when nothing has come of it after `limit` seconds."""
        if link is not self._tender.links[0] and batch.predicted is not None:
            batch = replace(batch, predicted=None)  # it is the first link's time
        if self._tender.sample.wanted:
            return self._sampled(link, batch)
        results = link.engines[self._index].run(batch) if link.is_plain else link.run(self._index, batch)
        return results if limit is None else _in_time(results, limit)

    async def _sampled(self, link: LiveLink, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        """A run that is kept if it goes well."""
        batch, ended = self._tender.sample.watch(batch)
        async with aclosing(link.run(self._index, batch)) as results:
            async for result in results:
                if ended(result):
                    self._tender.sampled()
                yield result

    # --- what a failure means

    def _judge(self, link: LiveLink, batch: Batch, error: Exception) -> str:
        """Why a link failed, a word of REASONS. Raises the error when another link is not to try."""
        tender = self._tender
        if not link.engines:
            tender.trip(link, "load", str(error) or type(error).__name__)
            return "load"
        if isinstance(error, _OWN):
            raise error
        if isinstance(error, EngineCrashed):
            self._judge_crash(link, batch, error)
            return "crash"
        if isinstance(error, _GONE):
            tender.trip(link, "unavailable", str(error), getattr(error, "retry_after", None) or 0.0)
            return "unavailable"
        if isinstance(error, _TooSlow | errors.DeadlineExceeded):
            return self._judge_late(link, batch, error)
        tender.prepare(link)
        if isinstance(error, errors.ResourceExhausted):
            return "busy"
        return "memory" if isinstance(error, MemoryError) else "error"

    def _judge_crash(self, link: LiveLink, batch: Batch, error: EngineCrashed) -> None:
        """Raise it when the batch is to blame: its parts are tried again, and one that crashes alone is not run elsewhere."""
        if link.health.crashed(batch.requests):
            self._tender.trip(link, "crash", str(error))
            return
        self._tender.prepare(link)
        if error.sure:
            raise error

    def _judge_late(self, link: LiveLink, batch: Batch, error: Exception) -> str:
        """Raise it when it is too late for every request."""
        now = time.monotonic()
        if batch.requests and all(each.deadline is not None and each.deadline <= now for each in batch.requests):
            raise errors.deadline_passed() from error
        if isinstance(error, _TooSlow):
            link.times.exceeded(batch.rows, error.seconds)
        self._tender.doubt(link)  # an engine that knows itself to be too slow does not even try
        return "deadline"

    def _sign(self, result: BatchResult, link: LiveLink, failed: Sequence[tuple[LiveLink, str]]) -> None:
        """Say in an answer which link gave it, and why not the first."""
        which = identity(link.engines[self._index]) if link.engines else {}  # closed meanwhile
        told = {**which, "link": link.name, "fallback": self._tender.why(failed)}
        result.parameters = {**told, **(result.parameters or {})}


def _limit(following: LiveLink | None, batch: Batch) -> float | None:
    """How long a run may take for the next link to answer in time still; None when that cannot, or nobody knows."""
    if following is None or not following.engines:
        return None
    deadline = min([each.deadline for each in batch.requests if each.deadline is not None], default=None)
    expected = following.times.predict(batch.rows)
    if deadline is None or expected is None:
        return None
    left = (deadline - time.monotonic()) * _SHARE - expected * _MARGIN - _WAY
    return left if left > 0 else None


async def _in_time(results: Results, limit: float) -> AsyncGenerator[BatchResult, None]:
    """These, if the first comes within `limit` seconds. Raises `_TooSlow` if it does not."""
    async with aclosing(results):
        try:
            async with asyncio.timeout(limit) as clock:
                first = await anext(results, None)
        except TimeoutError:
            if clock.expired():
                raise _TooSlow(limit) from None
            raise
        if first is not None:
            yield first
            async for result in results:
                yield result
