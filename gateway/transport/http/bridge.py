"""Runs one RSGI request through an ASGI application and collects its whole response.

For the control paths, whose bodies are small: nothing is streamed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, TypeAlias

from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]

from gateway.transport.http.replies import Reply

Message: TypeAlias = MutableMapping[str, Any]
AsgiApp: TypeAlias = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


async def call_asgi(app: AsgiApp, scope: Any, read: Callable[[], Awaitable[bytes]]) -> Reply:
    """The reply of `app` to the RSGI request `scope`; `read` gets its body, if and when `app` asks for it."""
    received = False
    status = 500
    headers: list[tuple[str, str]] = []
    parts: list[bytes] = []

    async def receive() -> Message:
        nonlocal received
        if not received:
            received = True
            with suppress(ProtocolClosed):
                return {"type": "http.request", "body": await read(), "more_body": False}
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = [
                (name.decode("latin-1"), value.decode("latin-1"))
                for name, value in message["headers"]
                # The server writes its own, from the body it is given.
                if name != b"content-length"
            ]
        else:
            parts.append(message.get("body", b""))

    try:
        await app(_asgi_scope(scope), receive, send)
    except Exception:
        # Starlette raises again what its error handler has answered already.
        if not parts:
            raise
    return status, headers, b"".join(parts)


def _asgi_scope(scope: Any) -> Message:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": scope.http_version,
        "method": scope.method,
        "scheme": scope.scheme,
        "path": scope.path,
        "query_string": scope.query_string.encode("latin-1", "replace"),
        "root_path": "",
        "headers": [
            (name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in scope.headers.items()
        ],
        "client": _address(scope.client),
        "server": _address(scope.server),
    }


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port) if port.isdecimal() else 0
