"""What dead workers left behind, and what live ones cannot use: pending entries change hands.

A worker whose announcement is gone is dead; its entries are claimed, and tried as `suspects` says. An entry that is
given, by a worker that stops or is too old for it, is like any other. Nothing is decided by how long an entry has been
pending: a long batch is no death.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from typing import NamedTuple
from zlib import crc32

from redis.exceptions import RedisError

from gateway.queues.redis import wire
from gateway.queues.redis.directory import Directory
from gateway.queues.redis.events import GIVEN, Events
from gateway.queues.redis.lane import LaneReader
from gateway.queues.redis.link import Link
from gateway.redis_client import Disconnected, unheeded
from gateway.redis_client.keys import GROUP
from gateway.telemetry import log_event

_AT_ONCE = 1000  # entries looked at
_STRANGE = 1000  # ms that an entry of a worker nobody has seen must be pending to be taken from it
_SHARED = 0.6  # seconds from a death in which each heir takes its share; all look after it within a beat
_ROUNDS = 60  # looks at what is pending for each look at who is in the group


class _Pending(NamedTuple):
    """An entry that was delivered so many times, the last `idle` ms ago."""

    entry: bytes
    idle: int
    deliveries: int


class Recovery:
    """Looks after the pending entries of this process's lanes."""

    def __init__(self, link: Link, directory: Directory, events: Events) -> None:
        self._link = link
        self._directory = directory
        self._events = events
        self._looks = 0

    async def look(self, lanes: Iterable[LaneReader]) -> None:
        """Take over what dead workers held of these lanes, and what was given to this one. Raises nothing."""
        self._looks += 1
        await asyncio.gather(*(self._look(lane, stream) for lane in lanes for stream in lane.streams))

    async def hand_over(self, lane: LaneReader) -> None:
        """Give jobs that nobody here will run to another worker. Without one they stay, until somebody claims them.

        Raises `Disconnected`.
        """
        jobs = lane.idle()
        heirs = list(self._directory.others(lane.lane))
        if not heirs or not jobs:
            return
        heir = random.choice(heirs)
        for stream in lane.streams:
            entries = [job.entry for job in jobs if job.stream == stream]
            if entries:
                await self._link.client.call("XCLAIM", stream, GROUP, heir, 0, *entries, "JUSTID")
        lane.disown(jobs)
        self._tell(heir)

    async def sign_off(self, lane: LaneReader) -> None:
        """Leave the group, unless entries would be lost with the name: what is pending is another's to claim."""
        for stream in lane.streams:
            try:
                mine = await self._link.client.call("XPENDING", stream, GROUP, "-", "+", 1, self._link.process)
                if not mine:
                    await self._link.client.call("XGROUP", "DELCONSUMER", stream, GROUP, self._link.process)
            except RedisError:
                continue  # no group, no name in it

    async def _look(self, lane: LaneReader, stream: str) -> None:
        try:
            total, _, _, consumers = await self._link.client.call("XPENDING", stream, GROUP)
            if self._looks % _ROUNDS == 0:
                await self._strike_off(stream)
            if total:
                await self._inspect(lane, stream, {name.decode(): int(count) for name, count in consumers})
        except Disconnected:
            return
        except RedisError as problem:  # the group is not made yet, or is gone; the reader makes it
            if not str(problem).startswith("NOGROUP"):
                self._link.report("recovery_failed", stream=stream, reason=str(problem))

    async def _inspect(self, lane: LaneReader, stream: str, pending: dict[str, int]) -> None:
        for process, count in pending.items():
            if process == self._link.process:
                held = sum(job.stream == stream for job in lane.held.values())
                if count > held + len(lane.outbox.unacknowledged[stream]):
                    await self._adopt_own(lane, stream)
            elif not self._directory.is_alive(process):
                await self._take_over(lane, stream, process)

    async def _strike_off(self, stream: str) -> None:
        """Take the names of the dead off a group once nothing is pending under them."""
        for found in await self._link.client.call("XINFO", "CONSUMERS", stream, GROUP):
            consumer = wire.fields(found)
            name = consumer[b"name"].decode()
            if self._directory.is_dead(name) and not consumer[b"pending"]:
                await self._link.client.call("XGROUP", "DELCONSUMER", stream, GROUP, name)

    async def _adopt_own(self, lane: LaneReader, stream: str) -> None:
        """Entries of ours that we do not hold: given to us, or read when a connection broke."""
        done = lane.outbox.unacknowledged[stream]
        pending = await self._pending(stream, self._link.process)
        lost = [each for each in pending if each.entry not in lane.held and each.entry not in done]
        ours = [each for each in lost if each.entry not in lane.foreign]
        await self._pass_on(lane, stream, [each.entry for each in lost if each.entry in lane.foreign])
        await asyncio.gather(*(self._claim(lane, stream, each) for each in ours))

    async def _take_over(self, lane: LaneReader, stream: str, process: str) -> None:
        """Claim our share, however much is held here: it has waited longer than anything that is yet to be read."""
        pending = await self._pending(stream, process)
        if not self._directory.is_dead(process):  # never seen: it may have come this very moment
            pending = [each for each in pending if each.idle > _STRANGE] if self._directory.sure else []
        heirs = sorted([self._link.process, *self._directory.others(lane.lane)])
        share = [each for each in pending if heirs[crc32(each.entry) % len(heirs)] == self._link.process]
        if self._directory.dead_for(process) > _SHARED:  # whose share it was has not taken it
            share = pending
        # As idle as it was seen: of two who claim at once, the second finds it busy.
        claims = [self._claim(lane, stream, each, idle=each.idle, orphan=True) for each in share]
        taken = sum(await asyncio.gather(*claims))
        if taken:
            self._link.counts.recovered += taken
            log_event("requests_recovered", logging.WARNING, model=lane.lane.model, requests=taken, of=process)

    async def _pending(self, stream: str, process: str) -> list[_Pending]:
        found = await self._link.client.call("XPENDING", stream, GROUP, "-", "+", _AT_ONCE, process)
        return [_Pending(entry, idle, deliveries) for entry, _, idle, deliveries in found]

    async def _claim(
        self, lane: LaneReader, stream: str, what: _Pending, *, idle: int = 0, orphan: bool = False
    ) -> int:
        # That it changes hands is no delivery, unless it is run at once beside others.
        begun = what.deliveries + (orphan and lane.contained and what.deliveries == 1)
        claimed = await self._link.client.call(
            "XCLAIM", stream, GROUP, self._link.process, idle, what.entry, "RETRYCOUNT", begun
        )
        for found in claimed:
            if found:
                await lane.enter(stream, found[0], wire.fields(found[1]), what.deliveries, orphan=orphan)
        return len(claimed)

    async def _pass_on(self, lane: LaneReader, stream: str, entries: list[bytes]) -> None:
        """Entries of a newer release: to a worker that can read them, if there is one."""
        heir = self._directory.newer(lane.lane)
        if heir is not None and entries:
            await self._link.client.call("XCLAIM", stream, GROUP, heir, 0, *entries, "JUSTID")
            lane.foreign.difference_update(entries)
            self._tell(heir)

    def _tell(self, heir: str) -> None:
        told = self._events.tell(GIVEN, heir)
        told.add_done_callback(unheeded)  # it looks by itself too
