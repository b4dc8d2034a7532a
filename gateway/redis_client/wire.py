"""`Wire`: one connection to one Redis server. Commands go out in order; replies come back in order.

Everything called in one turn of the loop, or while the pipeline before is unanswered, travels as one pipeline. Nothing
is ever sent twice: when the connection is lost every unanswered command fails with `Disconnected`.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

from hiredis import ProtocolError, Reader, pack_command
from redis.exceptions import AuthenticationError, NoPermissionError, OutOfMemoryError, RedisError, ResponseError

from gateway.errors import Unavailable

Word: TypeAlias = str | bytes | int | float | memoryview
Command: TypeAlias = Sequence[Word]
Reply: TypeAlias = Any
_LARGE = 16384  # bytes of a word from which sending it as it is beats copying it
_NOT_YET = object()
_ERRORS: dict[str, type[RedisError]] = {
    "OOM": OutOfMemoryError,
    "NOPERM": NoPermissionError,
    "NOAUTH": AuthenticationError,
    "WRONGPASS": AuthenticationError,
}
_NOT_SERVING = frozenset(("LOADING", "READONLY", "MASTERDOWN"))
_LATER = frozenset(("CLUSTERDOWN", "TRYAGAIN"))


def unheeded(done: asyncio.Future[Any]) -> None:
    """To be told of the end of a call whose failure changes nothing: it is made again, or need not be."""
    if not done.cancelled():
        done.exception()  # seen: asyncio would complain


class Disconnected(Unavailable):
    """Redis cannot be reached, or was lost before it answered: whether the command ran is not known."""

    def __init__(self, message: str) -> None:
        super().__init__(message, random.uniform(0.5, 1.0))  # spread, so that the refused do not come back together


class NotServing(Disconnected):
    """The server is loading its data, or a replica: the command did not run, and another server may run it."""


class Wire(asyncio.Protocol):
    """The protocol of one connection, made by `loop.create_connection`. `name` says in errors whose it is.

    `patience` is how many seconds of silence are allowed while replies are due. `lost` is set when it is over, and
    `on_lost` called before anybody else hears of it.
    """

    def __init__(self, name: str, patience: float) -> None:
        self.lost = asyncio.Event()
        self.why = ""
        self.on_lost: Callable[[], None] = _nothing
        self.name = name
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._replies: Reader = Reader(replyError=reply_error, notEnoughData=_NOT_YET)
        self._waiting: deque[asyncio.Future[Reply] | _Transaction] = deque()
        self._unsent: list[bytes | memoryview] = []
        self._flushing = False
        self._heard = 0.0  # when bytes last came, or were last expected to
        self._watch: asyncio.TimerHandle | None = None
        self._under_way = 0
        self._unwritten = 0  # bytes that the kernel has not taken, when last looked
        self._transport: asyncio.Transport | None = None

    def call(self, command: Command) -> asyncio.Future[Reply]:
        """Send one command. The future has its reply, `ResponseError` when that is one, or `Disconnected`."""
        future = self._loop.create_future()
        self._send(future, pack(command))
        return future

    def atomic(self, commands: Sequence[Command]) -> asyncio.Future[list[Reply]]:
        """Send commands that run together or not at all; the future has their replies, or the first error."""
        future = self._loop.create_future()
        packed = [pack_command(("MULTI",))]
        for command in commands:
            packed += pack(command)
        packed.append(pack_command(("EXEC",)))
        self._send(_Transaction(future, len(commands)), packed)
        return future

    def close(self, why: str) -> None:
        """Drop the connection at once; what was not answered fails with this reason."""
        self._fail(why)
        if self._transport is not None:
            self._transport.abort()

    def expect(self, seconds: float) -> None:
        """From now on, allow this many seconds of silence."""
        self._patience = seconds

    def _send(self, sink: asyncio.Future[Reply] | _Transaction, packed: list[bytes | memoryview]) -> None:
        if self.lost.is_set():
            _fail(sink, self.why)
            return
        self._unsent += packed
        if not self._waiting:
            self._flush_soon()
        self._waiting.append(sink)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if not self._unsent or self._transport is None or self._transport.is_closing():
            return
        self._under_way = len(self._waiting)
        self._transport.writelines(self._unsent)
        self._unsent = []
        self._heard = self._loop.time()
        self._unwritten = self._transport.get_write_buffer_size()
        if self._watch is None:
            self._watch = self._loop.call_later(self._patience, self._check)

    def _check(self) -> None:
        """End the connection when it was silent for too long; look again when it can have been, if not."""
        self._watch = None
        if not self._waiting or self._transport is None:
            return
        unwritten = self._transport.get_write_buffer_size()
        if unwritten != self._unwritten:
            # A large command on a slow network is under way, and nothing is amiss.
            self._unwritten = unwritten
            self._heard = self._loop.time()
        due = self._heard + self._patience
        if due <= self._loop.time():
            self.close(f"Redis at {self.name} did not answer for {self._patience:g} s")
        else:
            self._watch = self._loop.call_at(due, self._check)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        """Give each complete reply to whoever waits for it."""
        self._heard = self._loop.time()
        try:
            self._replies.feed(data)
            self._settle()
        except ProtocolError as problem:
            self.close(f"Redis at {self.name} does not speak its protocol: {problem}")

    def _settle(self) -> None:
        replies, waiting = self._replies, self._waiting
        while (reply := replies.gets()) is not _NOT_YET:
            if isinstance(reply, NotServing) or not waiting:
                self._unwelcome(reply)
                return
            sink = waiting[0]
            if isinstance(sink, asyncio.Future):
                if not sink.done():
                    if isinstance(reply, Exception):
                        sink.set_exception(reply)
                    else:
                        sink.set_result(reply)
            elif not sink.take(reply):
                continue
            waiting.popleft()
            self._under_way -= 1
        if self._unsent and not self._under_way:
            # After those whose replies these were, so that what they call next travels too.
            self._flush_soon()

    def _unwelcome(self, reply: Reply) -> None:
        """The server sends us away; or speaks unasked, and every reply from here on would go to the wrong caller."""
        self.close(str(reply) if isinstance(reply, Exception) else f"Redis at {self.name} answered unasked")

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._fail(f"the connection to Redis at {self.name} was lost" + (f": {exc}" if exc else ""))

    def _fail(self, why: str) -> None:
        if self.lost.is_set():
            return
        self.why = why
        self.lost.set()
        self.on_lost()
        if self._watch is not None:
            self._watch.cancel()
        self._unsent = []
        while self._waiting:
            _fail(self._waiting.popleft(), why)


class _Transaction:
    """Takes the replies of MULTI, of each command's queueing, and of EXEC."""

    __slots__ = ("_queued", "_refusal", "future")

    def __init__(self, future: asyncio.Future[list[Reply]], commands: int) -> None:
        self.future = future
        self._refusal: Exception | None = None
        self._queued = commands + 1

    def take(self, reply: Reply) -> bool:
        """Take one reply; true when it was the last one."""
        if self._queued:
            self._queued -= 1
            if self._refusal is None and isinstance(reply, Exception):
                self._refusal = reply
            return False
        if isinstance(reply, list):
            reply = next((each for each in reply if isinstance(each, Exception)), reply)
        if not self.future.done():
            # EXEC's own error says only that there was one before.
            settle(self.future, self._refusal or reply)
        return True


