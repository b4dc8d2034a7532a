"""Which connection a command goes out on, where there is one server: a URL's or the sentinels' primary."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.redis_client.cluster import Cluster
from gateway.redis_client.link import Link
from gateway.redis_client.options import Address, RedisOptions
from gateway.redis_client.sentinel import find_primary
from gateway.redis_client.wire import Command, Reply


class Route(Protocol):
    """What `RedisClient` needs of one server and of a cluster of them alike."""

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Try once to connect, and go on in tasks of the group. Raises LoginRefused."""

    def close(self) -> None:
        """End the tasks and drop the connections."""

    def call(self, command: Command) -> asyncio.Future[Reply]:
        """See `RedisClient.call`."""

    def atomic(self, commands: Sequence[Command]) -> asyncio.Future[list[Reply]]:
        """See `RedisClient.atomic`."""

    def link_of(self, command: Command) -> Link:
        """The link to the server that this command belongs to."""

    def redirected(self, error: Exception) -> Link | None:
        """The link to go to instead, where an error says that another server of the cluster has the key."""

    async def online(self) -> None:
        """Wait until `connected`."""

    @property
    def connected(self) -> bool:
        """Whether every server that is needed is connected."""


class Single:
    """One server."""

    def __init__(self, options: RedisOptions, moved: Callable[[], None]) -> None:
        self._options = options
        self._link = Link(options, self._locate, moved)
        self._keeper: asyncio.Task[None] | None = None
        self.call = self._link.call
        self.atomic = self._link.atomic

    async def start(self, group: asyncio.TaskGroup) -> None:
        """See Route."""
        await self._link.start()
        self._keeper = group.create_task(self._link.keep(), name="redis")

    def close(self) -> None:
        """See Route."""
        if self._keeper is not None:
            self._keeper.cancel()
        self._link.close()

    def link_of(self, command: Command) -> Link:
        """See Route."""
        del command
        return self._link

    def redirected(self, error: Exception) -> Link | None:
        """See Route."""
        del error
        return None

    async def online(self) -> None:
        """See Route."""
        await self._link.up.wait()

    @property
    def connected(self) -> bool:
        """See Route."""
        return self._link.connected

    async def _locate(self) -> Address:
        target = self._options.target
        return target.addresses[0] if target.kind == "single" else await find_primary(self._options)


def make_route(options: RedisOptions, moved: Callable[[], None]) -> Route:
    """The route that the URL asks for."""
    return (Cluster if options.target.kind == "cluster" else Single)(options, moved)
