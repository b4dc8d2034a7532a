"""Async inference over HTTP: `POST .../infer?async=1` and the paths under `/v2/jobs`. Framework-free.

| request                              | answer                                                                              |
|--------------------------------------|-------------------------------------------------------------------------------------|
| `POST /v2/models/M/infer?async=1`    | 202, the job, and its path as `Location`; body and headers as for any infer request |
| `GET /v2/jobs/ID`                    | 200, the job, with `result` when it is done or `error` when it failed               |
| `GET /v2/jobs/ID/result`             | what the infer request would have been answered, byte for byte; 202 and the job before |
| `GET /v2/jobs/ID/events`             | server-sent events: `state` for each change, then `end`                             |
| `DELETE /v2/jobs/ID`                 | 200, the job: cancelled, or as it ended before                                      |
| `GET /v2/jobs?state=S&limit=N`       | 200, `{"jobs": [...]}`, newest first                                                |

A result with binary outputs is the JSON followed by their bytes, and `Inference-Header-Content-Length` says where the
JSON ends, as in any V2 answer. Without Redis everything here is answered 501 with the remedy.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qsl

import orjson

from gateway.errors import GatewayError, InvalidArgument, MethodNotAllowed, NotFound, Unsupported
from gateway.jobs.base import HEARTBEAT, REMEDY, Change, Plan, Result
from gateway.jobs.record import STATES
from gateway.jobs.view import view
from gateway.transport.auth import Header
from gateway.transport.http.codec import encode
from gateway.transport.http.endpoint import Caller, InferEndpoint, packed
from gateway.transport.http.header import ResponsePlan
from gateway.transport.http.replies import JSON, Reply, error_reply

if TYPE_CHECKING:
    from gateway.jobs.jobs import Jobs

PATH = "/v2/jobs"
Stream: TypeAlias = tuple[int, list[tuple[str, str]], AsyncGenerator[bytes, None]]
"""Status, headers and a body in pieces, as `Reply`."""

_YES, _NO = ("1", "true"), ("0", "false")
_LIMIT, _MOST = 100, 1000
_LENGTH = "inference-header-content-length"
_EVENTS = [("content-type", "text/event-stream"), ("cache-control", "no-store"), ("x-accel-buffering", "no")]


def wants_job(query: str) -> bool:
    """Whether an infer request's query asks for a job. Raises InvalidArgument for a value that is neither yes nor no."""
    value = _query(query).get("async", "0").lower()
    if value not in (*_YES, *_NO):
        raise InvalidArgument(f"the query parameter 'async' must be 1 or 0, got '{value[:40]}'")
    return value in _YES


