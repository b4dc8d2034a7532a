"""Async inference as clients see it: real granian and gRPC, real Redis, `requests` and `tritonclient`."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import tritonclient.grpc.aio as triton_grpc
import tritonclient.http as triton
from google.protobuf import text_format
from tritonclient.grpc import service_pb2_grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig as Proto

from gateway import errors
from gateway.jobs.jobs import Jobs
from gateway.jobs.parameters import by_parameter
from gateway.jobs.runner import JobRunner, RunnerOptions
from gateway.jobs.store import JobStore, StoreOptions
from gateway.jobs.webhook import WebhookPolicy
from gateway.queues.base import Lane, PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.redis_client import RedisClient
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.transport.auth import Callers, Tokens
from gateway.transport.grpc import GrpcOptions, GrpcServer
from gateway.transport.http import HttpApp, HttpLimits, HttpServer
from tests.api.grpc_support import failure, message
from tests.redis_support import options
from tests.support import answer, background, model_config, tensor, until

PROTO = """name: "m" backend: "fake" max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: 2 } output { name: "OUT" data_type: TYPE_FP32 dims: 2 }"""
CONFIG = replace(model_config(), proto=text_format.Parse(PROTO, Proto()))
BODY = {"id": "7", "inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
INFER = "/v2/models/m/infer"
ASYNC = INFER + "?async=1"
SIXTEEN = "t" * 16, "u" * 16


@dataclass
class Running:
    url: str
    grpc_url: str
    jobs: Jobs | None
    free: asyncio.Event

    async def call(self, method: str, path: str, **more: Any) -> requests.Response:
        return await asyncio.to_thread(requests.request, method, self.url + path, timeout=10, **more)

    async def submit(self, **more: Any) -> str:
        reply = await self.call("POST", ASYNC, **({"json": BODY} | more))
        assert reply.status_code == 202, reply.text
        assert reply.headers["location"] == f"/v2/jobs/{reply.json()['id']}"
        return reply.headers["location"]

    async def ended(self, path: str, **more: Any) -> dict[str, Any]:
        """The last event of a job: waits for it to end."""
        reply = await self.call("GET", path + "/events", **more)
        name, data = events(reply.text)[-1]
        assert name == "end"
        return data


def events(text: str) -> list[tuple[str, Any]]:
    """The events of a stream of server-sent events: name and data."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


@asynccontextmanager
async def serving(
    redis_url: str | None,
    *,
    tokens: Tokens | None = None,
    runs: bool = True,
    limits: HttpLimits | None = None,
    store: StoreOptions | None = None,
    implementation: str = "grpcio",
) -> AsyncIterator[Running]:
    queue = MemoryQueue()
    queue.publish(PoolState("m", (VersionState("2", "READY", config=CONFIG),)))

    async def names() -> list[str]:
        return ["m"]

    service = Service(queue, Statistics(), names, ServiceOptions(strict_readiness=False))
    service.start()
    running = Running("", "", None, asyncio.Event())
    running.free.set()
    callers = Callers(tokens)
    async with background(work(queue, running)), jobs_of(redis_url, service, runs=runs, store=store) as jobs:
        running.jobs = jobs
        app = HttpApp(service, service.infer, limits, callers, jobs)
        infer = by_parameter(service.infer, jobs)
        native = GrpcOptions(port=0, native=implementation == "native")
        async with (
            GrpcServer(service, infer, None if callers.anonymous else callers.tenant, native) as rpc,
            app,
            HttpServer(app, "127.0.0.1", 0) as server,
        ):
            running.url, running.grpc_url = f"http://127.0.0.1:{server.port}", f"127.0.0.1:{rpc.port}"
            try:
                yield running
            finally:
                if jobs:
                    jobs.end_watches()


