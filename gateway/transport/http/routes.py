"""The FastAPI application: every path of the protocol, documented, with `/docs` and `/openapi.json`.

Complete on its own, so any ASGI server can run it; under `HttpApp` the infer and health paths do not come
this way. Bodies are read as bytes: no framework parses them and no error is ever a `detail`. The handlers
are all `async`, because a `Service` belongs to the event loop. `/docs` needs nothing from other hosts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib import resources
from typing import Annotated, Any, TypeAlias

import orjson
from fastapi import Depends, FastAPI, Path, Request
from fastapi.params import Depends as Dependency
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gateway import __version__, errors
from gateway.service import Service
from gateway.service.shared_regions import SharedRegions
from gateway.transport.auth import Callers
from gateway.transport.http import control
from gateway.transport.http.bridge import AsgiApp
from gateway.transport.http.document import DocumentReader
from gateway.transport.http.endpoint import InferEndpoint, deadline_of, read_body
from gateway.transport.http.extension_routes import add_generate, add_settings, respond
from gateway.transport.http.generate import GenerateEndpoint
from gateway.transport.http.jobs import PATH as JOBS
from gateway.transport.http.jobs import JobsEndpoint, wants_job
from gateway.transport.http.limits import HttpLimits
from gateway.transport.http.replies import error_reply, fault_reply
from gateway.transport.http.shared_memory import Document, add_shared_memory
from gateway.types import NO_CONTEXT, NO_PARAMETERS

Model = Annotated[str, Path(description="Name of a model in the repository.")]
Version = Annotated[str, Path(description="One of the model's versions; without it the newest that is ready.")]
_Answer: TypeAlias = Callable[[Service, str, str], Awaitable[Any]]
_ERROR = {"description": "What was wrong and what to do.", "content": {"application/json": {"example": {"error": ""}}}}
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "5XX": _ERROR}
_INFER_EXAMPLE = {
    "id": "1",
    "inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}],
    "outputs": [{"name": "OUTPUT0"}],
}
_INFER_TEXT = """JSON in and out, or Triton's binary tensor data: then the body is the JSON followed by the tensors'
bytes, the header `Inference-Header-Content-Length` says where the JSON ends, and each binary input has the
parameter `binary_data_size` in place of `data`. A request that is sent again with the same `Idempotency-Key` header gets
the first one's result. With the query `async=1` the request becomes a job: the answer is 202
with the job's path as `Location`; the query `callback=URL` names who is told of its end."""
_JOBS_TEXT = """Jobs are infer requests sent with `async=1`. They are kept in Redis, survive restarts, and are run by any
gateway; without Redis the answer is 501."""

_EXPLAIN_TEXT = """Not part of Triton's protocol: why each batch closed, predicted and actual times, refusals by reason,
what is known of the batches on each device, and what a request of one row would be told now. `gateway explain MODEL`
shows it to people. Counters start at zero when the version is loaded; times are in milliseconds."""


