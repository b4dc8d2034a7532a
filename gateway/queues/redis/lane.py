"""The worker's end of one lane: one task reads its streams, the consumers of this process share what it brings.

An entry that was read is this process's until it is acknowledged: it waits here, is in a consumer's hands, or its
answer is on the way. No more than the consumers' credits are read, so that a busy worker leaves the rest to others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress

from redis.exceptions import RedisError

from gateway import errors
from gateway.message import BadMessage, pack_request, unpack_request, version_of
from gateway.queues.base import Job, Keeps, Lane
from gateway.queues.redis import wire
from gateway.queues.redis.beside import Missing
from gateway.queues.redis.cancelled import Cancelled
from gateway.queues.redis.jobs import RedisJob, Stub
from gateway.queues.redis.link import Link
from gateway.queues.redis.outbox import Outbox
from gateway.queues.redis.suspects import Suspects
from gateway.redis_client import Disconnected
from gateway.redis_client.keys import GROUP
from gateway.telemetry import log_event
from gateway.types import Buffer, InferRequest

CLASSES = (1, 2, 3)
_BLOCK = 1.0  # seconds; also how long a stop may have to wait for the reader
_TRIES = (
    2  # what was begun so often, and lost with each of its workers, is not run again; once more where it is contained
)
_DEAD_KEPT, _DEAD_BYTES = 1000, 64 << 20  # dead letters of a lane, and how large all of them may be if they are alike


class LaneReader:
    """Reads a lane while it has consumers."""

    def __init__(
        self, link: Link, lane: Lane, outbox: Outbox, cancelled: Cancelled, gone: Callable[[str], bool]
    ) -> None:
        """`gone` says whether a gateway is known to be dead."""
        self.lane = lane
        self.outbox = outbox
        self.streams = [link.client.keys.requests(lane.model, lane.version, each) for each in CLASSES]
        self.held: dict[bytes, RedisJob] = {}  # by entry
        self.foreign: set[bytes] = set()  # entries of ours that only a newer worker can read
        self.suspects = Suspects(link, outbox, self.held, self._add)
        self._calls: dict[bytes, RedisJob] = {}
        self._link = link
        self._cancelled = cancelled
        self._gone = gone
        self._waiting: deque[RedisJob] = deque()
        self._consumers: list[RedisConsumer] = []
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._room = asyncio.Event()
        self._reader = link.client.reader()
        self._task: asyncio.Task[None] | None = None

    # --- consumers

    def attach(self, consumer: RedisConsumer) -> None:
        """A consumer takes from this lane from now on."""
        self._consumers.append(consumer)
        self._room.set()
        if self._task is None or self._task.done():
            self._task = self._link.start(self._read(), f"lane:{self.lane.model}/{self.lane.version}")

    def detach(self, consumer: RedisConsumer) -> None:
        """A consumer takes no more."""
        self._consumers.remove(consumer)
        self._room.set()
        while self._waiters:
            self._wake()

    @property
    def contained(self) -> bool:
        """Whether a request that kills what runs it leaves this process alive: that a worker died is not its doing."""
        return bool(self._consumers) and all(consumer.contained for consumer in self._consumers)

    @property
    def served(self) -> bool:
        """Whether anybody takes from this lane here."""
        return bool(self._consumers)

    async def stop(self) -> None:
        """Close the consumers and wait until the reader has ended."""
        for consumer in list(self._consumers):
            consumer.close()
        if self._task is not None:
            with suppress(Disconnected, RedisError):
                await self._reader.unblock()
            await asyncio.wait([self._task])

    def cancel(self) -> None:
        """End the reader at once: what it was given stays pending."""
        if self._task is not None:
            self._task.cancel()

    def idle(self) -> list[RedisJob]:
        """Jobs that wait here and that nobody will take; the caller hands them to another worker and disowns them."""
        return [] if self._consumers else [job for job in self._waiting if not job.done]

    # --- jobs

    def collect(self, limit: int) -> list[RedisJob]:
        """Up to so many of the jobs that wait."""
        jobs: list[RedisJob] = []
        while self._waiting and len(jobs) < limit:
            job = self._waiting.popleft()
            if job.done:
                job.give_up()
            else:
                jobs.append(job)
        return jobs

    def waiter(self) -> asyncio.Future[None]:
        """Done once there may be jobs, or no more to wait for. `leave` it."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if self._waiting:
            self._wake()
        return waiter

    def leave(self, waiter: asyncio.Future[None]) -> None:
        """Wait no more; whoever was woken for jobs that are still there passes it on."""
        if not waiter.done():
            self._waiters.remove(waiter)
        elif self._waiting:
            self._wake()

    def put_back(self, job: RedisJob) -> None:
        """See `Holder`."""
        self._waiting.appendleft(job)
        self._wake()

    def forget(self, job: RedisJob) -> None:
        """See `Holder`."""
        self.held.pop(job.entry, None)
        self._calls.pop(job.call, None)
        self._room.set()

    def drop(self, call: bytes) -> bool:
        """Its caller has gone. False when it is not held here."""
        job = self._calls.get(call)
        if job is None:
            return False
        job.give_up()
        return True

    def give_up_orphans(self, now: float) -> None:
        """Let go of jobs whose deadline has passed, and of those whose gateway has died."""
        self.suspects.go_on()
        for job in list(self.held.values()):
            if job.expired(now):
                job.give_up()
            elif self._gone(job.reply_to):
                self._link.counts.orphans += 1
                job.give_up()

    def abandon(self, calls: Container[bytes]) -> None:
        """This process answers these calls no more."""
        for call, job in list(self._calls.items()):
            if call in calls:
                job.give_up()

    def disown(self, jobs: Iterable[RedisJob]) -> None:
        """These are another worker's from now on."""
        for job in jobs:
            self.forget(job)
        self._waiting = deque(job for job in self._waiting if job.entry in self.held)

    # --- reading

    async def _read(self) -> None:
        client, reader = self._link.client, self._reader
        try:
            while self._consumers:
                room = await self._room_left()
                if not room:
                    continue
                try:
                    reply = await reader.call(
                        "XREADGROUP", "GROUP", GROUP, self._link.process, "COUNT", room, "BLOCK", int(_BLOCK * 1000),
                        "STREAMS", *self.streams, *[">"] * len(self.streams), seconds=_BLOCK,
                    )  # fmt: skip
                except Disconnected:
                    await client.online()
                except RedisError as problem:
                    await self._repair(problem)
                else:
                    for stream, entry, fields in wire.entries(reply):
                        await self.enter(stream.decode(), entry, fields)
        finally:
            await reader.close()

    async def _room_left(self) -> int:
        """How many entries to ask for; 0 when the consumers may have changed meanwhile."""
        room = self.room()
        if room > self._credits() // 4:  # a few at a time would cost a round trip each
            return room
        self._room.clear()
        await self._room.wait()
        return 0

    def more(self) -> None:
        """There may be room again."""
        self._room.set()

    def room(self) -> int:
        """How many more requests may be held here."""
        return self._credits() - len(self.held)

    def _credits(self) -> int:
        return sum(consumer.credits for consumer in self._consumers)

    async def _repair(self, problem: RedisError) -> None:
        """The group is missing when the lane is new, and after Redis has lost it."""
        if not str(problem).startswith("NOGROUP"):
            self._link.report("lane_unreadable", model=self.lane.model, reason=str(problem))
            await asyncio.sleep(_BLOCK)  # e.g. no permission: an operator has to see to it
        made = [self._link.client.call("XGROUP", "CREATE", stream, GROUP, "0", "MKSTREAM") for stream in self.streams]
        for refusal in await asyncio.gather(*made, return_exceptions=True):
            if isinstance(refusal, RedisError) and not str(refusal).startswith("BUSYGROUP"):  # that is: it is there
                self._link.report("lane_not_made", model=self.lane.model, reason=str(refusal))
                await asyncio.sleep(_BLOCK)  # e.g. no memory

    async def enter(
        self, stream: str, entry: bytes, fields: dict[bytes, bytes], deliveries: int = 1, *, orphan: bool = False
    ) -> None:
        """Hold an entry that is this process's now, or see it off. An `orphan` was begun so often, and lost each time."""
        if entry in self.held:
            return
        try:
            job = await self._open(stream, entry, fields)
        except (BadMessage, KeyError) as problem:
            self._link.damaged(problem, stream)
            self.outbox.done(Stub(stream, entry))
        except Missing:  # nobody waits any more, or the gateway misses it and sends it again
            self._link.report("payload_missing", logging.WARNING, stream=stream)
            self.outbox.done(Stub(stream, entry))
        except (Disconnected, RedisError) as problem:
            # It stays ours: `Recovery` finds it pending and not held.
            self._link.report("payload_unreadable", logging.WARNING, stream=stream, reason=str(problem))
        else:
            if job is not None and entry not in self.held and self._begin(job):  # as it may be by now
                self._admit(job, deliveries, orphan=orphan)

    async def _open(self, stream: str, entry: bytes, fields: dict[bytes, bytes]) -> RedisJob | None:
        """The job of an entry; None when it is not to be run here."""
        header = fields[wire.HEADER]
        if version_of(header) > self._link.reads:
            self.foreign.add(entry)
            self._link.bell.ring()
            return None
        envelope = wire.read_envelope(fields[wire.ENVELOPE])
        if self._unwanted(envelope):
            self.outbox.done(Stub(stream, entry))
            return None
        return RedisJob(self, stream, entry, envelope, await self._request(header, fields))

    def _unwanted(self, envelope: wire.Envelope) -> bool:
        counts = self._link.counts
        if envelope.call in self._calls:
            counts.duplicates += 1
        elif envelope.call in self._cancelled or self._gone(envelope.reply_to):
            counts.orphans += 1
        else:
            return False
        return True

    async def _request(self, header: bytes, fields: dict[bytes, bytes]) -> InferRequest:
        payload: Buffer
        if (reference := fields.get(wire.REFERENCE)) is not None:
            payload = await self._link.payloads.get(reference.decode())
        else:
            payload = fields[wire.PAYLOAD]
        self._link.seal.verify(fields.get(wire.SIGNATURE, b""), fields[wire.ENVELOPE], header, payload)
        return unpack_request(header, payload)

    def _begin(self, job: RedisJob) -> bool:
        """Hold a job, and know its times; false when it waited for a worker until its deadline."""
        now = time.monotonic()
        job.enqueued = now - max(self._link.client.clock() - wire.milliseconds(job.entry) / 1000, 0.0)
        if job.budget:
            job.request.deadline = job.enqueued + job.budget
            if job.expired(now):
                self.outbox.done(job)
                return False
        self.held[job.entry] = job
        self._calls[job.call] = job
        return True

    def _admit(self, job: RedisJob, deliveries: int, *, orphan: bool) -> None:
        if orphan and deliveries >= _TRIES + self.contained:
            self._bury(job, deliveries)
        elif orphan and (deliveries > 1 or not self.contained):
            self.suspects.add(job, deliveries)
        else:
            if deliveries > 1 and not orphan:
                job.request.signature = object()  # it was being tried
            self._add(job)

    def _add(self, job: RedisJob) -> None:
        self._waiting.append(job)
        self._wake()

    def _bury(self, job: RedisJob, deliveries: int) -> None:
        """A request that has outlived its workers is kept for the operator, and answered."""
        self._link.counts.dead_letters += 1
        client = self._link.client
        lane, reason = self.lane, f"begun {deliveries} times and never answered: its worker died each time"
        log_event("dead_letter", logging.ERROR, model=lane.model, id=job.request.id, reason=reason)
        key = client.keys.dead(lane.model, lane.version)
        header, parts = pack_request(job.request)
        payload = b"".join(parts)
        kept = max(min(_DEAD_KEPT, _DEAD_BYTES // (len(payload) + 1)), 1)
        buried = client.call(
            "XADD", key, "MAXLEN", "~", kept, "*", "id", job.request.id, "reason", reason, "h", header, "p", payload
        )
        buried.add_done_callback(self._buried)
        job.fail(
            errors.Internal(
                f"the request was given up: {self.lane.model} has lost {deliveries} workers that were running it"
            )
        )

    def _buried(self, done: asyncio.Future[bytes]) -> None:
        problem = asyncio.CancelledError() if done.cancelled() else done.exception()
        if problem is not None:
            self._link.report("dead_letter_not_kept", model=self.lane.model, reason=repr(problem))

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class RedisConsumer:
    """The `Consumer` protocol over lanes of a Redis queue."""

    def __init__(
        self, lanes: Sequence[LaneReader], limit: int, *, contained: bool = False, keeps: Keeps | None = None
    ) -> None:
        """Together with what it was given and has not answered, `limit` requests of a lane are read."""
        self.credits = limit
        self.keeps = keeps
        self.contained = contained
        self._lanes = lanes
        self._closed = asyncio.Event()
        for lane in lanes:
            lane.attach(self)
        if keeps is not None:
            keeps.freed = self._freed

    async def take(self, limit: int) -> list[Job]:
        """See `Consumer.take`."""
        while not self._closed.is_set():
            jobs: list[Job] = []
            for lane in self._lanes:
                jobs += lane.collect(limit - len(jobs))
            if jobs:
                return jobs
            await self._arrival()
        return []

    def close(self) -> None:
        """See `Consumer.close`."""
        if self._closed.is_set():
            return
        self._closed.set()
        for lane in self._lanes:
            lane.detach(self)

    def _freed(self) -> None:
        for lane in self._lanes:
            lane.more()

    async def _arrival(self) -> None:
        waiters = [lane.waiter() for lane in self._lanes]
        try:
            await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for lane, waiter in zip(self._lanes, waiters, strict=True):
                lane.leave(waiter)
