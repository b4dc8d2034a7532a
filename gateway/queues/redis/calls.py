"""The gateway's end: requests that were sent and are not answered yet.

Redis is not the record, this is: a request is kept until its caller has seen the last of it, and is sent again under
the same id when the queue has lost it. How that is noticed: `audit` looks whether an entry is still in its stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from redis.exceptions import RedisError, ResponseError

from gateway import errors
from gateway.message import BadMessage, pack_request, unpack_error, unpack_response
from gateway.queues.answers import Answers
from gateway.queues.base import Lane
from gateway.queues.redis import wire
from gateway.queues.redis.beside import INLINE, Missing
from gateway.queues.redis.link import Link
from gateway.queues.redis.routes import Part, Routes
from gateway.redis_client import Disconnected, unheeded
from gateway.redis_client.keys import GROUP
from gateway.types import Buffer, InferRequest, InferResponse

_PATIENCE = 30.0  # seconds that a request without a deadline waits for a Redis that is away
_YOUNG = 1.0  # seconds in which nothing is looked for: the usual wait is shorter, and looking costs a round trip
_FOREVER = 3600.0  # seconds that the tensors of a request without a deadline are kept
_MOST = 10_000  # pending entries asked for at once
_LOSSES = 5  # times that a request is lost though Redis was there all the time; a worker that cannot read it drops it
_SOME = 64  # entries read at once, which may have 256 KB each


class RedisCall(Answers):
    """One request: the `Responses` of `RedisQueue.submit`."""

    __slots__ = (
        "answered",
        "calls",
        "entries",
        "id",
        "lane",
        "losses",
        "missing",
        "part",
        "reference",
        "sending",
        "sent",
        "stream",
    )

    def __init__(self, request: InferRequest, lane: Lane, stream: str, identity: bytes, calls: Calls) -> None:
        super().__init__(request, calls.loop)
        self.part: Part | None = None  # of a sequence
        self.lane = lane
        self.stream = stream
        self.id = identity
        self.calls: Calls | None = calls
        self.sent = self.enqueued
        self.entries: list[bytes] = []  # where it is in the stream; more than once after it was sent again
        self.sending = False
        self.missing = False  # it was not found the last time
        self.losses = 0
        self.answered = False
        self.reference = ""  # of tensors that lie beside the stream

    def _leave(self) -> None:
        if self.calls is not None:
            self.calls.left(self)
            self.calls = None


class Calls:
    """All calls of one gateway process."""

    def __init__(self, link: Link, cancel: Callable[[bytes, bool], None], share: Callable[[Lane], bool]) -> None:
        """`cancel` tells workers of a call whose caller has gone, or whose deadline is over; `share` says whether those of a lane share /dev/shm."""
        self._link = link
        self._cancel = cancel
        self._share = share
        self.routes = Routes(link, self)
        self._calls: dict[bytes, RedisCall] = {}
        self._unanswered: dict[Lane, set[RedisCall]] = defaultdict(set)
        self._emptied = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self._down_since: float | None = None
        self._suspicious = False

    def submit(self, lane: Lane, request: InferRequest, klass: int) -> RedisCall:
        """Send a request. Raises `DeadlineExceeded` when its deadline is over."""
        stream = self._link.client.keys.requests(lane.model, lane.version, klass)
        part = self.routes.part_of(lane, request, stream) if request.parameters else None
        call = RedisCall(request, lane, stream, next(self._link.ids), self)
        if request.deadline is not None:
            call.expire_at(request.deadline)
        self._calls[call.id] = call
        self._unanswered[lane].add(call)
        if part is None:
            self.send(call)
        else:
            call.part, call.sending = part, True
            self.routes.enter(call, part)
        return call

    def left(self, call: RedisCall) -> None:
        """The caller has seen the last of it."""
        self._calls.pop(call.id, None)
        waiting = self._unanswered[call.lane]
        waiting.discard(call)
        if not waiting:
            del self._unanswered[call.lane]
            self._emptied.set()
        if call.reference:
            self._link.payloads.remove(call.reference)
        if call.part is not None:
            self.routes.left(call, call.part)
        if not call.answered:
            self._cancel(call.id, self._expired(call))

    def __contains__(self, call: object) -> bool:
        return call in self._calls

    def rows(self) -> dict[Lane, int]:
        """Rows of the unanswered requests of each lane."""
        return {lane: sum(call.request.rows for call in calls) for lane, calls in self._unanswered.items()}

    async def empty(self, lane: Lane) -> None:
        """Wait until no call of the lane is unanswered."""
        while self._unanswered.get(lane):
            self._emptied.clear()
            await self._emptied.wait()

    def close(self) -> None:
        """Answer all that still waits."""
        self.routes.close()
        for call in list(self._calls.values()):
            call.fail(errors.stopping())

    # --- answers

    async def deliver(self, frame: wire.Frame) -> None:
        """An answer has come. Raises `BadMessage` when it is none."""
        call = self._calls.get(frame.call)
        if call is None or call.done:
            self._link.counts.duplicates += 1
            if frame.kind == wire.ELSEWHERE:
                self._link.payloads.remove(_reference(frame))
            return
        try:
            answer = unpack_error(frame.header) if frame.kind == wire.ERROR else await self._response(frame)
        except BadMessage as problem:
            self._link.damaged(problem, "an answer")
            answer = errors.Internal("the answer was damaged on its way; the server's log has the details")
        except (Missing, Disconnected, RedisError) as problem:
            self._link.report("answer_lost", logging.WARNING, reason=str(problem))
            call.missing = True  # so that it is sent again
            return
        if isinstance(answer, errors.GatewayError):
            call.answered = True
            call.fail(answer)
        else:
            call.answered = answer.final
            call.reply(answer)

    async def _response(self, frame: wire.Frame) -> InferResponse:
        if frame.kind != wire.ELSEWHERE:
            return unpack_response(frame.header, frame.rest)
        reference = _reference(frame)
        response = unpack_response(frame.header, await self._link.payloads.get(reference))
        self._link.payloads.remove(reference)
        return response

    # --- sending

    def _expired(self, call: RedisCall) -> bool:
        deadline = call.request.deadline
        return deadline is not None and time.monotonic() >= deadline

    def send(self, call: RedisCall) -> asyncio.Task[None] | None:
        """Put it into its stream; a task does where that takes a while."""
        call.sending = True
        header, parts = pack_request(call.request)
        if sum(map(len, parts)) > INLINE:
            return self._link.start(self._send_large(call, header, parts), "payload")
        payload = b"".join(parts)  # which copies nothing where it is one piece of bytes
        self._add(call, header, wire.PAYLOAD, payload, (payload,))
        return None

    async def _send_large(self, call: RedisCall, header: bytes, parts: Sequence[Buffer]) -> None:
        if call.reference:
            self._link.payloads.remove(call.reference)  # what was sent before was lost, and it perhaps too
        ttl = _FOREVER if call.request.deadline is None else call.request.deadline - time.monotonic() + 10
        try:
            call.reference = await self._link.payloads.put(
                call.id.hex(), parts, same_host=self._share(call.lane), ttl=max(ttl, 1)
            )
        except (Disconnected, RedisError, errors.GatewayError) as problem:
            self._refused(call, problem)
            return
        if call.done:
            self._link.payloads.remove(call.reference)  # gone while it was being written
            return
        self._add(call, header, wire.REFERENCE, call.reference.encode(), parts)

    def _add(self, call: RedisCall, header: bytes, name: bytes, value: Buffer, parts: Sequence[Buffer]) -> None:
        deadline = call.request.deadline
        now = call.sent = time.monotonic()
        sequence = () if call.part is None else (call.part.token, call.part.after)
        budget = 0 if deadline is None else max(int((deadline - now) * 1000), 1)
        envelope = wire.encode(wire.Envelope(call.id, self._link.process, budget, *sequence))
        fields: tuple[Any, ...] = (wire.ENVELOPE, envelope, wire.HEADER, header, name, value)
        if self._link.seal.size:
            signature = self._link.seal.sign(envelope, header, b"".join(parts))
            fields += (wire.SIGNATURE, signature)
        sent = self._link.client.call("XADD", call.stream, "*", *fields)
        sent.add_done_callback(partial(self._sent, call))

    def _sent(self, call: RedisCall, sent: asyncio.Future[bytes]) -> None:
        call.sending = False
        problem = asyncio.CancelledError() if sent.cancelled() else sent.exception()
        if problem is None:
            call.entries.append(sent.result())
        else:
            self._refused(call, problem)
        if call.part is not None:
            self.routes.stored(call.part)

    def _refused(self, call: RedisCall, problem: BaseException) -> None:
        call.sending = False
        if isinstance(problem, ResponseError):
            self._link.report("request_not_stored", reason=str(problem), model=call.lane.model)
            error = errors.Unavailable(
                "the queue's Redis does not take requests now (its memory is full, or it refuses)"
            )
            if call.part is None:
                call.fail(error)
            else:
                self.routes.refuse(call, call.part, error)
        else:
            call.missing = True  # it may be there or not: `audit` sends it once Redis is back

    # --- what the queue has lost

    def suspect(self) -> None:
        """Redis was away or is another one: believe nothing of what it was given before."""
        self._suspicious = True

    async def audit(self) -> None:
        """Send again what is neither waiting nor being worked on any more. Raises `Disconnected`."""
        now = time.monotonic()
        if not self._link.client.connected:
            self._wait_for_redis(now)
            return
        self._down_since = None
        suspicious, self._suspicious = self._suspicious, False
        self.routes.look()
        streams: dict[str, list[RedisCall]] = defaultdict(list)
        for call in self._calls.values():
            if not call.done and (suspicious or call.missing or now - call.sent > _YOUNG):
                streams[call.stream].append(call)
                if call.part is not None:
                    self.routes.refresh(call.part)
        try:
            async with asyncio.TaskGroup() as group:
                for stream, calls in streams.items():
                    group.create_task(self._audit(stream, calls, suspicious=suspicious))
        except* (Disconnected, RedisError) as problems:
            self._suspicious |= suspicious
            raise problems.exceptions[0] from None

    async def _audit(self, stream: str, calls: Sequence[RedisCall], *, suspicious: bool) -> None:
        entries = sorted((entry for call in calls for entry in call.entries), key=wire.order)
        begun, waiting = await self._present(stream, entries, suspicious=suspicious) if entries else (set(), set())
        for call in calls:
            if call.part is not None and self.routes.orphaned(call.part):
                self._orphaned(call, call.part, waiting)
            else:
                self._judge(call, begun | waiting, suspicious=suspicious)

    def _judge(self, call: RedisCall, there: set[bytes], *, suspicious: bool) -> None:
        if call.done or call.sending:
            return
        part = call.part
        if any(entry in there for entry in call.entries):
            call.missing = False
        elif part is not None and call.missing:  # it is not to run again
            self.routes.lose(call, part)
        elif part is None and call.losses >= _LOSSES:
            self._link.report("request_lost", model=call.lane.model, times=call.losses)
            call.fail(
                errors.Unavailable(
                    f"the request was sent {call.losses + 1} times and no worker kept it; whoever runs this server should "
                    "see whether its gateways and workers have the same queue key and release"
                )
            )
        elif part is None and (call.missing or suspicious):
            call.losses += not suspicious
            self._link.counts.resubmitted += 1
            call.missing = False
            call.entries.clear()
            self.send(call)
        else:
            call.missing = True  # its answer may be on the way: look once more

    def _orphaned(self, call: RedisCall, part: Part, waiting: set[bytes]) -> None:
        """The worker is dead that it was sent to, which has not read what is `waiting`."""
        if call.done or call.sending:
            return
        alone = not any(
            other.part is not None and other.part.token == part.token
            for other in self._calls.values()
            if other is not call
        )
        if part.start and alone and waiting.intersection(call.entries):
            for entry in call.entries:  # should the worker be alive
                self._link.client.call("XDEL", call.stream, entry).add_done_callback(unheeded)
            call.entries.clear()
            call.missing = False
            call.sending = True
            self.routes.begin_again(call, part)
        else:
            self.routes.lose(call, part)

    def _wait_for_redis(self, now: float) -> None:
        self._down_since = self._down_since or now
        if now - self._down_since > _PATIENCE:
            for call in list(self._calls.values()):
                if call.request.deadline is None:
                    call.fail(errors.Unavailable("the queue's Redis cannot be reached; try again later"))

    async def _present(
        self, stream: str, entries: Sequence[bytes], *, suspicious: bool
    ) -> tuple[set[bytes], set[bytes]]:
        """Which of these entries, in order, are being worked on, and which are waiting. Raises `Disconnected`."""
        client = self._link.client
        try:
            groups = await client.call("XINFO", "GROUPS", stream)
        except ResponseError:
            return set(), set()  # no such stream
        ours = [group for group in map(wire.fields, groups) if group[b"name"] == GROUP.encode()]
        delivered = wire.order(ours[0][b"last-delivered-id"]) if ours else (0, 0)
        found = await self._pending(stream, entries) if ours else set()
        waiting = [entry for entry in entries if wire.order(entry) > delivered]
        # Where the oldest is, the others are too: Redis forgets what is old, all that is young, or everything.
        if suspicious or (waiting and not await self._stored(stream, waiting[:1])):
            waiting = await self._stored(stream, waiting)
        return found, set(waiting)

    async def _pending(self, stream: str, entries: Sequence[bytes]) -> set[bytes]:
        """Those of a range of entries that were delivered and are not acknowledged."""
        found: set[bytes] = set()
        first = entries[0]
        while True:
            some = await self._link.client.call("XPENDING", stream, GROUP, first, entries[-1], _MOST)
            found.update(each[0] for each in some)
            if len(some) < _MOST:
                return found
            first = b"(" + some[-1][0]

    async def _stored(self, stream: str, entries: Sequence[bytes]) -> list[bytes]:
        """Those of these entries that are in the stream."""
        found: list[bytes] = []
        for start in range(0, len(entries), _SOME):
            some = entries[start : start + _SOME]
            replies = await asyncio.gather(*(self._link.client.call("XRANGE", stream, each, each) for each in some))
            found += [entry for entry, reply in zip(some, replies, strict=True) if reply]
        return found


def _reference(frame: wire.Frame) -> str:
    """Where the tensors of an answer lie. Raises `BadMessage`."""
    try:
        return str(frame.rest, "utf-8")
    except UnicodeDecodeError:
        raise BadMessage("an answer does not say where its tensors are") from None
