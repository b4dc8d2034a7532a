"""The answers on their way to one caller: what every queue's `submit` returns.

An answer goes straight into the future that the gateway waits on, because a generator and a queue between
the two cost a tenth of all that a small request costs. Whoever closes it first (answer, cancel, deadline) wins.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Self

from gateway import errors
from gateway.types import InferRequest, InferResponse


class Answers:
    """The `Responses` of one request. A queue makes it a class of its own that knows what to do once it is over."""

    __slots__ = ("_answers", "_loop", "_timer", "_waiter", "done", "enqueued", "request")

    def __init__(self, request: InferRequest, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the one that runs; asking asyncio for it costs a system call on Python 3.11."""
        self.request = request
        self._loop = loop
        self.enqueued = time.monotonic()
        self.done = False
        self._answers: deque[InferResponse | errors.GatewayError] | None = None  # those nobody waited for yet
        self._waiter: asyncio.Future[InferResponse] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # --- who answers

    def reply(self, response: InferResponse) -> bool:
        """See `Job.reply`."""
        if self.done:
            return False
        self.done = response.final
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(response)
        else:
            self._keep(response)
        return True

    def fail(self, error: errors.GatewayError) -> bool:
        """See `Job.fail`."""
        if self.done:
            return False
        self.done = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            _raise_in(waiter, error)
        else:
            self._keep(error)
        return True

    def expire_at(self, deadline: float) -> None:
        """Fail at this time. Raises `DeadlineExceeded` when it is over already."""
        left = deadline - self.enqueued
        if left <= 0:
            raise errors.deadline_passed()
        self._timer = self._loop.call_later(left, self.fail, errors.deadline_passed())

    # --- who waits

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> asyncio.Future[InferResponse]:
        """The next answer, or the error."""
        if not self._answers and self.done:
            self.close()
            raise StopAsyncIteration
        waiter = self._waiter = self._loop.create_future()
        if self._answers:
            answer = self._answers.popleft()
            if isinstance(answer, errors.GatewayError):
                _raise_in(waiter, answer)
            else:
                waiter.set_result(answer)
        return waiter

    async def aclose(self) -> None:
        """Nobody waits any more."""
        self.close()

    def close(self) -> None:
        """`aclose`, which has nothing to wait for."""
        self.done = True
        self._answers = None
        # An error that was raised holds the frames it passed, they hold this, and this must not hold the error: such
        # rings are collected so rarely that a thousand late requests left 10 MB of them.
        self._waiter = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._leave()

    def _leave(self) -> None:
        """The caller has seen the last of it. May be called again."""
        raise NotImplementedError

    def _keep(self, answer: InferResponse | errors.GatewayError) -> None:
        if self._answers is None:
            self._answers = deque()
        self._answers.append(answer)


def _raise_in(waiter: asyncio.Future[InferResponse], error: errors.GatewayError) -> None:
    waiter.set_exception(error)
    waiter.exception()  # seen: a caller cancelled in this very turn never looks, and asyncio would complain
