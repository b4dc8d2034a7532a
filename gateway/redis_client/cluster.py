"""`Cluster`: Redis Cluster. A link to each primary; each command goes to the one that has its key's slot.

Order is kept among commands on one key's slot, not across slots, and not while that very slot moves. A redirected
command did not run where it was refused, so sending it on is no retry.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from redis.crc import key_slot
from redis.exceptions import ResponseError

from gateway.redis_client.dial import LoginRefused, dial
from gateway.redis_client.link import Link, delays, failed
from gateway.redis_client.options import Address, RedisOptions
from gateway.redis_client.wire import Command, Disconnected, Reply, Word, settle
from gateway.telemetry import log_event

_SLOTS = 16384
_HOPS = 5  # redirections of one command, after which something is wrong with the cluster
_KEYLESS = frozenset((b"PING", b"TIME", b"INFO", b"CLUSTER", b"CLIENT", b"CONFIG", b"DBSIZE", b"WAIT", b"ACL"))
_KEY_THIRD = frozenset((b"XINFO", b"XGROUP", b"OBJECT", b"MEMORY"))  # their second word is a subcommand


class Cluster:
    """The route of redis+cluster://; see `route.Route`."""

    def __init__(self, options: RedisOptions, moved: Callable[[], None]) -> None:
        self._options = options
        self._moved = moved
        self._links: dict[Address, Link] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._keepers: dict[Address, asyncio.Task[None]] = {}
        self._slots: list[Link | None] = [None] * _SLOTS
        self._stale = asyncio.Event()
        self._learned = asyncio.Event()  # set, and replaced, each time that all is connected
        self._why = "not connected to the Redis cluster yet"

    async def start(self, group: asyncio.TaskGroup) -> None:
        """See Route."""
        self._group = group
        try:
            await self._learn()
        except LoginRefused:
            raise
        except Disconnected as problem:
            self._why = problem.message
            self._stale.set()
        # The servers are connected to side by side; one that is down is not waited for.
        ups = [group.create_task(link.up.wait()) for link in self._links.values()]
        if ups:
            _, late = await asyncio.wait(ups, timeout=self._options.connect_timeout)
            for task in late:
                task.cancel()
        self._keeper = group.create_task(self._keep(), name="redis-cluster")

    def close(self) -> None:
        """See Route."""
        if self._keeper is not None:
            self._keeper.cancel()
        for address in [*self._links]:
            self._leave(address)
        self._slots = [None] * _SLOTS
        self._why = "the client was closed"

    def call(self, command: Command) -> asyncio.Future[Reply]:
        """See Route."""
        return self._sent(partial(Link.call, command=command), command)

    def atomic(self, commands: Sequence[Command]) -> asyncio.Future[list[Reply]]:
        """See Route."""
        return self._sent(partial(Link.atomic, commands=commands), commands[0])

    def link_of(self, command: Command) -> Link:
        """See Route."""
        key = key_of(command)
        link = self._slots[key_slot(key)] if key is not None else next(iter(self._links.values()), None)
        if link is None or not link.connected:
            self._stale.set()
        if link is None:
            raise Disconnected(self._why)
        return link

    async def online(self) -> None:
        """See Route."""
        while not self.connected:
            self._stale.set()
            await self._learned.wait()

    @property
    def connected(self) -> bool:
        """See Route."""
        return None not in self._slots and all(link.connected for link in self._links.values())

    def redirected(self, error: Exception) -> Link | None:
        """See Route."""
        words = str(error).split()
        if not isinstance(error, ResponseError) or len(words) < 3 or words[0] not in ("MOVED", "ASK"):
            return None
        host, _, port = words[2].rpartition(":")
        link = self._join(Address(host, int(port)))
        if words[0] == "MOVED":
            self._slots[int(words[1])] = link
            self._stale.set()
        else:
            link.call(("ASKING",))
        return link

    def _sent(self, send: Callable[[Link], asyncio.Future[Reply]], command: Command) -> asyncio.Future[Reply]:
        try:
            link = self.link_of(command)
        except Disconnected as problem:
            return failed(problem.message)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        send(link).add_done_callback(partial(self._answered, send, future, _HOPS))
        return future

    def _answered(
        self,
        send: Callable[[Link], asyncio.Future[Reply]],
        future: asyncio.Future[Reply],
        hops: int,
        answer: asyncio.Future[Reply],
    ) -> None:
        """Pass an answer on, unless it says that another server has the key now."""
        error = answer.exception()
        if isinstance(error, Disconnected):
            self._stale.set()
        link = self.redirected(error) if isinstance(error, Exception) and hops else None
        if link is not None:
            send(link).add_done_callback(partial(self._answered, send, future, hops - 1))
        elif not future.done():
            settle(future, error or answer.result())

    async def _keep(self) -> None:
        """Learn who has which slot whenever that may have changed."""
        while True:
            await self._stale.wait()
            for delay in delays():
                self._stale.clear()
                try:
                    await self._learn()
                except Disconnected as problem:
                    if problem.message != self._why:
                        log_event("redis_cluster_unknown", logging.WARNING, reason=problem.message)
                    self._why = problem.message
                if self.connected:
                    self._learned.set()
                    self._learned = asyncio.Event()
                    break
                await asyncio.sleep(delay)

    async def _learn(self) -> None:
        """Ask the first server that answers. Raises Disconnected when none does, LoginRefused when it is no cluster."""
        problem = Disconnected(self._why)
        for address in dict.fromkeys([*self._links, *self._options.target.addresses]):
            try:
                self._adopt(await self._ask(address), address)
            except LoginRefused:
                raise
            except Disconnected as why:
                problem = why
            else:
                return
        raise problem

    async def _ask(self, address: Address) -> list[Any]:
        wire = await dial(self._options, address)
        try:
            slots: list[Any] = await wire.call(("CLUSTER", "SLOTS"))
        except ResponseError as problem:
            raise LoginRefused(f"Redis at {address} tells of no cluster: {problem}") from None
        finally:
            wire.close("asked")
        return slots

    def _adopt(self, ranges: list[Any], told_by: Address) -> None:
        """Take the answer of CLUSTER SLOTS: ranges of first slot, last slot, primary, replicas."""
        slots: list[Link | None] = [None] * _SLOTS
        primaries = set()
        for first, last, (host, port, *_), *_ in ranges:
            # A server that does not know its own name leaves it out: it is the one that was asked.
            address = Address(host.decode() if host else told_by.host, port)
            primaries.add(address)
            slots[first : last + 1] = [self._join(address)] * (last + 1 - first)
        self._slots = slots
        self._why = "no server of the Redis cluster has this key's slot"
        for address in self._links.keys() - primaries:
            self._leave(address)

    def _join(self, address: Address) -> Link:
        link = self._links.get(address)
        if link is None:

            async def locate() -> Address:
                return address

            link = self._links[address] = Link(self._options, locate, self._moved)
            self._keepers[address] = self._group.create_task(link.keep(), name=f"redis:{address}")
        return link

    def _leave(self, address: Address) -> None:
        self._keepers.pop(address).cancel()
        self._links.pop(address).close()


def key_of(command: Command) -> bytes | None:
    """The first key of a command; None where it has none."""
    name = _bytes(command[0]).upper()
    if name in _KEYLESS:
        return None
    if name in (b"XREAD", b"XREADGROUP"):
        return _bytes(command[[_bytes(word).upper() for word in command].index(b"STREAMS") + 1])
    return _bytes(command[2 if name in _KEY_THIRD else 1])


def _bytes(word: Word) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()
