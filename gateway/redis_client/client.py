"""`RedisClient` and `Reader`: the calls that the rest of the gateway makes."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from gateway.redis_client.dial import dial
from gateway.redis_client.keys import Keys
from gateway.redis_client.link import Link
from gateway.redis_client.options import RedisOptions
from gateway.redis_client.wire import Command, Reply, Wire, Word


class RedisClient:
    """Redis, for as long as this async context manager is open.

    Entering makes one attempt to connect: it raises when the server refuses us (`LoginRefused`), and goes on in the
    background when it cannot be reached. While the connection is down every call fails at once with `Disconnected`.
    """

    def __init__(self, options: RedisOptions) -> None:
        self.keys = Keys(options.prefix)
        self.options = options
        self._readers: set[Reader] = set()
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        self._link = Link(self.options, self._moved)
        await self._link.start()
        await self._group.__aenter__()
        self._keeper = self._group.create_task(self._link.keep(), name="redis")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keeper.cancel()
        self._link.close()
        for reader in [*self._readers]:
            await reader.close()
        if not isinstance(error, asyncio.CancelledError):
            # The group would wrap an error of the block, which is none of its business.
            kind = error = trace = None
        await self._group.__aexit__(kind, error, trace)

    def call(self, *command: Word) -> asyncio.Future[Reply]:
        """Send one command; see the promises at the head of the package. Views must be contiguous and left alone.

        The future has the reply, `Disconnected`, or `redis.exceptions.ResponseError` (`OutOfMemoryError` among them).
        """
        return self._link.call(command)

    def atomic(self, *commands: Command) -> asyncio.Future[list[Reply]]:
        """Send commands on keys of one slot that run together or not at all; in order with the calls around them."""
        return self._link.atomic(commands)

    def reader(self) -> Reader:
        """A connection of its own for one caller that waits for long."""
        reader = Reader(self)
        self._readers.add(reader)
        return reader

    def clock(self) -> float:
        """Redis' time of day, in seconds, estimated to about the half of a round trip."""
        return self._link.clock.now()

    @property
    def generation(self) -> int:
        """Grows when the server that answers is another one, or may have lost its data."""
        return self._link.generation

    async def changed(self, since: int) -> int:
        """Wait until the generation is another one than `since`, and return it."""
        return await self._link.changed(since)

    async def online(self) -> None:
        """Wait until there is a connection."""
        await self._link.online()

    @property
    def connected(self) -> bool:
        """Whether a call has a connection to go out on."""
        return self._link.connected

    async def connect_reader(self) -> Wire:
        """A connection of its own to the server that calls go to."""
        return await dial(self.options, self.options.target.addresses[0])

    def forget_reader(self, reader: Reader) -> None:
        """The reader is closed."""
        self._readers.discard(reader)

    def _moved(self) -> None:
        """Another server answers the calls: the readers must not go on asking the one before."""
        for reader in self._readers:
            reader.drop("another Redis server answers now")


class Reader:
    """One connection for one caller at a time that waits for long, such as a blocking XREADGROUP. Made by `reader()`.

    A call that is cancelled drops the connection. What a cancelled or lost XREADGROUP was given is in the group's
    pending entries, to be read again with id 0.
    """

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._wire: Wire | None = None
        self._id = 0

    async def call(self, *command: Word, seconds: float) -> Any:
        """Send one command that Redis may take `seconds` to answer. Raises as `RedisClient.call` does.

        Connects when there is no connection; a lost one is noticed at most `call_timeout` after `seconds`.
        """
        wire = self._wire
        if wire is None or wire.lost.is_set():
            wire = await self._client.connect_reader()
            self._id = await wire.call(("CLIENT", "ID"))
            self._wire = wire
        wire.expect(seconds + self._client.options.call_timeout)
        try:
            return await wire.call(command)
        except asyncio.CancelledError:
            wire.close("the reader's caller gave up")
            raise

    async def unblock(self) -> None:
        """Have a call under way answered now, with nothing, as if its time were over. Raises as `RedisClient.call`."""
        if self._wire is not None:
            await self._client.call("CLIENT", "UNBLOCK", self._id)

    def drop(self, why: str) -> None:
        """End the connection; the call under way fails with `Disconnected`, the next one connects again."""
        if self._wire is not None:
            self._wire.close(why)
            self._wire = None

    async def close(self) -> None:
        """End the connection for good; the call under way fails with `Disconnected`."""
        self.drop("the reader was closed")
        self._client.forget_reader(self)
