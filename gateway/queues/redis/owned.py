"""The worker's end of sequences: what it begins, it has to the end.

A beginning comes in the lane that all workers read, no sooner than there is a place for it, and is claimed before it runs.
What follows comes in a stream that only this worker reads. Its entries are taken in their order and never again, so that
no request runs twice: what is lost of it ends the sequence, as does the death of the worker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from redis.exceptions import RedisError

from gateway import sequence as refusals
from gateway.errors import InvalidArgument
from gateway.message import BadMessage, pack_error
from gateway.queues.base import Keeps, Lane
from gateway.queues.redis import wire
from gateway.queues.redis.beside import Missing
from gateway.queues.redis.cancelled import Cancelled
from gateway.queues.redis.jobs import RedisJob, Stub
from gateway.queues.redis.lane import LaneReader, RedisConsumer
from gateway.queues.redis.link import Link
from gateway.queues.redis.outbox import Answered, Outbox
from gateway.queues.redis.routes import life
from gateway.redis_client import Disconnected, unheeded
from gateway.redis_client.keys import GROUP
from gateway.sequence import SequenceId, id_of

_KNOWN = 100_000  # sequences
_MOST = 10_000  # requests held
_LIVES, _RENEWED = 600.0, 60.0  # seconds that the stream outlives its worker, and between two times that it is told so
_BLOCK = 1.0  # seconds


class Begun:
    """The tokens of sequences that were begun here and have no gap."""

    def __init__(self) -> None:
        self._tokens: dict[bytes, dict[str, bytes]] = {}  # and what came last of it from each gateway
        self._latest: dict[SequenceId, bytes] = {}

    def add(self, token: bytes) -> None:
        """It begins."""
        self._tokens[token] = {}
        if len(self._tokens) > _KNOWN:
            del self._tokens[next(iter(self._tokens))]

    def take_over(self, id_: SequenceId, token: bytes) -> None:
        """Its first request is taken: what is yet to come of an earlier beginning under this id is too late."""
        before = self._latest.pop(id_, token)
        if before != token:
            self.end(before)
        self._latest[id_] = token
        if len(self._latest) > _KNOWN:
            del self._latest[next(iter(self._latest))]

    def goes_on(self, token: bytes) -> bool:
        """Whether a request may go on with it."""
        if token not in self._tokens:
            return False
        self._tokens[token] = self._tokens.pop(token)  # so that those longest unused are first
        return True

    def come(self, envelope: wire.Envelope) -> None:
        """A request has come. If the one before it has not, Redis has lost that, and the sequence ends."""
        token, gateway = envelope.sequence, envelope.reply_to
        came = self._tokens.get(token)
        if came is None:
            return
        if envelope.after and envelope.after != came.get(gateway, token):  # first is what began it
            self.end(token)
        came[gateway] = envelope.call

    def __contains__(self, token: bytes) -> bool:
        return token in self._tokens

    def end(self, token: bytes) -> None:
        """Something of it was lost."""
        self._tokens.pop(token, None)


class SharedReader(LaneReader):
    """A lane that every worker of its version reads. Where it is one of sequences all of it are beginnings."""

    def __init__(  # noqa: PLR0917
        self,
        link: Link,
        lane: Lane,
        outbox: Outbox,
        cancelled: Cancelled,
        gone: Callable[[str], bool],
        leaves: Callable[[Lane], bool],
    ) -> None:
        """`leaves` says whether other workers are to begin sequences."""
        super().__init__(link, lane, outbox, cancelled, gone)
        self._leaves = leaves
        self._left: list[RedisJob] = []  # beginnings for others
        self.begun = Begun()

    def room(self) -> int:
        """See `LaneReader.room`: of sequences, so many as there are places for."""
        keeps = self._keeps()
        if not keeps:
            return super().room()
        return 0 if self._leaves(self.lane) else sum(each.places() for each in keeps) - len(self._waiting)

    def _credits(self) -> int:
        return 0 if self._keeps() else super()._credits()  # none to wait for

    def _keeps(self) -> list[Keeps]:
        return [consumer.keeps for consumer in self._consumers if consumer.keeps is not None]

    def give_up_orphans(self, now: float) -> None:
        """See `LaneReader.give_up_orphans`; who leaves may be alone by now."""
        super().give_up_orphans(now)
        self.more()
        if self._left and not self._leaves(self.lane):
            left, self._left = self._left, []
            for job in left:
                self._add(job)

    def collect(self, limit: int) -> list[RedisJob]:
        """See `LaneReader.collect`. What nobody has taken is not claimed: it may be another worker's yet."""
        jobs = super().collect(limit)
        if self._keeps():
            for job in jobs:
                if job.sequence:
                    self._claim(job)
        return jobs

    def put_back(self, job: RedisJob) -> None:
        """See `Holder`. What was claimed is nobody else's."""
        if job.sequence and not self._consumers:
            self.begun.end(job.sequence)
            job.fail(refusals.lost(_id(job), self.lane.model))
        else:
            super().put_back(job)

    def idle(self) -> list[RedisJob]:
        """See `LaneReader.idle`."""
        return [*super().idle(), *(job for job in self._left if not job.done)]

    def disown(self, jobs: Iterable[RedisJob]) -> None:
        """See `LaneReader.disown`."""
        super().disown(jobs)
        self._left = [job for job in self._left if job.entry in self.held]

    def _admit(self, job: RedisJob, deliveries: int, *, orphan: bool) -> None:
        if not job.sequence:
            super()._admit(job, deliveries, orphan=orphan)
        elif orphan or job.sequence in self.begun:  # it may have run
            self.begun.end(job.sequence)
            job.fail(refusals.lost(_id(job), self.lane.model))
        elif self._leaves(self.lane):  # it came with what was asked for before
            self._left.append(job)
        else:
            self._add(job)

    def _claim(self, job: RedisJob) -> None:
        client, lane = self._link.client, self.lane
        id_ = _id(job)
        key = client.keys.sequence(*lane, id_)
        idle = max((each.idle for each in self._keeps()), default=0.0)
        # Whoever hears of an answer finds this done: it goes out first. A sequence that has ended meanwhile stays so.
        client.call("HSETNX", key, job.sequence, self._link.process).add_done_callback(unheeded)
        client.call("PEXPIRE", key, life(idle)).add_done_callback(unheeded)
        self.begun.add(job.sequence)
        self.begun.take_over(id_, job.sequence)


