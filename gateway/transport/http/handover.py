"""From granian's thread to the event loop: what need not be read is answered on the way.

granian calls Python on a thread of its own, which makes a coroutine of each request and gives it to the loop. An
application with a `door` is asked about each request on that thread first, so that a flood of requests that would be
refused costs the loop nothing, and bodies come in while their requests wait for it. Each request brings along when it
came. A request that needs no coroutine gets none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, ContextVar
from typing import Any, Protocol, TypeAlias

from granian import _futures

from gateway.service import Behind
from gateway.telemetry import log_event
from gateway.transport.auth import Header
from gateway.transport.http.replies import Reply
from gateway.transport.lag import Lag

Watcher: TypeAlias = Any  # granian's CallbackWatcherHTTP: a request, and the end of it


class Body(Awaitable[bytes], Protocol):
    """A body that was asked for: a future of granian's."""

    def done(self) -> bool:
        """Whether it has come, or never will."""

    def result(self) -> bytes:
        """The body. Raises `ProtocolClosed` when the client has gone, CancelledError after `cancel`."""

    def add_done_callback(self, call: Callable[[Body], None], context: Context) -> None:
        """Call this on the event loop, in that context, when it is done."""

    def cancel(self) -> object:
        """Nobody waits for it, if it has not come."""


Head: TypeAlias = tuple[tuple[str, str], Header]
"""Of an infer request: model and version, and what finds a header."""

Answer: TypeAlias = Callable[[Any, Any, float, Body | None], Awaitable[None]]


class Door(Protocol):
    """Decides about requests before they reach the event loop."""

    shut_until: float  # in `time.monotonic` seconds; it need not be asked after that

    def turn_away(self, scope: Any, now: float, behind: Behind) -> Reply | None:
        """What to answer a request at once, None to let it in. The event loop is `behind` by so much.

        Called on granian's thread: with nothing but the GIL between it and the event loop it may look at
        anything, but change only what is its own. It must not wait.
        """

    def reads(self, scope: Any) -> Head | None:
        """The head of a request whose body the application wants in one piece, if it does not refuse it; called there too."""


class RsgiApp(Protocol):
    """An application in granian's own interface (RSGI 1), with additions."""

    @property
    def door(self) -> Door | None:
        """Who is asked first; None for nobody."""

    async def __rsgi__(
        self, scope: Any, protocol: Any, arrived: float | None = None, given: Body | None = None
    ) -> None:
        """Answer one request through `protocol`; it `arrived` then, in `time.monotonic` seconds.

        `given` is the body if it was asked for already; it cannot be asked for again.
        """

    def begin(self, scope: Any, protocol: Any, head: Head, arrived: float, body: Body) -> bool:
        """See to a request whose body was asked for, without a task; False if that cannot be, and nothing was done.

        Called on the event loop. Raises nothing.
        """

    async def finished(self) -> None:
        """Wait until no request is inside. `Counted` gives this to an application that does not keep count."""


serving: ContextVar[RsgiApp] = ContextVar("serving")
"""The application that a server is about to be started for. One of which granian does not ask here has no door."""


def _schedule(loop: asyncio.AbstractEventLoop, context: Context, callback: Callable[..., Any]) -> Callable[..., None]:
    app = serving.get(None)
    if app is None or app.door is None:
        return _granians(loop, context, callback)  # type: ignore[no-any-return]
    return _Handover(app, app.door, loop, context).hand_over


class _Handover:
    """From granian's thread to the loop. What comes while the loop is at something else is taken in one go."""

    def __init__(self, app: RsgiApp, door: Door, loop: asyncio.AbstractEventLoop, context: Context) -> None:
        self._begin, self._answer = app.begin, app.__rsgi__
        self._door = door
        self._context = context
        self._call_soon, self._create_task = loop.call_soon_threadsafe, loop.create_task  # as granian's own does
        self._lag = Lag()
        self._waiting: deque[tuple[Watcher, float, Head | None, Body | None]] = deque()
        self._told = False  # the loop knows that it has to look

    def hand_over(self, watcher: Watcher) -> None:
        """Called by granian with each request, on its thread."""
        now = time.monotonic()
        door, lag = self._door, self._lag
        head = body = None
        try:
            if now < door.shut_until and (reply := door.turn_away(watcher.scope, now, lag.behind(now))) is not None:
                watcher.proto.response_bytes(*reply)
                watcher.done()
                return
            if (head := door.reads(watcher.scope)) is not None:
                body = watcher.proto()
        except Exception as fault:  # noqa: BLE001 - whatever is wrong with the door, the request is let in
            log_event("door_fault", logging.ERROR, fault)
        lag.handed(now)
        self._waiting.append((watcher, now, head, body))
        if not self._told:
            self._told = True
            self._call_soon(self._take, context=self._context)

    def _take(self) -> None:
        """On the loop."""
        self._told = False  # whoever comes from now on tells anew,
        waiting, begin = self._waiting, self._begin
        count = len(waiting)  # and has to wait for the next turn: others want the loop too
        if not count:
            return  # who told came in time for the last turn
        self._lag.taken(waiting[count - 1][1], time.monotonic(), count)
        try:
            for _ in range(count):
                watcher, arrived, head, body = waiting.popleft()
                if head is None or body is None or not begin(watcher.scope, watcher.proto, head, arrived, body):
                    watcher.taskref(self._create_task(_answered(self._answer, watcher, arrived, body)))
        finally:
            if waiting and not self._told:  # whatever became of one, the others are taken
                self._told = True
                self._call_soon(self._take, context=self._context)


async def _answered(answer: Answer, watcher: Watcher, arrived: float, body: Body | None) -> None:
    try:
        await answer(watcher.scope, watcher.proto, arrived, body)
    except BaseException as fault:  # noqa: BLE001 - granian's to tell, as it does without a door
        watcher.err(fault)
    else:
        watcher.done()


# granian looks it up by name whenever a server starts, and has no public place for it. A granian without the name is
# served without a door: refusals cost more, and nothing else changes.
_NAME = "_cbsched_aioschedule"
_granians: Callable[..., Any] = getattr(_futures, _NAME, lambda *_: None)
if hasattr(_futures, _NAME):
    setattr(_futures, _NAME, _schedule)
