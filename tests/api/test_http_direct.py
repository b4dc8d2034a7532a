"""Infer requests that are answered without a task: the same answers as with one, and nothing left behind."""

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import pytest
import requests

from gateway.config.model import Step
from gateway.errors import GatewayError, Internal, Overloaded
from gateway.queues.base import Job, PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Service
from gateway.service.inference import Inference
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics, VersionStatistics
from gateway.transport.http import HttpApp, HttpServer
from gateway.transport.http.direct import _Request
from gateway.transport.http.disconnects import Disconnects
from gateway.types import Infer, InferRequest, InferResponse
from tests.support import LANE, answer, model_config

BODY = json.dumps({"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]})
PATH = "/v2/models/m/infer"
_TIMES = 50


def holds_a_body(each: object) -> bool:
    codes = (_Request.read.__code__, HttpApp._reply.__code__)
    return isinstance(each, _Request) or (isinstance(each, FrameType) and each.f_code in codes)


HEAD = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n\r\n"


@dataclass
class Running:
    """A service whose one model answers what it was sent, unless it is told to wait or to fail."""

    url: str
    app: HttpApp
    statistics: VersionStatistics
    with_task: int = 0  # requests that came to the application's own coroutine
    error: GatewayError | Exception | None = None
    held: list[Job] = field(default_factory=list)  # jobs that are not answered
    hold: bool = False
    came: asyncio.Event = field(default_factory=asyncio.Event)
    began: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def post(self, body: bytes | str = BODY, path: str = PATH, **headers: str) -> requests.Response:
        plain = {"accept-encoding": "identity", **headers}
        return await asyncio.to_thread(requests.post, f"{self.url}{path}", data=body, headers=plain, timeout=10)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@asynccontextmanager
async def serving(
    monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Infer], Infer] = lambda infer: infer
) -> AsyncIterator[Running]:
    queue = MemoryQueue()
    queue.publish(PoolState("m", (VersionState("1", "READY", config=model_config()),)))

    async def names() -> list[str]:
        return ["m"]

    statistics = Statistics()
    service = Service(queue, statistics, names, ServiceOptions())
    app = HttpApp(service, wrap(service.infer))
    running = Running("", app, statistics.of("m", "1"))
    whole = HttpApp.__rsgi__

    async def noting(self: HttpApp, scope: Any, protocol: Any, arrived: Any = None, given: Any = None) -> None:
        running.with_task += scope.path != "/v2/health/live"
        await whole(self, scope, protocol, arrived, given)

    async def work() -> None:
        consumer = queue.consumer([LANE])
        while jobs := await consumer.take(8):
            for job in jobs:
                if running.hold:
                    running.held.append(job)
                elif running.error is not None:
                    job.fail(running.error)  # type: ignore[arg-type] # a fault is no GatewayError, which is the point
                else:
                    job.reply(answer(job.request, OUT=job.request.inputs["IN"]))
            running.came.set()

    begin = HttpApp.begin

    def beginning(self: HttpApp, *given: Any) -> bool:
        running.began.set()
        return begin(self, *given)

    monkeypatch.setattr(HttpApp, "__rsgi__", noting)
    monkeypatch.setattr(HttpApp, "begin", beginning)
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(work())
        async with app, HttpServer(app, "127.0.0.1", 0) as server:
            running.url = f"http://127.0.0.1:{server.port}"
            await asyncio.to_thread(requests.get, f"{running.url}/v2/health/live", timeout=10)  # it listens by now
            yield running
        working.cancel()


def bare(reply: requests.Response) -> tuple[int, dict[str, str], bytes]:
    """All of a reply but when it was sent."""
    return reply.status_code, {key: each for key, each in reply.headers.items() if key != "date"}, reply.content


BINARY = json.dumps(
    {
        "inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
        "outputs": [{"name": "OUT", "parameters": {"binary_data": True}}],
    }
)


