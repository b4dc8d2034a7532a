"""Requests that were lost with their worker: one of them may have killed it.

Where requests are run outside the worker none of them did, and only what was lost twice is suspect. Each is run alone,
and the next when it is acknowledged, so that a death has one suspect more at most. Redis' count of deliveries says how
often a request was begun: it grows just before a suspect runs, and not with each change of hands.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Container
from functools import partial

from gateway.queues.redis.jobs import RedisJob
from gateway.queues.redis.link import Link
from gateway.queues.redis.outbox import Outbox
from gateway.redis_client.keys import GROUP


class Suspects:
    """Those of one lane, which holds them too. `run` is given each when its turn has come."""

    def __init__(self, link: Link, outbox: Outbox, held: Container[bytes], run: Callable[[RedisJob], None]) -> None:
        self._link = link
        self._outbox = outbox
        self._held = held
        self._run = run
        self._waiting: deque[tuple[RedisJob, int]] = deque()  # and how often it was begun
        self._tried: RedisJob | None = None
        outbox.on_acknowledged.append(self.go_on)

    def add(self, job: RedisJob, deliveries: int) -> None:
        """A request that was begun so often, and never answered."""
        job.request.signature = object()  # equal to no other, so it joins no batch
        self._waiting.append((job, deliveries))
        self.go_on()

    def go_on(self) -> None:
        """Begin the next, unless one is being tried."""
        while self._waiting and not self._busy():
            job, deliveries = self._waiting.popleft()
            if job.done:
                job.give_up()
                continue
            self._tried = job
            counted = self._link.client.call(
                "XCLAIM", job.stream, GROUP, self._link.process, 0, job.entry, "RETRYCOUNT", deliveries + 1, "JUSTID"
            )
            counted.add_done_callback(partial(self._counted, job, deliveries))

    def _busy(self) -> bool:
        tried = self._tried
        if tried is None:
            return False
        return tried.entry in self._held or tried.entry in self._outbox.unacknowledged[tried.stream]

    def _counted(self, job: RedisJob, deliveries: int, counted: asyncio.Future[list[bytes]]) -> None:
        if counted.cancelled() or counted.exception() is not None:
            self._tried = None
            self._waiting.appendleft((job, deliveries))  # until `go_on` is called again
        elif counted.result():
            self._run(job)
        else:
            job.give_up()  # it is acknowledged: its worker was not dead
