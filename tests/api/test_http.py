"""The HTTP port as clients see it: real granian, real `tritonclient` and `requests`, a real service and queue."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.http as triton
from google.protobuf import text_format
from msgspec import structs
from tritonclient.grpc.model_config_pb2 import ModelConfig as Proto

from gateway import errors
from gateway.queues.base import Job, Lane, PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.transport.auth import Callers, Tokens
from gateway.transport.http import HttpApp, HttpLimits, HttpServer
from gateway.types import InferRequest, InferResponse
from tests.support import answer, background, model_config, settle, tensor

PROTO = """name: "m" backend: "fake" max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: 2 } output { name: "OUT" data_type: TYPE_FP32 dims: 2 }"""
CONFIG = replace(model_config(), proto=text_format.Parse(PROTO, Proto()))
LANE = Lane("m", "2")
BODY = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
TOKEN = "t" * 16


@dataclass
class Running:
    """A served gateway whose model doubles its input; `held` keeps answers back until it is set."""

    url: str
    service: Service
    queue: MemoryQueue
    free: asyncio.Event
    entered: "asyncio.Queue[InferRequest]" = field(default_factory=asyncio.Queue)
    left: "asyncio.Queue[InferRequest]" = field(default_factory=asyncio.Queue)
    taken: "asyncio.Queue[Job]" = field(default_factory=asyncio.Queue)

    async def call(self, method: str, path: str, **more: Any) -> requests.Response:
        return await asyncio.to_thread(requests.request, method, self.url + path, timeout=10, **more)


@asynccontextmanager
async def serving(*, limits: HttpLimits | None = None, tokens: Tokens | None = None) -> AsyncIterator[Running]:
    queue = MemoryQueue()
    states = (VersionState("1", "LOADING"), VersionState("2", "READY", config=CONFIG))
    queue.publish(PoolState("m", states))
    queue.publish(PoolState("broken", reason="config.pbtxt:1: no"))

    async def names() -> list[str]:
        return ["broken", "m", "unloaded"]

    service = Service(queue, Statistics(), names, ServiceOptions(strict_readiness=False))
    service.start()
    running = Running("", service, queue, asyncio.Event())
    running.free.set()

    async def infer(request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        running.entered.put_nowait(request)
        try:
            async with aclosing(service.infer(request)) as responses:
                async for response in responses:
                    yield response
        finally:
            running.left.put_nowait(request)

    app = HttpApp(service, infer, limits, Callers(tokens))
    async with background(work(running)), app, HttpServer(app, "127.0.0.1", 0) as server:
        running.url = f"http://127.0.0.1:{server.port}"
        yield running


async def work(running: Running) -> None:
    consumer = running.queue.consumer([LANE])
    while True:
        for job in await consumer.take(1):
            running.taken.put_nowait(job)
            await running.free.wait()
            _reply(job, job.request)


def _reply(job: Job, request: InferRequest) -> None:
    value = request.inputs["IN"].array
    if value.flat[0] == -1:
        raise AssertionError("the test's model was asked to break")
    job.reply(structs.replace(answer(request, OUT=tensor(value * 2)), model_version="2"))


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


def triton_input(name: str = "IN", value: float = 1.5, *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput(name, [1, 2], "FP32")
    tensor.set_data_from_numpy(np.full((1, 2), value, "f4"), binary_data=binary)
    return tensor


# --- unmodified clients


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_tritonclient_infers(
    gateway: Running, binary_in: bool, binary_out: bool | None, compression: str | None
) -> None:
    def infer() -> triton.InferResult:
        outputs = None if binary_out is None else [triton.InferRequestedOutput("OUT", binary_data=binary_out)]
        with triton.InferenceServerClient(gateway.url.removeprefix("http://")) as client:
            return client.infer(
                "m",
                [triton_input(binary=binary_in)],
                outputs=outputs,
                request_id="9",
                request_compression_algorithm=compression,
                response_compression_algorithm=compression,
            )

    result = await asyncio.to_thread(infer)
    assert result.as_numpy("OUT").tolist() == [[3.0, 3.0]]
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("9", "m", "2")


async def test_tritonclient_asks_about_everything(gateway: Running) -> None:
    def ask() -> dict[str, Any]:
        with triton.InferenceServerClient(gateway.url.removeprefix("http://")) as client:
            client.infer("m", [triton_input()])
            return {
                "live": client.is_server_live(),
                "ready": client.is_server_ready(),
                "model": client.is_model_ready("m"),
                "version": client.is_model_ready("m", "2"),
                "unknown": client.is_model_ready("x"),
                "server": client.get_server_metadata(),
                "metadata": client.get_model_metadata("m"),
                "config": client.get_model_config("m"),
                "statistics": client.get_inference_statistics("m"),
                "all": client.get_inference_statistics(),
                "index": client.get_model_repository_index(),
            }

    told = await asyncio.to_thread(ask)
    assert [told[key] for key in ("live", "ready", "model", "version", "unknown")] == [True, True, True, True, False]
    assert told["server"]["name"] == "triton"
    assert told["metadata"] == {
        "name": "m",
        "versions": ["2"],
        "platform": "fake",
        "inputs": [{"name": "IN", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "OUT", "datatype": "FP32", "shape": [-1, 2]}],
    }
    assert told["config"]["max_batch_size"] == 8
    assert told["config"]["input"][0]["dims"] == [2]
    assert told["statistics"] == told["all"]
    assert told["statistics"]["model_stats"][0]["inference_stats"]["success"]["count"] == 1
    assert told["index"] == [
        {"name": "broken", "state": "UNAVAILABLE", "reason": "config.pbtxt:1: no"},
        {"name": "m", "version": "1", "state": "LOADING"},
        {"name": "m", "version": "2", "state": "READY"},
        {"name": "unloaded"},
    ]


async def test_requests_with_json_and_any_content_type(gateway: Running) -> None:
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "text/plain"}):
        response = await gateway.call("POST", "/v2/models/m/versions/2/infer", data=json.dumps(BODY), headers=headers)
        assert response.json() == {
            "model_name": "m",
            "model_version": "2",
            "outputs": [{"name": "OUT", "datatype": "FP32", "shape": [1, 2], "data": [2.0, 4.0]}],
        }
        assert response.headers["Content-Type"] == "application/json"


async def test_raw_binary_request(gateway: Running) -> None:
    data = np.array([3, 4], "<f4").tobytes()
    response = await gateway.call(
        "POST", "/v2/models/m/infer", data=data, headers={"Inference-Header-Content-Length": "0"}
    )
    length = int(response.headers["Inference-Header-Content-Length"])
    assert np.frombuffer(response.content[length:], "<f4").tolist() == [6.0, 8.0]


async def test_the_response_is_packed_as_asked_and_errors_are_not(gateway: Running) -> None:
    for encoding, unpack in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
        headers = {"Accept-Encoding": f"identity;q=0.1, {encoding}"}
        response = await asyncio.to_thread(
            requests.post, gateway.url + "/v2/models/m/infer", json=BODY, headers=headers, stream=True, timeout=10
        )
        assert response.headers["Content-Encoding"] == encoding
        assert b'"data":[2.0,4.0]' in unpack(response.raw.read())
        response = await gateway.call("POST", "/v2/models/m/infer", data="{", headers=headers)
        assert "Content-Encoding" not in response.headers


# --- errors


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/", 404, "Not Found"),
        ("GET", "/v2/", 404, "Not Found"),
        ("GET", "/v2/models/m/", 404, "Not Found"),
        ("POST", "/v2/models/m/infer/", 404, "Not Found"),
        ("POST", "/v2/models//infer", 404, "Not Found"),
        ("POST", "/v2/models/m/versions/x/infer", 404, "Not Found"),
        ("GET", "/v2/models/m/versions/x", 404, "Not Found"),
        (
            "GET",
            "/v2/models/m/versions/" + "9" * 5000,
            404,
            f"Request for unknown model: 'm' version {'9' * 5000} is not found",
        ),
        ("GET", "/v2/health/other", 404, "Not Found"),
        ("GET", "/v2/models/m/infer", 405, "Method Not Allowed"),
        ("POST", "/v2", 405, "Method Not Allowed"),
        ("POST", "/v2/health/live", 405, "Method Not Allowed"),
        ("DELETE", "/v2/models/m", 405, "Method Not Allowed"),
        ("OPTIONS", "/v2/models/m/infer", 405, "Method Not Allowed"),
        ("GET", "/v2/models/x", 404, "Request for unknown model: 'x' is not found"),
        ("GET", "/v2/models/x/config", 404, "Request for unknown model: 'x' is not found"),
        ("GET", "/v2/models/x/ready", 404, "Request for unknown model: 'x' is not found"),
        ("GET", "/v2/models/x/stats", 400, "requested model 'x' is not available"),
        ("POST", "/v2/models/x/infer", 404, "Request for unknown model: 'x' is not found"),
        ("POST", "/v2/models/m/versions/9/infer", 404, "Request for unknown model: 'm' version 9 is not found"),
        (
            "POST",
            "/v2/models/m/versions/1/infer",
            503,
            "Request for unknown model: 'm' version 1 is not at ready state",
        ),
        ("POST", "/v2/models/broken/infer", 404, "Request for unknown model: 'broken' has no available versions"),
        ("POST", "/v2/models/m/infer", 500, "failed to parse the request JSON buffer: The document is empty. at 0"),
        (
            "POST",
            "/v2/repository/models/m/load",
            503,
            "explicit model load / unload is not allowed if polling is enabled",
        ),
        (
            "POST",
            "/v2/repository/models/m/unload",
            503,
            "explicit model load / unload is not allowed if polling is enabled",
        ),
    ],
)
async def test_error_bodies(gateway: Running, method: str, path: str, status: int, text: str) -> None:
    response = await gateway.call(method, path)
    assert (response.status_code, response.json()) == (status, {"error": text})
    assert response.headers["Content-Type"] == "application/json"


async def test_head_is_refused(gateway: Running) -> None:
    assert (await gateway.call("HEAD", "/v2/health/live")).status_code == 405


async def test_body_errors(gateway: Running) -> None:
    url = "/v2/models/m/infer"
    wrong = {"inputs": [{**BODY["inputs"][0], "shape": [1, 3], "data": [1, 2, 3]}], "id": "7"}
    response = await gateway.call("POST", url, json=wrong)
    assert response.status_code == 400
    assert response.json()["error"].startswith("[request id: 7] unexpected shape for input 'IN' for model 'm'.")
    response = await gateway.call("POST", url, json=BODY, headers={"Content-Encoding": "br"})
    assert (response.status_code, response.json()) == (501, {"error": "Unsupported compression type"})
    assert response.headers["Accept-Encoding"] == "gzip, deflate"
    response = await gateway.call("POST", url, json=BODY, headers={"x-request-timeout-ms": "soon"})
    assert response.status_code == 400
    assert "x-request-timeout-ms" in response.json()["error"]
    response = await gateway.call("POST", "/v2/repository/index", json={"ready": 1})
    assert (response.status_code, response.json()) == (400, {"error": "Invalid value for 'ready': expected a boolean"})
    response = await gateway.call("POST", "/v2/repository/index", json={"ready": True})
    assert response.json() == [{"name": "m", "version": "2", "state": "READY"}]


async def test_bodies_over_the_limit() -> None:
    async with serving(limits=HttpLimits(max_request_bytes=1000)) as gateway:
        for path in ("/v2/models/m/infer", "/v2/repository/index"):
            declared = await gateway.call("POST", path, data=b"x" * 1001)
            chunked = await gateway.call("POST", path, data=iter([b"x" * 600] * 2))
            for response in (declared, chunked):
                assert response.status_code == 400
                assert "exceeds the limit of 1000" in response.json()["error"]
        chunked = await gateway.call("POST", "/v2/models/m/infer", data=iter([json.dumps(BODY).encode()]))
        assert chunked.status_code == 200


async def test_large_bodies_that_arrive_together_are_bounded_together(gateway: Running) -> None:
    limits = HttpLimits(max_inflight_bytes=3_000_000)
    app = HttpApp(gateway.service, gateway.service.infer, limits)

    async def chunks(count: int, held: asyncio.Event) -> AsyncGenerator[bytes, None]:
        for _ in range(count):
            yield bytes(1_000_000)
        await held.wait()

    first = asyncio.Event()
    async with background(app._read(chunks(3, first))) as (reading,):
        await settle()
        done = asyncio.Event()
        done.set()
        with pytest.raises(errors.ResourceExhausted, match="max-inflight-bytes"):
            await app._read(chunks(1, done))
        first.set()
        assert len(await reading) == 3_000_000
        assert len(await app._read(chunks(4, done))) == 4_000_000  # alone, it is let in


class Body:
    """A request body as granian gives it, in one piece or in several."""

    def __init__(self, size: int) -> None:
        self.size, self.headers = size, {"content-length": str(size)}
        self.whole = self.pieces = 0
        self.came = asyncio.Event()

    async def __call__(self) -> bytes:
        self.whole += 1
        await self.came.wait()
        return bytes(self.size)

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        self.pieces += 1
        yield bytes(self.size)


async def test_large_bodies_are_read_in_one_piece_while_few_are_declared(gateway: Running) -> None:
    app = HttpApp(gateway.service, gateway.service.infer, HttpLimits(max_inflight_bytes=12_000_000))
    bodies = [Body(2_000_000), Body(2_000_000), Body(1_000_000)]
    async with background(*(app._body(body.headers, body) for body in bodies)) as reading:
        await settle()
        # The first holds 2 of the 3 MB that may be read so; what is small is not asked.
        assert [(body.whole, body.pieces) for body in bodies] == [(1, 0), (0, 1), (1, 0)]
        for body in bodies:
            body.came.set()
        assert [len(await each) for each in reading] == [2_000_000, 2_000_000, 1_000_000]
    gone = Body(2_000_000)
    async with background(app._body(gone.headers, gone)) as (lost,):
        await settle()
        lost.cancel()
        await asyncio.wait([lost])
    again = Body(3_000_000)
    again.came.set()
    await app._body(again.headers, again)
    assert (again.whole, again.pieces) == (1, 0)  # nothing is held any more
    huge = Body(17 << 20)
    await HttpApp(gateway.service, gateway.service.infer)._body(huge.headers, huge)
    assert (huge.whole, huge.pieces) == (0, 1)


async def test_a_deadline_header_ends_the_wait(gateway: Running) -> None:
    gateway.free.clear()
    response = await gateway.call("POST", "/v2/models/m/infer", json=BODY, headers={"x-request-timeout-ms": "50"})
    assert (response.status_code, response.json()) == (504, {"error": "Request timeout expired"})


async def test_a_fault_of_ours_is_logged_and_hidden(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as gateway:
        gateway.service.model_config = None  # type: ignore[method-assign,assignment]
        for method, path in (("POST", "/v2/models/m/infer"), ("GET", "/v2/models/m/config")):
            caplog.clear()
            response = await gateway.call(method, path, json=BODY)
            incident = response.json()["error"].split("request id ")[1].split(";")[0]
            assert response.status_code == 500
            assert "NoneType" not in response.text
            (record,) = [each for each in caplog.records if incident in each.getMessage()]
            assert record.exc_info is not None


async def test_draining_refuses(gateway: Running) -> None:
    gateway.service.drain()
    for word in ("live", "ready"):
        response = await gateway.call("GET", f"/v2/health/{word}")
        assert (response.status_code, response.json()) == (400, {word: False})
    response = await gateway.call("POST", "/v2/models/m/infer", json=BODY)
    assert response.status_code == 503
    assert (await gateway.call("GET", "/v2/models/m/ready")).status_code == 503


# --- tokens


async def test_everything_but_health_and_docs_needs_a_token() -> None:
    async with serving(tokens=Tokens({TOKEN: "alice"})) as gateway:
        for method, path in (
            ("GET", "/v2"),
            ("GET", "/v2/models/m"),
            ("GET", "/v2/models/stats"),
            ("POST", "/v2/models/m/infer"),
            ("POST", "/v2/repository/index"),
            ("POST", "/v2/repository/models/m/unload"),
        ):
            for headers in ({}, {"Authorization": "Bearer " + "x" * 16}):
                response = await gateway.call(method, path, json=BODY, headers=headers)
                assert response.status_code == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert list(response.json()) == ["error"]
        for path in ("/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"):
            assert (await gateway.call("GET", path)).status_code == 200
        # Nobody can make the gateway read a body without a token: this one never comes.
        host, port = gateway.url.removeprefix("http://").split(":")
        for path in (b"/v2/models/m/infer", b"/v2/repository/index"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 401")
            writer.close()
        allowed = {"Authorization": f"Bearer {TOKEN}"}
        assert (await gateway.call("GET", "/v2/models/m", headers=allowed)).status_code == 200
        assert (await gateway.call("POST", "/v2/models/m/infer", json=BODY, headers=allowed)).status_code == 200
        assert (await gateway.taken.get()).request.tenant == "alice"


# --- documentation, and the FastAPI application on its own


async def test_the_documentation_needs_no_other_host(gateway: Running) -> None:
    page = (await gateway.call("GET", "/docs")).text
    assert "https://" not in page
    assert "http://" not in page
    described = (await gateway.call("GET", "/openapi.json")).json()["paths"]
    for path in (
        "/v2",
        "/v2/health/live",
        "/v2/models/{model}/infer",
        "/v2/models/{model}/versions/{version}/infer",
        "/v2/models/{model}/config",
        "/v2/repository/index",
    ):
        assert path in described
    assert "422" not in json.dumps(described)
    assert "example" in described["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]["application/json"]


async def test_the_fastapi_routes_answer_like_the_fast_path(gateway: Running) -> None:
    """Any ASGI server may run the application: ask it without granian or the fast path."""
    import httpx

    from gateway.transport.http.endpoint import InferEndpoint
    from gateway.transport.http.routes import build

    limits = HttpLimits(max_request_bytes=1000)
    endpoint = InferEndpoint(gateway.service, gateway.service.infer, limits)
    transport = httpx.ASGITransport(build(gateway.service, endpoint, limits, Callers(header="x-tenant")))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for method, path, body in (
            ("POST", "/v2/models/m/infer", json.dumps(BODY)),
            ("POST", "/v2/models/m/versions/2/infer", json.dumps(BODY)),
            ("POST", "/v2/models/x/infer", json.dumps(BODY)),
            ("POST", "/v2/models/m/infer", "{"),
            ("GET", "/v2/health/live", None),
            ("GET", "/v2/health/ready", None),
        ):
            slow = await client.request(method, path, content=body, headers={"Accept-Encoding": "identity"})
            fast = await gateway.call(method, path, data=body, headers={"Accept-Encoding": "identity"})
            assert (slow.status_code, slow.content) == (fast.status_code, fast.content)
            assert slow.headers["content-type"] == fast.headers["content-type"]
        slow = await client.post("/v2/models/m/infer", content=b"x" * 1001)
        assert slow.status_code == 400


# --- clients that leave


async def request_bytes(gateway: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(BODY).encode()
    head = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    writer.write(head + body)
    await writer.drain()
    return reader, writer


async def test_a_client_that_leaves_frees_its_place_before_compute(gateway: Running) -> None:
    gateway.free.clear()
    running_reader, running_writer = await request_bytes(gateway)
    running = await gateway.taken.get()
    await gateway.entered.get()
    _, waiting_writer = await request_bytes(gateway)
    waiting = await gateway.entered.get()
    waiting_writer.close()
    assert await gateway.left.get() is waiting
    assert not running.done
    gateway.free.set()
    assert (await running_reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
    await settle()
    assert gateway.taken.empty()
    running_writer.close()
    statistics = (await gateway.service.statistics("m"))[0]["inference_stats"]
    assert statistics["success"]["count"] == 1
    assert statistics["fail"]["count"] == 1


async def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody(
    gateway: Running, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    for path in (b"/v2/models/m/infer", b"/v2/repository/index"):
        for head in (b"Content-Length: 100", b"Transfer-Encoding: chunked"):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n5\r\n{")
            await writer.drain()
            writer.close()
    assert (await gateway.call("POST", "/v2/models/m/infer", json=BODY)).status_code == 200
    assert (await gateway.call("POST", "/v2/repository/index")).status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_errors_of_the_queue_reach_the_client(gateway: Running) -> None:
    gateway.free.clear()
    reader, writer = await request_bytes(gateway)
    (await gateway.taken.get()).fail(errors.ResourceExhausted("later, please"))
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 429")
    assert b'{"error":"later, please"}' in await reader.readuntil(b"}")
    writer.close()