@pytest.mark.parametrize(
    ("body", "path", "headers", "well"),
    [
        (BODY, PATH, {}, True),
        (BODY, "/v2/models/m/versions/1/infer", {}, True),
        (BINARY.encode() + bytes(8), PATH, {"Inference-Header-Content-Length": str(len(BINARY))}, True),
        (bytes(8), PATH, {"Inference-Header-Content-Length": "0"}, True),
        (bytes(8), PATH, {"Inference-Header-Content-Length": "9"}, False),
        (BODY.replace("FP32", "FP33"), PATH, {}, False),
        (BODY[:-1], PATH, {}, False),
        ("", PATH, {}, False),
        (BODY, "/v2/models/other/infer", {}, False),
        (BODY, "/v2/models/m/versions/7/infer", {}, False),
        (BODY.replace('"IN"', '"INN"'), PATH, {}, False),
    ],
)
async def test_the_reply_is_that_of_the_task(
    monkeypatch: pytest.MonkeyPatch, body: bytes | str, path: str, headers: dict[str, str], well: bool
) -> None:
    async with serving(monkeypatch) as running:
        direct = bare(await running.post(body, path, **headers))
        assert running.with_task == 0
    monkeypatch.setattr(HttpApp, "begin", lambda *_: False)
    async with serving(monkeypatch) as running:
        assert bare(await running.post(body, path, **headers)) == direct
        assert running.with_task == 1
    assert (direct[0] == 200) == well


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (PATH, {"accept-encoding": "gzip"}),
        (PATH, {"content-encoding": "identity"}),
        (PATH, {"x-request-timeout-ms": "soon"}),
        (f"{PATH}?callback=", {}),
    ],
    ids=["packed reply", "packed body", "bad timeout", "query"],
)
async def test_what_has_more_to_wait_for_is_left_to_a_task(
    monkeypatch: pytest.MonkeyPatch, path: str, headers: dict[str, str]
) -> None:
    async with serving(monkeypatch) as running:
        reply = await running.post(BODY, path, **headers)
        assert running.with_task == 1
        assert reply.status_code in (200, 400)


async def test_an_error_of_the_model_is_told_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as running:
        running.error = Internal("it broke")
        reply = await running.post()
        assert (reply.status_code, reply.json()) == (500, {"error": "it broke"})
        running.error = Overloaded("much to do", 0.0123)
        reply = await running.post()
        assert (reply.status_code, reply.headers["retry-after-ms"]) == (429, "13")
        assert running.app.door is not None
        assert running.app.door.shut_until > 0  # whoever comes next is asked about
        assert sum(running.statistics.failures.values()) == 2
        assert running.with_task == 0


async def test_a_fault_is_hidden_and_told_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as running:
        monkeypatch.setattr("gateway.transport.http.direct.encode", lambda *_: 1 / 0)
        reply = await running.post()
        assert reply.status_code == 500
        assert "request id" in reply.json()["error"]
        assert running.with_task == 0


def wrapped(infer: Infer) -> Infer:
    async def answers(request: InferRequest) -> AsyncIterator[InferResponse]:
        if "fault" in request.parameters:
            raise RuntimeError("a fault of a wrapper")
        async with aclosing(infer(request)) as responses:
            async for response in responses:
                yield response

    return answers  # type: ignore[return-value]


async def test_what_a_wrapper_answers_is_waited_for_in_a_task_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, wrapped) as running:
        assert (await running.post()).json()["outputs"][0]["data"] == [1.0, 2.0]
        running.error = Internal("it broke")
        assert (await running.post()).json() == {"error": "it broke"}
        assert (await running.post(BODY[:-1] + ', "parameters": {"fault": true}}')).status_code == 500
        running.error = None
        assert (await running.post()).status_code == 200  # an error ended no other's task
        assert running.with_task == 0


@pytest.mark.parametrize("wrap", [lambda infer: infer, wrapped], ids=["future", "task"])
async def test_a_client_that_leaves_gives_up_its_place(
    monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Infer], Infer]
) -> None:
    async with serving(monkeypatch, wrap) as running:
        running.hold = True
        with running.connect() as client:
            client.sendall((HEAD + BODY).encode())
            await running.came.wait()
            (job,) = running.held
            assert not job.done
        async with asyncio.timeout(10):
            await running.app.finished()  # it is watched, found to have gone, and ended
        assert job.done
        assert running.statistics.failures["CANCELED"] == 1
        assert running.statistics.pending == 0
        assert running.with_task == 0


