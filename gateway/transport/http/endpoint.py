"""One HTTP inference, bytes to bytes: the work both the RSGI path and the FastAPI route do.

Knows headers and bodies, no web framework. Raises only what it means: `GatewayError` for the client, anything
else for the caller to log and hide.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import TypeAlias

from gateway.config.model import ModelConfig
from gateway.errors import Internal, InvalidArgument, Unsupported
from gateway.middleware.wire_times import WireTimes
from gateway.service import Service
from gateway.transport.auth import Header
from gateway.transport.http.codec import Codec, Headers, encode
from gateway.transport.http.compression import accepted, compress, decompress
from gateway.transport.http.header import ResponsePlan
from gateway.transport.http.limits import HttpLimits
from gateway.transport.idempotency import checked
from gateway.types import Infer, InferRequest, InferResponse, Parameter, Responses

Caller: TypeAlias = tuple[str, float | None, Mapping[str, Parameter], Mapping[str, str], WireTimes | None]
"""Of a request: its tenant, its deadline, the headers that are parameters of it, its trace context, and when it came where
requests may be traced.
"""


class InferEndpoint:
    """Answers infer requests from `infer`, which is the service's or wraps it."""

    def __init__(self, service: Service, infer: Infer, limits: HttpLimits) -> None:
        self._service = service
        self._infer = infer
        self._limits = limits
        self._codec = Codec(limits)

    async def answer(
        self, target: tuple[str, str], header: Header, body: bytes, caller: Caller
    ) -> tuple[Headers, bytes]:
        """Headers and body of the response to one infer request. Cancelling it cancels the inference."""
        if caller[-1] is not None:
            caller[-1].received()
        request, plan = await self.read(target, header, body)
        request.tenant, request.deadline, forwarded, request.trace_context, request.trace = caller
        if forwarded:
            request.parameters = {**request.parameters, **forwarded}
        headers, answer = encode(await only(self._infer(request), target), plan)
        accept = header("accept-encoding")
        return (headers, answer) if accept is None else await packed(headers, answer, accept)

    def begin(
        self, target: tuple[str, str], header: Header, body: bytes, deadline: float | None
    ) -> tuple[Responses, ResponsePlan, bool]:
        """What nobody in particular asks in a body that is not compressed, and how its response is to be written.

        The responses are to be waited for, and to be closed. The last tells whether the model is made of others.
        """
        config = self._config(target)
        request, plan = self._decoded(target, header, body, config)
        request.deadline = deadline
        return self._infer(request), plan, bool(config.steps)

    async def read(self, target: tuple[str, str], header: Header, body: bytes) -> tuple[InferRequest, ResponsePlan]:
        """The request in a body, and how its response is to be written."""
        config = self._config(target)
        encoding = header("content-encoding")
        if encoding is not None:
            body = await decompress(body, encoding, self._limits.max_input_size)
        return self._decoded(target, header, body, config)

    def _config(self, target: tuple[str, str]) -> ModelConfig:
        # An unknown model is reported before a bad body, as in Triton.
        config = self._service.model_config(*target)
        if config.decoupled:
            raise Unsupported("HTTP end point doesn't support models with decoupled transaction policy")
        return config

    def _decoded(
        self, target: tuple[str, str], header: Header, body: bytes, config: ModelConfig
    ) -> tuple[InferRequest, ResponsePlan]:
        request, plan = self._codec.decode(body, header("inference-header-content-length"), *target, config)
        key = header("idempotency-key")
        if key is not None:
            request.idempotency_key = checked(key)
        return request, plan


async def only(responses: Responses, target: tuple[str, str]) -> InferResponse:
    """The one answer of a model, after which there are no more."""
    try:
        return await responses.__anext__()
    except StopAsyncIteration:
        raise Internal(f"model '{target[0]}' ended without an answer") from None
    finally:
        await responses.aclose()


async def packed(headers: Headers, answer: bytes, accept: str) -> tuple[Headers, bytes]:
    """Headers and body in the encoding that an Accept-Encoding header asks for."""
    if (packing := accepted(accept)) == "identity":
        return headers, answer
    return [*headers, ("content-encoding", packing)], await compress(answer, packing)


def deadline_of(header: Header, arrived: float | None = None) -> float | None:
    """When a request that arrived then, or just now, must be answered by its headers."""
    timeout = header("x-request-timeout-ms")
    if timeout is None:
        return None
    return (time.monotonic() if arrived is None else arrived) + seconds_left(timeout)


async def read_body(chunks: AsyncIterator[bytes], limit: int) -> bytes:
    """A body of undeclared length. Raises InvalidArgument when it grows beyond `limit` bytes."""
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise body_too_large(size, limit)
        parts.append(chunk)
    return b"".join(parts)


def body_too_large(size: int, limit: int) -> InvalidArgument:
    """A body beyond `--max-request-bytes`, of which `size` bytes are known."""
    return InvalidArgument(
        f"the request body of at least {size} bytes exceeds the limit of {limit}; "
        "send less at a time, or raise --max-request-bytes"
    )


def seconds_left(timeout: str) -> float:
    """What the header `x-request-timeout-ms` says. Raises InvalidArgument."""
    try:
        milliseconds = float(timeout)
    except ValueError:
        milliseconds = 0.0
    if not 0 < milliseconds < 1e12:
        raise InvalidArgument(
            f"header 'x-request-timeout-ms' must be a positive number of milliseconds, got '{timeout[:40]}'"
        )
    return milliseconds / 1000
