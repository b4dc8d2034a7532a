"""`MemoryQueue`: gateway and worker in one process meet in deques and futures.

Everything happens on one event loop, so there is no lock: a state change and the wake-ups it causes are one
step. A job holds its own answers; whoever closes it first (answer, cancel, deadline) wins.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Self

from gateway import errors
from gateway.queues.base import Command, Job, Lane, PoolState
from gateway.types import InferRequest, InferResponse


class MemoryQueue:
    """The `Queue` protocol within one process."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, _LaneState] = {}
        self._pools: dict[str, PoolState] = {}
        self._orders: deque[MemoryOrder] = deque()
        self._order_waiter: asyncio.Future[None] | None = None
        self._closed = False

    def submit(self, lane: Lane, request: InferRequest) -> MemoryJob:
        """See `Queue.submit`."""
        if self._closed:
            raise errors.stopping()
        state = self._lane(lane)
        job = MemoryJob(request, state)
        if request.deadline is not None:
            job.expire_at(request.deadline)
        state.add(job)
        return job

    def consumer(self, lanes: Sequence[Lane]) -> MemoryConsumer:
        """See `Queue.consumer`."""
        return MemoryConsumer([self._lane(lane) for lane in lanes])

    async def drained(self, lane: Lane) -> None:
        """See `Queue.drained`."""
        await self._lane(lane).empty()
        self._lanes.pop(lane, None)

    def publish(self, state: PoolState) -> None:
        """See `Queue.publish`."""
        self._pools[state.model] = state

    def withdraw(self, model: str) -> None:
        """See `Queue.withdraw`."""
        self._pools.pop(model, None)

    def pool(self, model: str) -> PoolState | None:
        """See `Queue.pool`."""
        return self._pools.get(model)

    def pools(self) -> list[PoolState]:
        """See `Queue.pools`."""
        return [self._pools[name] for name in sorted(self._pools)]

    async def send(self, command: Command) -> None:
        """See `Queue.send`."""
        if self._closed:
            raise errors.stopping()
        order = MemoryOrder(command)
        self._orders.append(order)
        _wake(self._order_waiter)
        await order.reported

    async def commands(self) -> AsyncGenerator[MemoryOrder, None]:
        """See `Queue.commands`."""
        while True:
            while self._orders:
                yield self._orders.popleft()
            self._order_waiter = asyncio.get_running_loop().create_future()
            await self._order_waiter

    def close(self) -> None:
        """See `Queue.close`."""
        self._closed = True
        for lane in self._lanes.values():
            for job in lane.unanswered:
                job.fail(errors.stopping())
        while self._orders:
            self._orders.popleft().finish(errors.stopping())

    def _lane(self, lane: Lane) -> _LaneState:
        state = self._lanes.get(lane)
        if state is None:
            state = self._lanes[lane] = _LaneState()
        return state


