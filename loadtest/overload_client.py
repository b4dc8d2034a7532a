"""The overload test's generator: an open loop over raw HTTP/1.1, run in a process of its own.

    python -m loadtest.overload_client < plan.json

It sends request n when the plan says, whatever the server does, over connections opened before; a latency counts from the moment the
request was DUE. Each request carries its own number, and an answer must bring it back. Who is refused with 429 or 503 asks again at
once, as often as the plan says; each attempt has a deadline of its own, and one that found no connection until then is not sent. To cost little it writes and reads once for an attempt
and cuts the answer from the bytes. The first line it prints is the moment (CLOCK_MONOTONIC) from which the plan's times count, and
the second every attempt, by column, with what the generator itself used.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import resource
import struct
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

import uvloop

from loadtest.flat_requests import HOST

MODEL = "overload"
AHEAD = 0.3  # seconds between the announcement of the start and the start
PATIENCE = 5.0  # seconds to wait for the last answers

ANSWERED, WRONG, LOST, UNANSWERED, UNSENT = "answered", "wrong", "lost", "unanswered", "unsent"
OVERLOAD, SHED, DEADLINE, EXPIRED, UNAVAILABLE = "overload", "shed", "deadline", "expired", "unavailable"


_RIGHT = b"HTTP/1.1 200 "


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send: `times` are seconds from the start, in order."""

    port: int
    times: list[float]
    deadline_ms: float
    retries: int = 0
    connections: int = 512


@dataclass(slots=True)
class Attempts:
    """Every attempt, by column. `call` is the request it belongs to; times are seconds from the start, NaN for never."""

    call: list[int] = field(default_factory=list)
    attempt: list[int] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    kind: list[str] = field(default_factory=list)
    retry_after_ms: list[int] = field(default_factory=list)  # -1: none
    strays: int = 0  # answers that nobody had asked for
    waited: int = 0  # attempts that found every connection in use
    cpu_seconds: float = 0.0

    def add(self, attempt: Attempt) -> None:
        """Take one in."""
        self.call.append(attempt.call)
        self.attempt.append(attempt.attempt)
        self.due.append(attempt.due)
        self.sent.append(attempt.sent)
        self.answered.append(attempt.answered)
        self.kind.append(attempt.kind)
        self.retry_after_ms.append(attempt.retry_after_ms)


@dataclass(slots=True, eq=False)
class Attempt:
    """One request on its way; what its answer must end with is its number."""

    call: int
    attempt: int
    due: float
    sent: float = math.nan
    answered: float = math.nan
    kind: str = UNANSWERED
    retry_after_ms: int = -1
    number: bytes = b""


def kind_of(status: int, body: bytes, number: bytes) -> str:
    """What an answer is: by its status, and where two reasons share one, by its words. README.md has the table."""
    if status == 200:
        return ANSWERED if body.endswith(number) else WRONG
    if status == 429:
        return SHED if b"dropped" in body or b"more urgent" in body else OVERLOAD
    if status == 504:
        return DEADLINE if b"below service time" in body else EXPIRED
    return UNAVAILABLE if status == 503 else f"status {status}"


def request_head(model: str, deadline_ms: float, *headers: str, datatype: str = "INT64") -> bytes:
    """All of a request for one number but its eight bytes; without a deadline when that is 0."""
    tensor = {"name": "IN", "shape": [1, 1], "datatype": datatype, "parameters": {"binary_data_size": 8}}
    document = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}, separators=(",", ":"))
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        f"Host: {HOST}",
        "Content-Type: application/octet-stream",
        *([f"x-request-timeout-ms: {deadline_ms:.10g}"] if deadline_ms else []),
        *headers,
        f"Inference-Header-Content-Length: {len(document)}",
        f"Content-Length: {len(document) + 8}",
    ]
    return "\r\n".join([*lines, "", document]).encode()


