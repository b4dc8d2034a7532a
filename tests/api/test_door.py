"""Requests that are refused on granian's thread: without the event loop, counted once, and never by mistake."""

import asyncio
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests

from gateway.errors import GatewayError, NotFound, Overloaded
from gateway.queues.base import PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Behind, Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.telemetry import Refusals
from gateway.transport.auth import Callers, Tokens
from gateway.transport.header_rules import HeaderRules
from gateway.transport.http import HttpApp, HttpServer
from gateway.transport.http.door import InferDoor
from gateway.transport.http.replies import Reply
from gateway.types import InferRequest, InferResponse
from tests.support import answer, model_config

BODY = json.dumps({"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]})
TIMEOUT = {"x-request-timeout-ms": "1000"}
COUNT = 48


class Full(Service):
    """A service that has room for nobody, but looks at what it lets through."""

    asked = 0
    again: float | None = 0.0123
    threads: set[int]

    def turn_away(self, target: tuple[str, str], now: float, deadline: float, behind: Behind) -> float | None:
        self.asked += 1
        self.threads = {threading.get_ident()}
        assert now < deadline
        return self.again


@dataclass
class Running:
    url: str
    service: Full
    statistics: Statistics
    app: HttpApp
    seen: list[InferRequest] = field(default_factory=list)
    error: GatewayError | None = None

    def post(self, path: str = "m", body: str = BODY, **headers: str) -> requests.Response:
        return requests.post(
            f"{self.url}/v2/models/{path}/infer", data=body, headers={**TIMEOUT, **headers}, timeout=10
        )

    async def ask(self, **more: Any) -> requests.Response:
        return await asyncio.to_thread(lambda: self.post(**more))


@asynccontextmanager
async def serving(callers: Callers | None = None) -> AsyncIterator[Running]:
    queue = MemoryQueue()
    queue.publish(PoolState("m", (VersionState("1", "READY", config=model_config()),)))

    async def names() -> list[str]:
        return ["m"]

    statistics = Statistics()
    service = Full(queue, statistics, names, ServiceOptions())

    async def infer(request: InferRequest) -> AsyncIterator[InferResponse]:
        running.seen.append(request)
        if running.error is not None:
            raise running.error
        yield answer(request, OUT=request.inputs["IN"])

    running = Running("", service, statistics, HttpApp(service, infer, callers=callers))  # type: ignore[arg-type]
    async with running.app as app, HttpServer(app, "127.0.0.1", 0) as server:
        assert app.door is not None
        app.door.shut_until = math.inf  # as after a refusal
        running.url = f"http://127.0.0.1:{server.port}"
        await asyncio.to_thread(requests.get, f"{running.url}/v2/health/live", timeout=10)  # it listens by now
        yield running


async def test_a_refusal_needs_no_event_loop() -> None:
    async with serving() as running:
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(running.post)
            reply = asked.result()  # the event loop waits here, and does nothing else
        assert running.service.threads != {threading.get_ident()}
    assert reply.status_code == 429
    assert reply.json() == {"error": "overloaded: too much waits for the request to be answered by its deadline"}
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("1", "13")
    assert reply.headers["content-type"] == "application/json"


async def test_each_is_counted_before_the_next_request_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(
        Full, "turned_away", lambda _self, target, _error, times: told.append(times) or target == ("m", "")
    )
    async with serving() as running:
        await asyncio.gather(*(running.ask() for _ in range(COUNT)))
        running.service.again = None
        assert (await running.ask()).status_code == 200
        assert sum(told) == COUNT
        assert running.service.asked == COUNT + 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda running: running.post(**{"x-request-timeout-ms": "soon"}),
        lambda running: requests.post(f"{running.url}/v2/models/m/infer", data=BODY, timeout=10),
        lambda running: running.post(body=" " * (1 << 16) + BODY),
        lambda running: requests.post(
            f"{running.url}/v2/models/m/infer", data=iter([BODY.encode()]), headers=TIMEOUT, timeout=10
        ),
        lambda running: running.post(**{"idempotency-key": "k"}),
        lambda running: requests.get(f"{running.url}/v2/models/m", headers=TIMEOUT, timeout=10),
        lambda running: requests.get(f"{running.url}/v2/health/live", headers=TIMEOUT, timeout=10),
    ],
    ids=["bad timeout", "no deadline", "large body", "body of unknown length", "repeat", "metadata", "health"],
)
async def test_what_is_no_small_infer_request_with_a_deadline_is_let_in(
    ask: Callable[[Running], requests.Response],
) -> None:
    async with serving() as running:
        reply = await asyncio.to_thread(ask, running)
        assert running.service.asked == 0
        assert reply.status_code in (200, 400)


async def test_a_tenant_is_let_in() -> None:
    async with serving(Callers(header="x-tenant")) as running:
        assert (await running.ask(**{"x-tenant": "acme"})).status_code == 200
        assert running.service.asked == 0


