"""Changes to a key of Redis that happen only if nobody changed it since it was read: WATCH, read, MULTI, EXEC.

WATCH belongs to a connection, so each change under way has one of its own. Plain commands, no scripts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from gateway.errors import GatewayError, Internal, Unavailable
from gateway.redis_client import RedisClient
from gateway.redis_client.wire import Wire
from gateway.telemetry import log_event

Command: TypeAlias = Sequence[Any]
Decide: TypeAlias = Callable[[list[Any]], Sequence[Command]]
"""Given the replies of the reads, the commands of the change; none to change nothing."""

_CONNECTIONS = 4
_TRIES = 32


class Guarded:
    """Runs such changes, a few at a time, on keys of one slot. Close it when none is under way any more."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._free = asyncio.Semaphore(_CONNECTIONS)
        self._idle: list[tuple[int, Wire]] = []  # connections, each with the generation it was made in

    async def change(self, key: str, reads: Sequence[Command], decide: Decide) -> list[Any] | None:
        """The replies of the change; None when `decide` wanted none. Raises what it raises, and `GatewayError`.

        `decide` is asked again whenever the key changed in between. After `Disconnected` it is not known whether the
        change happened.
        """
        async with self._free:
            generation, wire = await self._connection(key)
            try:
                with typed():
                    replies = await self._attempt(wire, key, reads, decide)
            except BaseException:
                wire.close("a change was given up")
                raise
            self._idle.append((generation, wire))
        if isinstance(replies, GatewayError):
            raise replies
        return replies

    async def _connection(self, key: str) -> tuple[int, Wire]:
        while self._idle:
            generation, wire = self._idle.pop()
            if generation == self._client.generation and not wire.lost.is_set():
                return generation, wire
            wire.close("another Redis server answers now")
        return self._client.generation, await self._client.link_of(("GET", key)).dial()

    def close(self) -> None:
        """Drop the connections."""
        while self._idle:
            self._idle.pop()[1].close("closed")

    async def _attempt(
        self, wire: Wire, key: str, reads: Sequence[Command], decide: Decide
    ) -> list[Any] | GatewayError | None:
        try:
            return await _attempt(wire, key, reads, decide)
        except ResponseError as problem:
            if self._client.redirected(problem) is None:
                raise
            raise Unavailable("the jobs are moving to another server of the cluster; try again", 1.0) from None


async def _attempt(wire: Wire, key: str, reads: Sequence[Command], decide: Decide) -> list[Any] | GatewayError | None:
    for _ in range(_TRIES):
        # Nothing else uses the connection meanwhile, so WATCH and the reads may travel as one pipeline.
        _, *values = await asyncio.gather(*[wire.call(each) for each in (("WATCH", key), *reads)])
        try:
            commands = decide(values)
        except GatewayError as refusal:
            await wire.call(("UNWATCH",))
            return refusal
        if not commands:
            await wire.call(("UNWATCH",))
            return None
        replies: list[Any] | None = await wire.atomic(commands)
        if replies is not None:
            return replies
    raise Unavailable("a job's record changes faster than it can be read; try again", 1.0)


@contextmanager
def typed() -> Iterator[None]:
    """Turns Redis' own errors into the gateway's."""
    try:
        yield
    except OutOfMemoryError:
        raise Unavailable("the queue's Redis has no memory left for this job; try again later", 5.0) from None
    except RedisError as problem:
        log_event("redis_refused", logging.ERROR, problem)
        raise Internal("the queue's Redis refused a command; the server's log has the cause") from None
