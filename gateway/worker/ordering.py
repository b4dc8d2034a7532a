"""Answers in the order of the requests, for models that ask for it: Triton's `preserve_ordering`.

Stands between the queue's jobs and those who run them. What is answered early is held until all that came before it is
over: answered, refused, expired or cancelled. How long that takes is in no prediction.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from gateway.errors import GatewayError
from gateway.queues.base import Job
from gateway.types import InferRequest, InferResponse


class Order:
    """The requests of a lane that are not over, first come first. All hosts of the lane share it."""

    def __init__(self) -> None:
        self._turns: OrderedDict[int, Turn] = OrderedDict()  # by the identity of the request

    def enter(self, jobs: Iterable[Job]) -> list[Job]:
        """Jobs as they come out of the queue; those to run in their place."""
        turns = [Turn(job, self) for job in jobs]
        self._turns.update((id(turn.request), turn) for turn in turns)
        return list(turns)

    def leave(self, request: InferRequest) -> None:
        """A request is over, or goes elsewhere; nothing waits for it any more."""
        self._turns.pop(id(request), None)
        self.advance()

    def advance(self) -> None:
        """Hand out every answer that waits for no other."""
        while self._turns:
            first = next(iter(self._turns.values()))
            first.hand_out()
            if not first.done:
                return
            self._turns.popitem(last=False)


class Turn:
    """The `Job` of a request whose answers wait for their turn."""

    __slots__ = ("_held", "_job", "_order", "_over", "enqueued", "request")

    def __init__(self, job: Job, order: Order) -> None:
        self.request = job.request
        self.enqueued = job.enqueued
        self._job = job
        self._order = order
        self._held: list[InferResponse | GatewayError] = []
        self._over = False

    @property
    def done(self) -> bool:
        """See `Job.done`; what is held is answered."""
        return self._over or self._job.done

    def reply(self, response: InferResponse) -> bool:
        """See `Job.reply`."""
        return self._hold(response, last=response.final)

    def fail(self, error: GatewayError) -> bool:
        """See `Job.fail`."""
        return self._hold(error, last=True)

    def release(self) -> None:
        """See `Job.release`."""
        self._order.leave(self.request)
        self._job.release()

    def hand_out(self) -> None:
        """It is this job's turn: pass on what is held."""
        for answer in self._held:
            if isinstance(answer, GatewayError):
                self._job.fail(answer)
            else:
                self._job.reply(answer)
        self._held.clear()

    def _hold(self, answer: InferResponse | GatewayError, *, last: bool) -> bool:
        if self.done:
            return False
        self._over = last
        self._held.append(answer)
        self._order.advance()
        return True