@asynccontextmanager
async def jobs_of(
    url: str | None, service: Service, *, runs: bool, store: StoreOptions | None
) -> AsyncIterator[Jobs | None]:
    if url is None:
        yield None
        return
    async with (
        RedisClient(options(url)) as client,
        Jobs(JobStore(client, store), service.check, webhooks=WebhookPolicy(("hooks.example",))) as jobs,
    ):
        if not runs:
            yield jobs
            return
        lease = RunnerOptions(lease=2)
        async with JobRunner(jobs.store, jobs.feed, service.infer, service.model_config, options=lease):
            yield jobs


async def work(queue: MemoryQueue, running: Running) -> None:
    consumer = queue.consumer([Lane("m", "2")])
    while True:
        for job in await consumer.take(8):
            await running.free.wait()
            value = job.request.inputs["IN"].array
            if value.flat[0] == -1:
                job.fail(errors.InvalidArgument("no negative numbers"))
            else:
                job.reply(answer(job.request, OUT=tensor(value * 2)))


@pytest.fixture
async def gateway(redis_url: str) -> AsyncIterator[Running]:
    async with serving(redis_url) as running:
        yield running


# --- one job


@pytest.mark.parametrize("path", [ASYNC, "/v2/models/m/versions/2/infer?async=true"])
async def test_a_job_is_accepted_at_once_and_its_result_is_the_sync_answer(gateway: Running, path: str) -> None:
    sync = await gateway.call("POST", path.partition("?")[0], json=BODY)
    accepted = await gateway.call("POST", path, json=BODY)
    assert accepted.status_code == 202
    job = accepted.json()
    assert (job["model_name"], job["state"] in ("queued", "running", "done")) == ("m", True)
    location = accepted.headers["location"]
    await gateway.ended(location)
    result = await gateway.call("GET", location + "/result")
    assert (result.status_code, result.content) == (200, sync.content)
    assert result.headers["content-type"] == sync.headers["content-type"]
    whole = (await gateway.call("GET", location)).json()
    assert whole["result"] == sync.json()
    assert (whole["state"], whole["attempts"]) == ("done", 1)
    assert whole["created_at"] <= whole["started_at"] <= whole["finished_at"]
    assert whole["created_at"].endswith("Z")


@pytest.mark.parametrize("binary", [True, False])
async def test_binary_data_goes_in_and_comes_out_where_it_was_asked_for(gateway: Running, binary: bool) -> None:
    given = triton.InferInput("IN", [1, 2], "FP32")
    given.set_data_from_numpy(np.array([[1.5, 2.5]], "f4"), binary_data=binary)
    wanted = [triton.InferRequestedOutput("OUT", binary_data=binary)]
    body, length = triton.InferenceServerClient.generate_request_body([given], outputs=wanted)
    headers = {"Inference-Header-Content-Length": str(length)} if length is not None else {}
    sync = await gateway.call("POST", INFER, data=body, headers=headers)
    location = await gateway.submit(json=None, data=body, headers=headers)
    await gateway.ended(location)
    result = await gateway.call("GET", location + "/result")
    assert result.content == sync.content
    size = result.headers.get("inference-header-content-length")
    assert size == sync.headers.get("inference-header-content-length")
    parsed = triton.InferenceServerClient.parse_response_body(result.content, header_length=int(size) if size else None)
    assert parsed.as_numpy("OUT").tolist() == [[3.0, 5.0]]
    # In the job itself the answer's JSON is a member, and the binary data follows as ever.
    whole = await gateway.call("GET", location)
    head = whole.headers.get("inference-header-content-length")
    job = json.loads(whole.content[: int(head)] if head else whole.content)
    sent = json.loads(sync.content[: int(size)] if size else sync.content)
    assert job["result"] == sent
    if binary:
        assert head is not None
        assert np.frombuffer(whole.content[int(head) :], "f4").tolist() == [3.0, 5.0]


async def test_results_are_compressed_for_who_asks(gateway: Running) -> None:
    location = await gateway.submit()
    await gateway.ended(location)
    for path in (location, location + "/result"):
        reply = await gateway.call("GET", path, headers={"Accept-Encoding": "gzip"})
        assert reply.headers["content-encoding"] == "gzip"
        assert "OUT" in reply.text


