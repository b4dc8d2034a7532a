"""Ensembles with decoupled steps: each response of such a step runs the steps after it, and they do so side by side.

As in Triton's `EnsembleContext`, with one promise more: the ensemble's responses come in the order of the responses that
they are made from. So many are under way at once, and so many wait for a client that is slower; then the next response
of the step waits, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Protocol, Self, TypeAlias

from gateway.middleware.ensemble_plan import Plan
from gateway.middleware.ensemble_run import Run
from gateway.types import InferRequest, InferResponse

_BRANCHES = 32  # responses of one run of a step that run the steps after it at once
_AHEAD = 32  # responses that wait for the client

Give: TypeAlias = Callable[[InferResponse], Awaitable[None]]
"""Hands a response to who asked, once there is room for it."""


class Reached(Protocol):
    """What is called where the end of a plan is reached, in order; with `last` it is the last time."""

    def __call__(self, branch: Run, plan: Plan, *, last: bool) -> Awaitable[None]:
        """Tell what there is at the end."""


async def follow(run: Run, plan: Plan, reached: Reached) -> None:
    """Run a plan and, where a step of it is decoupled, its rest for each response. The first error ends them all."""
    try:
        async with asyncio.TaskGroup() as tasks:
            await _Branches(tasks, reached).follow(run, plan, None, asyncio.Event(), last=True)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


class _Branches:
    """What is under way for one request. Each branch waits for `before`, the end of the one before it, to tell its end."""

    def __init__(self, tasks: asyncio.TaskGroup, reached: Reached) -> None:
        self._tasks = tasks
        self._reached = reached

    async def follow(
        self, run: Run, plan: Plan, before: asyncio.Event | None, done: asyncio.Event, *, last: bool
    ) -> None:
        await run.tasks(plan)
        if plan.stream is not None and plan.rest is not None:
            before = await self._fork(run, plan, before, last=last)
        if before is not None:
            await before.wait()
        if plan.rest is None:
            await self._reached(run, plan, last=last)
        done.set()

    async def _fork(self, run: Run, plan: Plan, before: asyncio.Event | None, *, last: bool) -> asyncio.Event | None:
        """Begin a branch for each response of the plan's decoupled step; returns the end of the last."""
        assert plan.stream is not None
        assert plan.rest is not None
        room = asyncio.Semaphore(_BRANCHES)
        async with aclosing(run.stream(plan.stream)) as branches:
            async for branch, final in branches:
                await room.acquire()
                done = asyncio.Event()
                task = self._tasks.create_task(self.follow(branch, plan.rest, before, done, last=last and final))
                task.add_done_callback(lambda _: room.release())
                before = done
        return before


class Stream:
    """The `Responses` of a request that a coroutine function answers in its own time, begun when the first is asked for."""

    __slots__ = ("_produce", "_request", "_room", "_task", "_tasks", "_waiting")

    def __init__(
        self,
        produce: Callable[[InferRequest, Give], Awaitable[None]],
        request: InferRequest,
        tasks: asyncio.TaskGroup,
    ) -> None:
        """`tasks` outlives the request."""
        self._produce = produce
        self._request = request
        self._tasks = tasks
        self._task: asyncio.Task[None] | None = None
        self._waiting: asyncio.Queue[InferResponse | Exception] = asyncio.Queue()
        self._room = asyncio.Semaphore(_AHEAD)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> InferResponse:
        """The next response, or the error."""
        if self._task is None:
            self._task = self._tasks.create_task(self._run(), name="ensemble stream")
        found = await self._waiting.get()
        if isinstance(found, Exception):
            self._waiting.put_nowait(found)
            raise found
        self._room.release()
        return found

    async def aclose(self) -> None:
        """End the request, if it runs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            await self._produce(self._request, self._give)
        except Exception as error:  # noqa: BLE001 - it is for whoever waits for a response
            self._waiting.put_nowait(error)
        else:
            self._waiting.put_nowait(StopAsyncIteration())

    async def _give(self, response: InferResponse) -> None:
        await self._room.acquire()
        self._waiting.put_nowait(response)
