"""`JobRunner`: runs jobs through the whole gateway, a bounded number at a time, and finds those of gateways that died.

A job has no deadline but its own expiry, and gives way to clients who wait. What its model refuses it with ends it;
what says "not now" queues it again, later each time. Leaving the runner hands back what still runs.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.jobs.feed import Feed
from gateway.jobs.leases import Claim, Leases
from gateway.jobs.outcome import Retry, run
from gateway.jobs.store import JobStore
from gateway.queues.redis.seal import Seal
from gateway.telemetry import Refusals, log_event
from gateway.types import Infer

_PRUNE = 60.0  # seconds
_LOOK = 30.0  # seconds between looks when nothing is heard
_SOON = 0.2
_TROUBLE = 1.0  # seconds until Redis is asked again after it did not answer
_HAND_BACK = 2.0  # seconds that a stop leaves a run to be handed back
_PATIENCE = 5.0  # seconds between attempts to write down how a run ended, at most
_FIRST, _LAST = 0.5, 30.0  # seconds until a job is run again whose model was not available


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """`limit` jobs, and about `max_bytes` of requests, are run at once; a lease is kept for `lease` seconds."""

    limit: int = 64
    max_bytes: int = 256 << 20
    lease: float = 6.0


class JobRunner:
    """Runs jobs from entering to leaving `async with`; `drain` ends that gently.

    With `begin` it takes no job before that is set. `config_of(model, version)` says which priority is the least urgent, for jobs that do not ask for one.
    """

    def __init__(
        self,
        store: JobStore,
        feed: Feed,
        infer: Infer,
        config_of: Callable[[str, str], ModelConfig],
        *,
        seal: Seal | None = None,
        options: RunnerOptions | None = None,
        begin: asyncio.Event | None = None,
    ) -> None:
        self._options = options or RunnerOptions()
        self._store = store
        self._leases = Leases(store, self._options.lease)
        self._feed = feed
        self._infer = infer
        self._config_of = config_of
        self._seal = seal or Seal(None)
        self._begin = begin
        self._group = asyncio.TaskGroup()
        self._runs: dict[str, tuple[Claim, asyncio.Task[None]]] = {}
        self._lost: set[str] = set()  # runs that were cancelled because they are nobody's any more
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._prune_at = 0.0
        self._trusted_at = 0.0  # when leases that ran out may be believed to: their owners could have renewed them
        self._generation = -1
        self._troubles = Refusals()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._loops = [self._group.create_task(loop()) for loop in (self._take, self._keep, self._listen)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draining = True
        for task in (*self._loops, *[task for _, task in self._runs.values()]):
            task.cancel()
        if not isinstance(error, asyncio.CancelledError):
            kind = error = trace = None
        await self._group.__aexit__(kind, error, trace)

    @property
    def running(self) -> int:
        """How many jobs this process runs now."""
        return len(self._runs)

    async def drain(self) -> None:
        """Take no more jobs, and return when those that run have ended."""
        self._draining = True
        await self._idle.wait()

    # --- the loops

    async def _take(self) -> None:
        """Start what is due whenever something may be."""
        if self._begin is not None:
            await self._begin.wait()
        while not self._draining:
            self._wake.clear()
            try:
                wait = await self._look()
            except errors.GatewayError as problem:
                self._troubles.note("jobs", reason=problem.message)
                self._trusted_at = time.monotonic() + self._options.lease
                wait = _TROUBLE * random.uniform(0.5, 1.0)
            except Exception as fault:  # noqa: BLE001 - a record nobody foresaw must not end the gateway
                log_event("jobs_fault", logging.ERROR, fault)
                wait = _LOOK
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _look(self) -> float:
        """Recover, prune and start what is due; returns in how many seconds to look again."""
        now = time.monotonic()
        if self._generation != self._store.client.generation:
            # Nobody could renew while Redis was away, or before this process could have seen it.
            self._generation = self._store.client.generation
            self._trusted_at = now + self._options.lease
        if now >= self._trusted_at:
            for job, state in await self._leases.recover():
                log_event("job_lease_lost", logging.WARNING, job=job, state=state)
            self._trusted_at = now + self._options.lease / 2 * random.uniform(0.5, 1.0)
        if now >= self._prune_at:
            await self._leases.prune()
            self._prune_at = now + _PRUNE
        later = max(self._trusted_at - time.monotonic(), 0.0)
        room = self._room()
        if room:
            started = [job for job in await self._leases.due(room) if await self._start(job)]
            if self._room() and (due := await self._leases.next_due()) is not None:
                # What is due and was not started is another's, or still runs here without its lease.
                later = min(later, max(due, 0.0 if started else _SOON))
        return later

    def _room(self) -> int:
        used = sum(len(claim.request.payload) for claim, _ in self._runs.values())
        return self._options.limit - len(self._runs) if used < self._options.max_bytes and not self._draining else 0

    async def _start(self, job: str) -> bool:
        if job in self._runs or not self._room():
            return False
        claim = await self._leases.claim(job)
        if claim is None:
            return False
        self._idle.clear()
        self._runs[job] = claim, self._group.create_task(self._run(claim), name=f"job:{job}")
        return True

    async def _listen(self) -> None:
        """Wake up for what is queued, and end runs of what is not running any more."""
        with self._feed.subscribe() as inbox:
            while not inbox.closed:
                event = await inbox.next(_LOOK)
                if event is None or event.state == "queued":
                    self._wake.set()
                elif event.state == "cancelled":
                    self._give_up(event.job)

    async def _keep(self) -> None:
        """Renew the leases, and end the runs whose lease is lost."""
        while True:
            await asyncio.sleep(self._options.lease / 3)
            try:
                for job in await self._leases.renew({job: claim.token for job, (claim, _) in self._runs.items()}):
                    self._give_up(job)
            except errors.GatewayError as problem:
                self._troubles.note("leases", reason=problem.message)

    def _give_up(self, job: str) -> None:
        if job in self._runs:
            self._lost.add(job)
            self._runs[job][1].cancel()

    # --- one job

    async def _run(self, claim: Claim) -> None:
        job = claim.job.id
        try:
            await self._end(claim)
        except asyncio.CancelledError:
            if job not in self._lost:
                await self._hand_back(claim)
                raise
        except Exception as fault:  # noqa: BLE001 - one job must not end the others; its lease runs out
            log_event("job_fault", logging.ERROR, fault, job=job)
        finally:
            del self._runs[job]
            self._lost.discard(job)
            self._wake.set()
            if not self._runs:
                self._idle.set()

    async def _end(self, claim: Claim) -> None:
        outcome = await run(claim, self._infer, self._config_of, self._seal, self._store.clock)
        while True:
            try:
                if isinstance(outcome, Retry):
                    held = await self._leases.postpone(claim, _delay(claim, outcome), outcome.error)
                else:
                    held = await self._leases.finish(claim, *outcome)
                break
            except errors.Unavailable as problem:
                # The run is over and must not be lost: Redis is back some time.
                self._troubles.note("results", job=claim.job.id, reason=problem.message)
                await asyncio.sleep(_PATIENCE * random.uniform(0.1, 1.0))
        if not held:
            log_event("job_run_dropped", logging.WARNING, job=claim.job.id, reason="its lease was lost meanwhile")

    async def _hand_back(self, claim: Claim) -> None:
        try:
            async with asyncio.timeout(_HAND_BACK):
                await self._leases.postpone(claim, 0.0, None)
        except (TimeoutError, errors.GatewayError) as problem:
            # It is found when its lease runs out.
            log_event("job_not_handed_back", logging.WARNING, job=claim.job.id, reason=str(problem))


def _delay(claim: Claim, retry: Retry) -> float:
    doubled: float = min(_LAST, _FIRST * 2 ** min(claim.job.attempts, 10)) * random.uniform(0.5, 1.0)
    return max(doubled, retry.error.retry_after or 0.0)
