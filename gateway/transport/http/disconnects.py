"""Cancels requests whose client has gone, so that they leave the queue before they are computed.

Asking granian about each request costs 15 us, so only requests that have waited a while are asked about:
a sweep every 20 ms starts a watcher for those it meets a second time. It runs only while requests wait.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any, Self

from gateway.telemetry import log_event

Protocol = Any  # granian.rsgi.HTTPProtocol

_INTERVAL = 0.02  # seconds


class Disconnects:
    """The requests in flight of one listener, by task; an async context manager that owns their watchers."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._timer: asyncio.TimerHandle | None = None
        self._new: dict[asyncio.Task[Any], Protocol] = {}
        self._seen: dict[asyncio.Task[Any], Protocol] = {}
        self._watchers: dict[asyncio.Task[Any], asyncio.Task[None]] = {}
        self._gone: set[asyncio.Task[Any]] = set()
        self._emptied: asyncio.Event | None = None  # while somebody waits for it

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for watcher in self._watchers.values():
            watcher.cancel()
        await self._group.__aexit__(kind, error, trace)

    def begin(self, protocol: Protocol) -> asyncio.Task[Any]:
        """Have the current task, which is returned, cancelled if its client leaves before `end`."""
        task = asyncio.current_task()
        assert task is not None
        self._new[task] = protocol
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._sweep)
        return task

    def gone(self, task: asyncio.Task[Any]) -> bool:
        """Whether the task was cancelled because its client left, and for no other reason."""
        return task in self._gone

    def end(self, task: asyncio.Task[Any]) -> None:
        """The request is over; to be called exactly once."""
        if self._new.pop(task, None) is None:
            self._seen.pop(task, None)
            self._gone.discard(task)
            watcher = self._watchers.pop(task, None)
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
        for task, protocol in self._seen.items():
            self._watchers[task] = self._group.create_task(self._watch(task, protocol))
        self._seen, self._new = self._new, {}
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._sweep) if self._seen else None

    async def _watch(self, task: asyncio.Task[Any], protocol: Protocol) -> None:
        try:
            await protocol.client_disconnect()
        except Exception as fault:  # noqa: BLE001 - whatever granian raises, only this request goes unwatched
            log_event("disconnect_unwatched", logging.WARNING, fault)
            return
        self._gone.add(task)
        task.cancel()
