"""What processes tell each other besides requests: commands, questions, cancelled calls, and that something changed.

Every process reads the fleet's event stream. Whoever asked is answered in its reply stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from gateway import errors
from gateway.message import BadMessage, pack_error, unpack_error
from gateway.queues.base import Command, Load, Order, Unload
from gateway.queues.memory import MemoryOrder
from gateway.queues.redis import wire
from gateway.queues.redis.link import Link
from gateway.queues.redis.outbox import Outbox
from gateway.queues.redis.wanted import Wanted, has_files, hollow
from gateway.redis_client import Disconnected, unheeded
from gateway.telemetry import log_event

_KEPT = 10_000  # events
_BLOCK = 1.0  # seconds
_ANSWERED = 1.0  # seconds within which a live process answers a question
_ASK_AGAIN = 5.0  # seconds that a command waits for reports
_TRIES = 3  # times that a process is asked again which has not said a word
_ORDERS_KNOWN = 1000
_DEPENDENTS = "unload_dependents"  # a parameter, whatever its value

LOAD, UNLOAD, QUESTION, CANCEL, NEWS, GIVEN = "load", "unload", "question", "cancel", "news", "given"


class RedisOrder:
    """The `Order` protocol: a command from some gateway."""

    def __init__(self, command: Command, epoch: int, sender: str, identity: bytes, outbox: Outbox) -> None:
        self.command = command
        self.epoch = epoch
        self._sender = sender
        self._id = identity
        self._outbox = outbox
        self._report: bytes | None = None

    def finish(self, error: errors.GatewayError | None) -> None:
        """See `Order.finish`."""
        if self._report is None:
            self._report = b"" if error is None else pack_error(error)
            self.tell()

    def tell(self) -> None:
        """Say how it stands: carried out, or under way."""
        kind = wire.WORKING if self._report is None else wire.REPORT
        self._outbox.tell(self._sender, self._id, kind, self._report or b"")


class _Asked:
    """What several processes were asked, and what they said."""

    def __init__(self, event: wire.Broadcast, expected: Collection[str]) -> None:
        self.event = event
        self.expected = set(expected)
        self.said: list[bytes] = []
        self.silent: Counter[str] = Counter()  # how often each was asked and has not answered
        self.changed = asyncio.Event()

    async def complete(self) -> None:
        """Wait until all have answered that live."""
        while self.expected:
            self.changed.clear()
            await self.changed.wait()


class Events:
    """The event stream of the fleet, seen from one process."""

    def __init__(
        self, link: Link, outbox: Outbox, on: dict[str, Callable[[wire.Broadcast], None]], *, takes_orders: bool
    ) -> None:
        """`on` is told of cancelled calls, news and entries given to this process."""
        self.answers: dict[str, Callable[[str], bytes | Coroutine[Any, Any, bytes]]] = {}
        """What this process answers to a question, now or when it is done: by its first word, called with the rest."""
        self._link = link
        self._outbox = outbox
        self._on = on
        self._asked: dict[bytes, _Asked] = {}
        self._orders: deque[Order] = deque()
        self._order_waiter: asyncio.Future[None] | None = None
        self._cancelled: list[bytes] = []
        self._closed = False
        self._takes_orders = takes_orders
        self._wanted = Wanted(link)
        self._taken: dict[bytes, RedisOrder] = {}  # by the id of its event
        self._last = b""
        self._placed = False  # whether `_last` is a place in the stream as it is now

    # --- asking

    async def command(self, command: Command, workers: Collection[str]) -> None:
        """Have these workers carry out a command. Raises what one of them reported."""
        if self._closed:
            raise errors.stopping()
        if not workers:
            raise errors.Unavailable("no worker is alive to carry this out; start one, or look at its log")
        kind, parameters = _words(command)
        asked = await self._ask(kind, command.model, workers, parameters)
        try:
            while asked.expected:
                try:
                    async with asyncio.timeout(_ASK_AGAIN):
                        await asked.complete()
                except TimeoutError:
                    await self._ask_again(asked)
        finally:
            self._forget(asked)
        reports = [None if not said else unpack_error(said) for said in asked.said]
        if None not in reports:
            raise reports[0] or errors.Unavailable("every worker died that was to carry this out")
        # A worker whose repository has no such model has nothing to report where another has it.
        if failed := [error for error in reports if error is not None and not _has_no_such_model(error)]:
            raise failed[0]

    async def order(self, command: Command) -> None:
        """Have the worker of this process carry out a command. Raises what it reported."""
        if self._closed:
            raise errors.stopping()
        order = MemoryOrder(command)
        self._give(order)
        await order.reported

    async def question(self, question: str, processes: Collection[str]) -> list[bytes]:
        """What these processes answer; those that are silent for a second are left out."""
        if not processes:
            return []
        asked = await self._ask(QUESTION, question, processes, {})
        try:
            async with asyncio.timeout(_ANSWERED):
                await asked.complete()
        except TimeoutError:
            log_event("question_unanswered", logging.WARNING, question=question, processes=len(asked.expected))
        finally:
            self._forget(asked)
        return asked.said

    async def orders(self) -> AsyncGenerator[Order, None]:
        """See `Queue.commands`."""
        while True:
            while self._orders:
                order = self._orders.popleft()
                if await self._filled(order):
                    yield order
            self._order_waiter = asyncio.get_running_loop().create_future()
            await self._order_waiter

    async def _filled(self, order: Order) -> bool:
        """Get the files that a load command from elsewhere has, if any. Whoever sent it is told if they cannot be had."""
        command = order.command
        if not isinstance(order, RedisOrder) or not isinstance(command, Load) or not has_files(command):
            return True
        try:
            order.command = await self._wanted.whole(command)
        except (errors.Unavailable, RedisError, BadMessage) as problem:
            order.finish(errors.Unavailable(f"the files of the load request cannot be read: {problem}"))
            return False
        return True

    # --- telling

    def cancel(self, call: bytes) -> None:
        """Tell every worker that nobody waits for a call; all of one turn in one event."""
        if not self._cancelled:
            asyncio.get_running_loop().call_soon(self._tell_cancelled)
        self._cancelled.append(call)

    def tell(self, kind: str, text: str = "", ids: list[bytes] | None = None) -> asyncio.Future[bytes]:
        """Send an event. What comes of it is the caller's to look at, or nobody's."""
        event = wire.Broadcast(kind, self._link.process, text=text, ids=ids or [])
        return self._send(event)

    def _tell_cancelled(self) -> None:
        calls, self._cancelled = self._cancelled, []
        # Without it the workers run what nobody waits for; nothing else is lost.
        self.tell(CANCEL, ids=calls).add_done_callback(unheeded)

    # --- hearing

    def deliver(self, frame: wire.Frame) -> None:
        """An answer to what was asked. Its text begins with who says it."""
        asked = self._asked.get(frame.call)
        if asked is None:
            return
        process = str(frame.rest, "utf-8", "replace")
        asked.silent[process] = 0
        if frame.kind != wire.WORKING and process in asked.expected:
            asked.said.append(frame.header)
            asked.expected.discard(process)
            asked.changed.set()

    def died(self, process: str) -> None:
        """Nobody waits for what a dead process would say."""
        for asked in self._asked.values():
            asked.expected.discard(process)
            asked.changed.set()

    def close(self) -> None:
        """Answer those that still wait."""
        self._closed = True
        while self._orders:
            self._orders.popleft().finish(errors.stopping())
        for asked in self._asked.values():
            asked.said.append(pack_error(errors.stopping()))
            asked.expected.clear()
            asked.changed.set()

    async def start(self) -> None:
        """What is sent from now on concerns this process. Raises `Disconnected`."""
        found = await self._link.client.call("XREVRANGE", self._link.client.keys.events, "+", "-", "COUNT", 1)
        newest = found[0][0] if found else b"0-0"
        if not self._last or wire.order(newest) < wire.order(self._last):
            self._last = newest
        self._placed = True

    def disturbed(self) -> None:
        """Redis has lost its data, or is another one: what comes next may be older than what came last."""
        self._placed = False

    async def run(self) -> None:
        """Read the events until cancelled."""
        client = self._link.client
        reader = client.reader()
        try:
            while True:
                try:
                    if not self._placed:
                        await self.start()
                    reply = await reader.call(
                        "XREAD", "COUNT", 256, "BLOCK", int(_BLOCK * 1000), "STREAMS", client.keys.events, self._last,
                        seconds=_BLOCK,
                    )  # fmt: skip
                except Disconnected:
                    await client.online()
                except RedisError as problem:
                    self._link.report("events_unreadable", reason=str(problem))
                    await asyncio.sleep(_BLOCK)
                else:
                    for _, self._last, fields in wire.entries(reply):
                        self._hear(fields)
        finally:
            await reader.close()

    def _hear(self, fields: dict[bytes, bytes]) -> None:
        try:
            data = fields[wire.HEADER]
            self._link.seal.verify(fields.get(wire.SIGNATURE, b""), data)
            event = wire.read_broadcast(data)
        except (BadMessage, KeyError) as problem:
            self._link.damaged(problem, "an event")
            return
        if event.kind in (LOAD, UNLOAD):
            if self._takes_orders:
                self._take(event)
        elif event.kind == QUESTION:
            self._answer(event)
        elif (told := self._on.get(event.kind)) is not None:
            told(event)

    def _take(self, event: wire.Broadcast) -> None:
        order = self._taken.get(event.id)
        if order is None:  # else whoever sent it has not heard of us
            loads, told = event.kind == LOAD, event.parameters
            command = Load(event.text, told) if loads else Unload(event.text, _DEPENDENTS in told)
            epoch = wire.milliseconds(self._last)  # of its entry: for all the same
            order = self._taken[event.id] = RedisOrder(command, epoch, event.sender, event.id, self._outbox)
            self._give(order)
            if len(self._taken) > _ORDERS_KNOWN:
                del self._taken[next(iter(self._taken))]
        order.tell()

    def _give(self, order: Order) -> None:
        self._orders.append(order)
        if self._order_waiter is not None and not self._order_waiter.done():
            self._order_waiter.set_result(None)

    def _answer(self, event: wire.Broadcast) -> None:
        word, _, rest = event.text.partition(":")
        answer = self.answers.get(word)
        if event.sender == self._link.process:
            return
        try:
            said = b"" if answer is None else answer(rest)  # who has nothing to say is not waited for
        except (errors.GatewayError, KeyError):  # e.g. it holds no such model
            said = b""
        if isinstance(said, bytes):
            self._outbox.tell(event.sender, event.id, wire.TOLD, said)
        else:
            self._link.start(self._answer_later(event, said), f"queue:answer:{word}")

    async def _answer_later(self, event: wire.Broadcast, saying: Coroutine[Any, Any, bytes]) -> None:
        self._outbox.tell(event.sender, event.id, wire.TOLD, await saying)

    # --- sending

    async def _ask(self, kind: str, text: str, processes: Collection[str], parameters: dict[str, str]) -> _Asked:
        identity = next(self._link.ids)
        asked = _Asked(wire.Broadcast(kind, self._link.process, identity, text, parameters), processes)
        self._asked[identity] = asked
        try:
            await self._send(asked.event)
        except RedisError as problem:
            self._forget(asked)
            raise errors.Unavailable(f"the queue's Redis does not take commands now: {problem}") from None
        except BaseException:
            self._forget(asked)
            raise
        return asked

    async def _ask_again(self, asked: _Asked) -> None:
        """What was sent, or the answer to it, may be lost. Who is alive and never answers is given up."""
        for process in [each for each in asked.expected if asked.silent[each] >= _TRIES]:
            silent = f"{process} is alive and does not answer commands; give all processes the same --queue-key-file"
            asked.expected.discard(process)
            asked.said.append(pack_error(errors.Unavailable(silent)))
        with suppress(Disconnected, RedisError):
            await self._send(asked.event)
            asked.silent.update(asked.expected)

    def _forget(self, asked: _Asked) -> None:
        self._asked = {identity: each for identity, each in self._asked.items() if each is not asked}

    def _send(self, event: wire.Broadcast) -> asyncio.Future[bytes]:
        data = wire.encode(event)
        fields = [wire.HEADER, data]
        if self._link.seal.size:
            fields += [wire.SIGNATURE, self._link.seal.sign(data)]
        client = self._link.client
        return client.call("XADD", client.keys.events, "MAXLEN", "~", _KEPT, "*", *fields)


def _has_no_such_model(error: errors.GatewayError) -> bool:
    return "failed to poll from model repository" in error.message


def _words(command: Command) -> tuple[str, dict[str, str]]:
    """A command's kind and parameters as others are told."""
    if isinstance(command, Load):
        return LOAD, hollow(command).parameters
    return UNLOAD, {_DEPENDENTS: ""} if command.dependents else {}
