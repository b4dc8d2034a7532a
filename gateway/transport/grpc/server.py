"""`GrpcServer`: binds the port, chooses who serves ModelInfer, and stops without losing an accepted call.

With `pygrpc_native` installed, and nothing asked of it that it cannot do, its front serves ModelInfer and a
grpcio server behind it the rest; otherwise grpcio serves everything. Clients cannot tell which.
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from gateway.service import Service
from gateway.service.shared_regions import SharedRegions
from gateway.transport.grpc.calls import Authenticate, Calls
from gateway.transport.grpc.native import Front, native_front
from gateway.transport.grpc.options import INT32_MAX, GrpcOptions, Keepalive, Tls
from gateway.transport.grpc.servicer import add_handlers
from gateway.transport.ports import hushed, own_listeners, turn_away
from gateway.types import Infer

_HANDSHAKES = 0.2  # seconds for connections that are being made
_ARRIVAL = 0.05  # seconds for calls that have arrived and not begun
_QUIET = 1.0  # seconds that callers are kept waiting for the calls that run
_GOODBYE = 1.0  # seconds in which clients take notice that a connection is over


class GrpcServer:
    """Listens from entering to leaving `async with`; `port` is the one that was bound.

    Entering raises OSError when the address cannot be bound or a TLS file cannot be read. Leaving refuses new
    calls and waits `GrpcOptions.grace` seconds for the running ones; cancelling that ends them at once.
    """

    def __init__(
        self,
        service: Service,
        infer: Infer,
        authenticate: Authenticate | None,
        options: GrpcOptions,
        regions: SharedRegions | None = None,
    ) -> None:
        """`regions` are clients' shared memory; without them none may be used."""
        self.port = options.port
        self.implementation = "native" if _native_can(options) else "grpcio"
        self._service = service
        self._calls = Calls(infer, authenticate, options, service.controls.traces)
        self._options = options
        self._regions = regions
        self._stack = AsyncExitStack()
        self._front: Front | None = None
        self._left = False

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if self.implementation == "native":
                await self._start_native(stack)
            else:
                self.port = await self._start_grpcio(stack, self._address(), self._options.tls)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    async def leave(self) -> None:
        """Leave the port to the processes that share it: clients go to them, and no call is lost.

        Neither library can send its clients away and still answer them. But how it closes a connection without calls
        names the last one it took (GOAWAY), and clients make all later ones elsewhere, by themselves. So the network is
        made to lose what clients send, until the calls that run are answered and the connections are closed. If they
        run for longer, nothing more happens here; leaving the context refuses new calls while it waits for them.
        """
        for listener in own_listeners(self.port):
            turn_away(listener)
        await asyncio.sleep(_HANDSHAKES)
        with hushed(self.port):
            if await self._quiet():
                self._left = True
                await self._stack.aclose()
                await asyncio.sleep(_GOODBYE)

    async def _quiet(self) -> bool:
        """Wait until all calls that have come are answered; False if that takes too long."""
        if self._front is not None:
            return await self._front.quiet(_QUIET) and await self._calls.running.idle(_ARRIVAL)
        await asyncio.sleep(_ARRIVAL)
        return await self._calls.running.idle(_QUIET)

    async def _start_native(self, stack: AsyncExitStack) -> None:
        try:
            front = await stack.enter_async_context(native_front(self._address(), self._calls, self._options))
        except OSError as problem:
            raise self._cannot_bind() from problem
        # A directory of its own, so that nobody else can reach the socket.
        socket = str(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-grpc-"))) / "grpc.sock")
        await self._start_grpcio(stack, f"unix:{socket}", None)
        front.start(socket)
        self.port = front.port
        self._front = front

    async def _start_grpcio(self, stack: AsyncExitStack, address: str, tls: Tls | None) -> int:
        # For a call of its own a context's set_compression() does nothing, in grpcio 1.85.
        compression = _COMPRESSION.get(self._options.compression)
        server: Any = grpc.aio.server(options=_channel_options(self._options), compression=compression)
        add_handlers(server, self._service, self._calls, self._regions)
        credentials = _credentials(tls) if tls else None
        try:
            port: int = (
                server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
            )
        except RuntimeError as problem:
            raise self._cannot_bind() from problem
        await server.start()
        stack.push_async_callback(self._stop, server)
        return port

    async def _stop(self, server: Any) -> None:
        try:
            await self._calls.running.close(self._options.grace)
        finally:
            # A polite end waits for clients to confirm it, which one who left does not hear.
            await server.stop(0 if self._left else self._calls.running.left())

    def _address(self) -> str:
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        return f"{host}:{self._options.port}"

    def _cannot_bind(self) -> OSError:
        return OSError(
            f"gRPC cannot listen on {self._address()}: the port is in use, the address is not this machine's, or the "
            "TLS files are no matching PEM certificate and key; see --grpc-port, --grpc-address and the TLS options"
        )


_COMPRESSION = {"low": grpc.Compression.Gzip, "medium": grpc.Compression.Deflate, "high": grpc.Compression.Deflate}
"""As grpc's core chooses for a level among the two."""


def _native_can(options: GrpcOptions) -> bool:
    aged = options.keepalive.max_connection_age_ms > 0
    plain = options.tls is None and options.compression == "none" and not aged
    return options.native and plain and find_spec("pygrpc_native") is not None


def _credentials(tls: Tls) -> Any:
    root = tls.client_root.read_bytes() if tls.client_root else None
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=root,
        require_client_auth=root is not None,
    )


def _channel_options(options: GrpcOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", options.max_request_bytes),
        ("grpc.max_send_message_length", INT32_MAX),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        # By itself grpcio shares: a second server on the port would start, and take half of the calls.
        ("grpc.so_reuseport", int(options.share)),
        *_keepalive_options(options.keepalive),
    ]


def _keepalive_options(keepalive: Keepalive) -> list[tuple[str, int]]:
    pairs = [
        ("grpc.keepalive_time_ms", keepalive.time_ms),
        ("grpc.keepalive_timeout_ms", keepalive.timeout_ms),
        ("grpc.keepalive_permit_without_calls", int(keepalive.permit_without_calls)),
        ("grpc.http2.max_pings_without_data", keepalive.max_pings_without_data),
        ("grpc.http2.min_ping_interval_without_data_ms", keepalive.min_recv_ping_interval_without_data_ms),
        ("grpc.http2.max_ping_strikes", keepalive.max_ping_strikes),
    ]
    if keepalive.max_connection_age_ms:
        pairs.append(("grpc.max_connection_age_ms", keepalive.max_connection_age_ms))
    if keepalive.max_connection_age_grace_ms:
        pairs.append(("grpc.max_connection_age_grace_ms", keepalive.max_connection_age_grace_ms))
    return pairs