def settle(future: asyncio.Future[Reply], reply: Reply) -> None:
    """Give a waiting caller its reply or its error."""
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)


def pack(command: Command) -> list[bytes | memoryview]:
    """One command as the bytes to send; large words are not copied."""
    for word in command:
        kind = type(word)
        if (kind is bytes or kind is memoryview) and len(word) >= _LARGE:  # type: ignore[arg-type]
            return _pack_apart(command)
    return [pack_command(tuple(command))]  # type: ignore[arg-type]


def _pack_apart(command: Command) -> list[bytes | memoryview]:
    parts: list[bytes | memoryview] = [b"*%d\r\n" % len(command)]
    for word in command:
        if isinstance(word, (bytes, memoryview)) and len(word) >= _LARGE:
            view = memoryview(word).cast("B")
            parts += (b"$%d\r\n" % len(view), view, b"\r\n")
        else:
            # A command of one word less its head `*1\r\n` is that word.
            parts.append(pack_command((word,))[4:])
    return parts


def reply_error(text: str) -> Exception:
    """The error that Redis' error reply stands for; its text begins with Redis' own code, such as NOGROUP."""
    code = text.partition(" ")[0]
    if code in _NOT_SERVING:
        return NotServing(f"Redis does not serve now: {text}")
    if code in _LATER:
        return Disconnected(f"Redis does not serve now: {text}")
    return _ERRORS.get(code, ResponseError)(text)


def _nothing() -> None:
    pass


def _fail(sink: asyncio.Future[Reply] | _Transaction, why: str) -> None:
    future = sink.future if isinstance(sink, _Transaction) else sink
    if not future.done():
        future.set_exception(Disconnected(why))
