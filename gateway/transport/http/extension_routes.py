"""The FastAPI routes of extensions: generate, and the settings of logging and tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.params import Depends as Dependency
from fastapi.responses import Response, StreamingResponse

from gateway.errors import NotFound
from gateway.service import Service
from gateway.transport.http import control
from gateway.transport.http.endpoint import deadline_of, read_body
from gateway.transport.http.generate import GenerateEndpoint, Stream, generate_target
from gateway.transport.http.limits import HttpLimits
from gateway.transport.http.replies import Reply
from gateway.transport.http.shared_memory import Document
from gateway.types import NO_CONTEXT, NO_PARAMETERS

_SETTINGS_TEXT = """The same in every process of a fleet. A POST changes the settings that are in its body, and both answer with
those in force. What is written where is fixed at start: `trace_file` and `log_file` cannot be changed."""
_GENERATE_EXAMPLE = {"text_input": "Why?", "parameters": {"max_tokens": 16}}
_GENERATE_TEXT = """Each member of the body that is named as an input of the model is that tensor, a value or a list of them;
other members, and those of `parameters`, are request parameters. `generate` answers with one object of outputs,
`generate_stream` with a server-sent event for each response."""


def add_generate(
    app: FastAPI, endpoint: GenerateEndpoint, limits: HttpLimits, dependencies: Sequence[Dependency]
) -> None:
    """Add `generate` and `generate_stream`, with and without a version."""

    async def answer(request: Request) -> Response:
        target = generate_target(request.url.path)
        if target is None:  # a version that is no number
            raise NotFound("Not Found")
        header = request.headers.get
        caller = request.state.tenant, deadline_of(header), NO_PARAMETERS, NO_CONTEXT, None
        body = await read_body(request.stream(), limits.max_request_bytes)
        return respond(await endpoint.reply(target, header, body, caller))

    body = {"content": {"application/json": {"schema": {"type": "object"}, "example": _GENERATE_EXAMPLE}}}
    for word, summary in (("generate", "Run a model on plain JSON"), ("generate_stream", "The same, answer by answer")):
        for path in ("", "/versions/{version}"):
            app.add_api_route(
                "/v2/models/{model}" + path + "/" + word,
                answer,
                methods=["POST"],
                summary=summary,
                description=_GENERATE_TEXT,
                openapi_extra={"requestBody": body},
                dependencies=[*dependencies],
            )


def add_settings(app: FastAPI, service: Service, document: Document, dependencies: Sequence[Dependency]) -> None:
    """Add `/v2/logging`, `/v2/trace/setting` and `/v2/models/{model}/trace/setting`."""

    async def body(request: Request) -> dict[str, Any] | None:
        return await document(request) if request.method == "POST" else None

    async def logs(request: Request) -> Response:
        return _json(await control.log_settings(service, await body(request)))

    async def traces(request: Request) -> Response:
        model = request.path_params.get("model", "")
        return _json(await control.trace_settings(service, model, await body(request)))

    for path, answer, summary in (
        ("/v2/logging", logs, "Which lines are logged"),
        ("/v2/trace/setting", traces, "Which requests are traced"),
        ("/v2/models/{model}/trace/setting", traces, "Which requests to a model are traced"),
    ):
        for method in ("GET", "POST"):
            app.add_api_route(
                path,
                answer,
                methods=[method],
                summary=summary,
                description=_SETTINGS_TEXT,
                dependencies=[*dependencies],
            )


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def respond(reply: Reply | Stream) -> Response:
    """A reply as Starlette has it."""
    status, headers, body = reply
    if isinstance(body, bytes):
        return Response(body, status, dict(headers))
    return StreamingResponse(body, status, dict(headers))
