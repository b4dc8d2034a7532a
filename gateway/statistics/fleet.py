"""The statistics of a whole fleet, the same whichever process is asked: fresh of the live, last known of the dead.

Every process keeps its last word in one Redis hash, `Keys.stats`: process id to a `Record`. It writes it every few
seconds, before it answers a question and when it stops, so whatever was ever shown of a process outlives it and no
sum falls. A gateway that is asked reads the hash and asks the others, and takes the newest it knows of each process.
It remembers all of that: without Redis it goes on with what it knows, and writes back what Redis has lost.

The words of the long dead are folded into one record, `departed`, that names whose they were; a word of those in the
hash counts no more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

import msgspec
from redis.exceptions import RedisError

from gateway.errors import GatewayError
from gateway.statistics.snapshot import unpack
from gateway.statistics.statistics import Statistics
from gateway.telemetry import log_event

QUESTION = "statistics"
DEPARTED = "departed"
_TIDY = 12  # writes between two looks at the hash
_DEAD = 3600.0  # seconds of silence after which a word is folded: long enough for whoever was only cut off
_PATIENCE = 2.0  # seconds for what Redis or others have to say
_SLOW = 10.0  # seconds after which what was read may no longer be so
_REMEMBERED = 1000  # folded processes that are known by name

Word: TypeAlias = str | bytes | int | float | memoryview


class Redis(Protocol):
    """What is needed of a `RedisClient`."""

    def call(self, *command: Word) -> asyncio.Future[Any]:
        """One command."""

    def atomic(self, *commands: Sequence[Word]) -> asyncio.Future[list[Any]]:
        """Commands that run together or not at all."""


class Record(msgspec.Struct, array_like=True, gc=False):
    """The word of one process, higher `number` after lower; the one called `departed` has that of all it `folded`."""

    process: str
    number: int
    statistics: bytes  # `Statistics.snapshot`
    folded: list[str] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


class FleetStatistics:
    """Called, it gives the sum over the fleet. An async context manager that keeps this process's own word in Redis.

    `ask` puts a question to all other live processes; each answers `QUESTION` with `answer()`. `key` is the hash,
    `seconds` the time between two writes. Nothing here raises because of Redis: what is known is what is shown.
    """

    def __init__(
        self,
        local: Statistics,
        process: str,
        ask: Callable[[str], Awaitable[Sequence[bytes]]],
        *,
        redis: Redis,
        key: str,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local = local
        self._process = process
        self._ask = ask
        self._redis = redis
        self._key = key
        self._seconds = seconds
        self._clock = clock
        self._number = 0
        self._known: dict[str, Record] = {}  # the newest of each other process
        self._departed = Record(DEPARTED, 0, Statistics().snapshot())
        self._changes: dict[str, tuple[int, float]] = {}  # number of each word in the hash, and since when
        self._unreadable = 0  # records in the hash
        self._asking = asyncio.Lock()
        self._begun = 0  # rounds of asking
        self._latest = (0, Statistics())  # round that ended last, and its sum
        self._said: set[str] = set()  # what was logged, to say it once
        self._stopping = asyncio.Event()
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        # What was unloaded before this process began must be known before it counts anything.
        await self.tidy()
        await self._group.__aenter__()
        self._group.create_task(self._keep(), name="statistics")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if not isinstance(error, asyncio.CancelledError):
            # The group would wrap an error of the block, which is none of its business.
            kind = error = trace = None
        await self._group.__aexit__(kind, error, trace)

    def answer(self) -> bytes:
        """This process's word, which is on its way into the hash before anybody sees it."""
        data = self._word()
        # It is written again in a few seconds, and then a failure is noticed.
        self._redis.call("HSET", self._key, self._process, data).add_done_callback(_seen)
        return data

    async def __call__(self) -> Statistics:
        """The sum over all processes, of a round of questions that begins now or later; callers share rounds."""
        came = self._begun
        async with self._asking:
            number, total = self._latest
            if number > came:
                return total
            self._begun += 1
            number = self._begun
            total = await self._gather()
            self._latest = number, total
        return total

    async def tidy(self) -> None:
        """Learn what the hash has, give it back what it lost, and fold what the long dead have left."""
        began = self._clock()
        kept = await self._read()
        if kept is None:
            return
        await self._sum({}, kept)
        await self._fold(kept, began)

    # --- this process

    async def _keep(self) -> None:
        writes = 0
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(self._seconds):
                    await self._stopping.wait()
            except TimeoutError:
                writes += 1
                if writes % _TIDY == 0:
                    await self.tidy()
                await self._write()
        await self._write()

    async def _write(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._redis.call("HSET", self._key, self._process, self._word())
        except (GatewayError, RedisError, TimeoutError) as problem:
            self._say("statistics_not_kept", reason=str(problem) or "Redis does not answer")
        else:
            self._said.discard("statistics_not_kept")

    def _word(self) -> bytes:
        self._number += 1
        return _encode(Record(self._process, self._number, self._local.snapshot()))

    # --- the others

    async def _gather(self) -> Statistics:
        answers, kept = await asyncio.gather(self._answers(), self._read())
        live, unreadable = _records([*answers, self.answer()])
        self._unreadable = max(self._unreadable, unreadable)
        return await self._sum(live, kept)

    async def _answers(self) -> Sequence[bytes]:
        try:
            async with asyncio.timeout(_PATIENCE):
                return [answer for answer in await self._ask(QUESTION) if answer]
        except (GatewayError, RedisError, TimeoutError):
            return []  # nobody can be asked: what is known has to do

    async def _read(self) -> dict[str, Record] | None:
        try:
            async with asyncio.timeout(_PATIENCE):
                reply = await self._redis.call("HGETALL", self._key)
        except (GatewayError, RedisError, TimeoutError):
            return None
        kept, self._unreadable = _records(reply[1::2])
        return kept

    async def _sum(self, live: dict[str, Record], kept: Mapping[str, Record] | None) -> Statistics:
        """Add up what is known by now, and forget here what others have unloaded."""
        if kept is not None:
            self._departed = kept.get(DEPARTED, self._departed)
        folded = set(self._departed.folded)
        for process, record in {**(kept or {}), **live}.items():
            known = self._known.get(process)
            if process not in (DEPARTED, self._process) and (known is None or record.number > known.number):
                self._known[process] = record
        self._known = {process: record for process, record in self._known.items() if process not in folded}
        if kept is not None:
            self._give_back(kept, live)
        if self._process in folded:
            remedy = "this process was taken for dead, and what it counts is in no sum; restart it"
            self._say("statistics_disowned", remedy=remedy)
        past = [record.statistics for process, record in self._known.items() if process not in live]
        present = [record.statistics for process, record in live.items() if process not in folded]
        # Thousands of counters: on a thread they hold up no request.
        total = await asyncio.to_thread(Statistics.merge, present, [*past, self._departed.statistics])
        total.skipped += self._unreadable
        if total.skipped:
            self._say("statistics_unreadable", processes=total.skipped)
        self._local.catch_up(total)
        return total

    def _give_back(self, kept: Mapping[str, Record], live: Mapping[str, Record]) -> None:
        """Redis was emptied, or came back with older data."""
        lost = [record for process, record in self._known.items() if process not in kept and process not in live]
        if DEPARTED not in kept and self._departed.number:
            lost.append(self._departed)
        for record in lost:
            # Never over what is there: it may be newer.
            self._redis.call("HSETNX", self._key, record.process, _encode(record)).add_done_callback(_seen)

    # --- the long dead

    async def _fold(self, kept: Mapping[str, Record], began: float) -> None:
        """Add the words of the long dead to `departed`. The least of the live does it, so that one does."""
        silent = self._silent(kept, began)
        if any(process < self._process for process, seconds in silent.items() if seconds < 3 * _TIDY * self._seconds):
            return
        dead = [process for process, seconds in silent.items() if seconds >= _DEAD]
        new = [kept[process] for process in dead if process not in self._departed.folded]
        past = [self._departed.statistics, *(record.statistics for record in new)]
        if not dead or self._unreadable or None in map(unpack, past):
            return  # what this version of the code cannot read is left to those who can
        total = await asyncio.to_thread(Statistics.merge, [], past)
        names = [*self._departed.folded, *(record.process for record in new)][-_REMEMBERED:]
        departed = Record(DEPARTED, self._departed.number + 1, total.snapshot(), names)
        if self._clock() - began > _SLOW:
            return  # another may have done it meanwhile
        try:
            await self._redis.atomic(("HSET", self._key, DEPARTED, _encode(departed)), ("HDEL", self._key, *dead))
        except (GatewayError, RedisError) as problem:
            self._say("statistics_not_folded", reason=str(problem))

    def _silent(self, kept: Mapping[str, Record], now: float) -> dict[str, float]:
        """For how many seconds, by this process's own clock, each of the others has said nothing new."""
        others = {process: record for process, record in kept.items() if process not in (DEPARTED, self._process)}
        before = self._changes
        self._changes = {
            process: before[process] if before.get(process, (0, now))[0] == record.number else (record.number, now)
            for process, record in others.items()
        }
        return {process: now - since for process, (_, since) in self._changes.items()}

    def _say(self, event: str, **fields: str | int) -> None:
        if event not in self._said:
            self._said.add(event)
            log_event(event, logging.WARNING, **fields)


def _records(data: Iterable[bytes]) -> tuple[dict[str, Record], int]:
    """The records by process, and how many could not be read."""
    records, unreadable = {}, 0
    for each in data:
        try:
            record = _decode(each)
        except (msgspec.DecodeError, ValueError):
            unreadable += 1
        else:
            records[record.process] = record
    return records, unreadable


def _seen(done: asyncio.Future[Any]) -> None:
    """Its failure is nobody's business."""
    if not done.cancelled():
        done.exception()
