"""Refusals, tenants and deadlines as clients see them: the same over HTTP, `grpc.aio` and the native front."""

import asyncio
import http.client
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Any, get_args

import grpc
import pytest
import requests
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from gateway.queues.base import PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.scheduling.base import Refusal, RefusalReason
from gateway.scheduling.refusals import refused
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.transport.auth import Callers, Tokens
from gateway.transport.grpc import GrpcOptions, GrpcServer
from gateway.transport.http import HttpApp, HttpServer
from gateway.types import InferRequest, InferResponse
from tests.api.grpc_support import IMPLEMENTATIONS
from tests.support import answer, model_config

TOKEN = "t" * 16
BODY = json.dumps({"id": "r", "inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]})
ANSWERS = {  # reason: (HTTP status, gRPC status, text)
    "overload": (429, "RESOURCE_EXHAUSTED", "why"),
    "shed": (429, "RESOURCE_EXHAUSTED", "why"),
    "deadline": (504, "DEADLINE_EXCEEDED", "why"),
    "expired": (504, "DEADLINE_EXCEEDED", "why"),
    "queue_full": (503, "UNAVAILABLE", "[request id: r] Exceeds maximum queue size"),
    "queue_timeout": (503, "UNAVAILABLE", "Request timeout expired"),
}


@dataclass
class Wires:
    """A server of both wires whose endpoint refuses as `refusals` say, in turn, and else echoes."""

    http: str
    grpc: str
    refusals: list[Refusal] = field(default_factory=list)
    seen: list[InferRequest] = field(default_factory=list)

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        self.seen.append(request)
        if self.refusals:
            raise refused(self.refusals.pop(0), request.id)
        yield answer(request, OUT=request.inputs["IN"])

    async def post(self, **headers: str) -> requests.Response:
        url = f"{self.http}/v2/models/m/infer"
        return await asyncio.to_thread(requests.post, url, data=BODY, headers=headers, timeout=10)

    def post_pairs(self, *headers: tuple[str, str]) -> int:
        """The status of a request with these headers, each as often as it is given."""
        connection = http.client.HTTPConnection(self.http.removeprefix("http://"), timeout=10)
        with closing(connection):
            connection.putrequest("POST", "/v2/models/m/infer")
            for name, value in (("content-length", str(len(BODY))), *headers):
                connection.putheader(name, value)
            connection.endheaders(BODY.encode())
            return connection.getresponse().status

    @asynccontextmanager
    async def stub(self, *options: tuple[str, Any]) -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(self.grpc, options=options) as channel:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def fail(self) -> grpc.aio.AioRpcError:
        async with self.stub() as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(message())
        return caught.value


def message() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", id="r", raw_input_contents=[bytes(8)])
    request.inputs.add(name="IN", datatype="FP32", shape=[1, 2])
    return request


@asynccontextmanager
async def serving(implementation: str, callers: Callers) -> AsyncIterator[Wires]:
    queue = MemoryQueue()
    queue.publish(PoolState("m", (VersionState("1", "READY", config=model_config()),)))

    async def names() -> list[str]:
        return ["m"]

    service = Service(queue, Statistics(), names, ServiceOptions())
    wires = Wires("", "")
    options = GrpcOptions(port=0, native=implementation == "native")
    async with (
        HttpApp(service, wires.infer, callers=callers) as app,
        HttpServer(app, "127.0.0.1", 0) as http_server,
        GrpcServer(service, wires.infer, callers.tenant, options) as server,
    ):
        wires.http, wires.grpc = f"http://127.0.0.1:{http_server.port}", f"127.0.0.1:{server.port}"
        yield wires


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        pytest.importorskip("pygrpc_native")
    return request.param


@pytest.fixture
async def wires(implementation: str) -> AsyncIterator[Wires]:
    async with serving(implementation, Callers(header="X-Tenant")) as wires:
        yield wires


def retry_delay(error: grpc.aio.AioRpcError) -> float:
    """Seconds of the RetryInfo, read as grpcio's own helper does, which checks code and text too."""
    status = rpc_status.from_call(error)
    assert status is not None
    (detail,) = status.details
    info = error_details_pb2.RetryInfo()
    assert detail.Unpack(info)
    return info.retry_delay.ToNanoseconds() / 1e9


# --- refusals


@pytest.mark.parametrize("reason", get_args(RefusalReason))
async def test_a_refusal_means_the_same_on_both_wires(wires: Wires, implementation: str, reason: RefusalReason) -> None:
    status, code, text = ANSWERS[reason]
    wires.refusals = [Refusal(reason, "why", 1.2501)] * 2
    over_http = await wires.post()
    assert (over_http.status_code, over_http.json()) == (status, {"error": text})
    assert over_http.headers["content-type"] == "application/json"
    assert (over_http.headers["retry-after"], over_http.headers["retry-after-ms"]) == ("2", "1251")
    error = await wires.fail()
    assert (error.code().name, error.details()) == (code, text)
    trailers = dict(error.trailing_metadata())
    assert trailers["retry-after-ms"] == "1251"
    # The native front sends no key that gRPC reserves for itself.
    assert trailers.get("grpc-retry-pushback-ms") == (None if implementation == "native" else "1251")
    assert retry_delay(error) == 1.251


async def test_nothing_is_said_of_trying_again_when_nobody_knows(wires: Wires) -> None:
    wires.refusals = [Refusal("overload", "why")] * 2
    headers = (await wires.post()).headers
    assert not {"retry-after", "retry-after-ms"} & headers.keys()
    trailers = dict((await wires.fail()).trailing_metadata())
    assert not {"grpc-retry-pushback-ms", "grpc-status-details-bin", "retry-after-ms"} & trailers.keys()


async def test_the_least_wait_is_not_zero(wires: Wires) -> None:
    wires.refusals = [Refusal("shed", "why", 0.0)] * 2
    headers = (await wires.post()).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "1")
    assert retry_delay(await wires.fail()) == 0.001


async def test_a_grpc_client_that_retries_by_itself_waits_as_told() -> None:
    policy = {
        "maxAttempts": 2, "initialBackoff": "1000s", "maxBackoff": "1000s", "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }  # fmt: skip
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    async with serving("grpcio", Callers()) as wires:
        wires.refusals = [Refusal("overload", "why", 0.01)]
        async with wires.stub(("grpc.service_config", config)) as stub:
            assert (await stub.ModelInfer(message())).id == "r"
    assert len(wires.seen) == 2


async def test_a_stream_says_it_in_the_answer(wires: Wires) -> None:
    wires.refusals = [Refusal("overload", "too much"), Refusal("shed", "too much", 0.5)]
    async with wires.stub() as stub:
        stream = stub.ModelStreamInfer(iter([message()] * 3))
        silent, told, served = [await stream.read() for _ in range(3)]
    assert silent.error_message == "too much"
    assert "retry_after_ms" not in silent.infer_response.parameters
    assert told.error_message == "too much (retry after 500 ms)"
    assert told.infer_response.id == "r"
    assert told.infer_response.parameters["retry_after_ms"].int64_param == 500
    assert not served.error_message


async def test_a_stream_that_fails_whole_says_it_in_the_trailers(wires: Wires) -> None:
    wires.refusals = [Refusal("overload", "too much", 0.5)]
    async with wires.stub() as stub:
        stream = stub.ModelStreamInfer(iter([message()]), metadata=[("triton_grpc_error", "true")])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    assert (caught.value.code().name, caught.value.details()) == ("RESOURCE_EXHAUSTED", "too much")
    assert retry_delay(caught.value) == 0.5


# --- tenants


async def tenants(wires: Wires, *metadata: tuple[str, str]) -> list[str]:
    """Who both wires say the request is from, HTTP first, then unary and streamed gRPC."""
    assert await asyncio.to_thread(wires.post_pairs, *metadata) == 200
    async with wires.stub() as stub:
        await stub.ModelInfer(message(), metadata=metadata)
        await stub.ModelStreamInfer(iter([message()]), metadata=metadata).read()
    return [each.tenant for each in wires.seen]


async def test_the_trusted_header_names_the_tenant(wires: Wires) -> None:
    assert await tenants(wires, ("x-tenant", "acme")) == ["acme"] * 3


async def test_the_first_of_two_counts(wires: Wires) -> None:
    assert await tenants(wires, ("x-tenant", "acme"), ("x-tenant", "evil")) == ["acme"] * 3


async def test_without_the_header_it_is_the_default_tenant(wires: Wires) -> None:
    assert await tenants(wires) == [""] * 3


async def test_a_tenant_too_long_is_refused(wires: Wires) -> None:
    text = "the header 'x-tenant' must name a tenant in at most 128 printable characters, got 129"
    over_http = await wires.post(**{"x-tenant": "a" * 129})
    assert (over_http.status_code, over_http.json()) == (400, {"error": text})
    async with wires.stub() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(message(), metadata=[("x-tenant", "a" * 129)])
    assert (caught.value.code().name, caught.value.details()) == ("INVALID_ARGUMENT", text)
    assert wires.seen == []


async def test_no_header_is_believed_unless_it_was_named(implementation: str) -> None:
    async with serving(implementation, Callers()) as wires:
        assert await tenants(wires, ("x-tenant", "acme")) == [""] * 3


async def test_a_token_says_more_than_the_header(implementation: str) -> None:
    async with serving(implementation, Callers(Tokens({TOKEN: "alice"}), "x-tenant")) as wires:
        metadata = (("authorization", f"Bearer {TOKEN}"), ("x-tenant", "bob"))
        assert await tenants(wires, *metadata) == ["alice"] * 3


# --- deadlines


async def test_the_earliest_deadline_wins(wires: Wires) -> None:
    before = time.monotonic()
    await wires.post(**{"x-request-timeout-ms": "60000"})
    async with wires.stub() as stub:
        short, long = [("x-request-timeout-ms", "60000")], [("x-request-timeout-ms", "600000")]
        await stub.ModelInfer(message(), metadata=short, timeout=300)
        await stub.ModelInfer(message(), metadata=long, timeout=60)
        await stub.ModelInfer(message(), metadata=short)
        await stub.ModelInfer(message(), timeout=60)
        await stub.ModelStreamInfer(iter([message()]), metadata=short, timeout=300).read()
        await stub.ModelStreamInfer(iter([message()]), metadata=long, timeout=60).read()
    left = [each.deadline - before for each in wires.seen if each.deadline is not None]
    assert len(left) == 7
    # The test's own limit bounds how late any of them was sent.
    assert all(59 < each < 85 for each in left), left


async def test_without_any_there_is_none(wires: Wires) -> None:
    await wires.post()
    async with wires.stub() as stub:
        await stub.ModelInfer(message())
    assert [each.deadline for each in wires.seen] == [None, None]