class Generator:
    """Sends a plan, on a running event loop, once."""

    def __init__(self, plan: Plan) -> None:
        self.attempts: list[Attempt] = []
        self.strays = 0
        self.waited = 0
        self.cpu_seconds = 0.0
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._idle: list[Connection] = []  # the last used is the next: its state is in the caches
        self._waiting: deque[Attempt] = deque()  # attempts that found no idle connection
        self._next = 0
        self._open = 0
        self._start = 0.0
        self._done = self._loop.create_future()
        self._head = request_head(MODEL, plan.deadline_ms)

    async def run(self) -> None:
        """Connect, announce the start, send everything, and wait for the answers."""
        for _ in range(self._plan.connections):
            _, connection = await self._loop.create_connection(lambda: Connection(self), HOST, self._plan.port)
            self._idle.append(connection)
        used = _cpu_seconds()
        self._start = time.monotonic() + AHEAD
        sys.stdout.write(f"{self._start!r}\n")
        sys.stdout.flush()
        self._tick()
        try:
            async with asyncio.timeout(AHEAD + self._plan.times[-1] + PATIENCE):
                await self._done
        except TimeoutError:
            pass
        self.cpu_seconds = _cpu_seconds() - used

    def _tick(self) -> None:
        """Send what is due, and come again when the next is; timers know whole milliseconds."""
        times, now = self._plan.times, time.monotonic() - self._start
        while self._next < len(times) and times[self._next] <= now:
            self._send(Attempt(self._next, 0, times[self._next]))
            self._next += 1
        if self._next < len(times):
            self._loop.call_later(max(1, math.ceil((times[self._next] - now) * 1e3)) / 1e3, self._tick)

    def _send(self, attempt: Attempt) -> None:
        attempt.number = struct.pack("<q", len(self.attempts))
        attempt.sent = time.monotonic() - self._start
        self.attempts.append(attempt)
        self._open += 1
        if self._idle:
            self._write(self._idle.pop(), attempt)
        else:  # the server is slow, not this process: as many requests are on their way as there are connections
            self._waiting.append(attempt)
            self.waited += 1

    def _write(self, connection: Connection, attempt: Attempt) -> None:
        connection.attempt = attempt
        connection.transport.write(self._head + attempt.number)

    def taken(self, connection: Connection, attempt: Attempt, now: float) -> None:
        """A right answer came over a connection at a moment of the clock."""
        attempt.answered = now - self._start
        attempt.kind = ANSWERED
        self._free(connection)

    def received(self, connection: Connection, status: int, head: bytes, body: bytes) -> None:
        """Any answer came over a connection."""
        attempt = connection.attempt
        if attempt is None:
            self.strays += 1
            return
        now = attempt.answered = time.monotonic() - self._start
        attempt.kind = kind_of(status, body, attempt.number)
        if status != 200 and (after := _field(head, b"retry-after-ms")) is not None and b"\r\nretry-after:" in head:
            attempt.retry_after_ms = after
        again = status in (429, 503) and attempt.attempt < self._plan.retries
        if again:
            self._open += 1  # until it is sent
        self._free(connection)
        if again:
            self._open -= 1
            self._send(Attempt(attempt.call, attempt.attempt + 1, now))

    def _free(self, connection: Connection) -> None:
        connection.attempt = None
        latest = time.monotonic() - self._start - self._plan.deadline_ms / 1e3 if self._waiting else 0.0
        while self._waiting:
            attempt = self._waiting.popleft()
            if attempt.due >= latest:
                self._write(connection, attempt)
                break
            attempt.kind = UNSENT  # as a client with a deadline does: nobody waits for the answer any more
            self._ended()
        else:
            self._idle.append(connection)
        self._ended()

    def lost(self, connection: Connection) -> None:
        """The server closed a connection."""
        if connection in self._idle:
            self._idle.remove(connection)
        elif connection.attempt is not None:
            connection.attempt.kind = LOST
            self._ended()

    def _ended(self) -> None:
        self._open -= 1
        if not self._open and self._next == len(self._plan.times) and not self._done.done():
            self._done.set_result(None)


class Sender(Protocol):
    """Whom a `Connection` tells what comes over it; it is `Generator`'s methods that say what they mean."""

    def taken(self, connection: Any, attempt: Any, now: float) -> None: ...
    def received(self, connection: Any, status: int, head: bytes, body: bytes) -> None: ...
    def lost(self, connection: Any) -> None: ...


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, generator: Sender) -> None:
        self.attempt: Attempt | None = None
        self.transport: asyncio.WriteTransport
        self._generator = generator
        self._part = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self.transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        now, attempt = time.monotonic(), self.attempt
        # All there is to see of a right answer is its first and its last bytes; nothing else is right and ends so.
        if attempt is not None and data.startswith(_RIGHT) and data.endswith(attempt.number) and not self._part:
            self._generator.taken(self, attempt, now)
            return
        data = self._part + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            head = data[:end].lower()
            stop = end + 4 + (_field(head, b"content-length") or 0)
            if len(data) < stop:
                break
            self._generator.received(self, int(data[9:12]), head, data[end + 4 : stop])
            data = data[stop:]
        self._part = data

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - lost is lost
        """Part of asyncio.Protocol."""
        self._generator.lost(self)


def _field(head: bytes, name: bytes) -> int | None:
    """A header's whole number; the head is in small letters."""
    at = head.find(b"\r\n" + name + b":")
    return None if at < 0 else int(head[at + len(name) + 3 :].split(b"\r\n", 1)[0])


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _run(plan: Plan) -> Attempts:
    generator = Generator(plan)
    await generator.run()
    found = Attempts(strays=generator.strays, waited=generator.waited, cpu_seconds=generator.cpu_seconds)
    for attempt in generator.attempts:
        found.add(attempt)
    return found


def main() -> None:
    """Send the plan on standard input."""
    plan = Plan(**json.load(sys.stdin))
    gc.disable()  # nothing here is in cycles, and a collection would delay what is due
    attempts = uvloop.run(_run(plan))
    json.dump(asdict(attempts), sys.stdout)


if __name__ == "__main__":
    main()
