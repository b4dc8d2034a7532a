"""Cancels requests whose client has gone, so that they leave the queue before they are computed.

Asking granian about each request costs 15 us, so only requests that have waited a while are asked about:
a sweep every 20 ms starts a watcher for those it meets a second time. It runs only while requests wait.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any, Protocol, Self

from gateway.telemetry import log_event

_Client = Any  # granian.rsgi.HTTPProtocol

_INTERVAL = 0.02  # seconds


class Cancels(Protocol):
    """What works on a request: its task, or what does without one."""

    def cancel(self) -> object:
        """Nobody waits for it any more."""


class Disconnects:
    """The requests in flight of one listener; an async context manager that owns their watchers.

    Others may have tasks of requests in `tasks` too. What is left when it ends is cancelled.
    """

    def __init__(self) -> None:
        self.tasks = asyncio.TaskGroup()
        self._timer: asyncio.TimerHandle | None = None
        self._new: dict[Cancels, _Client] = {}
        self._seen: dict[Cancels, _Client] = {}
        self._watchers: dict[Cancels, asyncio.Task[None]] = {}
        self._gone: set[Cancels] = set()
        self._emptied: asyncio.Event | None = None  # while somebody waits for it

    async def __aenter__(self) -> Self:
        await self.tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for left in (*self._watchers.values(), *self._watchers, *self._seen, *self._new):
            left.cancel()
        await self.tasks.__aexit__(kind, error, trace)

    def begin(self, request: Cancels, protocol: _Client) -> None:
        """Have what works on a request cancelled if its client leaves before `end`."""
        self._new[request] = protocol
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._sweep)

    def gone(self, request: Cancels) -> bool:
        """Whether it was cancelled because its client left, and for no other reason."""
        return request in self._gone

    def end(self, request: Cancels) -> None:
        """The request is over; to be called exactly once."""
        if self._new.pop(request, None) is None:
            self._seen.pop(request, None)
            self._gone.discard(request)
            watcher = self._watchers.pop(request, None)
            if watcher is not None:
                watcher.cancel()
        if self._emptied is not None and not self._new and not self._seen and not self._watchers:
            self._emptied.set()

    async def finished(self) -> None:
        """Wait until every request that began has ended."""
        while self._new or self._seen or self._watchers:
            self._emptied = asyncio.Event()
            await self._emptied.wait()
        self._emptied = None

    def _sweep(self) -> None:
        for request, protocol in self._seen.items():
            self._watchers[request] = self.tasks.create_task(self._watch(request, protocol))
        self._seen, self._new = self._new, {}
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._sweep) if self._seen else None

    async def _watch(self, request: Cancels, protocol: _Client) -> None:
        try:
            await protocol.client_disconnect()
        except Exception as fault:  # noqa: BLE001 - whatever granian raises, only this request goes unwatched
            log_event("disconnect_unwatched", logging.WARNING, fault)
            return
        self._gone.add(request)
        request.cancel()
