"""`RedisQueue`: gateways and workers in any number of processes meet in Redis Streams.

The parts, each in its module: `calls` the gateway's end, `lane` and `outbox` the worker's, `directory` who is alive and
holds what, `events` commands and what else processes tell each other, `recovery` what dead workers left behind. What is
promised beyond `Queue`: a request is run at least once and answered at most once, whichever process or server
dies, as long as its gateway lives and its deadline has not passed. The keys are described in `gateway.redis_client`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from redis.exceptions import RedisError

from gateway import errors
from gateway.queues.base import Command, Keeps, Lane, Order, PoolState
from gateway.queues.figures import FleetFigures
from gateway.queues.redis import wire
from gateway.queues.redis.agreement import Agreement
from gateway.queues.redis.beside import Payloads
from gateway.queues.redis.calls import Calls, RedisCall
from gateway.queues.redis.cancelled import Cancelled
from gateway.queues.redis.directory import Directory
from gateway.queues.redis.events import CANCEL, GIVEN, NEWS, Events
from gateway.queues.redis.figures import look
from gateway.queues.redis.lane import LaneReader, RedisConsumer
from gateway.queues.redis.link import Counts, Link
from gateway.queues.redis.outbox import Outbox
from gateway.queues.redis.owned import OwnReader, SharedReader
from gateway.queues.redis.recovery import Recovery
from gateway.queues.redis.replies import Replies
from gateway.queues.redis.seal import Seal
from gateway.queues.redis.shared_files import FOLDER
from gateway.queues.redis.wanted import Wanted
from gateway.redis_client import Disconnected, RedisClient, unheeded
from gateway.telemetry import log_event
from gateway.types import InferRequest

Role: TypeAlias = Literal["all", "gateway", "worker"]

BEAT = 0.5  # seconds between looks after what may have gone wrong
_FLUSH = 2.0  # seconds that a stop gives the last answers and acknowledgements


class RedisQueue:
    """The `Queue` protocol over Redis, an async context manager. Enter it before anything is submitted or consumed."""

    def __init__(
        self, client: RedisClient, role: Role = "all", *, key: bytes | None = None, shares: bool = True
    ) -> None:
        """`client` is entered and left by the caller. With `key` messages are signed, and none is read that is not.

        With `shares` large payloads go through shared memory where both ends have it.
        """
        self.process = f"{role}-{secrets.token_hex(16)}"
        self._client = client
        self._role = role
        self._shares = shares
        self._seal = Seal(key)
        self._lanes: dict[Lane, SharedReader] = {}
        self._own: dict[Lane, OwnReader] = {}  # of the sequences begun here
        self._cancelled = Cancelled()
        self._tasks = asyncio.TaskGroup()
        self._background: list[asyncio.Task[None]] = []
        self._closed = False
        self._beat = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        payloads = Payloads(self._client, self.process, FOLDER if self._shares else None)
        link = self._link = Link(self._client, self.process, self._seal, payloads, self._tasks)
        self._outbox = Outbox(link)
        self._wanted = Wanted(link)
        self._calls = Calls(link, self._cancel, self._shares_memory)
        self._directory = Directory(link, self._role, self._calls.rows, self._died, self._tell_news)
        on: dict[str, Callable[[wire.Broadcast], None]] = {
            CANCEL: self._on_cancelled,
            NEWS: lambda _: self._directory.wake(),
            GIVEN: self._on_given,
        }
        self._events = Events(link, self._outbox, on, takes_orders=self._role != "gateway")
        self._calls.routes.directory = self._directory
        self._agreement = Agreement(self._directory, self._events)
        self._recovery = Recovery(link, self._directory, self._events)
        self._replies = Replies(link, self._role, self._deliver)
        with suppress(Disconnected, RedisError):  # it comes up later, or refuses and says so then
            await self._events.start()
            await self._replies.open()
            await self._directory.announce()
            await self._directory.refresh()
        for run in (self._directory.run, self._events.run, self._replies.run, self._look_after, self._watch):
            self._background.append(link.start(run(), f"queue:{run.__qualname__}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        try:
            async with asyncio.timeout(_FLUSH):
                await self._sign_off()
        except (TimeoutError, Disconnected, RedisError) as problem:
            log_event("sign_off_failed", logging.WARNING, reason=str(problem) or "Redis did not answer in time")
        for lane in self._readers():
            lane.cancel()
        for task in self._background:
            task.cancel()
        self._link.payloads.close()
        if not isinstance(error, asyncio.CancelledError):
            kind = error = trace = None  # the group would wrap an error of the block, which is none of its business
        await self._tasks.__aexit__(kind, error, trace)

    @property
    def host(self) -> str:
        """Equal for processes that share memory, by all that this one knows."""
        return self._link.payloads.host or self.process

    # --- Queue: requests

    def submit(self, lane: Lane, request: InferRequest) -> RedisCall:
        """See `Queue.submit`."""
        if self._closed:
            raise errors.stopping()
        return self._calls.submit(lane, request, _class_of(request))

    def consumer(
        self, lanes: Sequence[Lane], limit: int = 1024, *, contained: bool = False, keeps: Keeps | None = None
    ) -> RedisConsumer:
        """See `Queue.consumer`."""
        readers: list[LaneReader] = [self._lane(lane) for lane in lanes]
        if keeps is not None:
            readers += map(self._own_lane, lanes)
        return RedisConsumer(readers, limit, contained=contained, keeps=keeps)

    async def drained(self, lane: Lane) -> None:
        """See `Queue.drained`. What other gateways sent counts too, unless other workers take it."""
        await self._calls.empty(lane)
        reader = self._lanes.get(lane)
        if reader is None or not reader.served:
            return
        # Until then other workers that stop too have been heard of, and the last gateway has heard of this one.
        await asyncio.sleep(BEAT)
        while reader.served and (streams := self._left_to_us(reader)):
            try:
                lengths = await asyncio.gather(*(self._client.call("XLEN", stream) for stream in streams))
            except (Disconnected, RedisError):
                return  # what is there stays for other workers
            if not sum(lengths):
                return
            await self._beat.wait()

    # --- Queue: pools

    def publish(self, state: PoolState) -> None:
        """See `Queue.publish`."""
        self._directory.publish(state)

    def withdraw(self, model: str) -> None:
        """See `Queue.withdraw`."""
        self._directory.withdraw(model)

    def pool(self, model: str) -> PoolState | None:
        """See `Queue.pool`."""
        return self._directory.pool(model)

    def pools(self) -> list[PoolState]:
        """See `Queue.pools`."""
        return self._directory.pools()

    # --- Queue: commands

    async def send(self, command: Command, *, everywhere: bool = True) -> None:
        """See `Queue.send`."""
        if not everywhere:
            await self._events.order(command)
            return
        try:
            before = await self._wanted.note(command)  # first, so that nobody who joins meanwhile misses it
            try:
                await self._events.command(command, self._directory.workers())
            except errors.GatewayError:
                await self._wanted.restore(command.model, before)
                raise
            await self._agreement.reach()
        except RedisError as problem:
            raise errors.Unavailable(f"the queue's Redis does not take commands now: {problem}") from None

    async def wanted(self) -> Sequence[Command]:
        """See `Queue.wanted`."""
        try:
            return await self._wanted.read()
        except RedisError as problem:
            raise errors.Unavailable(f"the queue's Redis does not say which models are wanted: {problem}") from None

    def commands(self) -> AsyncIterator[Order]:
        """See `Queue.commands`."""
        return self._events.orders()

    def repository_names(self, own: Collection[str]) -> Collection[str]:
        """See `Queue.repository_names`."""
        self._directory.can_load(own)
        return self._directory.repository_names()

    def healthy(self) -> bool:
        """See `Queue.healthy`."""
        return self._client.connected and not self._closed

    def leave(self) -> None:
        """See `Queue.leave`."""
        self._directory.leave()

    def close(self) -> None:
        """See `Queue.close`."""
        self._closed = True
        self._calls.close()
        self._events.close()
        for lane in self._readers():
            lane.abandon(self._calls)

    # --- what a fleet has besides

    @property
    def client(self) -> RedisClient:
        """The fleet's Redis, open for as long as this queue is."""
        return self._client

    @property
    def seal(self) -> Seal:
        """What this deployment signs with."""
        return self._seal

    @property
    def counts(self) -> Counts:
        """What happened here that operators may ask about."""
        return self._link.counts

    @property
    def answers(self) -> dict[str, Callable[[str], bytes | Coroutine[Any, Any, bytes]]]:
        """What this process answers to `ask`: by the question's first word, called with what follows the colon."""
        return self._events.answers

    async def ask(self, question: str) -> list[bytes]:
        """Put a question to every other live process. Those that are silent for a second are left out."""
        return [said for said in await self._events.question(question, list(self._directory.members)) if said]

    async def figures(self) -> FleetFigures:
        """What operators and autoscalers ask of the queue."""
        return await look(self._client, self._directory.capacities())

    # --- requests

    def _lane(self, lane: Lane) -> SharedReader:
        reader = self._lanes.get(lane)
        if reader is None:
            reader = self._lanes[lane] = SharedReader(
                self._link, lane, self._outbox, self._cancelled, self._directory.is_dead, self._yields
            )
        return reader

    def _own_lane(self, lane: Lane) -> OwnReader:
        reader = self._own.get(lane)
        if reader is None:
            begun = self._lane(lane).begun
            reader = OwnReader(self._link, lane, self._outbox, self._cancelled, self._directory.is_dead, begun)
            self._own[lane] = reader
        return reader

    def _yields(self, lane: Lane) -> bool:
        return self._directory.leaving and any(self._directory.others(lane))

    def _left_to_us(self, reader: SharedReader) -> list[str]:
        """The streams of a lane that no other worker will read."""
        shared = [] if any(self._directory.others(reader.lane)) else reader.streams
        own = self._own.get(reader.lane)
        return shared if own is None else [*shared, own.stream]

    def _readers(self) -> list[LaneReader]:
        return [*self._lanes.values(), *self._own.values()]

    def _shares_memory(self, lane: Lane) -> bool:
        return self._directory.shares_memory(lane)

    def _cancel(self, call: bytes, expired: bool) -> None:
        """A caller of this process has gone; workers know of a deadline by themselves."""
        if not any(lane.drop(call) for lane in self._readers()) and not expired:
            self._cancelled.add(call, time.monotonic())
            self._events.cancel(call)

    def _on_cancelled(self, event: wire.Broadcast) -> None:
        now = time.monotonic()
        for call in event.ids:
            if event.sender != self.process and not any(lane.drop(call) for lane in self._readers()):
                self._cancelled.add(call, now)

    def _on_given(self, event: wire.Broadcast) -> None:
        if event.text == self.process:
            self._link.bell.ring()

    def _tell_news(self) -> None:
        self._events.tell(NEWS).add_done_callback(unheeded)

    def _died(self, process: str) -> None:
        self._events.died(process)
        self._link.bell.ring()

    async def _deliver(self, frame: wire.Frame) -> None:
        if frame.kind in (wire.REPORT, wire.WORKING, wire.TOLD):
            self._events.deliver(frame)
        else:
            await self._calls.deliver(frame)

    # --- tasks

    async def _look_after(self) -> None:
        """What is to be done from time to time: nothing here is waited for by a request that goes well."""
        while True:
            await self._link.bell.wait(BEAT)
            await self._tidy()
            self._beat.set()
            self._beat.clear()

    async def _tidy(self) -> None:
        now = time.monotonic()
        self._outbox.retry()
        for lane in self._readers():
            lane.give_up_orphans(now)
        self._link.payloads.sweep()
        for care in (self._recover, self._replies.keep, self._calls.audit):
            try:
                await care()
            except Disconnected:
                continue
            except RedisError as problem:
                self._link.report("queue_untended", reason=str(problem))

    async def _recover(self) -> None:
        lanes = list(self._lanes.values())
        await self._recovery.look(lane for lane in lanes if lane.served)
        for lane in lanes:
            await self._recovery.hand_over(lane)

    async def _watch(self) -> None:
        """Another server answers, or the same one after a loss: nothing that was stored is sure to be there."""
        generation = self._client.generation
        while True:
            generation = await self._client.changed(generation)
            self._directory.disturbed()
            self._events.disturbed()
            self._calls.suspect()
            with suppress(Disconnected, RedisError):
                await self._replies.open()
            self._link.bell.ring()

    async def _sign_off(self) -> None:
        """Hand over what is left, and tell the others that this process ends and did not die."""
        self._directory.leave()
        await asyncio.gather(*(lane.stop() for lane in self._readers()))
        for lane in self._lanes.values():
            await self._recovery.hand_over(lane)
        await self._outbox.flushed()
        for lane in self._lanes.values():
            await self._recovery.sign_off(lane)
        client, keys = self._client, self._client.keys
        await asyncio.gather(
            client.call("DEL", keys.process(self.process)),
            client.call("DEL", keys.holding(self.process)),
            client.call("HDEL", keys.processes, self.process),
            client.call("DEL", keys.replies(self.process)),
        )
        await self._events.tell(NEWS)


def _class_of(request: InferRequest) -> int:
    """The stream of its lane: 1 for Triton's highest priority, 3 for what may wait longest."""
    return 1 if request.priority == 1 else 3 if request.priority >= 3 else 2