async def test_a_client_that_leaves_in_the_middle_of_its_body_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(monkeypatch) as running:
        running.began.clear()
        with running.connect() as client:
            client.sendall((HEAD + BODY[:5]).encode())
            await running.began.wait()
        async with asyncio.timeout(10):
            await running.app.finished()
        assert running.statistics.pending == 0
        assert sum(running.statistics.failures.values()) == 0
        assert (await running.post()).status_code == 200
        assert running.with_task == 0


async def test_a_stop_waits_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as running:
        running.hold = True
        asked = asyncio.ensure_future(running.post())
        await running.came.wait()
        finished = asyncio.ensure_future(running.app.finished())
        await asyncio.sleep(0)
        assert not finished.done()
        (job,) = running.held
        job.reply(answer(job.request, OUT=job.request.inputs["IN"]))
        await finished
        assert (await asked).status_code == 200


async def leave_in_the_turn_of_the_body(running: Running, monkeypatch: pytest.MonkeyPatch, *, first: bool) -> None:
    """A client leaves, which is noticed just before its body is seen, or just after."""
    read = _Request.read
    gone = asyncio.Event()

    def reading(self: _Request, body: Any) -> None:
        if first:
            self.cancel()  # as the watcher does
        read(self, body)
        self.cancel()
        gone.set()

    monkeypatch.setattr(_Request, "read", reading)
    running.hold = True
    with running.connect() as client:
        client.sendall((HEAD + BODY).encode())
        await gone.wait()
        async with asyncio.timeout(10):
            await running.app.finished()
    service = running.app._service
    assert (service._open, service._inflight_bytes, running.statistics.pending) == (0, 0, 0)


@pytest.mark.parametrize("wrap", [lambda infer: infer, wrapped], ids=["future", "task"])
async def test_a_client_that_leaves_in_the_turn_of_its_body_gives_up_its_place(
    monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Infer], Infer]
) -> None:
    async with serving(monkeypatch, wrap) as running:
        await leave_in_the_turn_of_the_body(running, monkeypatch, first=False)


async def test_a_client_that_has_gone_before_its_body_is_seen_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(monkeypatch) as running:
        await leave_in_the_turn_of_the_body(running, monkeypatch, first=True)
        assert not running.held
        assert sum(running.statistics.failures.values()) == 0


async def test_an_ensemble_is_waited_for_in_a_task_that_begins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as running:
        config = replace(model_config(), steps=(Step("other", "", {}, {}),))
        monkeypatch.setattr(running.app._service, "model_config", lambda *_: config)
        monkeypatch.setattr(Inference, "begin", lambda _: 1 / 0)
        assert (await running.post()).status_code == 200
        assert running.with_task == 0


@pytest.mark.parametrize("way", ["future", "task of its own", "granian's task"])
async def test_nothing_is_left_of_a_request(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The garbage collector looks rarely on purpose, and does not see what granian's objects hold."""
    if way == "granian's task":
        monkeypatch.setattr(HttpApp, "begin", lambda *_: False)
    begun = asyncio.Event()
    register = Disconnects.begin

    def registering(self: Disconnects, request: Any, protocol: Any) -> None:
        register(self, request, protocol)
        begun.set()

    monkeypatch.setattr(Disconnects, "begin", registering)
    async with serving(monkeypatch, wrapped if way == "task of its own" else lambda infer: infer) as running:
        gc.collect()
        before = [each for each in gc.get_objects() if holds_a_body(each)]  # of other tests
        gc.disable()
        try:
            for error in (None, Internal("it broke"), None):
                running.error = error
                for body in (BODY, BODY[:-1]):
                    await running.post(body)
            for _ in range(5):
                begun.clear()
                with running.connect() as client:
                    client.sendall((HEAD + BODY[:5]).encode())
                    await begun.wait()
                    await running.post(BODY, "/v2/health/live")
                async with asyncio.timeout(10):
                    await running.app.finished()
            for _ in range(_TIMES):  # granian lets go of a body on threads of its own, when it comes to that
                left = sum(holds_a_body(each) for each in gc.get_objects())
                if left <= len(before):
                    break
                await running.post(BODY, "/v2/health/live")
        finally:
            gc.enable()
        assert left <= len(before)
        assert running.with_task == (11 if way == "granian's task" else 0)