class JobsEndpoint:
    """Answers the requests of the table above; without `jobs` all of them with 501. Raises `GatewayError`."""

    def __init__(self, endpoint: InferEndpoint, jobs: Jobs | None, heartbeat: float = HEARTBEAT) -> None:
        self._endpoint = endpoint
        self._jobs = jobs
        self._heartbeat = heartbeat

    @property
    def jobs(self) -> Jobs:
        """The jobs. Raises Unsupported where there are none."""
        if self._jobs is None:
            raise Unsupported(REMEDY)
        return self._jobs

    async def submit(self, target: tuple[str, str], header: Header, body: bytes, caller: Caller, query: str) -> Reply:
        """Make an infer request a job; the job must have been run by the deadline of its `caller`."""
        jobs = self.jobs
        request, plan = await self._endpoint.read(target, header, body)
        request.tenant, request.deadline, forwarded, request.trace_context, _ = caller
        request.parameters = {**request.parameters, **forwarded}
        callback = _query(query).get("callback") or header("lockgate-callback") or ""
        job = await jobs.submit(request, Plan(plan.binary, dict(plan.listed)), callback)
        return 202, [JSON, ("location", f"{PATH}/{job.id}")], orjson.dumps(view(job))

    async def reply(self, method: str, path: str, query: str, header: Header, tenant: str) -> Reply | Stream:
        """Answer a request to `/v2/jobs` or a path under it."""
        jobs = self.jobs
        identity, _, word = path[len(PATH) + 1 :].partition("/")
        if method != "GET" and (method != "DELETE" or word or not identity):
            raise MethodNotAllowed("Method Not Allowed")
        if path == PATH:
            return await self._list(_query(query), tenant)
        if method == "DELETE":
            return 200, [JSON], orjson.dumps(view(await jobs.cancel(identity, tenant)))
        if not word and identity:
            return await self._show(identity, header, tenant)
        if word == "result":
            return await self._result(identity, header, tenant)
        if word == "events":
            return await self._watch(identity, tenant)
        raise NotFound("Not Found")

    async def _list(self, query: Mapping[str, str], tenant: str) -> Reply:
        wanted = query.get("state", "")
        states = [state for state in STATES if wanted in ("", state)]
        if not states:
            raise InvalidArgument(f"there is no state '{wanted[:40]}'; expected one of {', '.join(STATES)}")
        text = query.get("limit", str(_LIMIT))
        limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0
        if not 1 <= limit <= _MOST:
            raise InvalidArgument(f"the query parameter 'limit' must be between 1 and {_MOST}, got '{text[:40]}'")
        jobs = await self.jobs.list(tenant, states, limit)
        return 200, [JSON], orjson.dumps({"jobs": [view(job) for job in jobs]})

    async def _show(self, identity: str, header: Header, tenant: str) -> Reply:
        job = await self.jobs.get(identity, tenant)
        result = await self.jobs.result(job) if job.state == "done" else None
        if not isinstance(result, Result):
            return 200, [JSON], orjson.dumps(view(job))
        headers, body = encode(result.response, ResponsePlan(*result.plan))
        length = next((int(value) for name, value in headers if name == _LENGTH), len(body))
        # The V2 answer as it is, with its binary data behind the JSON that it is now part of.
        text = orjson.dumps({**view(job), "result": orjson.Fragment(body[:length])})
        headers = [(name, str(len(text)) if name == _LENGTH else value) for name, value in headers]
        return await _packed(200, headers, text + body[length:], header)

    async def _result(self, identity: str, header: Header, tenant: str) -> Reply:
        job = await self.jobs.get(identity, tenant)
        result = await self.jobs.result(job)
        if result is None:
            return 202, [JSON], orjson.dumps(view(job))
        if isinstance(result, GatewayError):
            return error_reply(result)
        return await _packed(200, *encode(result.response, ResponsePlan(*result.plan)), header)

    async def _watch(self, identity: str, tenant: str) -> Stream:
        changes = self.jobs.watch(identity, tenant, self._heartbeat)
        try:
            first = await anext(changes)
        except BaseException:
            await changes.aclose()
            raise
        return 200, _EVENTS, _events(first, changes)


async def _packed(status: int, headers: list[tuple[str, str]], body: bytes, header: Header) -> Reply:
    accept = header("accept-encoding")
    return (status, headers, body) if accept is None else (status, *await packed(headers, body, accept))


async def _events(first: Change, changes: AsyncGenerator[Change, None]) -> AsyncGenerator[bytes, None]:
    """The changes as server-sent events, then `end`, unless the gateway stops before."""
    async with aclosing(changes):
        change = first
        yield _event(change)
        try:
            async for change in changes:
                yield _event(change)
        except GatewayError as problem:
            yield b"event: error\ndata: " + orjson.dumps({"error": problem.message}) + b"\n\n"
            return
        if change.job.final:
            yield b"event: end\ndata: " + orjson.dumps(view(change.job)) + b"\n\n"


def _event(change: Change) -> bytes:
    job, event = change
    if event is None:
        return b": nothing new\n\n"
    told: dict[str, Any] = {"id": job.id, "state": event.state, "time": event.time}
    if event.state == "queued" and job.position is not None:
        told["position"] = job.position
    return b"event: state\nid: %b\ndata: %b\n\n" % (event.id, orjson.dumps(told))


def _query(query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=16, errors="strict")
    except ValueError:
        raise InvalidArgument("the query has more than 16 parameters, or is not UTF-8") from None
    return dict(reversed(pairs))
