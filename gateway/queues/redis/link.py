"""What the parts of a `RedisQueue` share: the connection, who we are, and what was counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gateway.message import VERSION
from gateway.queues.redis import wire
from gateway.queues.redis.beside import Payloads
from gateway.queues.redis.seal import Seal
from gateway.redis_client import RedisClient
from gateway.telemetry import log_event

_BURST = 10.0  # seconds between two lines about the same


@dataclass(slots=True)
class Counts:
    """What happened on this process that its users may ask about."""

    resubmitted: int = 0  # requests the queue had lost
    duplicates: int = 0  # entries of requests that are in hand already, and answers to what was answered
    orphans: int = 0  # requests and answers whose gateway or caller is gone
    dead_letters: int = 0
    recovered: int = 0  # requests taken over from a worker that died
    damaged: int = 0  # messages that could not be read, or bore the wrong signature


class Bell:
    """Wakes whoever waits for the next beat before it is due."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """There is something to do now."""
        self._rung.set()

    async def wait(self, seconds: float) -> None:
        """Wait so long at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        self._rung.clear()


@dataclass(slots=True)
class Link:
    """The connection of one process and its name in the fleet. `tasks` ends with the queue."""

    client: RedisClient
    process: str
    seal: Seal
    payloads: Payloads
    tasks: asyncio.TaskGroup
    reads: int = VERSION  # the newest version of messages that are understood here
    counts: Counts = field(default_factory=Counts)
    hosts: dict[str, str] = field(default_factory=dict)  # of each process, the /dev/shm it has
    ids: Iterator[bytes] = field(default_factory=wire.ids)
    bell: Bell = field(default_factory=Bell)  # to be rung when there is something to look after
    _said: dict[str, tuple[float, int]] = field(default_factory=dict)  # events, when last, and how many since

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Do this beside everything else; it ends with the queue at the latest."""
        return self.tasks.create_task(work, name=name)

    def same_host(self, process: str) -> bool:
        """Whether a process reads the same /dev/shm as this one."""
        own = self.payloads.host
        return own is not None and (process == self.process or self.hosts.get(process) == own)

    def damaged(self, problem: Exception, where: str) -> None:
        """A message that is no use is counted and logged, and nothing else suffers from it."""
        self.counts.damaged += 1
        self.report("message_damaged", where=where, reason=str(problem))

    def report(self, event: str, level: int = logging.ERROR, **fields: str | int) -> None:
        """Log what may happen with every message: once in a while, with how often it happened in between."""
        now = time.monotonic()
        at, more = self._said.get(event, (-_BURST, 0))
        if now - at < _BURST:
            self._said[event] = (at, more + 1)
            return
        self._said[event] = (now, 0)
        log_event(event, level, **fields, **({"more_before": more} if more else {}))
