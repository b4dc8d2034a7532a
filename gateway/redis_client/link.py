"""`Link`: keeps one connection to one server up, for as long as its `keep` runs."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress

from redis.exceptions import ResponseError

from gateway.redis_client.clock import Clock
from gateway.redis_client.dial import LoginRefused, dial, identify
from gateway.redis_client.options import Address, RedisOptions
from gateway.redis_client.wire import Command, Disconnected, Reply, Wire
from gateway.telemetry import log_event

_LOOK_EVERY = 2.0  # seconds between looks at Redis' clock; also what finds a dead network on an idle connection
_FIRST_DELAY, _LAST_DELAY = 0.02, 1.0  # seconds between attempts to reconnect


class Link:
    """The connection that calls go out on.

    `locate` says where the server is, at each attempt. `moved` is called when another server answers than before.
    `up` is set while there is a connection; `settled` is too, and for good once the link is closed.
    """

    def __init__(
        self, options: RedisOptions, locate: Callable[[], Awaitable[Address]], moved: Callable[[], None]
    ) -> None:
        self.clock = Clock()
        self.up = asyncio.Event()
        self.settled = asyncio.Event()
        self._options = options
        self._locate = locate
        self._moved = moved
        self._identity = ""
        self.address = Address()
        self._wire: Wire | None = None
        self._why = "not connected to Redis yet"
        self._timeless = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._wire is not None

    def call(self, command: Command) -> asyncio.Future[Reply]:
        """See `Wire.call`; fails at once while there is no connection."""
        return self._wire.call(command) if self._wire is not None else failed(self._why)

    def atomic(self, commands: Sequence[Command]) -> asyncio.Future[list[Reply]]:
        """See `Wire.atomic`; fails at once while there is no connection."""
        return self._wire.atomic(commands) if self._wire is not None else failed(self._why)

    async def dial(self) -> Wire:
        """Another connection to the same server. Raises `Disconnected`, at once while the link itself is down."""
        if self._wire is None:
            raise Disconnected(self._why)
        return await dial(self._options, self.address)

    async def start(self) -> None:
        """Try once to connect. Raises LoginRefused; another failure is for `keep` to mend."""
        try:
            await self._connect()
        except LoginRefused:
            raise
        except Disconnected as problem:
            self._why = problem.message

    async def keep(self) -> None:
        """Connect again whenever the connection is lost, until cancelled; then drop it."""
        try:
            while True:
                if self._wire is None:
                    await self._reconnect()
                else:
                    await self._tend(self._wire)
        finally:
            self.close()

    def close(self) -> None:
        """Drop the connection; calls fail from now on."""
        if self._wire is not None:
            self._wire.close("the client was closed")
        self._why = "the client was closed"
        self.settled.set()

    async def _connect(self) -> None:
        self.address = await self._locate()
        wire = await dial(self._options, self.address)
        try:
            identity = await identify(wire)
            if identity != self._identity:
                self.clock.forget()
            await self._ask_time(wire)
        except BaseException:
            wire.close("the connection was not completed")
            raise
        if wire.lost.is_set():
            raise Disconnected(wire.why)
        wire.on_lost = self._down
        self._wire = wire
        self.up.set()
        self.settled.set()
        if identity != self._identity:
            self._identity = identity
            self._moved()

    async def _reconnect(self) -> None:
        said: set[str] = set()
        for delay in delays():
            try:
                await self._connect()
            except Disconnected as problem:
                self._why = problem.message
                if self._why not in said:
                    said.add(self._why)
                    log_event("redis_unreachable", logging.WARNING, reason=self._why)
                await asyncio.sleep(delay)
            else:
                log_event("redis_connected", address=str(self.address))
                return

    async def _tend(self, wire: Wire) -> None:
        """Look at Redis' clock now and then, and whether it is still the one, until the connection is lost."""
        while not wire.lost.is_set():
            try:
                async with asyncio.timeout(_LOOK_EVERY):
                    await wire.lost.wait()
            except TimeoutError:
                with suppress(Disconnected):
                    await self._ask_time(wire)
                    # An old primary may serve for 10 s after a failover, and all that is written there then is lost.
                    if await self._locate() != self.address:
                        wire.close("the primary is another server now")
        log_event("redis_lost", logging.WARNING, reason=wire.why)

    def _down(self) -> None:
        assert self._wire is not None
        self.up.clear()
        self.settled.clear()
        self._why = self._wire.why
        self._wire = None

    async def _ask_time(self, wire: Wire) -> None:
        sent = time.monotonic()
        try:
            seconds, micros = await wire.call(("TIME",))
        except ResponseError as problem:
            # An ACL without TIME; our own clock serves as far as it is set right.
            if not self._timeless:
                log_event("redis_clock_unknown", logging.WARNING, reason=str(problem))
            self._timeless = True
            return
        self.clock.sample(sent, time.monotonic(), int(seconds) + int(micros) / 1e6)


def failed(why: str) -> asyncio.Future[Reply]:
    """A future that has failed with `Disconnected` already."""
    future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    future.set_exception(Disconnected(why))
    return future


def delays() -> Iterator[float]:
    """Seconds to wait before each next attempt: doubling, jittered, for ever."""
    delay = _FIRST_DELAY
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(2 * delay, _LAST_DELAY)
