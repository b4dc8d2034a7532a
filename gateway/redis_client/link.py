"""`Link`: keeps one connection to one server up, for as long as its `keep` runs."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence

from gateway.redis_client.clock import Clock
from gateway.redis_client.dial import LoginRefused, dial, identify
from gateway.redis_client.options import RedisOptions
from gateway.redis_client.wire import Command, Disconnected, Reply, Wire
from gateway.telemetry import log_event

_CLOCK_EVERY = 2.0  # seconds between looks at Redis' clock; also what finds a dead network on an idle connection
_FIRST_DELAY, _LAST_DELAY = 0.02, 1.0  # seconds between attempts to reconnect


class Link:
    """The connection that calls go out on. `moved` is called when another server answers than before."""

    def __init__(self, options: RedisOptions, moved: Callable[[], None]) -> None:
        self.clock = Clock()
        self.generation = 0
        self._options = options
        self._moved = moved
        self._identity = ""
        self._wire: Wire | None = None
        self._why = "not connected to Redis yet"
        self._news = asyncio.Event()
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._wire is not None and not self._wire.lost.is_set()

    def call(self, command: Command) -> asyncio.Future[Reply]:
        """See `Wire.call`; fails at once while there is no connection."""
        return self._wire.call(command) if self._wire is not None else self._down()

    def atomic(self, commands: Sequence[Command]) -> asyncio.Future[list[Reply]]:
        """See `Wire.atomic`; fails at once while there is no connection."""
        return self._wire.atomic(commands) if self._wire is not None else self._down()

    async def start(self) -> None:
        """Try once to connect. Raises LoginRefused; another failure is for `keep` to mend."""
        try:
            await self._connect()
        except LoginRefused:
            raise
        except Disconnected as problem:
            self._lost(str(problem))

    async def keep(self) -> None:
        """Connect again whenever the connection is lost, until cancelled."""
        while True:
            if not self.connected:
                await self._reconnect()
            assert self._wire is not None
            await self._tend(self._wire)
            self._lost(self._wire.why)

    def close(self) -> None:
        """Drop the connection; calls fail from now on."""
        if self._wire is not None:
            self._wire.close("the client was closed")

    async def changed(self, since: int) -> int:
        """See `RedisClient.changed`."""
        while self.generation == since:
            await self._news.wait()
        return self.generation

    async def online(self) -> None:
        """See `RedisClient.online`."""
        await self._up.wait()

    async def _connect(self) -> None:
        wire = await dial(self._options, self._options.target.addresses[0])
        try:
            server = await identify(wire)
            if server.identity != self._identity:
                self.clock.forget()
            await self._ask_time(wire)
        except BaseException:
            wire.close("")
            raise
        self._wire = wire
        self._up.set()
        if server.identity != self._identity:
            self._identity = server.identity
            self.generation += 1
            self._news.set()
            self._news = asyncio.Event()
            self._moved()

    async def _reconnect(self) -> None:
        said = ""
        for delay in _delays():
            try:
                await self._connect()
            except Disconnected as problem:
                if str(problem) != said:
                    said = self._why = str(problem)
                    log_event("redis_unreachable", logging.WARNING, reason=said)
                await asyncio.sleep(delay)
            else:
                log_event("redis_connected", generation=self.generation)
                return

    async def _tend(self, wire: Wire) -> None:
        """Look at Redis' clock now and then, until the connection is lost."""
        while not wire.lost.is_set():
            try:
                async with asyncio.timeout(_CLOCK_EVERY):
                    await wire.lost.wait()
            except TimeoutError:
                await self._ask_time(wire)

    async def _ask_time(self, wire: Wire) -> None:
        sent = time.monotonic()
        try:
            seconds, micros = await wire.call(("TIME",))
        except Disconnected:
            if not wire.lost.is_set():
                raise
            return
        self.clock.sample(sent, time.monotonic(), int(seconds) + int(micros) / 1e6)

    def _lost(self, why: str) -> None:
        self._wire = None
        self._up.clear()
        self._why = why
        log_event("redis_lost", logging.WARNING, reason=why)

    def _down(self) -> asyncio.Future[Reply]:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        future.set_exception(Disconnected(self._why))
        return future


def _delays() -> Iterator[float]:
    """Seconds to wait before each next attempt: doubling, jittered, for ever."""
    delay = _FIRST_DELAY
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(2 * delay, _LAST_DELAY)