async def test_before_it_is_done_there_is_a_state_and_no_result(gateway: Running) -> None:
    gateway.free.clear()
    location = await gateway.submit()
    job = await gateway.call("GET", location)
    assert job.json()["state"] in ("queued", "running")
    assert "result" not in job.json()
    early = await gateway.call("GET", location + "/result")
    assert (early.status_code, early.json()["id"]) == (202, job.json()["id"])
    gateway.free.set()
    await gateway.ended(location)


async def test_a_failed_job_has_the_error_that_the_sync_answer_has(gateway: Running) -> None:
    bad = {"inputs": [{**BODY["inputs"][0], "data": [-1, 0]}]}
    sync = await gateway.call("POST", INFER, json=bad)
    location = await gateway.submit(json=bad)
    assert (await gateway.ended(location))["state"] == "failed"
    result = await gateway.call("GET", location + "/result")
    assert (result.status_code, result.content) == (sync.status_code, sync.content) == (400, sync.content)
    job = await gateway.call("GET", location)
    assert job.status_code == 200
    assert (job.json()["error"], job.json()["error_type"], job.json()["error_status"]) == (
        "no negative numbers", "InvalidArgument", 400,
    )  # fmt: skip


async def test_cancelling_is_idempotent(gateway: Running) -> None:
    gateway.free.clear()
    location = await gateway.submit()
    for _ in range(2):
        reply = await gateway.call("DELETE", location)
        assert (reply.status_code, reply.json()["state"]) == (200, "cancelled")
    result = await gateway.call("GET", location + "/result")
    assert (result.status_code, "was cancelled" in result.json()["error"]) == (400, True)
    gateway.free.set()
    location = await gateway.submit()
    await gateway.ended(location)
    assert (await gateway.call("DELETE", location)).json()["state"] == "done"


# --- what is refused


@pytest.mark.parametrize(
    ("query", "body", "status", "words"),
    [
        ("async=1", {"inputs": []}, 400, "expected 1 inputs but got 0"),
        ("async=1", {"inputs": [{**BODY["inputs"][0], "shape": [2, 1]}]}, 400, "unexpected shape"),
        ("async=1", b"{", 500, "failed to parse"),
        ("async=2", BODY, 400, "'async' must be 1 or 0"),
        ("async=1&callback=http://evil.example/", BODY, 400, "not allowed"),
        ("async=1&callback=https://hooks.example:99/", BODY, 400, "not allowed"),
        ("async=1&callback=https://hooks.example@evil.example/", BODY, 400, "has a user"),
        ("async=1&callback=file:///etc/passwd", BODY, 400, "expected http://HOST"),
        ("&".join(f"a{n}=1" for n in range(20)), BODY, 400, "more than 16 parameters"),
    ],
)
async def test_what_cannot_be_a_job_is_refused_at_once(
    gateway: Running, query: str, body: Any, status: int, words: str
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body)
    reply = await gateway.call("POST", f"{INFER}?{query}", data=data)
    assert (reply.status_code, words in reply.json()["error"]) == (status, True), reply.text
    assert (await gateway.call("GET", "/v2/jobs")).json() == {"jobs": []}


async def test_an_unknown_model_is_refused_at_once(gateway: Running) -> None:
    reply = await gateway.call("POST", "/v2/models/none/infer?async=1", json=BODY)
    assert (reply.status_code, reply.json()["error"]) == (404, "Request for unknown model: 'none' is not found")