async def test_a_request_that_is_let_in_brings_its_arrival_along() -> None:
    async with serving() as running:
        running.service.again = None
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(running.post)
            while not running.service.asked:
                pass  # the event loop is busy
            let_in = loop.time()
            while loop.time() < let_in + 0.05:
                pass
            busy_until = loop.time()
            reply = await asyncio.wrap_future(asked)
        assert reply.status_code == 200
        (request,) = running.seen
        assert request.deadline is not None
        assert request.deadline < busy_until + 1.0 - 0.05 + 0.02


@pytest.mark.parametrize(("error", "asked"), [(Overloaded("full", 1.0), 1), (NotFound("no such model"), 0)])
async def test_nobody_is_asked_until_one_was_refused_inside(error: GatewayError, asked: int) -> None:
    async with serving() as running:
        assert running.app.door is not None
        running.app.door.shut_until = 0.0
        running.service.again, running.error = None, error
        for _ in range(2):
            assert (await running.ask()).status_code == error.http
        assert running.service.asked == asked


async def test_a_fault_of_the_door_lets_the_request_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Reply:
        raise AssertionError("the test's door was asked to break")

    monkeypatch.setattr(Full, "turn_away", broken)
    async with serving() as running:
        assert (await running.ask()).status_code == 200


@dataclass
class Scope:
    path: str = "/v2/models/m/infer"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"content-length": "100"})


@pytest.mark.parametrize(
    ("scope", "early"),
    [
        (Scope(), True),
        (Scope("/v2/models/m/versions/1/infer"), True),
        (Scope(headers={"content-length": "101"}), False),
        (Scope(headers={"content-length": "ten"}), False),
        (Scope(headers={}), False),
        (Scope("/v2/repository/index"), False),
        (Scope("/v2/models/m/generate"), False),
        (Scope(method="GET"), False),
    ],
)
async def test_small_bodies_of_infer_requests_are_asked_for_at_once(scope: Scope, early: bool) -> None:
    async with serving() as running:
        door = InferDoor(running.service, Callers(), Refusals(), 100)
        assert (door.reads(scope) is not None) == early
        named = InferDoor(running.service, Callers(header="x-tenant"), Refusals(), 100)
        assert (named.reads(scope) is not None) == early
        known = InferDoor(running.service, Callers(Tokens({"0123456789abcdef": "acme"})), Refusals(), 100)
        assert known.reads(scope) is None  # it may be somebody who may not call


async def test_where_paths_are_restricted_nothing_is_asked_for_before_it_is_known_who_calls() -> None:
    async with serving() as running:
        rules = HeaderRules({"inference": ("key", "value")})
        async with HttpApp(running.service, running.service.infer, rules=rules) as app:
            assert app.door is not None
            assert app.door.reads(Scope()) is None
            assert app.door.reads(Scope(headers={"content-length": "0"})) is None


def noted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each request came to the application with its body asked for."""
    given: list[bool] = []
    answer = HttpApp.__rsgi__

    async def noting(self: HttpApp, scope: Any, protocol: Any, arrived: float | None = None, body: Any = None) -> None:
        given.append(body is not None)
        await answer(self, scope, protocol, arrived, body)

    monkeypatch.setattr(HttpApp, "__rsgi__", noting)
    return given


async def test_bodies_are_read_once_whoever_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = noted(monkeypatch)
    async with serving() as running:
        running.service.again = None
        given.clear()
        with requests.Session() as session:

            def ask(size: int, **headers: str) -> int:
                url = f"{running.url}/v2/models/m/infer"
                return session.post(url, data=BODY.ljust(size), headers=headers, timeout=10).status_code

            def asks() -> list[int]:
                return [ask(0), ask(1 << 20), ask(0, **{"x-request-timeout-ms": "soon"}), ask((1 << 20) + 1)]

            assert await asyncio.to_thread(asks) == [200, 200, 400, 200]
    assert given == [True, True, True, False]


async def test_a_body_comes_while_the_event_loop_is_busy() -> None:
    body = BODY.ljust(1 << 20).encode()
    async with serving() as running:
        running.service.again = None
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=10) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
            head = f"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            # The event loop waits here: what goes beyond the sockets' buffers was read without it.
            client.sendall(head.encode() + body)
            assert (await asyncio.to_thread(client.recv, 12)) == b"HTTP/1.1 200"


async def test_a_refusal_does_not_wait_for_a_body_that_was_asked_for() -> None:
    async with serving() as running:
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=10) as client:
            head = "POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\nx-request-timeout-ms: soon\r\n\r\n{"
            client.sendall(head.encode())

            def said() -> bytes:
                return b"".join(iter(lambda: client.recv(1 << 16), b""))  # until the connection ends

            assert (await asyncio.to_thread(said)).startswith(b"HTTP/1.1 400")
