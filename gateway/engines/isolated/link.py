"""`Link`: the gateway's end of one instance in a child, for as long as that child lives.

One batch at a time: its arrays into shared memory, a message there, a message back, the answer copied out. All of it on
the event loop but for batches and answers so large that copying them would hold it up. What the child says is checked;
a message that cannot be is the end of the link, as is the child's.
"""

from __future__ import annotations

import asyncio
import builtins
import pickle
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import msgspec

from gateway.engines.base import EngineCrashed, EngineSpec
from gateway.engines.isolated.frames import (
    CHUNK,
    About,
    Answered,
    Done,
    Failed,
    Finished,
    Frame,
    Frames,
    FromChild,
    Load,
    Next,
    Ready,
    Run,
    pack,
)
from gateway.engines.isolated.layout import lay_out, read_form
from gateway.engines.isolated.memory import Memory
from gateway.engines.isolated.sender import Sender
from gateway.engines.threads import EngineThread
from gateway.message import BadMessage, unpack_error
from gateway.types import Answer, Array, Batch, BatchResult, InferRequest

_LARGE = 1 << 20  # bytes; copying them takes 0.1 ms, which handing an image of 600 KB to a thread and back takes too
_NEXT = pack(Next())
_decode = msgspec.msgpack.Decoder(FromChild).decode


class NeverSeen(EngineCrashed):
    """The process was gone before it was given anything."""


