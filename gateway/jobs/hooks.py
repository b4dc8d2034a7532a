"""`HookRunner`: delivers the webhooks of jobs that have ended, whichever gateway ran them; each is tried a few times.

A webhook is leased by moving its next attempt into the future before it is called, so a gateway that dies delays it and
loses nothing. It may be delivered twice, and never counts as delivered unless the receiver said so.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from gateway.errors import GatewayError
from gateway.jobs.feed import Feed
from gateway.jobs.guarded import Command, typed
from gateway.jobs.record import FINAL, Job, read
from gateway.jobs.store import JobStore
from gateway.jobs.webhook import Caller, Outcome
from gateway.telemetry import log_event

ATTEMPTS = 8
_LEASE = 60.0  # seconds; longer than a call may take
_FIRST, _LAST = 1.0, 300.0  # seconds between attempts
_AT_ONCE = 16
_LOOK = 30.0  # seconds between looks when nothing is heard
_TROUBLE = 1.0
_LINGER = 3.0  # seconds that a stop leaves the calls under way; the rest are made again

Body = Callable[[Job], bytes]
"""What a receiver is told of a job."""


class HookRunner:
    """Delivers while it is open. `first_delay` is the time after a failed first attempt; each next one doubles it."""

    def __init__(self, store: JobStore, feed: Feed, caller: Caller, body: Body, first_delay: float = _FIRST) -> None:
        self._store = store
        self._client = store.client
        self._hooks = store.keys.job_hooks()
        self._feed = feed
        self._caller = caller
        self._body = body
        self._first_delay = first_delay
        self._group = asyncio.TaskGroup()
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._caller.__aenter__()
        await self._group.__aenter__()
        self._loops = [self._group.create_task(self._deliver_all()), self._group.create_task(self._listen())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for loop in self._loops:
            loop.cancel()
        if not isinstance(error, asyncio.CancelledError):
            kind = error = trace = None
        try:
            if self._calls:
                await asyncio.wait(self._calls.values(), timeout=_LINGER)
            for call in self._calls.values():
                call.cancel()
            await self._group.__aexit__(kind, error, trace)
        finally:
            await self._caller.__aexit__()

    async def _listen(self) -> None:
        with self._feed.subscribe() as inbox:
            while not inbox.closed:
                event = await inbox.next(_LOOK)
                if event is None or event.state in FINAL:
                    self._wake.set()

    async def _deliver_all(self) -> None:
        while True:
            self._wake.clear()
            try:
                wait = await self._start_due()
            except GatewayError:
                wait = _TROUBLE * random.uniform(0.5, 1.0)
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _start_due(self) -> float:
        """Start calls for what is due; returns in how many seconds to look again."""
        room = _AT_ONCE - len(self._calls)
        if room <= 0:
            return _LOOK
        now = self._store.clock()
        with typed():
            due = await self._client.call("ZRANGEBYSCORE", self._hooks, "-inf", now, "LIMIT", 0, room)
        for name in [each.decode() for each in due]:
            job = await self._lease(name)
            if job is not None:
                self._calls[name] = self._group.create_task(self._deliver(job))
        with typed():
            first = await self._client.call("ZRANGE", self._hooks, 0, 0, "WITHSCORES")
        return max(float(first[1]) - self._store.clock(), 0.0) if first else _LOOK

    async def _lease(self, name: str) -> Job | None:
        leased: Job | None = None

        def decide(replies: list[Any]) -> list[Command]:
            nonlocal leased
            job, due, now = read(name, replies[0]), replies[1], self._store.clock()
            leased = None
            if job is None or job.hook != "pending":
                return [("ZREM", self._hooks, name)]
            if due is None or float(due) > now:
                return []  # another gateway's
            leased = job
            return [
                ("HINCRBY", self._store.keys.job(name), "hook_attempts", 1),
                ("ZADD", self._hooks, now + _LEASE, name),
            ]

        await self._store.change(name, decide, [("ZSCORE", self._hooks, name)])
        return leased

    async def _deliver(self, job: Job) -> None:
        try:
            outcome = await self._caller.call(job.callback, self._body(job), int(self._store.clock()))
            await self._note(job, outcome)
        except GatewayError as problem:
            # The lease runs out, and it is called again.
            log_event("webhook_unsettled", logging.WARNING, job=job.id, reason=problem.message)
        finally:
            del self._calls[job.id]
            self._wake.set()

    async def _note(self, job: Job, outcome: Outcome) -> None:
        attempts = job.hook_attempts + 1
        key = self._store.keys.job(job.id)

        def decide(replies: list[Any]) -> list[Command]:
            now = read(job.id, replies[0])
            if now is None or now.hook != "pending":
                return [("ZREM", self._hooks, job.id)]
            if outcome.again and attempts < ATTEMPTS:
                return [("ZADD", self._hooks, self._store.clock() + self._delay(attempts), job.id)]
            word = "delivered" if outcome.delivered else f"given up: {outcome.reason}"
            return [("HSET", key, "hook", word), ("ZREM", self._hooks, job.id)]

        await self._store.change(job.id, decide)
        if not outcome.delivered:
            again = outcome.again and attempts < ATTEMPTS
            log_event(
                "webhook_failed", logging.WARNING, job=job.id, attempt=attempts, again=again, reason=outcome.reason
            )

    def _delay(self, attempts: int) -> float:
        return float(min(_LAST, self._first_delay * 2 ** (attempts - 1)) * random.uniform(0.5, 1.0))
