"""An application that can tell its callers to go: each answer then ends its connection, and they make another."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeAlias

from gateway.transport.http.handover import Body, Door, Head, RsgiApp

_CLOSE = ("connection", "close")
_Headers: TypeAlias = list[tuple[str, str]]


class Farewell:
    """An `RsgiApp` around another. Set `leaving` for answers that end their connections, but for its door's."""

    def __init__(self, app: RsgiApp) -> None:
        self.leaving = False
        self._app = app

    @property
    def door(self) -> Door | None:
        """See `RsgiApp`."""
        return self._app.door

    def __rsgi__(
        self, scope: Any, protocol: Any, arrived: float | None = None, given: Body | None = None
    ) -> Coroutine[Any, Any, None]:
        """See `RsgiApp`."""
        return self._app.__rsgi__(scope, _Last(protocol) if self.leaving else protocol, arrived, given)

    def begin(self, scope: Any, protocol: Any, head: Head, arrived: float, body: Body) -> bool:
        """See `RsgiApp`."""
        return self._app.begin(scope, _Last(protocol) if self.leaving else protocol, head, arrived, body)

    async def finished(self) -> None:
        """See `RsgiApp`."""
        await self._app.finished()


class _Last:
    """A protocol whose answer ends its connection."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol, name)

    def __call__(self) -> Any:
        return self._protocol()

    def __aiter__(self) -> Any:
        return self._protocol.__aiter__()

    def response_bytes(self, status: int, headers: _Headers, body: bytes) -> None:
        self._protocol.response_bytes(status, [*headers, _CLOSE], body)

    def response_str(self, status: int, headers: _Headers, body: str) -> None:
        self._protocol.response_str(status, [*headers, _CLOSE], body)

    def response_stream(self, status: int, headers: _Headers) -> Any:
        return self._protocol.response_stream(status, [*headers, _CLOSE])
