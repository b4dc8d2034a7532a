"""`HttpApp`: the RSGI application of the HTTP port.

Infer requests are answered here, bytes in and bytes out; health too, which probes ask for often and without
a token. Every other path goes to the FastAPI application through a bridge; it is imported on the first such
request, on a thread, because its import takes as long as all the rest of the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]

from gateway.errors import GatewayError, too_many_bytes
from gateway.middleware.wire_times import WireTimes
from gateway.service import Service
from gateway.service.shared_regions import SharedRegions
from gateway.telemetry import Refusals
from gateway.transport.auth import Callers
from gateway.transport.header_rules import NO_RULES, HeaderRules
from gateway.transport.http.bridge import AsgiApp, call_asgi
from gateway.transport.http.control import health
from gateway.transport.http.direct import Direct
from gateway.transport.http.disconnects import Disconnects
from gateway.transport.http.door import InferDoor, infer_target
from gateway.transport.http.endpoint import InferEndpoint, body_too_large, deadline_of, read_body
from gateway.transport.http.generate import GenerateEndpoint, generate_target
from gateway.transport.http.handover import Body, Head
from gateway.transport.http.jobs import PATH as JOBS
from gateway.transport.http.jobs import JobsEndpoint, Stream, wants_job
from gateway.transport.http.limits import HttpLimits
from gateway.transport.http.replies import Reply, error_reply, fault_reply
from gateway.types import NO_CONTEXT, NO_PARAMETERS, Infer, Parameter

if TYPE_CHECKING:
    from gateway.jobs.jobs import Jobs

_SMALL_BODY = 1 << 20  # read in one piece; all the connections there may be cannot hold much with bodies like this
_LARGE_BODY = 1 << 24  # read in one piece while those that are read so are declared to be a part of what may arrive,
_AT_ONCE = 4  # one in so many: each piece makes its own way to the event loop, and all are copied together there
_NOTHING = (NO_PARAMETERS, NO_CONTEXT)
_HEALTH = {"/v2/health/live": "live", "/v2/health/ready": "ready"}


class HttpApp:
    """Serves a `Service` over HTTP; an async context manager, to be open while requests come.

    `infer` answers inference: `service.infer` or a wrapper of it. Without `callers` everybody may call; without `jobs`
    there is no async inference, without `regions` no use of clients' shared memory.
    """

    def __init__(
        self,
        service: Service,
        infer: Infer,
        limits: HttpLimits | None = None,
        callers: Callers | None = None,
        jobs: Jobs | None = None,
        *,
        rules: HeaderRules = NO_RULES,
        regions: SharedRegions | None = None,
    ) -> None:
        self._limits = limits or HttpLimits()
        self._service = service
        self._rules = rules
        self._restricted = bool(rules.restricted)
        self._traces = service.controls.traces
        self._reads = rules.forward is not None or rules.traced
        self._callers = callers or Callers()
        self._endpoint = InferEndpoint(service, infer, self._limits)
        self._generate = GenerateEndpoint(service, infer, self._limits)
        self._jobs = JobsEndpoint(self._endpoint, jobs)
        self._regions = regions
        self._disconnects = Disconnects()
        self._direct = Direct(self._endpoint, self._disconnects, self._failure)
        self._asgi: AsgiApp | None = None
        self._building = asyncio.Lock()
        self._arriving = 0  # bytes of large bodies that are read in pieces
        self._whole = 0  # declared bytes of those that are read in one
        self._refusals = Refusals()
        self.door: InferDoor | None = None

    async def __aenter__(self) -> Self:
        early = -1 if self._restricted else min(_SMALL_BODY, self._limits.max_request_bytes)
        self.door = InferDoor(self._service, self._callers, self._refusals, early)
        await self._disconnects.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._disconnects.__aexit__(kind, error, trace)

    async def finished(self) -> None:
        """Wait until every request that came in is answered."""
        await self._disconnects.finished()

    async def __rsgi__(
        self, scope: Any, protocol: Any, arrived: float | None = None, given: Body | None = None
    ) -> None:
        """See `RsgiApp`. A client that leaves cancels its request and gets no answer."""
        task = asyncio.current_task()
        assert task is not None
        self._disconnects.begin(task, protocol)
        wire = WireTimes("HTTP", arrived) if self._traces.on else None
        try:
            status, headers, body = await self._reply(scope, protocol, arrived, wire, given)
            if wire is not None:
                wire.sending()
            if isinstance(body, bytes):
                protocol.response_bytes(status, headers, body)
            else:
                await _send(protocol.response_stream(status, headers), body)
        except ProtocolClosed as left:  # the client, while its body was read
            # A body that was given holds this error, which would hold the frames that hold the body.
            left.__traceback__ = None
        except asyncio.CancelledError:
            if not self._disconnects.gone(task):
                raise
        finally:
            if given is not None:
                given.cancel()  # a body that was not waited for would keep its connection, however slowly it comes
            self._disconnects.end(task)
            if wire is not None:
                wire.sent()
                wire.close()

    async def _reply(
        self, scope: Any, protocol: Any, arrived: float | None, wire: WireTimes | None, given: Body | None
    ) -> Reply | Stream:
        path: str = scope.path
        try:
            if self._restricted:
                self._rules.check_path(path, scope.headers.get)
            if scope.method == "POST" and (target := infer_target(path)) is not None:
                headers = scope.headers  # granian makes a new object each time
                tenant = "" if self._callers.anonymous else self._callers.tenant(headers.get)
                query = scope.query_string
                job = query and wants_job(query)
                told = self._told(headers) if self._reads else _NOTHING
                caller = (tenant, deadline_of(headers.get, arrived), *told, wire)
                body = await (self._body(headers, protocol) if given is None else given)
                if job:
                    return await self._jobs.submit(target, headers.get, body, caller, query)
                return 200, *await self._endpoint.answer(target, headers.get, body, caller)
            return await self._other(scope, protocol, arrived, wire)
        except ProtocolClosed:
            raise
        except Exception as problem:  # noqa: BLE001 - a fault of ours must not end the connection without a word
            return self._failure(problem, path)

    def begin(self, scope: Any, protocol: Any, head: Head, arrived: float, body: Body) -> bool:
        """See `RsgiApp`. Without a task are answered those that nothing of the gateway has to look at but the model."""
        if self._reads or self._traces.on or not self._callers.anonymous or scope.query_string:
            return False
        return self._direct.begin(protocol, head, arrived, body)

    def _failure(self, problem: Exception, path: str) -> Reply:
        if not isinstance(problem, GatewayError):
            return fault_reply(problem, path)
        self._refusals.note(type(problem).__name__, wire="http", reason=problem.message)
        if self.door is not None:
            self.door.refused(problem)
        return error_reply(problem)

    async def _other(self, scope: Any, protocol: Any, arrived: float | None, wire: WireTimes | None) -> Reply | Stream:
        path: str = scope.path
        if scope.method == "POST" and (target := generate_target(path)) is not None:
            headers = scope.headers
            caller = (
                self._callers.tenant(headers.get),
                deadline_of(headers.get, arrived),
                *(self._told(headers) if self._reads else _NOTHING),
                wire,
            )
            return await self._generate.reply(target, headers.get, await self._body(headers, protocol), caller)
        if scope.method == "GET" and (word := _HEALTH.get(path)) is not None:
            return health(self._service, word)
        if path.startswith(JOBS) and path[len(JOBS) :][:1] in ("", "/"):
            get = scope.headers.get
            return await self._jobs.reply(scope.method, path, scope.query_string, get, self._callers.tenant(get))
        asgi = self._asgi or await self._build()
        return await call_asgi(asgi, scope, partial(self._body, scope.headers, protocol))

    def _told(self, headers: Any) -> tuple[Mapping[str, Parameter], Mapping[str, str]]:
        """What headers say beside who calls: parameters, and the trace context."""
        return self._rules.forwarded(headers.items()), self._rules.context(headers.get)

    async def _body(self, headers: Any, protocol: Any) -> bytes:
        declared = headers.get("content-length")
        if declared is None:
            return await self._read(protocol) if "transfer-encoding" in headers else b""
        if int(declared) > self._limits.max_request_bytes:
            raise body_too_large(int(declared), self._limits.max_request_bytes)
        return await protocol() if int(declared) <= _SMALL_BODY else await self._large(int(declared), protocol)

    async def _large(self, declared: int, protocol: Any) -> bytes:
        whole = self._whole + declared
        if declared > _LARGE_BODY or whole > self._limits.max_inflight_bytes // _AT_ONCE:
            return await self._read(protocol)
        self._whole = whole
        try:
            return await protocol()  # type: ignore[no-any-return]
        finally:
            self._whole -= declared

    async def _read(self, protocol: Any) -> bytes:
        """A large body, counted while it arrives: a thousand connections could each send the largest at once."""
        async with aclosing(self._counted(protocol)) as chunks:
            return await read_body(chunks, self._limits.max_request_bytes)

    async def _counted(self, protocol: Any) -> AsyncGenerator[bytes, None]:
        size = 0
        try:
            async for chunk in protocol:
                size += len(chunk)
                self._arriving += len(chunk)
                # A lone body is let in, however large: its own limit bounds it.
                if self._arriving > max(size, self._limits.max_inflight_bytes):
                    raise too_many_bytes(
                        f"{self._arriving} bytes of request bodies are arriving and the limit is "
                        f"{self._limits.max_inflight_bytes}"
                    )
                yield chunk
        finally:
            self._arriving -= size

    async def _build(self) -> AsgiApp:
        async with self._building:
            if self._asgi is None:
                self._asgi = await asyncio.to_thread(self._import)
        return self._asgi

    def _import(self) -> AsgiApp:
        from gateway.transport.http.routes import build

        return build(
            self._service,
            self._endpoint,
            self._limits,
            self._callers,
            self._jobs,
            generate=self._generate,
            regions=self._regions,
        )


async def _send(transport: Any, pieces: AsyncGenerator[bytes, None]) -> None:
    async with aclosing(pieces) as body:
        async for piece in body:
            await transport.send_bytes(piece)
