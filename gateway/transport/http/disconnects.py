"""Cancels requests whose client has gone, so that they leave the queue before they are computed.

Asking granian about each request costs 15 us, so only requests that have waited a while are asked about:
a sweep every 20 ms starts a watcher for those it meets a second time. It runs only while requests wait.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

Protocol = Any  # granian.rsgi.HTTPProtocol

_INTERVAL = 0.02  # seconds


class Waiting:
    """One request that may be watched. `gone` tells a cancellation by disconnect from any other."""

    __slots__ = ("gone", "protocol", "task", "watcher")

    def __init__(self, protocol: Protocol, task: asyncio.Task[Any]) -> None:
        self.protocol = protocol
        self.task = task
        self.watcher: asyncio.Task[None] | None = None
        self.gone = False


class Disconnects:
    """The requests in flight of one listener; an async context manager that owns their watchers."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._timer: asyncio.TimerHandle | None = None
        self._new: set[Waiting] = set()
        self._seen: set[Waiting] = set()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # The block's own error is not told to the group, which would wrap it; the watchers end with their requests.
        await self._group.__aexit__(None, None, None)

    def begin(self, protocol: Protocol) -> Waiting:
        """Have the current task cancelled if its client leaves before `end`."""
        task = asyncio.current_task()
        assert task is not None
        waiting = Waiting(protocol, task)
        self._new.add(waiting)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._sweep)
        return waiting

    def end(self, waiting: Waiting) -> None:
        """The request is over; to be called exactly once."""
        self._new.discard(waiting)
        self._seen.discard(waiting)
        if waiting.watcher is not None:
            waiting.watcher.cancel()

    def _sweep(self) -> None:
        for waiting in self._seen:
            waiting.watcher = self._group.create_task(_watch(waiting))
        self._seen, self._new = self._new, set()
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._sweep) if self._seen else None


async def _watch(waiting: Waiting) -> None:
    await waiting.protocol.client_disconnect()
    waiting.gone = True
    waiting.task.cancel()
