"""A request on a worker: read from its lane's stream, and pending there until it is answered."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from gateway import errors
from gateway.message import pack_error, pack_response
from gateway.queues.redis import wire
from gateway.queues.redis.outbox import Outbox
from gateway.types import InferRequest, InferResponse


class Holder(Protocol):
    """What a job needs of the lane that holds it."""

    outbox: Outbox

    def forget(self, job: RedisJob) -> None:
        """The job is over."""

    def put_back(self, job: RedisJob) -> None:
        """The job goes back to the front."""


@dataclass(slots=True)
class Stub:
    """An entry that is no job: it is acknowledged as it is."""

    stream: str
    entry: bytes
    call: bytes = b""
    reply_to: str = ""


class RedisJob:
    """The `Job` protocol. `entry` of `stream` is where it came from, `call` whom its answers are for."""

    __slots__ = ("_over", "budget", "call", "enqueued", "entry", "lane", "reply_to", "request", "sequence", "stream")

    def __init__(self, lane: Holder, stream: str, entry: bytes, envelope: wire.Envelope, request: InferRequest) -> None:
        self.lane = lane
        self.stream = stream
        self.entry = entry
        self.call = envelope.call
        self.reply_to = envelope.reply_to
        self.sequence = envelope.sequence
        self.request = request
        self.enqueued = 0.0
        self.budget = envelope.budget_ms / 1000  # seconds from then to the deadline; 0: no deadline
        self._over = False

    @property
    def done(self) -> bool:
        """See `Job.done`."""
        return self._over or self.expired(time.monotonic())

    def expired(self, now: float) -> bool:
        """Whether its gateway has told the caller that the deadline passed."""
        deadline = self.request.deadline
        return deadline is not None and now > deadline

    def reply(self, response: InferResponse) -> bool:
        """See `Job.reply`."""
        if self.done:
            return False
        header, parts = pack_response(response)
        self._end(response.final)
        self.lane.outbox.answer(self, wire.RESPONSE, header, parts, final=response.final)
        return True

    def fail(self, error: errors.GatewayError) -> bool:
        """See `Job.fail`."""
        if self.done:
            return False
        self._end(True)
        self.lane.outbox.answer(self, wire.ERROR, pack_error(error), final=True)
        return True

    def release(self) -> None:
        """See `Job.release`."""
        if not self.done:
            self.lane.put_back(self)

    def give_up(self) -> None:
        """Nobody waits any more."""
        if not self._over:
            self._end(True)
            self.lane.outbox.done(self)

    def _end(self, final: bool) -> None:
        if final:
            self._over = True
            self.lane.forget(self)
