"""The routes about clients' shared memory, of each kind the same.

There is no CUDA memory: none is registered, and so none is there. Memory in Redis is a kind that Triton does not have.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, TypeAlias

import orjson
from fastapi import Depends, FastAPI, Path, Request
from fastapi.params import Depends as Dependency
from fastapi.responses import Response

from gateway import errors
from gateway.errors import InvalidArgument
from gateway.service.registers import Registers
from gateway.service.shared_regions import SharedRegions
from gateway.shm import Memory, Regions
from gateway.shm.errors import no_cuda_regions, redis_memory_disabled, unknown_region_of
from gateway.transport.http.document import bad_member

Document: TypeAlias = Callable[[Request], Awaitable[dict[str, Any]]]
"""Reads the JSON object that is a request's body."""

Name = Annotated[str, Path(description="The region's name among the registered ones; any characters.")]
_Of: TypeAlias = Callable[[str], Awaitable[Response]]
_Register: TypeAlias = Callable[[str, Request], Awaitable[Response]]


def add_shared_memory(
    app: FastAPI, regions: SharedRegions | None, document: Document, dependencies: Sequence[Dependency]
) -> None:
    """Add the routes; without `regions` all of them answer 501."""

    async def allowed() -> None:
        if regions is None:
            raise errors.shared_memory_disabled()

    protected = [*dependencies, Depends(allowed)]

    async def redis_allowed() -> None:
        if regions is None or regions.redis is None:
            raise redis_memory_disabled()

    nothing = SharedRegions(Regions(), Registers(), "")
    _add_cuda(app, protected)
    _add_regions(app, "system", regions or nothing, document, protected)
    redis = None if regions is None else regions.redis
    _add_regions(app, "redis", redis or nothing, document, [*protected, Depends(redis_allowed)])


def _add_regions(
    app: FastAPI, kind: str, regions: SharedRegions, document: Document, dependencies: Sequence[Dependency]
) -> None:
    async def status(name: str) -> Response:
        return Response(
            orjson.dumps([_told(each) for each in await regions.status(name)]), media_type="application/json"
        )

    async def register(name: str, request: Request) -> Response:
        body = await document(request)
        await regions.register(name, _text(body, "key"), _natural(body.get("offset", 0), "offset"), _size(body))
        return Response()

    async def unregister(name: str) -> Response:
        await regions.unregister(name)
        return Response()

    _add(app, kind, (status, register, unregister), dependencies)


def _add_cuda(app: FastAPI, dependencies: Sequence[Dependency]) -> None:
    async def status(name: str) -> Response:
        if name:
            raise unknown_region_of("cuda", name)
        return Response(b"[]", media_type="application/json")

    async def register(name: str, _: Request) -> Response:
        raise no_cuda_regions(name)

    async def unregister(_: str) -> Response:
        return Response()

    _add(app, "cuda", (status, register, unregister), dependencies)


def _add(app: FastAPI, kind: str, handlers: tuple[_Of, _Register, _Of], dependencies: Sequence[Dependency]) -> None:
    status, register, unregister = handlers

    async def status_of(name: Name) -> Response:
        return await status(name)

    async def status_of_all() -> Response:
        return await status("")

    async def register_one(name: Name, request: Request) -> Response:
        return await register(name, request)

    async def unregister_one(name: Name) -> Response:
        return await unregister(name)

    async def unregister_all() -> Response:
        return await unregister("")

    for path, handler, summary in (
        ("/status", status_of_all, "The registered regions"),
        ("/region/{name:path}/status", status_of, "A registered region"),
        ("/region/{name:path}/register", register_one, "Register a region"),
        ("/unregister", unregister_all, "Forget all regions"),
        ("/region/{name:path}/unregister", unregister_one, "Forget a region"),
    ):
        app.add_api_route(
            f"/v2/{kind}sharedmemory{path}",
            handler,
            methods=["GET" if path.endswith("status") else "POST"],
            summary=f"{summary} of {kind} shared memory",
            dependencies=[*dependencies],
        )


def _told(region: Memory) -> dict[str, Any]:
    return {"name": region.name, "key": region.key, "offset": region.offset, "byte_size": region.byte_size}


def _required(body: dict[str, Any], member: str) -> Any:
    if member not in body:
        raise InvalidArgument(f"Shared memory register request has no '{member}' field")
    return body[member]


def _text(body: dict[str, Any], member: str) -> str:
    value = _required(body, member)
    if type(value) is not str:
        raise bad_member(member, "string", "string")
    return value


def _size(body: dict[str, Any]) -> int:
    return _natural(_required(body, "byte_size"), "byte_size")


def _natural(value: Any, member: str) -> int:
    if type(value) is not int or value < 0:
        raise bad_member(member, "unsigned-integer", "unsigned-integer")
    return value
