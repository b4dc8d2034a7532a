"""Keeps the links of a chain: which one runs now, which are out of use, and when they come back.

What is told of a change is told once: a log line, `changed`, counters. While every link is in use nothing happens here: no
task wakes, no timer runs. Links are loaded and tried in `run`, off the request path.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

from gateway import errors
from gateway.engines.chain import PRELOAD
from gateway.engines.fallback.health import REASONS
from gateway.engines.fallback.link import LiveLink
from gateway.engines.fallback.sample import Sample
from gateway.engines.tensorrt.background import PlanKeeper
from gateway.telemetry import log_event

_TRY_SECONDS = {"remote": 2.0}  # for the sample; a device that hangs is no better than one that is gone
_TRY_MOST = 10.0


class Tender:
    """The links of one chain, best first."""

    def __init__(self, links: Sequence[LiveLink]) -> None:
        self.links = links
        self.current = links[0]
        self.model = links[0].config.name
        self.sample = Sample(batched=links[0].config.max_batch_size > 0 and links[0].config.by_rows)
        self._preload = links[0].config.parameters.get(PRELOAD, "")
        self._wanted: list[LiveLink] = []  # to be loaded
        self._wake = asyncio.Event()
        self._changed: Callable[[], None] = lambda: None
        self._answered: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()

    @property
    def reason(self) -> str:
        """Why the first link does not run, in words; empty when it does."""
        first = self.links[0]
        return "" if first.used else f"not on {first.name}: {REASONS[first.health.trouble]}: {first.health.text}"

    def why(self, failed: Sequence[tuple[LiveLink, str]]) -> str:
        """The word of REASONS why the first link did not answer a batch that these failed on."""
        first = self.links[0]
        return next((reason for link, reason in failed if link is first), first.health.trouble)

    async def begin(self) -> None:
        """Load the best link that loads. Raises `Unavailable` when none does."""
        for link in self.links:
            try:
                await link.load()
            except Exception as problem:  # noqa: BLE001 - a backend may raise anything; it is said of the link
                self.trip(link, "load", _text(problem))
            else:
                break
        else:
            tried = "; ".join(f"{link.name}: {link.health.text}" for link in self.links)
            raise errors.Unavailable(f"model '{self.model}' has no engine that loads: {tried}")
        self._settle()
        eager = self._preload == "true" or (not self._preload and self.links[0].config.backend == "remote")
        if eager:
            self._wanted += [link for link in self.links if link.used and not link.engines]

    # --- told by runs

    def sampled(self) -> None:
        """The sample was taken. Links that were loaded before it are tried with it, so that their first runs are quick."""
        self._wanted += [link for link in self.links if link.engines and link is not self.current]
        self._wake.set()

    def answered(self, link: LiveLink, failed: Sequence[tuple[LiveLink, str]], requests: int) -> None:
        """A link ran a batch that others had failed on."""
        link.health.ran()
        self._answered[link.name] += requests
        if link is self.links[0]:
            return
        self._fallbacks[self.why(failed)] += requests
        for other, reason in failed:
            # Where the next link could do it, the request is not to blame.
            if reason in ("memory", "error") and other.health.failed():
                self.trip(other, reason, "it failed several times in a row")
        self._settle()

    def trip(self, link: LiveLink, reason: str, text: str, retry_after: float = 0.0) -> None:
        """A link goes out of use until a probe succeeds."""
        if link.used:
            link.health.trip(reason, text, time.monotonic(), retry_after)
            log_event(
                "engine_out_of_use", logging.WARNING, model=self.model, engine=link.name,
                reason=REASONS[reason], error=text,
            )  # fmt: skip
        self.prepare(link)
        self._settle()

    def doubt(self, link: LiveLink) -> None:
        """A link is too slow for a deadline: its time is to be measured again."""
        if link.health.retry_at < math.inf:
            return
        link.health.doubt(time.monotonic())
        self.prepare(link)

    def prepare(self, link: LiveLink) -> None:
        """A link shows trouble: the next one may be needed."""
        if self._preload != "false":
            after = self.links[self.links.index(link) + 1 :]
            following = next((each for each in after if each.used), None)
            if following is not None and not following.engines and following not in self._wanted:
                self._wanted.append(following)
        self._wake.set()

    def counted(self) -> tuple[Counter[str], Counter[str]]:
        """See `FallbackEngine.counted`."""
        counts = self._answered, self._fallbacks
        self._answered, self._fallbacks = Counter(), Counter()
        return counts

    # --- in the background

    async def run(self, changed: Callable[[], None]) -> None:
        """See `FallbackEngine.tend`."""
        self._changed = changed
        self.counted()  # warm-up is nobody's request
        async with asyncio.TaskGroup() as tasks:
            for link in self.links:
                if link.keeper is not None:
                    tasks.create_task(self._keep_plan(link, link.keeper))
            await self._probe_when_due()

    async def _keep_plan(self, link: LiveLink, keeper: PlanKeeper) -> None:
        """Whenever a link to TensorRT does not load for want of a plan, have one built, and try it then."""
        while True:
            await link.refused.wait()
            link.refused.clear()
            try:
                built = await keeper.prepare()
            except errors.Unavailable:
                continue  # the keeper has told why
            if built:
                link.health.mended(time.monotonic())
                self._wake.set()

    async def _probe_when_due(self) -> None:
        while True:
            self._wake.clear()
            if self._wanted:
                await self._prepare(self._wanted.pop(0))
                continue
            due = min(self.links, key=lambda link: link.health.retry_at)
            pause = due.health.retry_at - time.monotonic()
            if pause <= 0:
                await self._probe(due)
                continue
            try:
                async with asyncio.timeout(None if pause == math.inf else pause):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _prepare(self, link: LiveLink) -> None:
        """Load a link before it is needed."""
        try:
            await link.load()
            await self._try(link)
        except Exception as problem:  # noqa: BLE001 - a backend may raise anything; it is said of the link
            self.trip(link, "load", _text(problem))

    async def _probe(self, link: LiveLink) -> None:
        """Try a link that had trouble."""
        had = link.health.trouble
        try:
            await link.load()
            link.times.forget()
            await self._try(link)
        except Exception as problem:  # noqa: BLE001 - a backend may raise anything; it is said of the link
            link.health.refused(had or "error", _text(problem), time.monotonic())
            log_event("engine_probed", logging.DEBUG, model=self.model, engine=link.name, reason=_text(problem))
            if not isinstance(problem, errors.Unavailable):
                await link.unload()  # a broken engine is no use, and holds memory
            self._settle()
            return
        link.health.recovered(time.monotonic())
        if had:
            log_event("engine_back_in_use", model=self.model, engine=link.name)
        self._settle()

    async def _try(self, link: LiveLink) -> None:
        seconds = _TRY_SECONDS.get(link.config.backend, _TRY_MOST)
        try:
            async with asyncio.timeout(seconds) as clock:
                for engine in link.engines:
                    begun = time.monotonic()
                    await self.sample.try_on(engine)
                    if self.sample:
                        link.times.learn(1, time.monotonic() - begun)
        except TimeoutError:
            if clock.expired():
                raise errors.Internal(f"it gave no answer to a request of one row in {seconds:g} s") from None
            raise

    def _settle(self) -> None:
        """The best link that is loaded and in use runs from now on."""
        best = next((link for link in self.links if link.used and link.engines), None)
        best = best or next((link for link in reversed(self.links) if link.engines), self.current)
        if best is not self.current:
            log_event(
                "engine_changed", logging.WARNING if self.reason else logging.INFO, model=self.model,
                before=self.current.name, now=best.name,
            )  # fmt: skip
            self.current = best
            self._changed()


def _text(problem: Exception) -> str:
    return str(problem) or type(problem).__name__
