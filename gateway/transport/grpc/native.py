"""ModelInfer on `pygrpc_native`'s front: HTTP/2 and gRPC framing in Rust threads, the rest on the event loop.

The front owns the public port and passes every other call to a grpcio server on a private socket. One thread
hands its events to the loop in batches; each call is a task of this front's group. The front undoes gzip,
refuses other compression, and does not limit the size of messages, which `Calls` therefore checks. It sends no
`grpc-retry-pushback-ms`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from gateway import errors
from gateway.transport.grpc.calls import Calls, stopping
from gateway.transport.grpc.options import GrpcOptions
from gateway.transport.grpc.trailers import trailers

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_BATCH = 64
_LINGER = 0.05  # seconds for what was passed on from the grpcio server, which the front does not count
_log = logging.getLogger("gateway.grpc")


@asynccontextmanager
async def native_front(address: str, calls: Calls, options: GrpcOptions) -> AsyncIterator[Front]:
    """A bound front, to be `start`ed; the block's end closes it once what was answered has been sent.

    Raises OSError when `address` cannot be bound. A front that fails while it serves cancels the block and
    ends it with an ExceptionGroup of a RuntimeError, because nobody could reach the gateway any more.
    """
    from pygrpc_native import NativeGrpcFront

    keepalive = options.keepalive
    native = NativeGrpcFront(
        address,
        [(_METHOD, False)],
        io_threads=_io_threads(),
        call_details=True,
        metrics=True,
        keepalive_time_ms=max(keepalive.time_ms, 1),
        keepalive_timeout_ms=max(keepalive.timeout_ms, 1),
        keepalive_permit_without_calls=keepalive.permit_without_calls,
        reuse_port=options.share,
    )
    try:
        async with asyncio.TaskGroup() as group:
            front = Front(native, calls, group)
            try:
                yield front
            finally:
                await front.stop()
    finally:
        native.close()


def _io_threads() -> int:
    # On two cores a second thread costs a tenth more CPU a call and gains nothing; large tensors on a large
    # machine need more than the gigabyte a second that one thread moves.
    return max(1, min(4, (os.cpu_count() or 1) // 4))


class Front:
    """The loop's side of a front: one task per call."""

    def __init__(self, native: Any, calls: Calls, group: asyncio.TaskGroup) -> None:
        self.port: int = native.bound_port
        self._native = native
        self._calls = calls
        self._group = group
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ended = asyncio.Event()
        self._started = False
        self._stopping = False

    def start(self, fallback: str) -> None:
        """Serve, passing all but ModelInfer to the grpcio server on the socket at this path."""
        self._started = True
        self._group.create_task(self._watch())
        self._native.set_fallback(fallback)
        self._native.start()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._dispatch, args=(loop,), name="grpc-front", daemon=True).start()

    async def quiet(self, seconds: float) -> bool:
        """Wait until every call that has come is answered and its answer sent, for so many seconds at most."""
        await asyncio.to_thread(self._flush, seconds)
        return self._all_sent()

    async def stop(self) -> None:
        """Cancel the calls that outlived the grace, send what was answered, and close."""
        self._stopping = True
        for task in self._tasks.values():
            task.cancel()
        if self._started and not self._ended.is_set():
            await asyncio.to_thread(self._flush, self._calls.running.left())
        self._native.close()

    async def _watch(self) -> None:
        await self._ended.wait()
        if not self._stopping:
            raise RuntimeError("the native gRPC front stopped by itself")

    def _dispatch(self, loop: asyncio.AbstractEventLoop) -> None:
        """The front's thread: hand events to the loop until either is closed."""
        try:
            while (events := self._native.recv_batch_details(_BATCH)) is not None:
                loop.call_soon_threadsafe(self._on_events, events)
        except Exception:  # noqa: BLE001 - whatever ended the thread, the front must not go on accepting calls
            _log.exception("the native gRPC front failed")
        self._native.close()
        with suppress(RuntimeError):  # a loop that was closed without stop() has nobody left to tell
            loop.call_soon_threadsafe(self._ended.set)

    def _on_events(self, events: list[tuple[Any, ...]]) -> None:
        for cancelled, call_id, _, payload, _, details in events:
            if cancelled:
                # Taken out here, because a task that is cancelled before it began cleans up nothing.
                task = self._tasks.pop(call_id, None)
                if task is not None:
                    task.cancel()
            elif self._calls.running.closed:
                self._fail(call_id, stopping())
            else:
                self._tasks[call_id] = self._group.create_task(self._answer(call_id, payload, details))

    async def _answer(self, call_id: int, payload: bytes, details: tuple[Any, ...]) -> None:
        metadata, _, remaining = details
        wire = self._calls.wire()
        try:
            self._native.respond(call_id, await self._calls.answer(payload, metadata, remaining, wire))
        except errors.GatewayError as error:
            self._fail(call_id, error)
        finally:
            self._tasks.pop(call_id, None)
            if wire is not None:
                wire.sent()
                wire.close()

    def _fail(self, call_id: int, error: errors.GatewayError) -> None:
        self._native.fail(call_id, error.grpc, error.message, trailers(error, pushback=False))

    def _flush(self, seconds: float) -> None:
        # The front tells nobody when an answer is on its way, it only counts calls that have ended, and closing
        # it drops the rest. So this asks again every millisecond, in a thread, once in the life of a server.
        until = time.monotonic() + seconds
        linger = time.monotonic() + min(seconds, _LINGER)
        while time.monotonic() < linger or (not self._all_sent() and time.monotonic() < until):
            time.sleep(0.001)

    def _all_sent(self) -> bool:
        counts = self._native.metrics()["methods"][_METHOD]
        return bool(counts["started"] == sum(status["count"] for status in counts["status"].values()))
