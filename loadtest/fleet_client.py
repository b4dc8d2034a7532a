"""A client of a whole fleet: load on several gateways at once, and a history of what became of every request.

    echo '{"ports": [8000, 8010], "history": "client.jsonl", "rate": 200, "deadline_ms": 1000, "retries": 3}' |
        python -m loadtest.fleet_client
    python -m loadtest.history client.jsonl

At a rate (Poisson arrivals, an open loop) or in a closed loop, until all `requests` are sent or SIGTERM or SIGINT says to stop; then it waits
for the last answers. It connects again for as long as it runs, so gateways may be killed and come back. A request whose connection broke, or
which was answered with 503, is sent once more through another gateway if it can be, `retries` times and within its deadline. The model is one whose
output is its input, such as `write_model` makes: the input is the request's tag, and no two requests of any run have the same.

It prints `started` once every gateway was tried, and at the end what it used.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import resource
import secrets
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from loadtest.flat_requests import HOST
from loadtest.history import LOST, UNANSWERED, UNSENT, Record, Run, Writer
from loadtest.overload_client import Attempt, Connection, request_head

MODEL = "fleet"
PATIENCE = 5.0  # seconds after its deadline until a request counts as unanswered
AGAIN = 0.02  # seconds between attempts to connect, and until a refused client of a closed loop asks again
_ERROR_BYTES = 300
_CONFIG = """backend: "fake" max_batch_size: {rows} dynamic_batching {{ }}
instance_group {{ count: 1 kind: KIND_CPU }}
input {{ name: "IN" data_type: TYPE_{datatype} dims: {dims} }} output {{ name: "OUT" data_type: TYPE_{datatype} dims: {dims} }}
{parameters}
"""
_PARAMETER = 'parameters {{ key: "{}" value {{ string_value: "{}" }} }}'


def write_model(
    repository: Path,
    name: str = MODEL,
    *,
    base_us: float = 2000.0,
    per_row_us: float = 50.0,
    rows: int = 32,
    dims: int = 1,
    datatype: str = "INT64",
    **more: str,
) -> None:
    """Put a fake model into a repository that answers with its input after so many microseconds.

    `more` are parameters of the fake backend.
    """
    (repository / name / "1").mkdir(parents=True)
    given = {"a_us": f"{base_us:g}", "b_us": f"{per_row_us:g}"} | more
    parameters = "\n".join(_PARAMETER.format(*each) for each in given.items())
    config = _CONFIG.format(rows=rows, dims=dims, datatype=datatype, parameters=parameters)
    (repository / name / "config.pbtxt").write_text(config)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send, and where."""

    ports: list[int]
    history: str  # the file to write
    client: str = "client"
    model: str = MODEL
    datatype: str = "INT64"  # of eight bytes
    requests: int = -1  # -1: until told to stop
    rate: float = 0.0  # requests a second; 0: a closed loop
    concurrency: int = 32  # connections to each gateway, and the requests of a closed loop
    deadline_ms: float = 0.0  # 0: none
    retries: int = 0
    idempotent: bool = False  # send an Idempotency-Key, the same each time a request is sent
    seed: int = 0


@dataclass(slots=True, eq=False)
class Call(Attempt):
    """One request until it is over. `due` is when it should have been sent, by the monotonic clock."""

    tag: int = 0
    written: int = 0  # how often
    port: int = 0
    over: asyncio.TimerHandle | None = None
    connection: FleetConnection | None = None  # that it is on its way over


class FleetConnection(Connection):
    """A connection to one of the gateways; `closing` once that said that it will close it."""

    def __init__(self, client: FleetClient, port: int) -> None:
        super().__init__(client)
        self.port = port
        self.closing = False

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self.closing = self.closing or b"\r\nconnection: close" in data.lower()
        if data.find(b"HTTP/1.1 ", 1) > 0:  # two answers: not to be taken for one by its first and last bytes
            super().data_received(data[:1])
            data = data[1:]
        super().data_received(data)


@dataclass(slots=True)
class _Gateway:
    port: int
    idle: list[FleetConnection] = field(default_factory=list)
    missing: int = 0  # connections
    connecting: bool = False


