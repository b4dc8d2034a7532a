"""What every gRPC call goes through, whichever library carried it here.

Who calls and until when, from metadata; running an inference from bytes to bytes; which calls are running,
so that a stop can refuse new ones and wait for the rest; and which error a client may see. Knows no gRPC
library.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from gateway import errors
from gateway.middleware.wire_times import WireTimes
from gateway.telemetry import Refusals
from gateway.transport.auth import Header
from gateway.transport.grpc import codec
from gateway.transport.grpc.options import INT32_MAX, GrpcOptions
from gateway.transport.idempotency import HEADER, checked
from gateway.types import NO_CONTEXT, NO_PARAMETERS, Infer, InferRequest, InferResponse, Parameter

_T = TypeVar("_T")
Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
Authenticate: TypeAlias = Callable[[Header], str]
"""The tenant of a call with this metadata; raises `GatewayError`."""

_TIMEOUT = "x-request-timeout-ms"
_FOREVER = 1e9  # seconds; the libraries report "no deadline" as some huge number
_log = logging.getLogger("gateway.grpc")


class Traces(Protocol):
    """Whether any request may be traced, by `on`."""

    on: bool


class Caller(NamedTuple):
    """Who is calling, when the call ends (`time.monotonic` seconds), how many seconds a request of it has, the key
    under which its one request is repeated, the metadata that are parameters of its requests, and their trace context.
    """

    tenant: str
    deadline: float | None
    timeout: float | None
    key: str | None = None
    forwarded: Mapping[str, Parameter] = NO_PARAMETERS
    context: Mapping[str, str] = NO_CONTEXT


class Running:
    """A context manager that counts calls. Once `close`d it refuses new ones with `Unavailable`."""

    def __init__(self) -> None:
        self.closed = False
        self._awaited = False
        self._count = 0
        self._idle = asyncio.Event()
        self._until = 0.0
        self._waits: set[asyncio.Timeout] = set()

    def __enter__(self) -> None:
        if self.closed:
            raise stopping()
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count -= 1
        if self._awaited and not self._count:
            self._idle.set()

    async def idle(self, seconds: float) -> bool:
        """Wait until no call runs; False if one still does after so many seconds."""
        self._awaited = True
        self._idle.clear()
        if self._count:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
        return not self._count

    async def unless_closed(self, item: Awaitable[_T]) -> _T | None:
        """Wait for `item`; None if `close` comes first, which gives up waiting."""
        try:
            # A timeout that nobody sets until close() does: the wait ends there and then, and nothing else.
            async with asyncio.timeout(0 if self.closed else None) as scope:
                self._waits.add(scope)
                try:
                    return await item
                finally:
                    self._waits.discard(scope)
        except TimeoutError:
            return None

    async def close(self, grace: float) -> None:
        """Refuse new calls, and return when those running have ended or `grace` seconds are over."""
        self.closed = True
        for scope in self._waits:
            scope.reschedule(0)
        until = time.monotonic() + grace
        await self.idle(grace)
        # Set only now, because a wait that is cancelled means a forced stop, which has no time left.
        self._until = until

    def left(self) -> float:
        """How many seconds of the grace are left; 0 before `close` and after a `close` that was cancelled."""
        return max(self._until - time.monotonic(), 0.0)


class Calls:
    """The calls of one server."""

    def __init__(
        self,
        infer: Infer,
        authenticate: Authenticate | None,
        options: GrpcOptions,
        traces: Traces | None = None,
    ) -> None:
        """Without `authenticate` everybody is the default tenant; without `traces` none are made."""
        self.infer = infer
        self.running = Running()
        self._authenticate = authenticate
        self._traces = traces
        self._max_bytes = options.max_request_bytes
        self._max_tensors = options.max_request_tensors
        self._refusals = Refusals()
        self._rules = options.rules
        self._plain = not options.rules.restricted and options.rules.forward is None and not options.rules.traced

    def wire(self) -> WireTimes | None:
        """Where to note when a request comes from now on; None while no request is traced."""
        return WireTimes("GRPC") if self._traces is not None and self._traces.on else None

    def allow(self, rpc: str, metadata: Metadata) -> None:
        """Raise `Unavailable` for a call that lacks the metadata which its protocol demands."""
        if self._rules.restricted:
            values: dict[str, Any] = dict(reversed(metadata))
            self._rules.check_rpc(rpc, values.get)

    def inferring(self, rpc: str, metadata: Metadata, remaining: float | None) -> Caller:
        """`caller`, of a call that asks for inference."""
        if self._plain:
            return self.caller(metadata, remaining)
        self.allow(rpc, metadata)
        values: dict[str, Any] = dict(reversed(metadata))
        forwarded, context = self._rules.forwarded(metadata), self._rules.context(values.get)
        return self.caller(metadata, remaining)._replace(forwarded=forwarded, context=context)

    def caller(self, metadata: Metadata, remaining: float | None) -> Caller:
        """Authenticate a call and fix its deadline; `remaining` is what gRPC says is left, in seconds."""
        deadline = time.monotonic() + remaining if remaining is not None and _ends(remaining) else None
        if self._authenticate is None:
            timeout = repeated = None
            # Of a key that is there twice the first counts, as on HTTP.
            for key, value in metadata:
                if key == _TIMEOUT and timeout is None:
                    timeout = str(value)
                elif key == HEADER and repeated is None:
                    repeated = str(value)
            return Caller("", deadline, _timeout(timeout), repeated)
        values: dict[str, Any] = dict(reversed(metadata))
        return Caller(self._authenticate(values.get), deadline, _timeout(values.get(_TIMEOUT)), values.get(HEADER))

    def request(self, payload: bytes, caller: Caller) -> InferRequest:
        """A request from its serialized message. Raises `GatewayError`."""
        if len(payload) > self._max_bytes:
            # The status that grpcio gives, which refuses such a message before it gets here.
            raise errors.ResourceExhausted(
                f"the request message of {len(payload)} bytes exceeds the limit of {self._max_bytes}; "
                "send less at a time, or raise --max-request-bytes"
            )
        request = codec.decode(payload)
        if max(len(request.inputs), len(request.outputs)) > self._max_tensors:
            raise self._too_many(request)
        request.tenant = caller.tenant
        request.deadline = caller.deadline
        request.trace_context = caller.context
        if caller.forwarded:
            request.parameters = {**request.parameters, **caller.forwarded}
        if caller.timeout is not None:
            until = time.monotonic() + caller.timeout
            request.deadline = until if caller.deadline is None else min(until, caller.deadline)
        return request

    async def answer(
        self, payload: bytes, metadata: Metadata, remaining: float | None, wire: WireTimes | None = None
    ) -> bytes:
        """ModelInfer: the one answer to a request, both serialized. Raises `GatewayError` only.

        `wire` notes when the request is read and the answer is there; whoever sends that closes it.
        """
        try:
            with self.running:
                caller = self.inferring("ModelInfer", metadata, remaining)
                request = self.request(payload, caller)
                request.one_answer = True
                if caller.key is not None:
                    request.idempotency_key = checked(caller.key)
                if wire is not None:
                    wire.received()
                    request.trace = wire
                return sendable(codec.encode(await self._only(request)))
        except Exception as error:  # noqa: BLE001 - explain() logs what is not ours
            known = explain(error, timed=_ends(remaining))
            self._refusals.note(type(known).__name__, wire="grpc", reason=known.message)
            raise known from None
        finally:
            if wire is not None:
                wire.sending()

    def _too_many(self, request: InferRequest) -> errors.InvalidArgument:
        counts = {"inputs": len(request.inputs), "outputs": len(request.outputs)}
        what, count = next((what, count) for what, count in counts.items() if count > self._max_tensors)
        return errors.InvalidArgument(
            f"the request has {count} {what}, more than the limit of {self._max_tensors}; "
            "send fewer, or raise --max-request-tensors"
        )

    async def _only(self, request: InferRequest) -> InferResponse:
        responses = self.infer(request)
        try:
            response = await anext(responses)
        except StopAsyncIteration:
            raise errors.Internal(f"model '{request.model_name}' ended without an answer") from None
        finally:
            await responses.aclose()  # aclosing() does the same for 1 us more
        if not response.final:
            raise errors.one_answer_only()
        return response


def sendable(message: bytes) -> bytes:
    """`message` itself, or `InvalidArgument` if it is larger than a client accepts."""
    if len(message) > INT32_MAX:
        raise errors.InvalidArgument(
            f"the response of {len(message)} bytes exceeds gRPC's limit of {INT32_MAX}; ask for fewer outputs or rows"
        )
    return message


def explain(error: Exception, *, timed: bool = False) -> errors.GatewayError:
    """The error a client may see; one that is not ours goes to the log and none of it to the client.

    In a call with a deadline of its own, `timed`, clients look for the words of their library when that passes; with
    Triton nobody but the library ever says that it has.
    """
    if timed and isinstance(error, errors.DeadlineExceeded):
        return type(error)(f"Deadline Exceeded: {error.message}", error.retry_after)
    if isinstance(error, errors.GatewayError):
        return error
    _log.error("a gRPC call failed unexpectedly", exc_info=error)
    return errors.Internal("internal error")


def stopping() -> errors.Unavailable:
    """What a call meets that arrives after the stop began."""
    return errors.Unavailable("GRPC server is shutting down and has stopped accepting new requests.")


def _ends(remaining: float | None) -> bool:
    """Whether a call with so many seconds left, as its library says, has a deadline."""
    return remaining is not None and remaining <= _FOREVER


def _timeout(value: str | None) -> float | None:
    """Seconds of a value in milliseconds."""
    if value is None:
        return None
    with suppress(ValueError):
        milliseconds = float(value)
        if 0 < milliseconds < 1e12:
            return milliseconds / 1000
    raise errors.InvalidArgument(
        f"metadata 'x-request-timeout-ms' must be a positive number of milliseconds, got '{value[:40]}'"
    )