class Link:
    """Runs the batches of one instance in its child. `lost` is called once, when there will be no more answers."""

    def __init__(self, line: socket.socket, memory: Memory, thread: EngineThread, lost: Callable[[str], None]) -> None:
        line.setblocking(False)
        self._socket = line
        self._memory = memory
        self._thread = thread
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(line.fileno(), self._read)
        self._frames = Frames()
        self._sender = Sender(line, self._loop)
        self._reply: asyncio.Future[Frame] | None = None
        self._patience = self._due = 0.0  # seconds
        self._alarm: asyncio.TimerHandle | None = None
        self._hung: Callable[[], None] = self.close
        self._idle: Callable[[], None] | None = None
        self._closed = False
        self._tells = False  # the model wants to know the requests

    @property
    def running(self) -> bool:
        """Whether the child is at work on something."""
        return self._reply is not None

    async def load(self, spec: EngineSpec, module: str, install: str) -> Ready:
        """Load the model in the child. Raises what the child raised, or `EngineCrashed`."""
        # A protobuf message is not pickled: it travels as what it is made for.
        plain = replace(spec, children=None, infer=None, config=replace(spec.config, proto=None))
        payload = await self._thread.call(lambda: pickle.dumps(plain))
        message = Load(module, install, spec.config.proto.SerializeToString())
        self._send(pack(message, len(payload)), bytearray(payload))
        said, _ = self._decoded(await self._next())
        if not isinstance(said, Ready):
            raise self._broken(f"{type(said).__name__} in answer to a load")
        self._reply = None
        self._tells = said.answers
        return said

    async def compute(self, batch: Batch, patience: float, hung: Callable[[], None]) -> BatchResult:
        """Run a batch of a model that answers once; `hung` is called if that has not ended in so many seconds.

        Call it one at a time, after `when_idle`. Raises `EngineCrashed` when the child ends before it has answered.
        """
        started = time.monotonic_ns()
        reply, stacked = await self._give(batch, patience, hung)
        message, frame = self._decoded(await reply)
        if not isinstance(message, Done):
            raise self._broken(f"{type(message).__name__} in answer to a run")
        now = time.monotonic_ns()
        outputs = await self._outputs(message.form, frame)
        self._rest()
        return BatchResult(outputs, started, stacked, max(stacked, min(message.finished_ns, now)))

    async def answer(
        self, batch: Batch, patience: float, hung: Callable[[], None]
    ) -> AsyncGenerator[BatchResult, None]:
        """The same of a model that answers request by request."""
        started = time.monotonic_ns()
        reply, stacked = await self._give(batch, patience, hung)
        while True:
            message, frame = self._decoded(await reply)
            if not isinstance(message, Answered):
                self._rest()
                if not isinstance(message, Finished):
                    raise self._broken(f"{type(message).__name__} in answer to a run")
                return
            now = time.monotonic_ns()
            answers = self._answers(message, await self._outputs(message.form, frame), len(batch.requests))
            yield BatchResult({}, started, stacked, max(stacked, min(message.finished_ns, now)), answers)
            self._watch(patience, hung)
            reply = self._expect()
            self._send(_NEXT)

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the child is at work on nothing more: now, or when it has answered what was given up."""
        reply = self._reply
        if reply is None:
            callback()
            return
        self._idle = callback
        if not reply.done():
            reply.cancel()
        elif not reply.cancelled():
            try:
                self._drop(reply.result())
            except msgspec.DecodeError as problem:
                self._broken(str(problem))

    def finish(self) -> None:
        """Have the instance in the child end in its own time; `lost` is called when it has."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Have the instance in the child end. Harmless when it has."""
        self._end("closed")

    # --- to the child

    async def _give(self, batch: Batch, patience: float, hung: Callable[[], None]) -> tuple[asyncio.Future[Frame], int]:
        """Have the child begin; returns what its answer will come in, and when the batch was stacked."""
        size = sum([request.size for request in batch.requests])
        if batch.requests and size <= _LARGE and self._thread.idle:
            header, payload = self._stacked(batch)
            stacked = time.monotonic_ns()
            reply = self._expect()
            self._watch(patience, hung)
            self._send(header, payload)
            return reply, stacked
        reply = self._expect()
        self._watch(patience, hung)
        mine = threading.Lock()  # whoever has it first decides whether the batch is sent
        try:
            stacked = await self._thread.call(partial(self._stack_and_send, batch, mine), hurry=batch.hurry)
        except NeverSeen:
            self._end("ended")
            raise
        except BaseException:
            if mine.acquire(blocking=False) and self._reply is reply:
                self._rest()  # the child never hears of it
            raise
        return reply, stacked

    def _stack_and_send(self, batch: Batch, mine: threading.Lock) -> int:
        """On the engine's thread: the event loop, which has answers to write, would add a millisecond to each run."""
        header, payload = self._stacked(batch)
        stacked = time.monotonic_ns()
        if mine.acquire(blocking=False):
            try:
                self._sender.send(header, payload)
            except OSError:
                raise self._never_seen() from None
        return stacked

    def _stacked(self, batch: Batch) -> tuple[bytes, bytearray | None]:
        layout, values = lay_out(batch.stack() if batch.gather is None else batch.gather())
        payload = self._memory.put(layout, values)
        requests = tuple(map(_about, batch.requests)) if self._tells else ()
        message = Run(batch.rows, batch.cores, batch.outputs, layout.form, requests)
        return pack(message, len(payload) if payload else 0), payload

    def _send(self, header: bytes, payload: bytearray | None = None) -> None:
        try:
            self._sender.send(header, payload)
        except OSError:
            self._end("ended")
            raise self._never_seen() from None

    def _never_seen(self) -> NeverSeen:
        return NeverSeen("the engine's process had ended before the batch")

    # --- from the child

    def _expect(self) -> asyncio.Future[Frame]:
        if self._closed:
            raise self._never_seen()
        self._reply = self._loop.create_future()
        return self._reply

    async def _next(self) -> Frame:
        return await self._expect()

    def _read(self) -> None:
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end("ended")
            return
        try:
            self._frames.feed(data)
            while (frame := self._frames.next()) is not None:
                self._take(frame)
        except (BadMessage, msgspec.DecodeError) as problem:
            self._end(f"said what cannot be: {problem}")

    def _take(self, frame: Frame) -> None:
        if self._reply is None or self._answered:
            raise BadMessage("it was not asked")
        if self._reply.cancelled():
            self._drop(frame)
        else:
            self._reply.set_result(frame)

    def _drop(self, frame: Frame) -> None:
        """Take in an answer that nobody waits for any more."""
        message = _decode(frame.header)
        if isinstance(message, Answered) and not self._closed:
            self._expect().cancel()
            self._watch(self._patience, self._hung)
            with suppress(NeverSeen):
                self._send(_NEXT)
        else:
            self._rest()

    def _decoded(self, frame: Frame) -> tuple[FromChild, Frame]:
        try:
            message = _decode(frame.header)
        except msgspec.DecodeError as problem:
            raise self._broken(str(problem)) from None
        if isinstance(message, Failed):
            self._rest()
            raise _raised(message)
        return message, frame

    async def _outputs(self, form: bytes, frame: Frame) -> dict[str, Array]:
        try:
            layout = read_form(form)
            if layout.size > _LARGE:
                return await self._thread.call(lambda: self._memory.take(layout, frame.payload))
            return self._memory.take(layout, frame.payload)
        except BadMessage as problem:
            raise self._broken(problem.message) from None

    def _answers(self, message: Answered, arrays: dict[str, Array], requests: int) -> list[Answer]:
        answers = []
        try:
            for place, (request, names, error, final, parameters) in enumerate(message.answers):
                outputs = None if names is None else {name: arrays[f"{place}/{name}"] for name in names}
                if not 0 <= request < requests:
                    raise self._broken(f"an answer to request {request} of {requests}")
                answers.append(Answer(request, outputs, unpack_error(error) if error else None, final, parameters))
        except (KeyError, BadMessage) as problem:
            raise self._broken(str(problem)) from None
        return answers

    def _broken(self, why: str) -> EngineCrashed:
        self._end(f"said what cannot be: {why}")
        return EngineCrashed("the engine's process gave an answer that cannot be")

    def _rest(self) -> None:
        """There is nothing more to do for the last run."""
        self._reply = None
        if self._closed:
            self._memory.close()
        if self._idle is not None:
            idle, self._idle = self._idle, None
            idle()

    def _end(self, why: str) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._sender.close()
        if self._alarm is not None:
            self._alarm.cancel()
        if not self._answered:
            if self._reply is not None and not self._reply.done():
                self._reply.set_exception(EngineCrashed("the engine's process ended while it ran a batch"))
                self._reply.exception()  # who gave the run up never asks
            self._rest()
        self._lost(why)

    @property
    def _answered(self) -> bool:
        """Whether an answer is here that is still to be taken in."""
        return self._reply is not None and self._reply.done() and not self._reply.cancelled()

    # --- the watchdog

    def be_patient(self, seconds: float) -> None:
        """The run has not hung: ask again in so many seconds."""
        self._watch(seconds, self._hung)

    def _watch(self, patience: float, hung: Callable[[], None]) -> None:
        """One timer for many runs, because to set one and take it back for each costs more than the rest of this."""
        self._patience, self._hung = patience, hung
        self._due = self._loop.time() + patience
        if self._alarm is not None and self._alarm.when() > self._due:
            self._alarm.cancel()
            self._alarm = None
        if self._alarm is None:
            self._alarm = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        self._alarm = None
        if self._reply is None:
            return
        if self._answered:  # it waits for whoever takes the answer
            self._watch(self._patience, self._hung)
        elif self._loop.time() >= self._due:
            self._hung()
        else:
            self._alarm = self._loop.call_at(self._due, self._look)


def _about(request: InferRequest) -> About:
    return About(
        request.model_name,
        request.model_version,
        request.id,
        tuple((output.name, output.classification) for output in request.outputs),
        dict(request.parameters),
        request.deadline,
        request.priority,
        request.tenant,
        request.rows,
    )


def _raised(message: Failed) -> BaseException:
    """What the child raised, as near to it as can be; its trace is noted."""
    if message.error:
        return unpack_error(message.error)
    kind = getattr(builtins, message.kind, None)
    problem: Exception = RuntimeError(f"{message.kind}: {message.text}")
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not StopIteration:
        with suppress(TypeError):  # some are made of more than a text
            problem = kind(message.text)
    problem.add_note(f"In the engine's process:\n{message.trace}")
    return problem
