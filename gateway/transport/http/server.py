"""`HttpServer`: one listening socket served by granian's embedded server, on the caller's event loop.

Serves any RSGI application. Promises one TCP port, known before the first request and not shared with another
process unless that is asked for; no signal handlers; and a stop that closes the port first and lets running
requests finish.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.net import SocketHolder  # type: ignore[attr-defined]
from granian.server.embed import Server

from gateway.transport.http.farewell import Farewell
from gateway.transport.http.handover import Body, Door, Head, RsgiApp, serving
from gateway.transport.ports import listening, turn_away

_IDLE_MS = 75_000  # how long a connection may idle, or take to send a request's headers
# Bytes that a connection reads at once. A body in one piece is copied once less: of a request with an image (602 KB)
# that is 0.06 ms of the 0.6 that the gateway takes. Only connections that send as much come to have as much.
_BUFFER = 1 << 20
_FINISH = 5.0  # seconds a stop leaves requests that are inside the application, when all accepted work is done
_LINGER = 1.0  # seconds a stop leaves the kernel to take the last answers
_FAREWELL = 1.0  # seconds in which callers that keep their connection are told to make another


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the certificate chain and its private key."""

    cert: Path
    key: Path


class HttpServer:
    """An async context manager that serves `app` while it is open.

    Port 0 takes a free port; `port` says which. Connections beyond `max_connections` wait to be accepted.
    Entering raises OSError when the address cannot be bound, `ssl.SSLError` for bad TLS files.
    """

    def __init__(
        self,
        app: RsgiApp,
        host: str,
        port: int,
        *,
        tls: TlsFiles | None = None,
        max_connections: int = 1000,
        share: bool = False,
        listener: socket.socket | None = None,
    ) -> None:
        """With `share` other processes may listen on the port too. A `listener` made elsewhere is used as it is."""
        self.port = port
        self._host = host
        self._tls = tls
        self._max_connections = max_connections
        self._share = share
        self._listener = listener
        self._app = app
        self._stopping = False
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        listener = self._listener or await listening(self._host, self.port, self._max_connections, share=self._share)
        self.port = listener.getsockname()[1]
        self._descriptor = listener.fileno()
        if self._share:
            self._app = Farewell(self._app)  # only here, because the application is open by now
        try:
            self._server = _Embedded(listener, self._app, self._tls, self._max_connections)
        except BaseException:
            listener.close()
            raise
        await self._group.__aenter__()
        self._serving = self._group.create_task(self._serve(), name=f"http:{self.port}")
        return self

    async def leave(self) -> None:
        """Leave the port to the processes that share it. Returns when no new request can come.

        Callers that are connected are answered and told to connect anew. Whoever made the listener has to see to it
        that no new ones come.
        """
        assert isinstance(self._app, Farewell), "nobody shares the port"
        self._app.leaving = True
        if self._listener is None:
            turn_away(self._descriptor)
        await asyncio.sleep(_FAREWELL)
        self._stop()

    def _stop(self) -> None:
        self._stopping = True
        self._server.stop()  # type: ignore[no-untyped-call]

    async def _serve(self) -> None:
        await self._server.serve()
        if not self._stopping:
            raise RuntimeError(f"the HTTP listener on port {self.port} ended by itself")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        try:
            # What is left may be a client that stalls in the middle of its body, for ever.
            with suppress(TimeoutError):
                async with asyncio.timeout(_FINISH):
                    await self._app.finished()
            # granian waits for half-sent requests as well, and those may never be completed.
            await asyncio.wait({self._serving}, timeout=_LINGER)
        finally:
            self._serving.cancel()
            if not isinstance(error, asyncio.CancelledError):
                # The group would wrap an error of the block, which is none of its business.
                kind = error = trace = None
            await self._group.__aexit__(kind, error, trace)


class Counted:
    """An application, and how many requests are inside it. Costs every request a coroutine of its own."""

    door: Door | None = None

    def __init__(self, answer: Callable[[Any, Any], Awaitable[None]]) -> None:
        self._answer = answer
        self._count = 0
        self._idle: asyncio.Event | None = None

    async def __rsgi__(
        self, scope: Any, protocol: Any, arrived: float | None = None, given: Body | None = None
    ) -> None:
        """See `RsgiApp`."""
        self._count += 1
        try:
            await self._answer(scope, protocol)
        finally:
            self._count -= 1
            if self._idle is not None and not self._count:
                self._idle.set()

    def begin(self, scope: Any, protocol: Any, head: Head, arrived: float, body: Body) -> bool:  # noqa: ARG002
        """See `RsgiApp`."""
        return False

    async def finished(self) -> None:
        """See `RsgiApp`."""
        if self._count:
            self._idle = asyncio.Event()
            await self._idle.wait()


class _Embedded(Server):
    """granian's server on a socket of ours: its own is shared by every process that asks for the port."""

    def __init__(self, listener: socket.socket, app: RsgiApp, tls: TlsFiles | None, max_connections: int) -> None:
        super().__init__(
            app,
            interface=Interfaces.RSGI,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=_IDLE_MS, max_buffer_size=_BUFFER),
            websockets=False,
            backlog=max_connections,
            backpressure=max_connections,
            log_enabled=False,
            log_level=LogLevels.critical,
            ssl_cert=tls.cert if tls else None,
            ssl_key=tls.key if tls else None,
            ssl_protocol_min=SSLProtocols.tls12,
        )
        self._listener = listener

    @staticmethod
    async def _spawn_rsgi_worker(number: int, stop: Any, app: RsgiApp, *rest: Any) -> None:
        serving.set(app)  # in the context of this server's own task
        await Server._spawn_rsgi_worker(number, stop, app, *rest)  # noqa: SLF001 - ours in its place

    def _init_shared_socket(self) -> None:
        self._shd = SocketHolder(self._listener.detach(), False, self.backlog)  # type: ignore[call-arg, assignment]
