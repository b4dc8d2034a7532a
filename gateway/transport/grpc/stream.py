"""ModelStreamInfer: many requests on one call, run side by side, the answers of each in order.

A request that fails is answered in `error_message` and the call goes on, unless the client's metadata says
`triton_grpc_error: true`. Ending the call ends its requests; a server that stops reads no more of them and
ends the call, UNAVAILABLE, when those it has are answered.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from grpc.aio import EOF, InternalError

from gateway import errors
from gateway.middleware.wire_times import WireTimes
from gateway.transport.grpc import codec
from gateway.transport.grpc.calls import Caller, Calls, explain, sendable, stopping
from gateway.transport.grpc.trailers import retry_after_ms
from gateway.transport.idempotency import HEADER


class Stream:
    """One ModelStreamInfer call; `context` is its `grpc.aio.ServicerContext`, which reads and writes bytes."""

    def __init__(self, calls: Calls, context: Any) -> None:
        metadata = context.invocation_metadata()
        self._calls = calls
        self._context = context
        self._caller: Caller = calls.inferring("ModelStreamInfer", metadata, context.time_remaining())
        if self._caller.key is not None:
            raise errors.InvalidArgument(
                f"metadata '{HEADER}' is for one request, and a ModelStreamInfer call has many; send it with ModelInfer"
            )
        self._fails_whole = ("triton_grpc_error", "true") in ((key, value) for key, value in metadata)
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Serve the call. Raises the first `GatewayError` if the client asked for that, and when the server stops."""
        failed: BaseException | None = None
        read_all = True
        try:
            async with asyncio.TaskGroup() as group:
                read_all = await self._read(group)
        except* errors.GatewayError as group_of_errors:
            failed = group_of_errors.exceptions[0]
        if failed is not None:
            raise failed
        if not read_all:
            raise stopping()  # a request may have come that was not read, and OK would say that none did

    async def _read(self, group: asyncio.TaskGroup) -> bool:
        """Start the requests as they come; False if the server stopped before the client had sent its last."""
        wire = self._calls.wire()
        while (payload := await self._calls.running.unless_closed(self._context.read())) is not None:
            if payload is EOF:
                return True
            group.create_task(self._answer(payload, wire))
            wire = self._calls.wire()
        return False

    async def _answer(self, payload: bytes, wire: WireTimes | None) -> None:
        if wire is not None:
            wire.received()
        try:
            with self._calls.running:
                request = self._calls.request(payload, self._caller)
                request.trace = wire
                async with aclosing(self._calls.infer(request)) as responses:
                    async for response in responses:
                        await self._write(sendable(codec.encode_streamed(response)), wire)
        except Exception as problem:  # noqa: BLE001 - explain() logs what is not ours, and the request is answered
            error = explain(problem, timed=self._caller.deadline is not None)
            if self._fails_whole:
                # Kept for good: the status cannot be sent while another answer is half written.
                await self._writing.acquire()
                raise error from None
            await self._write(
                codec.encode_streamed_error(error.message, codec.request_id(payload), retry_after_ms(error)), wire
            )
        finally:
            if wire is not None:
                wire.close()

    async def _write(self, message: bytes, wire: WireTimes | None) -> None:
        async with self._writing:
            if wire is not None:
                wire.sending()
            try:
                await self._context.write(message)
            except InternalError:
                # The client has ended the call, of which gRPC tells the call itself a little later.
                raise asyncio.CancelledError from None
            if wire is not None:
                wire.sent()