class FleetClient:
    """Carries a plan out, on a running event loop, once."""

    def __init__(self, plan: Plan, writer: Writer) -> None:
        self.waited = 0  # requests that found every connection in use
        self._plan = plan
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._random = random.Random(plan.seed)
        self._gateways = deque(_Gateway(port) for port in plan.ports)  # the next one first
        self._waiting: deque[Call] = deque()
        self._next = 0
        self._open = 0
        self._due = 0.0
        self._stopped = False
        self._done = asyncio.Event()
        self._first_tag = secrets.randbits(30) << 32
        self._head = request_head(plan.model, plan.deadline_ms, datatype=plan.datatype)
        self._seconds = plan.deadline_ms / 1e3 or math.inf

    async def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Connect, send, and wait for the last answers. Tells when every gateway was tried."""
        wanted = [gateway for gateway in self._gateways for _ in range(self._plan.concurrency)]
        async with asyncio.TaskGroup() as self._group:
            connected = await asyncio.gather(*map(self._connect, wanted))
            for gateway, up in zip(wanted, connected, strict=True):
                if not up:
                    self._miss(gateway)
            started()
            self._due = time.monotonic()
            if self._plan.rate:
                self._tick()
            else:
                for _ in range(self._plan.concurrency):
                    self._launch()
            self._look()
            await self._done.wait()
        for gateway in self._gateways:
            for connection in gateway.idle:
                connection.transport.abort()

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True
        self._look()

    def _tick(self) -> None:
        """Send what is due, and come again when the next is; timers know whole milliseconds."""
        now = time.monotonic()
        while self._due <= now and not self._all_sent():
            self._launch(self._due)
            self._due += self._random.expovariate(self._plan.rate)
        if not self._all_sent():
            self._loop.call_later(max(1, math.ceil((self._due - now) * 1e3)) / 1e3, self._tick)

    def _all_sent(self) -> bool:
        return self._stopped or self._next == self._plan.requests

    def _launch(self, due: float | None = None) -> None:
        if self._all_sent():
            return
        call = Call(self._next, 0, time.monotonic() if due is None else due, tag=self._first_tag + self._next)
        call.number = struct.pack("<q", call.tag)
        self._next += 1
        self._open += 1
        patience = PATIENCE + (self._seconds if self._plan.deadline_ms else PATIENCE)
        call.over = self._loop.call_later(patience, self._silent, call)
        self._send(call)

    def _send(self, call: Call) -> None:
        self._gateways.rotate(-1)
        up = [gateway for gateway in self._gateways if gateway.idle]
        # What was lost with a gateway would be lost once more with its next connection, of whose end nobody knows yet.
        if up:
            self._write(next((each for each in up if each.port != call.port), up[0]).idle.pop(), call)
        else:
            self._waiting.append(call)
            self.waited += 1

    def _write(self, connection: FleetConnection, call: Call) -> None:
        connection.attempt = call
        call.written += 1
        call.port, call.connection = connection.port, connection
        connection.transport.write(self._head_of(call) + call.number)

    def _head_of(self, call: Call) -> bytes:
        late = time.monotonic() - call.due
        if late < 1e-3 and not self._plan.idempotent:
            return self._head
        key = [f"Idempotency-Key: {call.tag}"] if self._plan.idempotent else []
        left = max(1.0, self._plan.deadline_ms - 1e3 * late) if self._plan.deadline_ms else 0.0
        return request_head(self._plan.model, left, *key, datatype=self._plan.datatype)

    # --- what connections say

    def taken(self, connection: FleetConnection, call: Call, now: float) -> None:
        """A right answer came."""
        self._release(connection, call)
        self._finish(call, 200, now, call.tag)

    def received(self, connection: FleetConnection, status: int, head: bytes, body: bytes) -> None:  # noqa: ARG002 - Connection's
        """Any answer came."""
        now, call = time.monotonic(), connection.attempt
        answer = struct.unpack("<q", body[-8:])[0] if status == 200 and len(body) >= 8 else None
        if not isinstance(call, Call):
            self._writer.add(Record(-1, 0, now, now, status, answer, port=connection.port))
            return
        if status == 200 and answer != call.tag:
            connection.closing = True  # whose answers these are, nobody knows any more
        self._release(connection, call)
        if status == 503 and self._may_repeat(call):
            self._send(call)
        else:
            self._finish(call, status, now, answer, "" if status == 200 else _text(body))

    def lost(self, connection: FleetConnection) -> None:
        """A connection broke, or is one that we closed."""
        gateway = self._gateway(connection)
        if connection in gateway.idle:
            gateway.idle.remove(connection)
        self._miss(gateway)
        if not isinstance(call := connection.attempt, Call):
            return
        connection.attempt = call.connection = None
        if self._may_repeat(call):
            self._send(call)
        else:
            self._finish(call, LOST, None)

    def _gateway(self, connection: FleetConnection) -> _Gateway:
        return next(each for each in self._gateways if each.port == connection.port)

    def _may_repeat(self, call: Call) -> bool:
        return call.written <= self._plan.retries and time.monotonic() - call.due < self._seconds

    def _release(self, connection: FleetConnection, call: Call) -> None:
        connection.attempt = call.connection = None
        # Not before all that has come is read: a second answer must not be taken for that to the next request.
        self._loop.call_soon(self._free, connection)

    def _free(self, connection: FleetConnection) -> None:
        """Use a connection for whoever waits, if it can be used again."""
        if connection.closing or connection.transport.is_closing():
            connection.transport.close()
            return
        while self._waiting:
            call = self._waiting.popleft()
            if time.monotonic() - call.due < self._seconds:
                self._write(connection, call)
                return
            self._finish(call, LOST if call.written else UNSENT, None)  # as a client does that waits no longer
        self._gateway(connection).idle.append(connection)

    def _silent(self, call: Call) -> None:
        """Nothing came in all the time there was; whatever comes later finds its connection closed."""
        if call.connection is None:
            self._waiting.remove(call)
        else:
            call.connection.attempt = None
            call.connection.transport.abort()
        self._finish(call, UNANSWERED if call.written else UNSENT, None)

    def _finish(self, call: Call, status: int, now: float | None, answer: int | None = None, text: str = "") -> None:
        if call.over is not None:
            call.over.cancel()
        self._writer.add(Record(call.call, call.tag, call.due, now, status, answer, call.written, call.port, text))
        self._open -= 1
        if not self._plan.rate:
            if status == 200:
                self._loop.call_soon(self._launch)  # after its connection is free
            else:
                self._loop.call_later(AGAIN, self._launch)
        self._look()

    def _look(self) -> None:
        if self._all_sent() and not self._open:
            self._done.set()

    # --- connections

    async def _connect(self, gateway: _Gateway) -> bool:
        try:
            _, connection = await self._loop.create_connection(
                lambda: FleetConnection(self, gateway.port), HOST, gateway.port
            )
        except OSError:
            return False
        self._free(connection)
        return True

    def _miss(self, gateway: _Gateway) -> None:
        gateway.missing += 1
        if not gateway.connecting and not self._done.is_set():
            gateway.connecting = True
            self._group.create_task(self._reconnect(gateway))

    async def _reconnect(self, gateway: _Gateway) -> None:
        # One after another, so that a gateway that is down costs this process next to nothing.
        while gateway.missing and not self._done.is_set():
            if await self._connect(gateway):
                gateway.missing -= 1
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._done.wait(), AGAIN * self._random.uniform(0.5, 1.5))
        gateway.connecting = False


def _text(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])[:_ERROR_BYTES]
    except (ValueError, KeyError, TypeError):
        return body[:_ERROR_BYTES].decode(errors="replace")


async def _run(plan: Plan) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    with Writer(Path(plan.history), Run(plan.client, plan.requests, plan.deadline_ms)) as writer:
        client = FleetClient(plan, writer)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, client.stop)
        began = time.monotonic()
        await client.run(lambda: print("started", flush=True))
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "waited": client.waited,
    }


def main() -> None:
    """Carry out the plan on standard input."""
    plan = Plan(**json.load(sys.stdin))
    print(json.dumps(uvloop.run(_run(plan))), flush=True)


if __name__ == "__main__":
    main()
