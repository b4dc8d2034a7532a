"""Gateways that share jobs in a real Redis, each with an `infer` that the test controls."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from gateway import errors
from gateway.config.model import Batching
from gateway.jobs.jobs import Jobs
from gateway.jobs.record import Job
from gateway.jobs.runner import JobRunner, RunnerOptions
from gateway.jobs.store import JobStore, StoreOptions
from gateway.jobs.webhook import WebhookPolicy
from gateway.queues.redis.seal import Seal
from gateway.redis_client import RedisClient, RedisOptions
from gateway.types import InferRequest, InferResponse
from tests.support import answer, model_config, request, tensor

LEASE = 0.3  # seconds


class Model:
    """An `Infer` that doubles its input. While `free` is clear it does so later; `problems` are raised first."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.problems: list[Exception] = []
        self.seen: list[InferRequest] = []
        self.entered = asyncio.Semaphore(0)
        self.left = asyncio.Semaphore(0)

    async def __call__(self, of: InferRequest) -> AsyncGenerator[InferResponse, None]:
        self.seen.append(of)
        self.entered.release()
        try:
            await self.free.wait()
            if self.problems:
                raise self.problems.pop(0)
            yield answer(of, OUT=tensor(of.inputs["IN"].array * 2))
        finally:
            self.left.release()


@dataclass
class Gateway:
    """One process's part in the jobs."""

    client: RedisClient
    jobs: Jobs
    model: Model
    runner: JobRunner | None = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def submit(self, value: float = 1.0, tenant: str = "", **more: Any) -> Job:
        return await self.jobs.submit(request(value, tenant=tenant, **more.pop("fields", {})), **more)

    async def ended(self, job: Job) -> Job:
        """The job once it has ended."""
        async for change in self.jobs.watch(job.id, job.tenant, heartbeat=1.0):
            last = change.job
        assert last.final
        return last

    async def until(self, job: Job, condition: Callable[[Job], bool]) -> Job:
        """The job once this is true, looked at whenever something happens to any job."""
        with self.jobs.feed.subscribe() as inbox:
            while not condition(found := await self.jobs.get(job.id, job.tenant)):
                await inbox.next(0.05)
        return found

    async def result(self, job: Job) -> Any:
        result = await self.jobs.result(await self.jobs.get(job.id, job.tenant))
        assert not isinstance(result, errors.GatewayError), result
        assert result is not None
        return result.response.outputs["OUT"].array.tolist()


@asynccontextmanager
async def gateway(
    of: RedisOptions,
    *,
    model: Model | None = None,
    store: StoreOptions | None = None,
    runner: RunnerOptions | None = None,
    runs: bool = True,
    key: bytes | None = None,
    allow: tuple[str, ...] = (),
) -> AsyncIterator[Gateway]:
    model = model or Model()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(RedisClient(of))
        seal = Seal(key)
        jobs = Jobs(JobStore(client, store), lambda _: None, seal=seal, webhooks=WebhookPolicy(allow))
        await stack.enter_async_context(jobs)
        one = Gateway(client, jobs, model)
        if runs:
            options = runner or RunnerOptions(lease=LEASE)
            one.runner = JobRunner(
                jobs.store,
                jobs.feed,
                model,
                lambda *_: model_config(batching=Batching(priority_levels=9)),
                seal=seal,
                options=options,
            )
            await stack.enter_async_context(one.runner)
        yield one


async def die(one: Gateway) -> None:
    """The gateway's process is killed: nothing is handed back, nothing renewed, nothing said."""
    assert one.runner is not None
    one.jobs.store.change = never  # type: ignore[method-assign]
    one.runner._leases.renew = never  # type: ignore[method-assign]
    one.runner._leases.recover = never  # type: ignore[method-assign]


async def never(*_: Any) -> Any:
    raise errors.Unavailable("killed")
