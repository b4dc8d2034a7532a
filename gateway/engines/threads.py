"""An engine that runs on a thread of its own: the thread, and the `Engine` around what a backend loaded.

The hand-over is on the path of every batch: it takes 40 us with uvloop, where `run_in_executor` takes 100
(2 shared cores). A cancelled waiter loses its result and disturbs nothing; work it queued and that has not
begun is not run. Nothing here knows a backend.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

from gateway import errors
from gateway.artefacts import Artefact
from gateway.types import Array, Batch, BatchResult

T = TypeVar("T")

_PAUSE = 1e-4  # seconds


class Loaded(Protocol):
    """What a backend loads for one engine: a model that computes, on whatever thread calls it."""

    @property
    def provider(self) -> str:
        """What the model really runs on."""

    @property
    def widest(self) -> int:
        """The most cores a run can use."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know though the model works."""

    def compute(self, inputs: dict[str, Array], batch: Batch) -> dict[str, Array]:
        """Run the model on the stacked inputs and return `batch.outputs`, or every configured output."""

    def interrupt(self) -> None:
        """End a run in progress as soon as can be; called on another thread, and never followed by a run."""


class _Work(NamedTuple):
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[tuple[Any, BaseException | None]]
    function: Callable[[], Any]
    last: bool


def _nothing() -> None:
    """What a thread does last when there is nothing to do."""


class EngineThread:
    """One daemon thread that does one thing at a time, in order. Used from one event loop only."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[_Work] = SimpleQueue()
        self._ended: asyncio.Future[tuple[Any, BaseException | None]] | None = None
        self._given = 0
        self._done = 0  # counted on the thread, and there alone
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether all that was ever given to it has been done, and what was not wanted any more passed over."""
        return self._given == self._done

    async def call(self, function: Callable[[], T], *, hurry: bool = False) -> T:
        """Run `function` on the thread and return what it returns or raise what it raises.

        With `hurry` it begins before the event loop goes on.
        """
        if self._ended is not None:
            raise errors.Unavailable("the engine is closed; it takes no more work")
        future = self._put(function, last=False)
        if hurry:
            _let_others_run()
        result, error = await future
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def stop(self, last: Callable[[], object] = _nothing) -> None:
        """Take no more work; run `last` after what is queued, then end the thread. Does not wait."""
        if self._ended is None:
            self._ended = self._put(last, last=True)

    async def close(self, last: Callable[[], object] = _nothing) -> None:
        """`stop`, and wait for the thread to end. Cancel this to give up on a run that never ends."""
        self.stop(last)
        assert self._ended is not None
        await asyncio.shield(self._ended)
        self._thread.join()  # it has posted its last result and only has to return

    def _put(self, function: Callable[[], object], *, last: bool) -> asyncio.Future[tuple[Any, BaseException | None]]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._given += 1
        self._queue.put(_Work(loop, future, function, last))
        return future

    def _serve(self) -> None:
        goes_on = True
        while goes_on:
            goes_on = _do(self._queue.get())  # no local keeps the last batch alive while the thread waits for the next
            self._done += 1


def _let_others_run() -> None:
    # The thread is awake and waits for the interpreter's lock, which a busy event loop keeps for 5 ms. With 64 answers
    # to write that was the gap between two runs; with this it was 1.5 ms (traced under loadtest.overload at 1.5x).
    time.sleep(_PAUSE)


def _do(work: _Work) -> bool:
    if work.future.cancelled():
        return not work.last
    result, error = None, None
    try:
        result = work.function()
    except BaseException as problem:  # noqa: BLE001 - whatever it is belongs to the waiter, and the thread goes on
        error = problem
    try:
        # The error travels as a value: a future refuses StopIteration and complains of errors nobody fetched.
        work.loop.call_soon_threadsafe(_settle, work.future, (result, error))
    except RuntimeError:
        return False  # the event loop is closed: nobody waits, and nobody will again
    return not work.last


def _settle(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


class ThreadEngine:
    """The `Engine` of one loaded model on one thread. `loaded` is None once closed."""

    concurrency = 1
    ahead = True
    contained = False

    def __init__(self, loaded: Loaded, thread: EngineThread, artefact: Artefact | None = None) -> None:
        """`artefact` is what was loaded, where there was a choice."""
        self.provider = loaded.provider
        self.artefact = artefact
        self.warnings = loaded.warnings
        self.widest = loaded.widest
        self.loaded: Loaded | None = loaded
        self._thread = thread

    async def run(self, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        """Stack and compute on the engine's thread; yields once."""
        yield await self._thread.call(partial(self._run, batch), hurry=batch.hurry)

    async def close(self) -> None:
        """Interrupt a run in progress, drop the model and end the thread."""
        if (loaded := self.loaded) is not None:
            loaded.interrupt()
        await self._thread.close(self._drop)

    def _run(self, batch: Batch) -> BatchResult:
        assert self.loaded is not None
        started = time.monotonic_ns()
        inputs = batch.stack()
        stacked = time.monotonic_ns()
        outputs = self.loaded.compute(inputs, batch)
        return BatchResult(outputs, started, stacked, time.monotonic_ns())

    def _drop(self) -> None:
        # On the thread, after the last run: freeing a model takes too long for the event loop.
        self.loaded = None
