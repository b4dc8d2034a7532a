"""Who is alive, who holds what: every process announces itself and reads the others' announcements.

A process that is silent for two seconds is dead to the others. Who could not hear or be heard for a while itself, be it
that Redis was away or full or that this process stood still, declares nobody dead for as long again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from redis.exceptions import RedisError

from gateway.queues.base import NO_WORKER, Capacity, Lane, PoolState, VersionState
from gateway.queues.redis import announce
from gateway.queues.redis.admission import FleetAdmission
from gateway.queues.redis.announce import Announcement
from gateway.queues.redis.link import Bell, Link
from gateway.redis_client import Disconnected, unheeded
from gateway.telemetry import log_event

BEAT = 0.25  # seconds
_LIVES = 2.0  # seconds from an announcement to the death of who made it
_DEAD_KNOWN = 10_000  # processes
_HOLDING_LIVES = 600.0  # seconds
_LEAST = 0.02  # seconds between two looks, however much news there is


@dataclass(slots=True)
class Member:
    """Another process."""

    announcement: Announcement
    heard: float  # when there was a new announcement
    pools: dict[str, PoolState] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    digest: bytes = b""

    def serves(self, lane: Lane) -> bool:
        """Whether it takes requests of this lane."""
        pool = None if self.announcement.leaving else self.pools.get(lane.model)
        return pool is not None and any(
            state.version == lane.version and state.state == "READY" for state in pool.versions
        )


class Directory:
    """The fleet as this process knows it, itself included."""

    def __init__(
        self,
        link: Link,
        role: str,
        rows: Callable[[], dict[Lane, int]],
        died: Callable[[str], None],
        news: Callable[[], None],
    ) -> None:
        """`rows` says what this process waits for. `died` is told of each process that is dead, `news` that others
        should look what this one holds now.
        """
        self.members: dict[str, Member] = {}
        self.dead: dict[str, float] = {}  # and since when
        self.leaving = False
        self._names: Collection[str] = ()
        self._link = link
        self._role = role
        self._rows = rows
        self._died = died
        self._news = news
        self._own: dict[str, PoolState] = {}
        self._pools: dict[str, PoolState] = {}
        self._known: set[str] = set()  # models that somebody held once
        self._admissions: dict[Lane, FleetAdmission] = {}
        self._bell = Bell()
        self._holding = b""  # what this process holds, packed; empty after a change
        self._unreadable: set[str] = set()  # live processes of another release
        self._written: tuple[bytes, bool] = (b"", False)  # what others can know: the digest of what is held, `leaving`
        self._looked = 0.0  # when the others were last looked at
        self._numbers = count(1)
        self._looking = asyncio.Lock()
        self._calm = 0.0  # nobody is declared dead before this time

    # --- what this process holds

    def publish(self, state: PoolState) -> None:
        """See `Queue.publish`."""
        self._own[state.model] = state
        self._renew(state.model)

    def withdraw(self, model: str) -> None:
        """See `Queue.withdraw`."""
        if self._own.pop(model, None) is not None and not any(model in each.pools for each in self.members.values()):
            self._known.discard(model)
            self._forget(model)
        self._renew(model)

    def can_load(self, names: Collection[str]) -> None:
        """The models of this process's repository."""
        if set(names) != set(self._names):
            self._names = tuple(names)
            self._holding = b""

    def leave(self) -> None:
        """This worker takes no more requests."""
        self.leaving = True
        for model in self._own:
            self._merge(model)
        self._bell.ring()

    # --- what the fleet holds

    def pool(self, model: str) -> PoolState | None:
        """See `Queue.pool`."""
        return self._pools.get(model)

    def pools(self) -> list[PoolState]:
        """See `Queue.pools`."""
        return [self._pools[name] for name in sorted(self._pools)]

    def repository_names(self) -> set[str]:
        """The names of what the workers could load."""
        return {name for member in self.members.values() for name in member.names} | set(self._names)

    def others(self, lane: Lane) -> Iterator[str]:
        """The other workers that take requests of this lane."""
        return (process for process, member in self.members.items() if member.serves(lane))

    def newer(self, lane: Lane) -> str | None:
        """A worker of this lane that reads newer messages than this process does."""
        others = self.others(lane)
        return next((each for each in others if self.members[each].announcement.reads > self._link.reads), None)

    def workers(self) -> set[str]:
        """Every live worker that carries out commands."""
        found = {
            process
            for process, member in self.members.items()
            if member.announcement.role != "gateway" and not member.announcement.leaving
        }
        return found if self._role == "gateway" or self.leaving else found | {self._link.process}

    def shares_memory(self, lane: Lane) -> bool:
        """Whether every worker of a lane reads the same /dev/shm as this process."""
        return all(map(self._link.same_host, (*self.others(lane), self._link.process)))

    def capacities(self) -> dict[Lane, list[Capacity | None]]:
        """Of each lane that is served, what each live worker has announced of its speed; None for nothing yet."""
        found: dict[Lane, list[Capacity | None]] = {}
        own = self._capacities()
        for pool in self._pools.values():
            for state in pool.versions:
                lane = Lane(pool.model, state.version)
                name = f"{lane.model}/{lane.version}"
                found[lane] = [self.members[each].announcement.capacity.get(name) for each in self.others(lane)]
                if not self.leaving and any(each.version == lane.version for each in self._own_versions(lane.model)):
                    found[lane].append(own.get(name))
        return found

    def _own_versions(self, model: str) -> tuple[VersionState, ...]:
        pool = self._own.get(model)
        return () if pool is None else pool.versions

    def is_dead(self, process: str) -> bool:
        """Whether a process is known to have died."""
        return process in self.dead

    def dead_for(self, process: str) -> float:
        """Seconds since a process was found dead; of one that is not known to be, for ever."""
        return time.monotonic() - self.dead.get(process, -math.inf)

    def is_alive(self, process: str) -> bool:
        """Whether a process announces itself, be it in another release's way."""
        return process in self.members or process in self._unreadable or process == self._link.process

    @property
    def sure(self) -> bool:
        """Whether silence means something now."""
        return time.monotonic() > self._calm

    # --- the beat

    async def run(self) -> None:
        """Announce and look around until cancelled."""
        client = self._link.client
        while True:
            began = time.monotonic()
            try:
                announced = self.announce()
                await self.refresh()
                await announced
            except Disconnected:
                self._deaf()
            except RedisError as problem:
                self._deaf()
                self._link.report("not_announced", reason=str(problem))
                # A full Redis takes nothing new, but keeps what it has for longer.
                lives = client.call("PEXPIRE", client.keys.process(self._link.process), int(_LIVES * 1000))
                lives.add_done_callback(unheeded)
            await self._bell.wait(max(BEAT - (time.monotonic() - began), _LEAST))

    def wake(self) -> None:
        """Somebody has news."""
        self._bell.ring()

    def announce(self) -> asyncio.Future[bytes]:
        """Tell the others of this process. The future fails where Redis did not take it."""
        client, process = self._link.client, self._link.process
        holding = self._holding = self._holding or announce.pack_holding(self._own.values(), self._names)
        now = announce.digest(holding), self.leaving
        news = now != self._written
        key, lives = client.keys.holding(process), int(_HOLDING_LIVES * 1000)
        kept = client.call("SET", key, holding, "PX", lives) if news else client.call("PEXPIRE", key, lives)
        kept.add_done_callback(self._kept)
        if news and self._own:
            known = [word for model in self._own for word in (model, process)]
            client.call("HSET", client.keys.models, *known).add_done_callback(unheeded)
        own = Announcement(
            self._role,
            self._link.payloads.host or "",
            self._link.reads,
            self.leaving,
            now[0],
            self._capacities(),
            {f"{lane.model}/{lane.version}": rows for lane, rows in self._rows().items()},
            next(self._numbers),
        )
        client.call("HSET", client.keys.processes, process, self._role).add_done_callback(unheeded)
        announced = client.call("SET", client.keys.process(process), announce.encode(own), "PX", int(_LIVES * 1000))
        announced.add_done_callback(unheeded)
        self._written = now
        if news:
            self._news()
        return announced

    def _kept(self, done: asyncio.Future[bytes | int | None]) -> None:
        """What is held was not written, or Redis has lost it: write it with the next announcement."""
        if done.cancelled() or done.exception() is not None or not done.result():
            self._written = (b"", False)

    async def refresh(self) -> None:
        """Read who is there. Raises `Disconnected`."""
        async with self._looking:
            await self._refresh()

    async def _refresh(self) -> None:
        client = self._link.client
        roles, known = await asyncio.gather(
            client.call("HGETALL", client.keys.processes), client.call("HKEYS", client.keys.models)
        )
        names = list({name.decode() for name in roles[::2]} - {self._link.process} | self.members.keys())
        found = await client.call("MGET", *map(client.keys.process, names)) if names else []
        now = time.monotonic()
        if now - self._looked > _LIVES / 2:
            self._deaf()
        self._looked = now
        silent = [process for process, data in zip(names, found, strict=True) if data is None]
        self._unreadable.clear()
        for process, data in zip(names, found, strict=True):
            own = None if data is None else announce.read_announcement(data)
            if own is not None:
                await self._see(process, own)
            elif data is not None:
                self._unreadable.add(process)
        if self.sure:
            self._bury(silent, now)
        self._learn(known)
        self._weigh()

    def _deaf(self) -> None:
        """Nothing is known of anybody for a while now, nor of us."""
        self._calm = time.monotonic() + _LIVES + BEAT

    async def _see(self, process: str, own: Announcement) -> None:
        now = time.monotonic()
        member = self.members.get(process)
        if member is None:
            member = self.members[process] = Member(own, now)
            self.dead.pop(process, None)
        if own.number != member.announcement.number:
            member.heard = now
        left = own.leaving and not member.announcement.leaving
        member.announcement = own
        self._link.hosts[process] = own.host
        if own.digest != member.digest:
            data = await self._link.client.call("GET", self._link.client.keys.holding(process))
            holding = None if data is None else announce.read_holding(data)
            if holding is None:
                return
            touched = set(member.pools)
            member.pools, member.names = holding
            member.digest = announce.digest(data)
            for model in touched | set(member.pools):
                self._merge(model)
        elif left:
            for model in member.pools:
                self._merge(model)

    def _bury(self, silent: Sequence[str], now: float) -> None:
        """Their announcements have lapsed, or they said good-bye."""
        client = self._link.client
        for process in silent:
            member = self.members.get(process)
            if member is not None:
                if now - member.heard < _LIVES / 2 and not member.announcement.leaving:
                    continue  # Redis has lost it, not its process
                self._forget_member(process, member)
            # One that lives after all puts itself there again.
            client.call("HDEL", client.keys.processes, process).add_done_callback(unheeded)

    def _forget_member(self, process: str, member: Member) -> None:
        del self.members[process]
        self._link.hosts.pop(process, None)
        self.dead[process] = time.monotonic()
        if len(self.dead) > _DEAD_KNOWN:
            self.dead.pop(next(iter(self.dead)))
        log_event("process_gone", logging.INFO if member.announcement.leaving else logging.WARNING, process=process)
        for model in member.pools:
            self._merge(model)
        self._died(process)

    def disturbed(self) -> None:
        """Redis was away or has lost its data: silence means nothing for a while."""
        self._deaf()
        self._written = (b"", False)
        self._bell.ring()

    # --- merging

    def _renew(self, model: str) -> None:
        self._holding = b""
        self._merge(model)
        self._bell.ring()

    def _learn(self, known: list[bytes]) -> None:
        names = {name.decode() for name in known}
        for model in names ^ self._known:
            self._known = self._known | {model} if model in names else self._known - {model}
            self._merge(model)

    def _merge(self, model: str) -> None:
        pools = {
            process: member.pools[model]
            for process, member in self.members.items()
            if model in member.pools and not member.announcement.leaving
        }
        if model in self._own and not self.leaving:
            pools[self._link.process] = self._own[model]
        if not pools:
            if model in self._known:
                self._pools[model] = PoolState(model, reason=NO_WORKER)
            else:
                self._pools.pop(model, None)
            return
        merged = announce.merge(model, pools)
        merged = replace(merged, versions=tuple(self._admitting(model, state) for state in merged.versions))
        if merged != self._pools.get(model):
            self._pools[model] = merged

    def _admitting(self, model: str, state: VersionState) -> VersionState:
        if state.state != "READY":
            return state
        lane = Lane(model, state.version)
        admission = self._admissions.setdefault(lane, FleetAdmission(lane))
        if state.config is not None:
            admission.configure(state.config)
        return replace(state, admission=admission)

    def _weigh(self) -> None:
        """Tell each lane's admission what its workers can do and what other gateways wait for."""
        own_capacities = self._capacities()
        for lane, admission in self._admissions.items():
            name = f"{lane.model}/{lane.version}"
            capacities = [
                member.announcement.capacity[name]
                for member in self.members.values()
                if name in member.announcement.capacity and not member.announcement.leaving
            ]
            own = own_capacities.get(name)
            elsewhere = sum(member.announcement.rows.get(name, 0) for member in self.members.values())
            admission.weigh([*capacities, *([own] if own else [])], elsewhere)

    def _capacities(self) -> dict[str, Capacity]:
        found = {}
        for pool in self._own.values():
            for state in pool.versions:
                capacity = state.admission.capacity() if state.admission is not None else None
                if capacity is not None:
                    found[f"{pool.model}/{state.version}"] = capacity
        return found

    def _forget(self, model: str) -> None:
        client = self._link.client
        client.call("HDEL", client.keys.models, model).add_done_callback(unheeded)
