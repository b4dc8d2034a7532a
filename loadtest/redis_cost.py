"""CPU of this process per Redis command, callers in a closed loop: `RedisClient` against redis-py, in one run.

    python -m loadtest.redis_cost [--callers 64] [--commands 20000] [--bytes 4096] [--rounds 3]

Each round measures, one after the other: the loop alone, `RedisClient.call`, redis-py with everything that is waiting in
one pipeline (what a coalescing client built on it would do), and redis-py called plainly. The command is an XADD of 12
words with one value of `--bytes`, on an embedded server's unix socket. Figures are CPU time (user and system) of this
process alone; compare within a round. With Linux `perf`, two runs that differ only in `--commands` give instructions.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio
import uvloop
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.redis_client import RedisClient, RedisOptions
from gateway.redis_server import EmbeddedServer

Call = Callable[..., Awaitable[Any]]


async def cpu_of(call: Call, callers: int, commands: int, value: bytes) -> float:
    """Microseconds of CPU per command."""
    left = commands

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await call("XADD", "s", "MAXLEN", "~", 1000, "*", "id", "abc", "h", value[:100], "p", value)

    started = time.process_time()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return (time.process_time() - started) / commands * 1e6


class Piped:
    """redis-py with its own pipelines: whatever waits while one is under way is the next."""

    def __init__(self, client: redis.asyncio.Redis, group: asyncio.TaskGroup) -> None:
        self._client = client
        self._waiting: list[tuple[asyncio.Future[Any], tuple[Any, ...]]] = []
        self._bell = asyncio.Event()
        self._pump = group.create_task(self._run())

    def __call__(self, *command: Any) -> Awaitable[Any]:
        """Send one command."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((future, command))
        self._bell.set()
        return future

    async def _run(self) -> None:
        while True:
            await self._bell.wait()
            self._bell.clear()
            batch, self._waiting = self._waiting, []
            pipeline = self._client.pipeline(transaction=False)
            for _, command in batch:
                pipeline.execute_command(*command)
            for (future, _), reply in zip(batch, await pipeline.execute(raise_on_error=False), strict=True):
                future.set_result(reply)

    def close(self) -> None:
        """End the task."""
        self._pump.cancel()


async def measure(arguments: argparse.Namespace) -> None:
    async with EmbeddedServer() as server, RedisClient(RedisOptions(server.url)) as ours, asyncio.TaskGroup() as group:
        path = server.url.removeprefix("unix://")
        theirs = redis.asyncio.Redis(
            unix_socket_path=path, protocol=2, retry=Retry(NoBackoff(), 0), max_connections=999
        )
        piped = Piped(theirs, group)
        calls: dict[str, Call] = {
            "the loop alone": lambda *_: asyncio.sleep(0),
            "RedisClient.call": ours.call,
            "redis-py pipelines": piped,
            "redis-py calls": theirs.execute_command,
        }
        names = arguments.only.split(",") if arguments.only else list(calls)
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                cost = await cpu_of(calls[name], arguments.callers, arguments.commands, bytes(arguments.bytes))
                found[name].append(cost)
        for name, costs in found.items():
            print(f"{name:20} {statistics.median(costs):7.1f} us  ({min(costs):.1f} to {max(costs):.1f})")
        piped.close()
        await theirs.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--commands", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="names of the table, with commas")
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