@pytest.mark.parametrize("query", ["async=0", "async=false", "other=1", "callback=x"])
async def test_other_queries_are_sync(gateway: Running, query: str) -> None:
    assert (await gateway.call("POST", f"{INFER}?{query}", json=BODY)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/jobs/" + "0" * 32, 404),
        ("DELETE", "/v2/jobs/" + "0" * 32, 404),
        ("GET", "/v2/jobs/" + "0" * 32 + "/events", 404),
        ("GET", "/v2/jobs/" + "0" * 32 + "/result", 404),
        ("GET", "/v2/jobs/" + "0" * 32 + "/other", 404),
        ("GET", "/v2/jobs/", 404),
        ("GET", "/v2/jobs/nonsense", 404),
        ("GET", "/v2/jobsx", 404),
        ("POST", "/v2/jobs", 405),
        ("DELETE", "/v2/jobs", 405),
        ("PUT", "/v2/jobs/" + "0" * 32, 405),
        ("DELETE", "/v2/jobs/" + "0" * 32 + "/result", 405),
        ("GET", "/v2/jobs?state=no", 400),
        ("GET", "/v2/jobs?limit=0", 400),
        ("GET", "/v2/jobs?limit=x", 400),
        ("GET", "/v2/jobs?limit=10000", 400),
    ],
)
async def test_paths_that_are_none(gateway: Running, method: str, path: str, status: int) -> None:
    reply = await gateway.call(method, path)
    assert (reply.status_code, list(reply.json())) == (status, ["error"])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", ASYNC),
        ("POST", "/v2/models/m/versions/2/infer?async=1"),
        ("GET", "/v2/jobs"),
        ("GET", "/v2/jobs/" + "0" * 32),
        ("GET", "/v2/jobs/" + "0" * 32 + "/events"),
        ("GET", "/v2/jobs/" + "0" * 32 + "/result"),
        ("DELETE", "/v2/jobs/" + "0" * 32),
    ],
)
async def test_with_the_memory_queue_the_answer_is_501_and_the_remedy(method: str, path: str) -> None:
    async with serving(None) as running:
        reply = await running.call(method, path, json=BODY if method == "POST" else None)
        assert reply.status_code == 501
        assert "--queue redis://" in reply.json()["error"]
        assert "--queue embedded" in reply.json()["error"]
        assert (await running.call("POST", INFER, json=BODY)).status_code == 200


async def test_limits_hold_for_jobs_too(redis_url: str) -> None:
    async with serving(
        redis_url, runs=False, limits=HttpLimits(max_request_bytes=400), store=StoreOptions(max_jobs=1)
    ) as running:
        large = {**BODY, "id": "x" * 400}
        assert (await running.call("POST", ASYNC, json=large)).status_code == 400
        await running.submit()
        reply = await running.call("POST", ASYNC, json=BODY)
        assert reply.status_code == 429
        assert "--max-jobs" in reply.json()["error"]
        assert reply.headers["retry-after"]


# --- many jobs, many callers


async def test_jobs_are_listed_by_state(redis_url: str) -> None:
    async with serving(redis_url, runs=False) as running:
        paths = [await running.submit() for _ in range(3)]
        await running.call("DELETE", paths[1])

        async def listed(query: str) -> list[str]:
            reply = await running.call("GET", "/v2/jobs" + query)
            return ["/v2/jobs/" + job["id"] for job in reply.json()["jobs"]]

        assert await listed("") == paths[::-1]
        assert await listed("?state=queued") == [paths[2], paths[0]]
        assert await listed("?state=queued&limit=1") == [paths[2]]
        assert await listed("?state=cancelled") == [paths[1]]
        positions = [(await running.call("GET", path)).json().get("position") for path in paths]
        assert positions == [1, None, 2]


async def test_tenants_do_not_meet(redis_url: str) -> None:
    tokens = Tokens({SIXTEEN[0]: "a", SIXTEEN[1]: "b"})
    ours, theirs = ({"Authorization": f"Bearer {token}"} for token in SIXTEEN)
    async with serving(redis_url, tokens=tokens) as running:
        assert (await running.call("POST", ASYNC, json=BODY)).status_code == 401
        assert (await running.call("GET", "/v2/jobs")).status_code == 401
        path = await running.submit(headers=ours)
        await running.ended(path, headers=ours)
        for method, suffix in (("GET", ""), ("GET", "/result"), ("GET", "/events"), ("DELETE", "")):
            assert (await running.call(method, path + suffix, headers=theirs)).status_code == 404
            assert (await running.call(method, path + suffix)).status_code == 401
        assert (await running.call("GET", "/v2/jobs", headers=theirs)).json() == {"jobs": []}
        assert len((await running.call("GET", "/v2/jobs", headers=ours)).json()["jobs"]) == 1


