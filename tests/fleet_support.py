"""Processes of a fleet within one process: what tests of `RedisQueue` share."""

# ruff: noqa: ASYNC110 - what other processes do sets no event here
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from gateway.queues.base import Job, Lane, PoolState, VersionState
from gateway.queues.redis import directory
from gateway.queues.redis import queue as queue_module
from gateway.queues.redis.queue import RedisQueue, Role
from gateway.redis_client import RedisClient, RedisOptions
from loadtest.fault_proxy import FaultProxy
from tests.redis_support import options
from tests.support import LANE, model_config

READY = PoolState("m", (VersionState("1", "READY", config=model_config()),))


def hurry(monkeypatch: pytest.MonkeyPatch, lives: float = 0.5) -> None:
    """Beats and deaths in a fraction of the time."""
    monkeypatch.setattr(directory, "BEAT", lives / 6)
    monkeypatch.setattr(queue_module, "BEAT", 0.05)
    monkeypatch.setattr(directory, "_LIVES", lives)


class Mortal:
    """A process of the fleet that can die without a word."""

    def __init__(self, of: RedisOptions, role: Role, key: bytes | None = None) -> None:
        self._options = of
        self._role: Role = role
        self._key = key
        self._stack = AsyncExitStack()
        self.queue: RedisQueue

    async def __aenter__(self) -> RedisQueue:
        self.client = await self._stack.enter_async_context(RedisClient(self._options))
        self.queue = await self._stack.enter_async_context(RedisQueue(self.client, self._role, key=self._key))
        return self.queue

    async def __aexit__(self, *error: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Everything it did ends here; nothing is told to anybody."""
        for task in self.queue._background:
            task.cancel()
        for lane in self.queue._lanes.values():
            lane.cancel()
        self.queue._sign_off = self._nothing
        await self._stack.aclose()

    async def _nothing(self) -> None:
        pass


@asynccontextmanager
async def proxied(url: str, folder: str) -> AsyncIterator[tuple[FaultProxy, RedisOptions]]:
    """A way to the server on which faults can be made, and its address with keys that no other test has."""
    async with FaultProxy(url.removeprefix("unix://"), path=f"{folder}/proxy") as proxy:
        yield proxy, options(f"unix://{proxy.path}")


async def known(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    while not condition():
        await asyncio.sleep(0.01)


async def take(queue: RedisQueue, count: int, consumer=None, lane: Lane = LANE) -> list[Job]:
    consumer = consumer or queue.consumer([lane], 8)
    jobs: list[Job] = []
    while len(jobs) < count:
        jobs += await consumer.take(count - len(jobs))
    return jobs


async def emptied(queue: RedisQueue) -> None:
    """Wait until nothing is left in the lane's streams."""
    while await entries(queue):
        await asyncio.sleep(0.01)


async def entries(queue: RedisQueue) -> int:
    """Requests in the lane's streams."""
    call, key = queue.client.call, queue.client.keys.requests
    return sum([await call("XLEN", key("m", "1", each)) for each in (1, 2, 3)])
