"""`Link`: the gateway's end of one instance in a child, for as long as that child lives.

A batch's arrays into shared memory, a message there, a message back, the answer copied out. All of it on the event loop
but for batches and answers so large that copying them would hold it up. The child runs one batch at a time, and goes on
at once with the next, which may be laid out beside the one that runs. What the child says is checked; a message that
cannot be is the end of the link, as is the child's.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import msgspec

from gateway.engines.base import EngineCrashed, EngineSpec
from gateway.engines.isolated.desks import Desks, Given, NeverSeen
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
from gateway.engines.isolated.watchdog import Watchdog
from gateway.engines.threads import EngineThread
from gateway.message import BadMessage, unpack_error
from gateway.types import Answer, Array, Batch, BatchResult

_LARGE = 1 << 20  # bytes; copying them takes 0.1 ms, which handing an image of 600 KB to a thread and back takes too
_NEXT = pack(Next())
_decode = msgspec.msgpack.Decoder(FromChild).decode


class Link:
    """Runs the batches of one instance in its child. `lost` is called once, when there will be no more answers.

    `works` is told whenever the child has something to do from now on, and has no more.
    """

    def __init__(
        self,
        line: socket.socket,
        memory: Memory,
        thread: EngineThread,
        lost: Callable[[str], None],
        works: Callable[[bool], None],
    ) -> None:
        line.setblocking(False)
        self._socket = line
        self._memory = memory
        self._thread = thread
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(line.fileno(), self._read)
        self._frames = Frames()
        self._sender = Sender(line, self._loop)
        self._watchdog = Watchdog(self.close)
        self._loading: asyncio.Future[Frame] | None = None
        self._desks = Desks(works)
        self._asked: deque[Given] = deque()  # what the child is to answer
        self._finished_ns = 0  # the end of the last run
        self._closed = False
        self._tells = False  # the model wants to know the requests

    @property
    def running(self) -> bool:
        """Whether the child is at work on something."""
        return self._desks.busy or self._loading is not None

    @property
    def batch(self) -> Batch | None:
        """What the child is at work on, if somebody waits for that."""
        return self._desks.batch

    async def load(self, spec: EngineSpec, module: str, install: str) -> Ready:
        """Load the model in the child. Raises what the child raised, or `EngineCrashed`."""
        # A protobuf message is not pickled: it travels as what it is made for.
        plain = replace(spec, children=None, infer=None, config=replace(spec.config, proto=None))
        payload = await self._thread.call(lambda: pickle.dumps(plain))
        message = Load(module, install, spec.config.proto.SerializeToString())
        if self._closed:
            raise NeverSeen
        self._loading = self._loop.create_future()
        self._send(pack(message, len(payload)), bytearray(payload))
        frame = await self._loading
        self._loading = None
        said = self._decoded(frame)
        if not isinstance(said, Ready):
            raise self._broken(f"{type(said).__name__} in answer to a load")
        self._tells = said.answers
        if said.answers:
            self._desks.single()
        return said

    async def compute(self, batch: Batch, patience: float, hung: Callable[[], None]) -> BatchResult:
        """Run a batch of a model that answers once; `hung` is called if that has not ended in so many seconds.

        Two may be under way: the second is laid out while the first runs. Raises `EngineCrashed` when the child ends
        before it has answered.
        """
        given = await self._desks.take(Given(batch, patience, hung))
        try:
            started = time.monotonic_ns()
            stacked = await self._give(given)
            frame = await given.reply
            given.over = True
            message = self._decoded(frame)
            if not isinstance(message, Done):
                raise self._broken(f"{type(message).__name__} in answer to a run")
            finished = min(message.finished_ns, time.monotonic_ns())
            # What was laid out early waited for its turn, and then began at once.
            waited = max(0, self._finished_ns - stacked)
            started, stacked = started + waited, stacked + waited
            self._finished_ns = finished = max(stacked, finished)
            return BatchResult(await self._outputs(message.form, frame, message.start), started, stacked, finished)
        finally:
            self._leave(given)

    async def answer(
        self, batch: Batch, patience: float, hung: Callable[[], None]
    ) -> AsyncGenerator[BatchResult, None]:
        """The same of a model that answers request by request, one batch at a time."""
        given = await self._desks.take(Given(batch, patience, hung))
        try:
            started = time.monotonic_ns()
            stacked = await self._give(given)
            while True:
                frame = await given.reply
                message = self._decoded(frame)
                if not isinstance(message, Answered):
                    given.over = True
                    if not isinstance(message, Finished):
                        raise self._broken(f"{type(message).__name__} in answer to a run")
                    return
                outputs = await self._outputs(message.form, frame, message.start)
                finished = max(stacked, min(message.finished_ns, time.monotonic_ns()))
                answers = self._answers(message, outputs, len(batch.requests))
                yield BatchResult({}, started, stacked, finished, answers)
                given.reply = self._loop.create_future()
                self._go_on(given)
        finally:
            self._leave(given)

    def finish(self) -> None:
        """Have the instance in the child end in its own time; `lost` is called when it has."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Have the instance in the child end. Harmless when it has."""
        self._end("closed")

    def be_patient(self, seconds: float) -> None:
        """The run has not hung: ask again in so many seconds."""
        self._watchdog.watch(seconds)

    # --- to the child

    async def _give(self, given: Given) -> int:
        """Have the child begin, now or after what it is at; returns when the batch was stacked."""
        batch = given.batch
        self._ask(given)
        if batch.requests and sum([request.size for request in batch.requests]) <= _LARGE and self._thread.idle:
            try:
                header, payload = self._stacked(given)
            except BaseException:
                self._take_back(given)
                raise
            stacked = time.monotonic_ns()
            self._send(header, payload)
            return stacked
        mine = threading.Lock()  # whoever has it first decides whether the batch is sent
        try:
            return await self._thread.call(partial(self._stack_and_send, given, mine), hurry=batch.hurry)
        except NeverSeen:
            self._gone()
            raise
        except BaseException:
            if mine.acquire(blocking=False):
                self._take_back(given)
            raise

    def _ask(self, given: Given) -> None:
        if self._closed:
            raise NeverSeen
        self._asked.append(given)
        if len(self._asked) == 1:
            self._watchdog.watch(given.patience, given.hung)

    def _take_back(self, given: Given) -> None:
        """The child never hears of it."""
        given.over = True
        if given in self._asked:
            self._asked.remove(given)
            self._look_on()

    def _stack_and_send(self, given: Given, mine: threading.Lock) -> int:
        """On the engine's thread: the event loop, which has answers to write, would add a millisecond to each run."""
        header, payload = self._stacked(given)
        stacked = time.monotonic_ns()
        if mine.acquire(blocking=False):
            try:
                self._sender.send(header, payload)
            except OSError:
                raise NeverSeen from None
        return stacked

    def _stacked(self, given: Given) -> tuple[bytes, bytearray | None]:
        batch, desk = given.batch, given.desk
        layout, values = lay_out(batch.stack() if batch.gather is None else batch.gather())
        span = self._desks.span(desk, layout.size)
        payload = self._memory.put(layout, values, span)
        requests = tuple(map(About.of, batch.requests)) if self._tells else ()
        message = Run(batch.rows, batch.cores, batch.outputs, layout.form, span[0], desk, requests)
        return pack(message, len(payload) if payload else 0), payload

    def _go_on(self, given: Given) -> None:
        """An answer was taken in: the next one may come."""
        self._ask(given)
        self._send(_NEXT)

    def _leave(self, given: Given) -> None:
        """Nobody waits for it any more; the child may still be at work on it."""
        if given.over or self._closed:
            self._rest(given)
        elif given in self._asked:
            given.reply.cancel()
        else:  # an answer is there that was not taken in, or was not the last
            try:
                self._drop(given, given.reply.result())
            except msgspec.DecodeError as problem:
                self._broken(str(problem))

    def _rest(self, given: Given) -> None:
        """There is nothing more to do for it."""
        self._desks.leave(given)
        if self._closed and not self._desks.busy:
            self._memory.close()

    def _send(self, header: bytes, payload: bytearray | None = None) -> None:
        try:
            self._sender.send(header, payload)
        except OSError:
            self._gone()
            raise NeverSeen from None

    # --- from the child

    def _read(self) -> None:
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end("ended")
        else:
            self._hear(data)

    def _gone(self) -> None:
        """The child takes nothing more. What it said before still counts: it may have answered one of the two."""
        with suppress(OSError):
            while not self._closed and (data := self._socket.recv(CHUNK)):
                self._hear(data)
        self._end("ended")

    def _hear(self, data: bytes) -> None:
        try:
            self._frames.feed(data)
            while (frame := self._frames.next()) is not None:
                self._take(frame)
        except (BadMessage, msgspec.DecodeError) as problem:
            self._end(f"said what cannot be: {problem}")

    def _take(self, frame: Frame) -> None:
        if self._loading is not None and not self._loading.done():
            self._loading.set_result(frame)
            return
        if not self._asked:
            raise BadMessage("it was not asked")
        given = self._asked.popleft()
        self._look_on()
        if given.reply.cancelled():
            self._drop(given, frame)
        else:
            given.reply.set_result(frame)

    def _look_on(self) -> None:
        """Watch what the child is at from now on."""
        if self._asked:
            self._watchdog.watch(self._asked[0].patience, self._asked[0].hung)
        else:
            self._watchdog.rest()

    def _drop(self, given: Given, frame: Frame) -> None:
        """Take in an answer that nobody waits for any more."""
        message = _decode(frame.header)
        if isinstance(message, Done | Failed):
            now = time.monotonic_ns()
            finished = now if isinstance(message, Failed) else min(message.finished_ns, now)
            self._finished_ns = max(self._finished_ns, finished)
        if isinstance(message, Answered) and not self._closed:
            given.reply = self._loop.create_future()
            given.reply.cancel()
            with suppress(NeverSeen):
                self._go_on(given)
        else:
            self._rest(given)

    def _decoded(self, frame: Frame) -> FromChild:
        try:
            message: FromChild = _decode(frame.header)
        except msgspec.DecodeError as problem:
            raise self._broken(str(problem)) from None
        if isinstance(message, Failed):
            self._finished_ns = time.monotonic_ns()
            raise message.raised()
        return message

    async def _outputs(self, form: bytes, frame: Frame, start: int) -> dict[str, Array]:
        try:
            layout = read_form(form)
            if layout.size > _LARGE:
                return await self._thread.call(lambda: self._memory.take(layout, frame.payload, start))
            return self._memory.take(layout, frame.payload, start)
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

    def _end(self, why: str) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._sender.close()
        self._watchdog.close()
        self._desks.close()
        if self._loading is not None and not self._loading.done():
            self._loading.set_exception(EngineCrashed("the engine's process ended while it loaded the model"))
        self._loading = None
        for place, given in enumerate(self._asked):
            if given.reply.done():
                self._rest(given)
            else:
                lost = EngineCrashed("the engine's process ended while it ran a batch") if place == 0 else NeverSeen()
                given.reply.set_exception(lost)
                given.reply.exception()  # who gave the run up never asks
        self._asked.clear()
        if not self._desks.busy:
            self._memory.close()
        self._lost(why)
