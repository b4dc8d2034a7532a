"""`MemoryQueue`: gateway and worker in one process meet in deques and futures.

Everything happens on one event loop, so there is no lock: a state change and the wake-ups it causes are one
step. A job holds its own answers; whoever closes it first (answer, cancel, deadline) wins.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence

from gateway import errors
from gateway.queues.answers import Answers
from gateway.queues.base import Command, Job, Keeps, Lane, PoolState
from gateway.types import InferRequest


class MemoryQueue:
    """The `Queue` protocol within one process."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, _LaneState] = {}
        self._pools: dict[str, PoolState] = {}
        self.pool = self._pools.get  # see `Queue.pool`; each request asks several times, and this is no frame of Python
        self._orders: deque[MemoryOrder] = deque()
        self._order_waiter: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # once there is a request
        self._closed = False

    def submit(self, lane: Lane, request: InferRequest) -> MemoryJob:
        """See `Queue.submit`."""
        if self._closed:
            raise errors.stopping()
        state = self._lanes.get(lane) or self._lane(lane)
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        job = MemoryJob(request, self._loop)
        job.lane = state
        if request.deadline is not None:
            job.expire_at(request.deadline)
        state.unanswered.add(job)
        state.waiting.append(job)
        if len(state.waiting) == 1:  # else whoever was woken for the first of them takes the rest too
            state.wake()
        return job

    def consumer(
        self,
        lanes: Sequence[Lane],
        limit: int = 0,  # noqa: ARG002 - there is no other
        *,
        contained: bool = False,  # noqa: ARG002
        keeps: Keeps | None = None,  # noqa: ARG002
    ) -> MemoryConsumer:
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

    def pools(self) -> list[PoolState]:
        """See `Queue.pools`."""
        return [self._pools[name] for name in sorted(self._pools)]

    async def send(self, command: Command, *, everywhere: bool = True) -> None:  # noqa: ARG002 - here is everywhere
        """See `Queue.send`."""
        if self._closed:
            raise errors.stopping()
        order = MemoryOrder(command)
        self._orders.append(order)
        _wake(self._order_waiter)
        await order.reported

    async def wanted(self) -> Sequence[Command]:
        """See `Queue.wanted`: there is one worker, and it was there."""
        return ()

    async def commands(self) -> AsyncGenerator[MemoryOrder, None]:
        """See `Queue.commands`."""
        while True:
            while self._orders:
                yield self._orders.popleft()
            self._order_waiter = asyncio.get_running_loop().create_future()
            await self._order_waiter

    def repository_names(self, own: Collection[str]) -> Collection[str]:
        """See `Queue.repository_names`."""
        return own

    def healthy(self) -> bool:
        """See `Queue.healthy`."""
        return not self._closed

    def leave(self) -> None:
        """See `Queue.leave`: nobody else is there."""

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
        self.epoch = time.time_ns() // 1_000_000
        self.reported: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finish(self, error: errors.GatewayError | None) -> None:
        """See `Order.finish`."""
        if self.reported.done():
            return
        if error is None:
            self.reported.set_result(None)
        else:
            self.reported.set_exception(error)


class MemoryJob(Answers):
    """One request: `Job` for the worker, `Responses` for the gateway."""

    __slots__ = ("lane",)

    lane: _LaneState | None  # None once the gateway has seen the last of it

    def release(self) -> None:
        """See `Job.release`."""
        if not self.done and self.lane is not None:
            self.lane.put_back(self)

    def _leave(self) -> None:
        lane, self.lane = self.lane, None
        if lane is not None:
            lane.unanswered.remove(self)
            if not lane.unanswered:
                lane.emptied.set()


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
        self.emptied = asyncio.Event()

    def put_back(self, job: MemoryJob) -> None:
        self.waiting.appendleft(job)
        self.wake()

    def wake(self) -> None:
        for consumer in self.consumers:
            if consumer.wake():
                return

    async def empty(self) -> None:
        while self.unanswered:
            self.emptied.clear()
            await self.emptied.wait()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
