"""`Feed`: the changes of all jobs as they happen, read once for a process and handed to whoever subscribes.

One connection reads the stream of events, from any process. What a subscriber is told may have gaps (Redis was away
for long, or lost its data), so it looks at the record itself now and then.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from gateway.errors import GatewayError
from gateway.jobs.base import Event
from gateway.jobs.guarded import typed
from gateway.redis_client import RedisClient

_BLOCK = 1.0  # seconds
_COUNT = 500
_RETRY = 0.5


class Inbox:
    """The events for one subscriber. Closed when the feed is."""

    def __init__(self) -> None:
        self.closed = False
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        """Hand over an event."""
        self._events.append(event)
        self._arrived.set()

    def close(self) -> None:
        """Nothing more will come."""
        self.closed = True
        self._arrived.set()

    async def next(self, seconds: float) -> Event | None:
        """The next event; None when none came for so long, or none will come any more."""
        if not self._events and not self.closed:
            self._arrived.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        return self._events.popleft() if self._events else None


class Feed:
    """Reads events from entering to leaving `async with`. Subscribers of "" are told of every job."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._inboxes: dict[str, set[Inbox]] = {}
        self._closed = False
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._reader = self._client.reader()
        self._group.create_task(self._read(), name="job-events")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self._reader.close()
        if not isinstance(error, asyncio.CancelledError):
            kind = error = trace = None
        await self._group.__aexit__(kind, error, trace)

    def close(self) -> None:
        """Tell the subscribers that nothing more will come, for a stop that waits for them."""
        self._closed = True
        for inbox in [each for group in self._inboxes.values() for each in group]:
            inbox.close()

    @contextmanager
    def subscribe(self, job: str = "") -> Iterator[Inbox]:
        """An inbox for the events of one job, or of all, for the duration of the block."""
        inbox = Inbox()
        if self._closed:
            inbox.close()
        self._inboxes.setdefault(job, set()).add(inbox)
        try:
            yield inbox
        finally:
            group = self._inboxes[job]
            group.discard(inbox)
            if not group:
                del self._inboxes[job]

    @property
    def subscribers(self) -> int:
        """How many inboxes are open."""
        return sum(map(len, self._inboxes.values()))

    async def _read(self) -> None:
        last: bytes | None = None
        generation = -1
        while not self._closed:
            try:
                if last is None or generation != self._client.generation:
                    # Another server may have lost its data, and its newest event may be older than the one we know.
                    generation = self._client.generation
                    newest = await self._newest()
                    last = newest if last is None else min(last, newest, key=_order)
                for event in await self._events(last):
                    last = event.id
                    self._tell(event)
            except GatewayError:
                if not self._closed:
                    await asyncio.sleep(_RETRY * random.uniform(0.5, 1.0))

    async def _newest(self) -> bytes:
        with typed():
            found = await self._client.call("XREVRANGE", self._client.keys.job_events(), "+", "-", "COUNT", 1)
        return bytes(found[0][0]) if found else b"0-0"

    async def _events(self, last: bytes) -> list[Event]:
        if self._closed:
            return []  # the reader would connect again
        command = ("XREAD", "COUNT", _COUNT, "BLOCK", int(_BLOCK * 1000), "STREAMS", self._client.keys.job_events())
        with typed():
            streams = await self._reader.call(*command, last, seconds=_BLOCK)
        return [_event(*entry) for _, entries in streams or () for entry in entries]

    def _tell(self, event: Event) -> None:
        for inbox in (*self._inboxes.get(event.job, ()), *self._inboxes.get("", ())):
            inbox.put(event)


def _event(identity: bytes, words: list[bytes]) -> Event:
    fields: dict[bytes, Any] = dict(zip(words[::2], words[1::2], strict=False))
    text = {name: fields.get(name, b"").decode("utf-8", "replace") for name in (b"job", b"state", b"time")}
    try:
        moment = float(text[b"time"])
    except ValueError:
        moment = 0.0  # no event of ours, and nobody has subscribed to its job
    return Event(bytes(identity), text[b"job"], text[b"state"], moment)


def after(event: bytes, other: bytes) -> bool:
    """Whether an event came after another, by their ids."""
    return _order(event) > _order(other)


def _order(identity: bytes) -> tuple[int, int]:
    time, _, number = identity.partition(b"-")
    return int(time), int(number or 0)