def build(
    service: Service,
    endpoint: InferEndpoint,
    limits: HttpLimits,
    callers: Callers,
    jobs: JobsEndpoint | None = None,
    *,
    generate: GenerateEndpoint | None = None,
    regions: SharedRegions | None = None,
) -> AsgiApp:
    """The application of one gateway. Reads a file: call it off the event loop."""
    jobs = jobs or JobsEndpoint(endpoint, None)

    async def authorize(request: Request) -> None:
        request.state.tenant = callers.tenant(request.headers.get)

    app = FastAPI(
        title="Lockgate",
        version=__version__,
        description="KServe V2 / Open Inference Protocol with NVIDIA Triton's extensions.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.add_exception_handler(errors.GatewayError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_error)
    app.add_exception_handler(Exception, _on_error)
    page = resources.files(__package__).joinpath("docs.html").read_text(encoding="utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page)

    _add_health(app, service)
    protected = [Depends(authorize)]
    _add_metadata(app, service, protected)
    document = partial(_document, limits)
    _add_control(app, service, document, protected)
    add_shared_memory(app, regions, document, protected)
    add_settings(app, service, document, protected)
    _add_infer(app, endpoint, jobs, limits, protected)
    if generate is not None:
        add_generate(app, generate, limits, protected)
    _add_jobs(app, jobs, protected)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/v2/health/live", summary="Is the process serving at all?")
    async def live() -> Response:
        return respond(control.health(service, "live"))

    @app.get("/v2/health/ready", summary="Can requests be served?")
    async def ready() -> Response:
        return respond(control.health(service, "ready"))


def _add_metadata(app: FastAPI, service: Service, dependencies: Sequence[Dependency]) -> None:
    @app.get("/v2", summary="Name, version and extensions of this server", dependencies=dependencies)
    async def server() -> Response:
        return _json(control.server_metadata(service))

    @app.get("/v2/models/stats", summary="Statistics of every model", dependencies=dependencies)
    async def statistics() -> Response:
        return _json(await control.model_statistics(service))

    def add(suffix: str, summary: str, answer: _Answer, text: str | None = None) -> None:
        async def newest(model: Model) -> Response:
            return _json(await answer(service, model, ""))

        async def of_version(model: Model, version: Version) -> Response:
            return _json(await answer(service, model, _number(version)))

        for path, handler in (("", newest), ("/versions/{version}", of_version)):
            app.add_api_route(
                "/v2/models/{model}" + path + suffix,
                handler,
                summary=summary,
                description=text,
                dependencies=[*dependencies],
            )

    add("", "A model's inputs and outputs", control.model_metadata)
    add("/ready", "Does this model answer?", control.model_ready)
    add("/config", "A model's whole configuration", control.model_config)
    add("/stats", "A model's statistics", control.model_statistics)
    add("/explain", "Why a model's requests were batched, refused or late", control.model_explanation, _EXPLAIN_TEXT)


async def _document(limits: HttpLimits, request: Request) -> dict[str, Any]:
    """The JSON object that is a request's body; an empty body is an empty one."""
    body = await read_body(request.stream(), limits.max_request_bytes)
    # A reader for each request: another's document may be in use across an `await`.
    return DocumentReader(limits.max_input_size, limits.max_json_depth).read(body) if body.strip() else {}


def _add_control(app: FastAPI, service: Service, document: Document, dependencies: Sequence[Dependency]) -> None:
    @app.post("/v2/repository/index", summary="Every model and its state", dependencies=dependencies)
    async def index(request: Request) -> Response:
        return _json(await control.repository_index(service, await document(request)))

    @app.post("/v2/repository/models/{model}/load", summary="Load or reload a model", dependencies=dependencies)
    async def load(model: Model, request: Request) -> Response:
        await service.load(model, control.load_parameters(await document(request)))
        return Response()

    @app.post("/v2/repository/models/{model}/unload", summary="Unload a model", dependencies=dependencies)
    async def unload(model: Model, request: Request) -> Response:
        await service.unload(model, dependents=control.unload_dependents(await document(request)))
        return Response()

    async def of_one() -> Response:
        raise errors.repository_name()

    for path in ("/index", "/models/{model}/load", "/models/{model}/unload"):
        app.add_api_route(
            "/v2/repository/{repository}" + path,
            of_one,
            methods=["POST"],
            include_in_schema=False,
            dependencies=[*dependencies],
        )


def _add_infer(
    app: FastAPI,
    endpoint: InferEndpoint,
    jobs: JobsEndpoint,
    limits: HttpLimits,
    dependencies: Sequence[Dependency],
) -> None:
    async def answer(request: Request, model: str, version: str) -> Response:
        header = request.headers.get
        caller = request.state.tenant, deadline_of(header), NO_PARAMETERS, NO_CONTEXT, None
        body = await read_body(request.stream(), limits.max_request_bytes)
        if (query := request.url.query) and wants_job(query):
            return respond(await jobs.submit((model, version), header, body, caller, query))
        headers, content = await endpoint.answer((model, version), header, body, caller)
        return respond((200, headers, content))

    async def newest(model: Model, request: Request) -> Response:
        return await answer(request, model, "")

    async def of_version(model: Model, version: Version, request: Request) -> Response:
        return await answer(request, model, _number(version))

    body = {"content": {"application/json": {"schema": {"type": "object"}, "example": _INFER_EXAMPLE}}}
    for path, handler in (("", newest), ("/versions/{version}", of_version)):
        app.add_api_route(
            "/v2/models/{model}" + path + "/infer",
            handler,
            methods=["POST"],
            summary="Run a model",
            description=_INFER_TEXT,
            openapi_extra={"requestBody": body},
            dependencies=[*dependencies],
        )


def _add_jobs(app: FastAPI, jobs: JobsEndpoint, dependencies: Sequence[Dependency]) -> None:
    async def answer(request: Request) -> Response:
        query, path = request.url.query, request.url.path
        reply = await jobs.reply(request.method, path, query, request.headers.get, request.state.tenant)
        return respond(reply)

    for method, path, summary in (
        ("GET", JOBS, "Your jobs, the newest first; query parameters: state, limit"),
        ("GET", JOBS + "/{job}", "A job: its state, and its result or error"),
        ("DELETE", JOBS + "/{job}", "Cancel a job"),
        ("GET", JOBS + "/{job}/result", "What the infer request would have been answered"),
        ("GET", JOBS + "/{job}/events", "A job's changes of state, as server-sent events"),
    ):
        app.add_api_route(
            path, answer, methods=[method], summary=summary, description=_JOBS_TEXT, dependencies=[*dependencies]
        )


def _number(version: str) -> str:
    # Not FastAPI's to check: what it refuses is a 422.
    if not (version.isascii() and version.isdecimal()):
        raise errors.NotFound("Not Found")
    return version


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, errors.GatewayError):
        return respond(error_reply(error))
    if isinstance(error, HTTPException):
        row = errors.MethodNotAllowed if error.status_code == 405 else errors.NotFound
        return respond(error_reply(row(error.detail)))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    return respond(fault_reply(error, request.url.path))


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
