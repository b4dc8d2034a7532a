"""`RedisClient` and `Reader`: the calls that the rest of the gateway makes."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from redis.exceptions import ResponseError

from gateway.redis_client.keys import Keys
from gateway.redis_client.link import Link, delays
from gateway.redis_client.options import RedisOptions
from gateway.redis_client.route import make_route
from gateway.redis_client.wire import Command, Disconnected, Reply, Wire, Word

_BULK = 4  # connections for large commands, per process


class RedisClient:
    """Redis, for as long as this async context manager is open.

    Entering makes one attempt to connect: it raises LoginRefused when the server lets nobody in who we are, and goes on
    in the background when it cannot be reached. While the connection is down calls fail at once with Disconnected.
    """

    def __init__(self, options: RedisOptions) -> None:
        self.keys = Keys(options.prefix)
        self.options = options
        self.generation = 0
        self._news = asyncio.Event()
        self._readers: set[Reader] = set()
        self._room = asyncio.Semaphore(_BULK)
        self._idle: list[Reader] = []  # made for `bulk`
        self._route = make_route(options, self._moved)
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        try:
            await self._route.start(self._group)
        except BaseException as problem:
            self._route.close()
            await self._leave(problem)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._route.close()
        for reader in [*self._readers]:
            await reader.close()
        await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        if not isinstance(error, asyncio.CancelledError):
            # The group would wrap an error of the block, which is none of its business.
            error = None
        await self._group.__aexit__(type(error) if error else None, error, None)

    def call(self, *command: Word) -> asyncio.Future[Reply]:
        """Send one command; see the promises at the head of the package.

        The future has the reply, `Disconnected`, or `redis.exceptions.ResponseError` (`OutOfMemoryError` among them).
        A large word is not copied: leave it alone until there is a reply. A view must be contiguous.
        """
        return self._route.call(command)

    def atomic(self, *commands: Command) -> asyncio.Future[list[Reply]]:
        """Send commands on keys of one slot that run together or not at all; in order with the calls around them.

        The future has their replies, or the first error among them, which is the rule's exception: Redis runs the rest.
        """
        return self._route.atomic(commands)

    async def bulk(self, *command: Word) -> Reply:
        """Send one command that is large or has a large reply, beside the others: nothing waits behind it.

        Raises as `call` does. There is no order between this and other calls. As many as have a connection run at a
        time; a caller that is cancelled has its connection dropped.
        """
        link = self.link_of(command)
        async with self._room:
            self._idle.sort(key=lambda idle: idle.link is link)  # the last is the one that is connected there
            reader = self._idle.pop() if self._idle else self.reader()
            try:
                return await reader.call(*command, seconds=0)
            finally:
                self._idle.append(reader)

    def reader(self) -> Reader:
        """A connection of its own for one caller that waits for long."""
        reader = Reader(self)
        self._readers.add(reader)
        return reader

    def clock(self, key: str = "") -> float:
        """Redis' time of day, in seconds, to about half a round trip. In a cluster: that of the server with the key."""
        try:
            return self.link_of(("GET", key) if key else ("TIME",)).clock.now()
        except Disconnected:
            return time.time()

    async def changed(self, since: int) -> int:
        """Wait until `generation` is another one than `since`, and return it.

        It grows when the server that answers is another one, or was started again, and so may have lost its data.
        """
        while self.generation == since:
            await self._news.wait()
        return self.generation

    async def online(self) -> None:
        """Wait until `connected`."""
        await self._route.online()

    @property
    def connected(self) -> bool:
        """Whether calls have connections to go out on."""
        return self._route.connected

    def link_of(self, command: Command) -> Link:
        """For readers: the link to the server that a command belongs to. Raises Disconnected."""
        return self._route.link_of(command)

    def redirected(self, error: Exception) -> Link | None:
        """For readers: the link to go to instead, where an error says so."""
        return self._route.redirected(error)

    def forget(self, reader: Reader) -> None:
        """For readers: it is closed."""
        self._readers.discard(reader)

    def _moved(self) -> None:
        self.generation += 1
        self._news.set()
        self._news = asyncio.Event()
        # The server before may still be there, cut off from the rest: readers must not go on asking it.
        for reader in self._readers:
            reader.drop("another Redis server answers now")


class Reader:
    """One connection for one caller at a time that waits for long, such as a blocking XREADGROUP. Made by `reader()`.

    Never cancel a call under way: `unblock` makes it return. What a cancelled or lost XREADGROUP was given stays among
    the consumer's pending entries, and is read again with id 0.
    """

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._wire: Wire | None = None
        self.link: Link | None = None  # to the server that it is connected to
        self._id = 0
        self._dropped = ""  # why the connection that is being made is unwanted already
        self._delays = delays()

    async def call(self, *command: Word, seconds: float) -> Reply:
        """Send one command that Redis may take `seconds` to answer. Raises as `RedisClient.call` does.

        Connects when there is no connection; waits up to `seconds` for Redis to be there. A lost connection is noticed
        at most `call_timeout` after `seconds`.
        """
        wire, link = self._wire, self._client.link_of(command)
        if wire is None or wire.lost.is_set() or link is not self.link:
            self.drop("the key is elsewhere")
            wire = await self._connect(link, seconds)
        try:
            return await self._ask(wire, command, seconds)
        except ResponseError as error:
            moved = self._client.redirected(error)
            if moved is None:
                raise
        self.drop("the key is elsewhere")
        return await self._ask(await self._connect(moved, seconds), command, seconds)

    async def unblock(self) -> None:
        """Make a blocked command return as if its time were over; nothing happens when none is blocked just then.

        Raises as `RedisClient.call` does.
        """
        if self._id and self.link is not None and self._wire is not None and not self._wire.lost.is_set():
            await self.link.call(("CLIENT", "UNBLOCK", self._id))

    def drop(self, why: str) -> None:
        """End the connection; the call under way fails with `Disconnected`, the next one connects again."""
        self._dropped = why
        if self._wire is not None:
            self._wire.close(why)

    async def close(self) -> None:
        """End the connection; the call under way fails with `Disconnected`."""
        self.drop("the reader was closed")
        self._client.forget(self)

    async def _ask(self, wire: Wire, command: Command, seconds: float) -> Reply:
        wire.expect(seconds + self._client.options.call_timeout)
        try:
            return await wire.call(command)
        except asyncio.CancelledError:
            wire.close("the reader's caller gave up")
            raise

    async def _connect(self, link: Link, seconds: float) -> Wire:
        self._dropped, self._id = "", 0
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await link.settled.wait()
        try:
            self._wire = wire = await link.dial()
            with suppress(ResponseError):  # an ACL without CLIENT ID: then nothing can be unblocked
                self._id = await self._ask(wire, ("CLIENT", "ID"), 0)
        except Disconnected:
            if link.connected:
                # The link is there and this connection is not; a caller that asks again at once must not spin.
                await asyncio.sleep(next(self._delays))
            raise
        if self._dropped:
            wire.close(self._dropped)
            raise Disconnected(self._dropped)
        self._delays = delays()
        self.link = link
        return wire