class OwnReader(LaneReader):
    """The stream of what follows. Once nobody takes from it, it is read on for a while to refuse what comes too late."""

    def __init__(  # noqa: PLR0917
        self,
        link: Link,
        lane: Lane,
        outbox: Outbox,
        cancelled: Cancelled,
        gone: Callable[[str], bool],
        begun: Begun,
    ) -> None:
        super().__init__(link, lane, outbox, cancelled, gone)
        self.stream = link.client.keys.owned(*lane, link.process)
        self.streams = [self.stream]
        self._begun = begun
        self._ended = False
        self._last = (0, 0)  # the newest entry that was seen to
        self._renew_at = 0.0
        self._until = 0.0  # when nobody takes from it
        outbox.on_lost.append(self._lost)

    def detach(self, consumer: RedisConsumer) -> None:
        """See `LaneReader.detach`."""
        super().detach(consumer)
        if not self._consumers:
            self._until = time.monotonic() + _LIVES
            while self._waiting:
                self._refuse(self._waiting.popleft())

    def put_back(self, job: RedisJob) -> None:
        """See `Holder`."""
        if self._consumers:
            super().put_back(job)
        else:
            self._refuse(job)

    async def stop(self) -> None:
        """See `LaneReader.stop`. What nobody has read is lost, as its gateways see."""
        self._ended = True
        await super().stop()
        await self._link.client.call("UNLINK", self.stream)

    def room(self) -> int:
        """See `LaneReader.room`. What a sequence needs to go on may be last in line, so all of it is read."""
        return max(_MOST - len(self.held), 0)

    def collect(self, limit: int) -> list[RedisJob]:
        """See `LaneReader.collect`."""
        jobs: list[RedisJob] = []
        while self._waiting and len(jobs) < limit:
            job = self._waiting.popleft()
            if job.sequence == job.call:
                self._begun.take_over(_id(job), job.sequence)
            if job.done:
                job.give_up()
                self._begun.end(job.sequence)
            elif self._begun.goes_on(job.sequence):
                jobs.append(job)
            else:
                job.fail(refusals.broken(_id(job), self.lane.model))
        return jobs

    async def _read(self) -> None:
        place: str | bytes = "0"  # in what was read before and is in nobody's hands, or ">" for what is new
        try:
            while not self._ended and (self._consumers or time.monotonic() < self._until):
                try:
                    reply = await self._next(place)
                    found = list(wire.entries(reply))
                    for stream, entry, fields in found:
                        await self.enter(stream.decode(), entry, fields)
                except Disconnected:
                    await self._link.client.online()
                    place = "0"
                except RedisError as problem:
                    await self._repair(problem)
                    place = "0"
                else:
                    if place != ">":
                        place = found[-1][1] if found else ">"
        finally:
            await self._reader.close()

    async def _next(self, place: str | bytes) -> object:
        self._renew()
        while not (room := self.room()):
            self._room.clear()
            await self._room.wait()
        return await self._reader.call(
            "XREADGROUP", "GROUP", GROUP, self._link.process, "COUNT", room, "BLOCK", int(_BLOCK * 1000),
            "STREAMS", self.stream, place, seconds=_BLOCK,
        )  # fmt: skip

    def _renew(self) -> None:
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew_at = now + _RENEWED
            self._link.client.call("PEXPIRE", self.stream, int(_LIVES * 1000)).add_done_callback(unheeded)

    async def _repair(self, problem: RedisError) -> None:
        await super()._repair(problem)
        self._renew_at, self._last = 0.0, (0, 0)  # it is another stream now

    async def enter(
        self, stream: str, entry: bytes, fields: dict[bytes, bytes], deliveries: int = 1, *, orphan: bool = False
    ) -> None:
        """See `LaneReader.enter`. Raises `Disconnected` and `RedisError` for what has to be read again."""
        del deliveries, orphan
        if entry in self.held or entry in self.outbox.unacknowledged[stream]:
            return
        envelope: wire.Envelope | None = None
        job: RedisJob | None = None
        try:
            envelope = wire.read_envelope(fields[wire.ENVELOPE])
            if wire.order(entry) > self._last:
                job = await self._open(stream, entry, fields)
            else:  # it was, and its answer is lost
                self._refuse_unread(stream, entry, envelope.call, envelope.reply_to)
        except (BadMessage, KeyError) as problem:
            self._link.damaged(problem, stream)
            self.outbox.done(Stub(stream, entry))
        except Missing:
            self._link.report("payload_missing", logging.WARNING, stream=stream)
            self.outbox.done(Stub(stream, entry))
        if job is not None and envelope is not None and self._begin(job):
            self._accept(job, envelope)
        elif envelope is not None:
            self._begun.end(envelope.sequence)
            if entry in self.foreign:  # it is of a newer release, which no other worker can help with
                self.foreign.discard(entry)
                self._refuse_unread(stream, entry, envelope.call, envelope.reply_to)
        self._last = max(self._last, wire.order(entry))

    def _accept(self, job: RedisJob, envelope: wire.Envelope) -> None:
        if not self._consumers:
            self._refuse(job)
            return
        if job.sequence == job.call:
            self._begun.add(job.sequence)
        self._begun.come(envelope)
        self._add(job)

    def _refuse(self, job: RedisJob) -> None:
        self._begun.end(job.sequence)
        if not job.fail(refusals.lost(_id(job), self.lane.model)):
            job.give_up()

    def _lost(self, job: Answered) -> None:
        """Nobody will hear of its answer, and it is not to be run again."""
        if job.stream == self.stream:
            if isinstance(job, RedisJob):
                self._begun.end(job.sequence)
            self._refuse_unread(job.stream, job.entry, job.call, job.reply_to)

    def _refuse_unread(self, stream: str, entry: bytes, call: bytes, reply_to: str) -> None:
        stub = Stub(stream, entry, call, reply_to)
        lost = refusals.lost("of this request", self.lane.model)
        self.outbox.answer(stub, wire.ERROR, pack_error(lost), final=True)


def _id(job: RedisJob) -> SequenceId:
    try:
        return id_of(job.request)
    except InvalidArgument:  # no gateway of ours sends such
        return 0
