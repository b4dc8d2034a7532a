"""The generate extension: `POST /v2/models/M[/versions/V]/generate` and `.../generate_stream`. Framework-free.

`generate` answers with one JSON object and needs a model that gives exactly one response. `generate_stream` answers with
one server-sent event for each response; the status is the first one's, and an error after it is an event. A request that
is refused before a model has seen it is answered with JSON on both.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import lru_cache
from typing import TypeAlias

import orjson

from gateway.errors import GatewayError, Internal, InvalidArgument
from gateway.service import Service
from gateway.transport.auth import Header
from gateway.transport.http import generation
from gateway.transport.http.document import DocumentReader
from gateway.transport.http.endpoint import Caller
from gateway.transport.http.limits import HttpLimits
from gateway.transport.http.replies import JSON, Reply, fault_reply
from gateway.transport.idempotency import HEADER, checked
from gateway.types import Infer, InferRequest, InferResponse, Responses

Stream: TypeAlias = tuple[int, list[tuple[str, str]], AsyncGenerator[bytes, None]]
"""Status, headers and a body in pieces, as `Reply`."""

_SSE = [
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-store"),
    ("x-accel-buffering", "no"),
]
_MODELS = "/v2/models/"
_WORDS = {"generate": False, "generate_stream": True}


@lru_cache(1024)
def generate_target(path: str) -> tuple[str, str, bool] | None:
    """Model, version and whether to stream, of a path of this extension; None for another path."""
    head, _, word = path.rpartition("/")
    if word not in _WORDS or not head.startswith(_MODELS):
        return None
    model, slash, rest = head[len(_MODELS) :].partition("/")
    kind, _, version = rest.partition("/")
    if not model or (slash and not (kind == "versions" and version.isascii() and version.isdecimal())):
        return None
    return model, version, _WORDS[word]


class GenerateEndpoint:
    """Answers generate requests from `infer`, which is the service's or wraps it. Raises `GatewayError`."""

    def __init__(self, service: Service, infer: Infer, limits: HttpLimits) -> None:
        self._service = service
        self._infer = infer
        self._limits = limits
        self._reader = DocumentReader(limits.max_input_size, limits.max_json_depth)

    async def reply(self, target: tuple[str, str, bool], header: Header, body: bytes, caller: Caller) -> Reply | Stream:
        """Answer a request to what `generate_target` said."""
        if caller[-1] is not None:
            caller[-1].received()
        model, version, streams = target
        request = self._read(model, version, header, body)
        request.tenant, request.deadline, forwarded, request.trace_context, request.trace = caller
        request.parameters = {**request.parameters, **forwarded}
        if streams:
            return await self._stream(request)
        if (key := header(HEADER)) is not None:
            request.idempotency_key = checked(key)
        return 200, [JSON], generation.encode(await self._only(request))

    def _read(self, model: str, version: str, header: Header, body: bytes) -> InferRequest:
        config = self._service.model_config(model, version)
        if header("content-encoding") not in (None, "", "identity"):
            raise InvalidArgument("Unsupported content-encoding, only 'identity' is supported.")
        return generation.decode(self._reader.members(body), config, version, self._limits)

    async def _only(self, request: InferRequest) -> InferResponse:
        responses: list[InferResponse] = []
        async with aclosing(self._infer(request)) as answers:
            async for response in answers:
                responses.append(response)
                if len(responses) > 1:
                    break
        if len(responses) != 1:
            raise Internal(
                "generate expects model to produce exactly 1 response, use generate stream for model that generates "
                "various number of responses"
            )
        return responses[0]

    async def _stream(self, request: InferRequest) -> Stream:
        self._service.prepare(request)  # what is wrong with the request is no event yet
        responses = self._infer(request)
        try:
            first = _event(await anext(responses))
        except BaseException as error:  # whatever it is, the request is over
            await responses.aclose()
            if isinstance(error, StopAsyncIteration):
                return 200, _SSE, _one(b"")  # a model that has nothing to say
            if not isinstance(error, GatewayError) or error.reason:  # with a reason, no model has seen it
                raise
            return error.http, _SSE, _one(_failed(error))
        return 200, _SSE, _events(first, responses, request.model_name)


async def _one(event: bytes) -> AsyncGenerator[bytes, None]:
    yield event


async def _events(first: bytes, responses: Responses, model: str) -> AsyncGenerator[bytes, None]:
    async with aclosing(responses):
        yield first
        try:
            async for response in responses:
                yield _event(response)
        except GatewayError as error:
            yield _failed(error)
        except Exception as fault:  # noqa: BLE001 - a fault of ours must not end the answer without a word
            yield b"data: " + fault_reply(fault, model)[2] + b"\n\n"


def _event(response: InferResponse) -> bytes:
    return b"data: " + generation.encode(response) + b"\n\n"


def _failed(error: GatewayError) -> bytes:
    message = error.message.encode(errors="replace").decode()
    return b"data: " + orjson.dumps({"error": message}) + b"\n\n"