async def test_an_idempotency_key_makes_one_job_of_repeats(gateway: Running) -> None:
    key = {"Idempotency-Key": "order-17"}
    assert await gateway.submit(headers=key) == await gateway.submit(headers=key)
    other = {"inputs": [{**BODY["inputs"][0], "data": [5, 6]}]}
    reply = await gateway.call("POST", ASYNC, json=other, headers=key)
    assert (reply.status_code, "Idempotency-Key" in reply.json()["error"]) == (409, True)


# --- events


async def test_events_tell_each_change_in_order_and_then_the_end(redis_url: str) -> None:
    async with serving(redis_url, runs=False) as running:
        path = await running.submit()
        assert running.jobs is not None
        with await running.call("GET", path + "/events", stream=True) as stream:
            assert stream.headers["content-type"] == "text/event-stream"
            lines = stream.iter_lines(decode_unicode=True)
            first = [await asyncio.to_thread(next, lines) for _ in range(3)]
            assert (first[0], json.loads(first[2].removeprefix("data: "))["state"]) == ("event: state", "queued")
            async with JobRunner(
                running.jobs.store, running.jobs.feed, _echo, lambda *_: CONFIG, options=RunnerOptions(lease=2)
            ):
                rest = await asyncio.to_thread(lambda: "\n".join(lines))
        told = events(rest)
        assert [(name, data["state"]) for name, data in told] == [
            ("state", "running"), ("state", "done"), ("end", "done"),
        ]  # fmt: skip


async def _echo(request):
    yield answer(request, OUT=request.inputs["IN"])


async def test_a_client_that_leaves_frees_everything(redis_url: str) -> None:
    async with serving(redis_url, runs=False) as running:
        path = await running.submit()
        assert running.jobs is not None
        streams = []
        for _ in range(5):
            stream = await running.call("GET", path + "/events", stream=True)
            lines = stream.iter_lines()
            await asyncio.to_thread(next, lines)
            streams.append((stream, lines))  # without its iterator the stream would be closed
        assert running.jobs.feed.subscribers == 5
        for stream, _ in streams:
            stream.close()
        feed = running.jobs.feed
        await until(lambda: not feed.subscribers)


async def test_a_stop_does_not_wait_for_watchers(redis_url: str) -> None:
    async with serving(redis_url, runs=False) as running:
        path = await running.submit()
        stream = await running.call("GET", path + "/events", stream=True)
        lines = stream.iter_lines()
        await asyncio.to_thread(next, lines)
    rest = [line async for line in _read(lines)]
    assert rest[0].startswith(b"id: ")
    assert b"event: end" not in rest  # the job has not ended: a client is to connect again


