"""A model's calls of other models: its `Channel` in the child, and in the gateway what answers.

They have a line of their own, so that the line of the batches stays what it is: one frame there and one back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from typing import TypeAlias, cast

import msgspec

from gateway import errors
from gateway.engines.isolated.area import Area
from gateway.engines.isolated.frames import CHUNK, Ask, Counted, Frame, Frames, GiveUp, Message, Reply, Wanted, pack
from gateway.engines.measures import Measure, Measures, Owner
from gateway.message import BadMessage, pack_error, pack_request, pack_response, unpack_error, unpack_request
from gateway.message import unpack_response as read_response
from gateway.telemetry import log_event
from gateway.types import Buffer, Infer, InferRequest, InferResponse

_MOST_CALLS = 256  # open at once, of one instance
_LARGE = 1 << 16  # bytes
Replies: TypeAlias = deque[tuple[Reply, Buffer]]
_decode_asked = msgspec.msgpack.Decoder(Ask | Counted | GiveUp | Wanted).decode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode


class ChildCalls:
    """The `Channel` of an instance. Of those who wait for a reply one reads the line, for all of them."""

    def __init__(self, line: socket.socket, area: Area | None = None) -> None:
        """What is large goes through `area`, where there is one and no other call has it."""
        self._socket = line
        self._area = area
        self._area_lock = threading.Lock()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, Replies] = {}
        self._frames = Frames()
        self._turn = threading.Condition()
        self._reading = False  # somebody does
        self._batch: Sequence[InferRequest] = ()
        self._gone = False

    def begin(self, requests: Sequence[InferRequest]) -> None:
        """A batch of these begins."""
        self._batch = requests

    def infer(self, request: InferRequest) -> Iterator[InferResponse]:
        """See `Channel.infer`."""
        header, parts = pack_request(request)
        number, replies = self._expect()
        ended = False
        shared = self._share(parts)
        try:
            self._send(
                Ask(number, header, request.deadline, shared, self._place(request.trace)), [] if shared else parts
            )
            while not ended:
                reply = self._next(replies)
                if reply is None:
                    ended = True
                    raise errors.stopping()
                said, payload = reply
                ended = said.last
                if said.error:
                    raise unpack_error(said.error)
                yield read_response(said.response, payload)
        finally:
            del self._open[number]
            if not ended:
                self._send(GiveUp(number), [])
            if shared:
                self._area_lock.release()

    def measure(self, measure: Measure, *, wait: bool = True) -> float:
        """See `Channel.measure`."""
        if not wait:
            self._send(Counted(-1, measure), [])
            return 0.0
        number, replies = self._expect()
        try:
            self._send(Counted(number, measure), [])
            reply = self._next(replies)
        finally:
            del self._open[number]
        if reply is None:
            raise errors.stopping()
        if reply[0].error:
            raise unpack_error(reply[0].error)
        return float(reply[0].response)

    def cancelled(self, request: InferRequest) -> bool:
        """See `Channel.cancelled`."""
        late = request.deadline is not None and time.monotonic() > request.deadline
        place = self._place(request)
        if self._gone or late or place < 0:
            return True
        number, replies = self._expect()
        try:
            self._send(Wanted(number, place), [])
            reply = self._next(replies)
        finally:
            del self._open[number]
        return reply is None or bool(reply[0].error)

    def _place(self, request: object) -> int:
        """The place of a request in the batch that runs, -1 if it is not there."""
        return next((place for place, each in enumerate(self._batch) if each is request), -1)

    def _expect(self) -> tuple[int, Replies]:
        number = next(self._numbers)
        self._open[number] = deque()
        return number, self._open[number]

    def _next(self, replies: Replies) -> tuple[Reply, Buffer] | None:
        """The next reply to a call, None when there will be none."""
        while True:
            with self._turn:
                while self._reading and not replies:
                    self._turn.wait()
                if replies:
                    return replies.popleft()
                if self._gone:
                    return None
                self._reading = True
            try:
                self._read()
            finally:
                with self._turn:
                    self._reading = False
                    self._turn.notify_all()

    def _share(self, parts: list[Buffer]) -> int:
        """Put them where the gateway finds them; how many bytes there are then, 0 when they must go by the line."""
        size = sum(map(len, parts))
        if self._area is None or size < _LARGE or not self._area_lock.acquire(blocking=False):
            return 0
        try:
            block, at = self._area.room(size), 0
        except OSError:
            self._area_lock.release()
            return 0
        for part in parts:
            block[at : at + len(part)] = part
            at += len(part)
        return size

    def _send(self, message: Message, parts: list[Buffer]) -> None:
        data = b"".join([pack(message, sum(map(len, parts))), *parts])
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError:
            self._gone = True

    def _read(self) -> None:
        data = self._receive()
        self._gone = self._gone or not data
        self._frames.feed(data)
        while (frame := self._frames.next()) is not None:
            message = _decode_reply(frame.header)
            if (replies := self._open.get(message.call)) is not None:
                replies.append((message, frame.payload))

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(CHUNK)
        except OSError:
            return b""


class CallServer(asyncio.Protocol):
    """Answers the calls of one instance with `infer`; a task of `tasks` for each. What is large comes through `area`.

    `wanted` says whether anybody waits for the request at this place of the batch that runs.
    """

    def __init__(
        self,
        infer: Infer,
        wanted: Callable[[int], bool],
        tasks: asyncio.TaskGroup,
        measures: Measures,
        area: Area | None,
    ) -> None:
        self._infer = infer
        self._metrics = Owner(measures)
        self._wanted = wanted
        self._area = area
        self._tasks = tasks
        self._frames = Frames()
        self._open: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._line = cast("asyncio.WriteTransport", transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self._frames.feed(data)
        try:
            while (frame := self._frames.next()) is not None:
                self._take(frame)
        except (BadMessage, msgspec.DecodeError) as problem:
            log_event("calls_unreadable", logging.ERROR, reason=str(problem))
            self._line.abort()

    def connection_lost(self, problem: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Part of asyncio.Protocol. What runs for the instance is given up."""
        for task in self._open.values():
            task.cancel()
        self._metrics.close()
        if self._area is not None:
            self._area.close()

    @property
    def waiting(self) -> bool:
        """Whether the model waits for others."""
        return bool(self._open)

    def close(self) -> None:
        """Give up what runs for the instance, and its line."""
        self._line.abort()

    def _take(self, frame: Frame) -> None:
        message = _decode_asked(frame.header)
        if isinstance(message, GiveUp):
            if (task := self._open.get(message.call)) is not None:
                task.cancel()
        elif isinstance(message, Counted):
            self._count(message)
        elif isinstance(message, Wanted):
            self._send(Reply(message.call, b"", b"" if self._wanted(message.place) else b"no", True), [])
        elif message.call in self._open or len(self._open) >= _MOST_CALLS:
            raise BadMessage(f"call {message.call} is one too many: {len(self._open)} are open")
        else:
            task = self._tasks.create_task(self._answer(message, frame.payload))
            self._open[message.call] = task
            task.add_done_callback(lambda _: self._open.pop(message.call, None))

    def _count(self, counted: Counted) -> None:
        try:
            reply = Reply(counted.call, repr(self._metrics.act(counted.measure)).encode(), b"", True)
        except errors.GatewayError as error:
            reply = Reply(counted.call, b"", pack_error(error), True)
        except KeyError:  # what nobody opened
            raise BadMessage("a metric is used that is not there") from None
        if counted.call >= 0:
            self._send(reply, [])

    async def _answer(self, asked: Ask, payload: Buffer) -> None:
        try:
            request = unpack_request(asked.header, self._shared(asked.shared) if asked.shared else payload)
            request.deadline = asked.deadline
            request.trace = asked.of
            async with aclosing(self._infer(request)) as responses:
                async for response in responses:
                    header, parts = pack_response(response)
                    self._send(Reply(asked.call, header, b"", response.final), parts)
                    if response.final:
                        return
            error: errors.GatewayError = errors.Internal("the model gave no final response")
        except errors.GatewayError as refused:
            error = refused
        except Exception as problem:  # noqa: BLE001 - it is the caller's to hear of, and must not end the gateway
            log_event("call_failed", logging.ERROR, problem)
            error = errors.Internal("the call failed; the server's log has the details")
        self._send(Reply(asked.call, b"", pack_error(error), True), [])

    def _shared(self, size: int) -> Buffer:
        if self._area is None:
            raise BadMessage("a call is said to be in shared memory, and there is none")
        return memoryview(self._area.seen(size))[:size]

    def _send(self, message: Message, parts: list[Buffer]) -> None:
        if not self._line.is_closing():
            self._line.write(b"".join([pack(message, sum(map(len, parts))), *parts]))
