"""A model behind a real service and queue whose runs the test answers, and callers of an endpoint around it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from gateway import errors
from gateway.config.model import ResponseCache
from gateway.queues.base import Job, PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics, VersionStatistics
from gateway.types import Infer, InferRequest, InferResponse, Timings
from tests.support import LANE, answer, model_config, settle, tensor


class Rig:
    """A service with a ready model `m`, version 1, and the worker's end of its lane; `endpoint` is under test."""

    endpoint: Infer

    def __init__(self, **more) -> None:
        self.queue = MemoryQueue()
        self.statistics = Statistics()
        self.service = Service(self.queue, self.statistics, self._names, ServiceOptions())
        self.consumer = self.queue.consumer([LANE])
        self.publish(**more)

    async def _names(self):
        return ["m"]

    def publish(self, version: str = "1", digest: str = "d1", cache: ResponseCache | None = None, **more) -> None:
        self.digest = digest
        config = replace(model_config(**more), response_cache=cache)
        self.queue.publish(PoolState("m", (VersionState(version, "READY", config=config, digest=digest),)))

    @property
    def counted(self) -> VersionStatistics:
        return self.statistics.of("m", "1")

    async def job(self) -> Job:
        """The next run that is asked for."""
        (job,) = await self.consumer.take(1)
        return job

    async def idle(self) -> bool:
        """Whether no run is asked for once everything has settled."""
        await settle()
        lane = self.queue._lane(LANE)
        return not any(not job.done for job in lane.waiting)

    async def reply(self, value: float) -> Job:
        """Answer the next run with OUT full of `value`."""
        job = await self.job()
        job.reply(self.answered(job.request, value))
        return job

    def answered(self, request: InferRequest, value: float, digest: str | None = None) -> InferResponse:
        """The answer with OUT full of `value`, by a version of this digest."""
        response = answer(request, OUT=tensor([[value, value]] * request.rows))
        response.timings = Timings(queue_ns=1, compute_infer_ns=1, batch_rows=request.rows)
        response.digest = self.digest if digest is None else digest
        return response


def value_of(response: InferResponse) -> float:
    return float(response.outputs["OUT"].array.flat[0])


async def ask(endpoint: Infer, request: InferRequest) -> InferResponse | errors.GatewayError:
    try:
        async with aclosing(endpoint(request)) as responses:
            (response,) = [each async for each in responses]
    except errors.GatewayError as error:
        return error
    return response


class Callers:
    """Tasks that ask an endpoint."""

    def __init__(self, group: asyncio.TaskGroup, rig: Rig) -> None:
        self._group = group
        self._rig = rig
        self.tasks: list[asyncio.Task] = []

    async def ask(self, request: InferRequest) -> asyncio.Task:
        """Ask, and let it get as far as it can."""
        self.tasks.append(self._group.create_task(ask(self._rig.endpoint, request)))
        await settle()
        return self.tasks[-1]

    async def leave(self, task: asyncio.Task) -> None:
        task.cancel()
        await asyncio.wait([task])
        await settle()


@asynccontextmanager
async def callers(rig: Rig) -> AsyncIterator[Callers]:
    async with asyncio.TaskGroup() as group:
        asking = Callers(group, rig)
        try:
            yield asking
        finally:
            for task in asking.tasks:
                task.cancel()
