"""Async inference as the settings ask for it: the client-facing side, and what runs jobs and delivers webhooks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import orjson

from gateway.config.model import ModelConfig
from gateway.config.settings import Settings
from gateway.jobs.hooks import HookRunner
from gateway.jobs.jobs import Jobs
from gateway.jobs.record import Job
from gateway.jobs.runner import JobRunner
from gateway.jobs.store import JobStore, StoreOptions
from gateway.jobs.view import view
from gateway.jobs.webhook import Caller, WebhookKey, WebhookPolicy
from gateway.queues.redis.seal import Seal
from gateway.redis_client import RedisClient
from gateway.types import Infer, InferRequest


def open_jobs(settings: Settings, client: RedisClient, check: Callable[[InferRequest], None]) -> Jobs:
    """The jobs for transports, to be entered. Raises InvalidArgument for a bad `--webhook-allow`."""
    store = JobStore(client, StoreOptions(settings.job_ttl_secs, settings.max_jobs))
    policy = WebhookPolicy(settings.webhook_allow)
    return Jobs(store, check, seal=Seal(_key(settings)), webhooks=policy)


@asynccontextmanager
async def run_jobs(
    settings: Settings,
    jobs: Jobs,
    infer: Infer,
    config_of: Callable[[str, str], ModelConfig],
    begin: asyncio.Event,
) -> AsyncGenerator[JobRunner, None]:
    """Run jobs through `infer` from when `begin` is set, and deliver webhooks, for the duration of the block."""
    key = _key(settings)
    async with AsyncExitStack() as stack:
        if jobs.webhooks and key is not None:
            caller = Caller(jobs.webhooks, WebhookKey(key))
            await stack.enter_async_context(HookRunner(jobs.store, jobs.feed, caller, _told))
        runner = JobRunner(jobs.store, jobs.feed, infer, config_of, seal=jobs.seal, begin=begin)
        yield await stack.enter_async_context(runner)


def _key(settings: Settings) -> bytes | None:
    return None if settings.queue_key_file is None else settings.queue_key_file.read_bytes().strip()


def _told(job: Job) -> bytes:
    return orjson.dumps(view(job))