class MemoryOrder:
    """A command and the future of its report."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.reported: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finish(self, error: errors.GatewayError | None) -> None:
        """See `Order.finish`."""
        if self.reported.done():
            return
        if error is None:
            self.reported.set_result(None)
        else:
            self.reported.set_exception(error)


class MemoryJob:
    """One request and the answers on their way back to it: `Job` for the worker, `Responses` for the gateway.

    An answer goes straight into the future that the gateway waits on, because a generator and a queue between
    the two cost a tenth of all that a small request costs.
    """

    __slots__ = ("_answers", "_lane", "_timer", "_waiter", "done", "enqueued", "request")

    def __init__(self, request: InferRequest, lane: _LaneState) -> None:
        self.request = request
        self.enqueued = time.monotonic()
        self.done = False
        self._lane: _LaneState | None = lane  # None once the gateway has seen the last of it
        self._answers: deque[InferResponse | errors.GatewayError] | None = None  # those nobody waited for yet
        self._waiter: asyncio.Future[InferResponse] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # --- the worker's side

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

    def release(self) -> None:
        """See `Job.release`."""
        if not self.done and self._lane is not None:
            self._lane.put_back(self)

    # --- the gateway's side

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> asyncio.Future[InferResponse]:
        """The next answer, or the error."""
        if not self._answers and self.done:
            self._leave()
            raise StopAsyncIteration
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        if self._answers:
            answer = self._answers.popleft()
            if isinstance(answer, errors.GatewayError):
                _raise_in(waiter, answer)
            else:
                waiter.set_result(answer)
        return waiter

    async def aclose(self) -> None:
        """Nobody waits any more."""
        self.done = True
        self._answers = None
        self._leave()

    def expire_at(self, deadline: float) -> None:
        """Fail at this time. Raises `DeadlineExceeded` when it is over already."""
        left = deadline - self.enqueued
        if left <= 0:
            raise errors.deadline_passed()
        self._timer = asyncio.get_running_loop().call_later(left, self.fail, errors.deadline_passed())

    def _keep(self, answer: InferResponse | errors.GatewayError) -> None:
        if self._answers is None:
            self._answers = deque()
        self._answers.append(answer)

    def _leave(self) -> None:
        if self._lane is not None:
            self._lane.remove(self)
            self._lane = None
        if self._timer is not None:
            self._timer.cancel()


class MemoryConsumer:
    """The `Consumer` protocol over lanes of this process."""

    def __init__(self, lanes: list[_LaneState]) -> None:
        self._lanes = lanes
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        for lane in lanes:
            lane.consumers.append(self)

    async def take(self, limit: int) -> list[Job]:
        """See `Consumer.take`."""
        while not self._closed:
            jobs = self._collect(limit)
            if jobs:
                return jobs
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self._pass_on()
                raise
        return []

    def close(self) -> None:
        """See `Consumer.close`."""
        if self._closed:
            return
        self._closed = True
        for lane in self._lanes:
            lane.consumers.remove(self)
        self._pass_on()
        _wake(self._waiter)

    def wake(self) -> bool:
        """Wake a waiting `take`; False if none is waiting."""
        if self._waiter is None or self._waiter.done():
            return False
        self._waiter.set_result(None)
        return True

    def _pass_on(self) -> None:
        # This consumer may have been woken for a job that it will not take now.
        for lane in self._lanes:
            if lane.waiting:
                lane.wake()

    def _collect(self, limit: int) -> list[Job]:
        jobs: list[Job] = []
        if len(self._lanes) == 1:
            waiting = self._lanes[0].waiting
            while waiting and len(jobs) < limit:
                job = waiting.popleft()
                if not job.done:
                    jobs.append(job)
            return jobs
        while len(jobs) < limit:
            filled = [lane for lane in self._lanes if lane.waiting]
            if not filled:
                break
            lane = min(filled, key=lambda lane: lane.waiting[0].enqueued) if len(filled) > 1 else filled[0]
            job = lane.waiting.popleft()
            if not job.done:
                jobs.append(job)
        return jobs


class _LaneState:
    """The jobs of a lane: those that no worker has taken, and all that are not seen off."""

    def __init__(self) -> None:
        self.waiting: deque[MemoryJob] = deque()
        self.unanswered: set[MemoryJob] = set()
        self.consumers: list[MemoryConsumer] = []
        self._emptied = asyncio.Event()

    def add(self, job: MemoryJob) -> None:
        self.unanswered.add(job)
        self.waiting.append(job)
        if len(self.waiting) == 1:  # else whoever was woken for the first of them takes the rest too
            self.wake()

    def put_back(self, job: MemoryJob) -> None:
        self.waiting.appendleft(job)
        self.wake()

    def remove(self, job: MemoryJob) -> None:
        self.unanswered.remove(job)
        if not self.unanswered:
            self._emptied.set()

    def wake(self) -> None:
        for consumer in self.consumers:
            if consumer.wake():
                return

    async def empty(self) -> None:
        while self.unanswered:
            self._emptied.clear()
            await self._emptied.wait()


def _raise_in(waiter: asyncio.Future[InferResponse], error: errors.GatewayError) -> None:
    waiter.set_exception(error)
    waiter.exception()  # seen: a caller cancelled in this very turn never looks, and asyncio would complain


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