async def _read(lines: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (line := await asyncio.to_thread(next, lines, None)) is not None:
        yield line


# --- gRPC


@pytest.mark.parametrize("implementation", ["grpcio", "native"])
async def test_grpc_clients_have_jobs_by_parameters(redis_url: str, implementation: str) -> None:
    async with serving(redis_url, implementation=implementation) as running:
        running.free.clear()
        async with triton_grpc.InferenceServerClient(running.grpc_url) as client:
            given = triton_grpc.InferInput("IN", [1, 2], "FP32")
            given.set_data_from_numpy(np.array([[1.5, 2.5]], "f4"))
            accepted = (await client.infer("m", [given], request_id="9", parameters={"async": True})).get_response()
            assert (accepted.id, len(accepted.outputs)) == ("9", 0)
            job = accepted.parameters["job_id"].string_param
            assert accepted.parameters["job_state"].string_param in ("queued", "running")
            asked = (await client.infer("m", [], parameters={"job_id": job})).get_response()
            assert asked.parameters["job_state"].string_param in ("queued", "running")
            running.free.set()
            await running.ended(f"/v2/jobs/{job}")
            done = await client.infer("m", [], parameters={"job_id": job})
            assert done.as_numpy("OUT").tolist() == [[3.0, 5.0]]
            assert done.get_response().parameters["job_state"].string_param == "done"
            assert done.get_response().id == "9"
            # HTTP has the same job, its outputs binary as on gRPC.
            whole = await running.call("GET", f"/v2/jobs/{job}/result")
            assert (
                whole.content[int(whole.headers["inference-header-content-length"]) :]
                == np.array([3, 5], "f4").tobytes()
            )


async def test_grpc_errors_and_cancels(redis_url: str) -> None:
    async with serving(redis_url) as running, grpc.aio.insecure_channel(running.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        running.free.clear()
        accepted = await stub.ModelInfer(message(**{"async": True}))
        look = message(job_cancel=True)
        look.parameters["job_id"].string_param = accepted.parameters["job_id"].string_param
        assert (await stub.ModelInfer(look)).parameters["job_state"].string_param == "cancelled"
        del look.parameters["job_cancel"]
        assert (await failure(stub.ModelInfer(look)))[0] is grpc.StatusCode.CANCELLED
        look.parameters["job_id"].string_param = "0" * 32
        assert (await failure(stub.ModelInfer(look)))[0] is grpc.StatusCode.NOT_FOUND
        bad = message()
        bad.parameters["async"].string_param = "yes"
        assert (await failure(stub.ModelInfer(bad)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await failure(stub.ModelInfer(message(model="none", **{"async": True}))))[0] is (
            grpc.StatusCode.NOT_FOUND
        )
        running.free.set()
        assert (await stub.ModelInfer(message(**{"async": False}))).outputs[0].name == "OUT"


async def test_a_grpc_submission_that_is_repeated_under_its_key_is_one_job(redis_url: str) -> None:
    async with serving(redis_url) as running, grpc.aio.insecure_channel(running.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        key = (("idempotency-key", "order-17"),)
        answers = [await stub.ModelInfer(message(**{"async": True}), metadata=key) for _ in range(2)]
        assert len({each.parameters["job_id"].string_param for each in answers}) == 1


async def test_grpc_streams_have_jobs_too(redis_url: str) -> None:
    async with serving(redis_url) as running, grpc.aio.insecure_channel(running.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def asks():
            yield message("1", **{"async": True})

        answers = [each async for each in stub.ModelStreamInfer(asks())]
        assert [each.infer_response.parameters["job_state"].string_param for each in answers] == ["queued"]


async def test_grpc_with_the_memory_queue_is_unimplemented_with_the_remedy() -> None:
    async with serving(None) as running, grpc.aio.insecure_channel(running.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        code, text = await failure(stub.ModelInfer(message(**{"async": True})))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert "--queue embedded" in text


# --- any ASGI server


async def test_the_fastapi_application_has_the_same_routes(redis_url: str) -> None:
    import httpx

    async with serving(redis_url) as running:
        described = (await running.call("GET", "/openapi.json")).json()["paths"]
        assert {"/v2/jobs", "/v2/jobs/{job}", "/v2/jobs/{job}/result", "/v2/jobs/{job}/events"} <= set(described)
        assert set(described["/v2/jobs/{job}"]) == {"get", "delete"}
        app = HttpApp(*_parts(running))
        asgi = await app._build()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(asgi), base_url="http://x") as client:
            accepted = await client.post(ASYNC, json=BODY)
            assert accepted.status_code == 202
            told = events((await client.get(accepted.headers["location"] + "/events")).text)
            assert told[-1][0] == "end"
            whole = (await client.get(accepted.headers["location"])).json()
            assert whole["result"]["outputs"][0]["data"] == [2.0, 4.0]
            assert (await client.delete(accepted.headers["location"])).json()["state"] == "done"


def _parts(running: Running) -> tuple[Any, ...]:
    assert running.jobs is not None
    service = running.jobs._check.__self__
    return service, service.infer, None, None, running.jobs
