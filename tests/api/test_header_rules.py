"""Restricted APIs and forwarded headers, as unmodified clients meet them."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http.aio as http_aio
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig as Proto
from tritonclient.utils import InferenceServerException

from gateway.config.restricted import APIS, checked_pattern, read_restricted
from gateway.queues.base import Lane, PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.transport.grpc import GrpcOptions, GrpcServer
from gateway.transport.header_rules import HeaderRules
from gateway.transport.http import HttpApp, HttpServer
from gateway.types import InferRequest, InferResponse
from tests.support import answer, background, model_config

PROTO = """name: "m" backend: "fake" max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: 2 } output { name: "OUT" data_type: TYPE_FP32 dims: 2 }"""
CONFIG = replace(model_config(), proto=text_format.Parse(PROTO, Proto()))
BODY = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


@dataclass
class Served:
    http: http_aio.InferenceServerClient
    grpc: grpc_aio.InferenceServerClient
    url: str
    address: str
    asked: list[InferRequest] = field(default_factory=list)


@asynccontextmanager
async def serving(http: HeaderRules, rpc: HeaderRules, *, native: bool = True) -> AsyncIterator[Served]:
    queue = MemoryQueue()
    queue.publish(PoolState("m", (VersionState("1", "READY", config=CONFIG),)))

    async def names() -> list[str]:
        return ["m"]

    async def work() -> None:
        consumer = queue.consumer([Lane("m", "1")])
        while True:
            for job in await consumer.take(1):
                job.reply(answer(job.request, OUT=job.request.inputs["IN"]))

    async def infer(request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        served.asked.append(request)
        async with aclosing(service.infer(request)) as responses:
            async for response in responses:
                yield response

    service = Service(queue, Statistics(), names, ServiceOptions(explicit_control=True))
    service.start()
    app = HttpApp(service, infer, rules=http)
    grpc_server = GrpcServer(service, infer, None, GrpcOptions(port=0, rules=rpc, native=native))
    async with background(work()), app, HttpServer(app, "127.0.0.1", 0) as server, grpc_server:
        address = f"127.0.0.1:{grpc_server.port}"
        clients = (
            http_aio.InferenceServerClient(f"127.0.0.1:{server.port}"),
            grpc_aio.InferenceServerClient(address),
        )
        async with clients[0], clients[1]:
            served = Served(*clients, f"http://127.0.0.1:{server.port}", address)
            yield served


def rules(*restricted: str, pattern: str = "", grpc: bool = False) -> HeaderRules:
    return HeaderRules.of(restricted, pattern, grpc=grpc)


def inputs(module: Any) -> list[Any]:
    tensor = module.InferInput("IN", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 2), "f4"))
    return [tensor]


PATHS = [
    ("GET", "/v2/health/live", "health"),
    ("GET", "/v2/health/ready", "health"),
    ("GET", "/v2/models/m/ready", "health"),
    ("GET", "/v2", "metadata"),
    ("GET", "/v2/models/m", "metadata"),
    ("GET", "/v2/models/m/versions/1", "metadata"),
    ("GET", "/docs", "metadata"),
    ("POST", "/v2/models/m/infer", "inference"),
    ("POST", "/v2/models/m/versions/1/infer", "inference"),
    ("POST", "/v2/models/m/generate", "inference"),
    ("POST", "/v2/models/m/versions/1/generate_stream", "inference"),
    ("GET", "/v2/jobs", "inference"),
    ("GET", "/v2/models/m/config", "model-config"),
    ("GET", "/v2/models/stats", "statistics"),
    ("GET", "/v2/models/m/stats", "statistics"),
    ("GET", "/v2/models/m/explain", "statistics"),
    ("POST", "/v2/repository/index", "model-repository"),
    ("POST", "/v2/repository/models/m/unload", "model-repository"),
    ("GET", "/v2/logging", "logging"),
    ("GET", "/v2/trace/setting", "trace"),
    ("GET", "/v2/models/m/trace/setting", "trace"),
    ("GET", "/v2/systemsharedmemory/status", "shared-memory"),
    ("POST", "/v2/cudasharedmemory/region/x/register", "shared-memory"),
]


async def test_http_apis_want_their_header() -> None:
    """Each its own, and no other's."""
    every = [f"{api}:{api}-key=sesame" for api in APIS]
    async with serving(rules(*every), rules()) as served, httpx.AsyncClient() as client:
        for method, path, api in PATHS:
            own = f"{api}-key"
            others = {f"{other}-key": "sesame" for other in APIS if other != api}
            for headers in ({}, {own: "wrong"}, others):
                refused = await client.request(method, served.url + path, headers=headers, json=BODY)
                assert refused.status_code == 403, path
                assert refused.json() == {"error": f"This API is restricted, expecting header '{own}'"}
            if not path.endswith("unload"):  # nobody is there to do it
                let_in = await client.request(method, served.url + path, headers={own.title(): "sesame"}, json=BODY)
                assert let_in.status_code != 403, path


CALLS: list[tuple[str, Callable[[Any, dict[str, str]], Any]]] = [
    ("health", lambda client, headers: client.is_server_live(headers=headers)),
    ("health", lambda client, headers: client.is_server_ready(headers=headers)),
    ("health", lambda client, headers: client.is_model_ready("m", headers=headers)),
    ("metadata", lambda client, headers: client.get_server_metadata(headers=headers)),
    ("metadata", lambda client, headers: client.get_model_metadata("m", headers=headers)),
    ("inference", lambda client, headers: client.infer("m", inputs(grpc_aio), headers=headers)),
    ("model-config", lambda client, headers: client.get_model_config("m", headers=headers)),
    ("model-repository", lambda client, headers: client.get_model_repository_index(headers=headers)),
    ("statistics", lambda client, headers: client.get_inference_statistics(headers=headers)),
    ("trace", lambda client, headers: client.get_trace_settings(headers=headers)),
    ("logging", lambda client, headers: client.get_log_settings(headers=headers)),
]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("api", "call"), CALLS)
async def test_grpc_protocols_want_their_metadata(api: str, call: Callable[..., Any], native: bool) -> None:
    name = "triton-grpc-protocol-admin-key"
    async with serving(rules(), rules(f"{api}:Admin-Key=sesame", grpc=True), native=native) as served:
        for headers in ({}, {name: "wrong"}, {"admin-key": "sesame"}):
            with pytest.raises(InferenceServerException) as raised:
                await call(served.grpc, headers)
            assert raised.value.status() == "StatusCode.UNAVAILABLE"
            assert raised.value.message() == f"This protocol is restricted, expecting header '{name}'"
        assert await call(served.grpc, {name: "sesame"})


async def test_streams_and_the_health_protocol_are_restricted_too() -> None:
    guarded = rules("inference,health,shared-memory:k=v", grpc=True)

    async def asked() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "m", "inputs": inputs(grpc_aio)}

    async with serving(rules(), guarded) as served:
        with pytest.raises(grpc.aio.AioRpcError, match="This protocol is restricted"):
            async for _ in served.grpc.stream_infer(asked()):
                pass
        with pytest.raises(InferenceServerException, match="This protocol is restricted"):
            await served.grpc.get_system_shared_memory_status()
        async for result, error in served.grpc.stream_infer(asked(), headers={"triton-grpc-protocol-k": "v"}):
            assert error is None
            assert result is not None
        async with grpc.aio.insecure_channel(served.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            with pytest.raises(grpc.aio.AioRpcError, match="This protocol is restricted"):
                await check(health_pb2.HealthCheckRequest())
            told = await check(health_pb2.HealthCheckRequest(), metadata=(("triton-grpc-protocol-k", "v"),))
            assert told.status == health_pb2.HealthCheckResponse.SERVING


SENT = {"my_header_1": "a", "My_Header_2": "b", "other": "c"}


@pytest.mark.parametrize("pattern", ["my_header.*", "MY_HEADER.*", "(?-i)my_header.*"])
async def test_headers_become_parameters(pattern: str) -> None:
    forward = rules(pattern=pattern)
    async with serving(forward, forward) as served, httpx.AsyncClient() as client:
        await served.http.infer("m", inputs(http_aio), headers=dict(SENT), parameters={"own": 1})
        lower = {key.lower(): value for key, value in SENT.items()}
        await served.grpc.infer("m", inputs(grpc_aio), headers=lower, parameters={"own": 1})
        await client.post(f"{served.url}/v2/models/m/generate", json={"IN": [1, 2], "own": 1}, headers=dict(SENT))
        wanted = {"own": 1, "my_header_1": "a", "my_header_2": "b"}
        assert [dict(request.parameters) for request in served.asked] == [wanted] * 3


async def test_without_a_pattern_no_header_is_a_parameter() -> None:
    async with serving(rules("health:k=v"), rules("health:k=v", grpc=True)) as served:
        await served.http.infer("m", inputs(http_aio), headers=dict(SENT))
        await served.grpc.infer("m", inputs(grpc_aio), headers={"my_header_1": "a"})
        assert [dict(request.parameters) for request in served.asked] == [{}, {}]


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        (["health"], "expected API,API,...:KEY=VALUE"),
        (["health:key"], "expected API,API,...:KEY=VALUE"),
        (["health:key="], "expected API,API,...:KEY=VALUE"),
        (["health:a b=c"], "expected API,API,...:KEY=VALUE"),
        (["everything:k=v"], "'everything' is no group of APIs"),
        (["health,trace:k=v", "trace:k=v"], "'trace' is restricted twice"),
    ],
)
def test_bad_restrictions_are_refused(entries: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_restricted(entries)


def test_a_value_may_have_signs_of_its_own() -> None:
    assert read_restricted(["health,trace:k=a=b:c,d"]) == {"health": ("k", "a=b:c,d"), "trace": ("k", "a=b:c,d")}


def test_a_bad_pattern_is_refused() -> None:
    assert checked_pattern("(?-i)a.*") == "(?-i)a.*"
    with pytest.raises(ValueError, match="it is no regular expression"):
        checked_pattern("(")


@pytest.mark.parametrize("traced", [True, False])
async def test_the_trace_context_is_read_where_spans_are_made(traced: bool) -> None:
    ruled = HeaderRules.of((), "", traced=traced)
    sent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1", "x": "y"}
    async with serving(ruled, ruled) as served, httpx.AsyncClient() as client:
        await served.http.infer("m", inputs(http_aio), headers=dict(sent))
        await served.grpc.infer("m", inputs(grpc_aio), headers=dict(sent))
        await client.post(f"{served.url}/v2/models/m/generate", json={"IN": [1, 2]}, headers=sent)
        del sent["x"]
        assert [dict(request.trace_context) for request in served.asked] == [sent if traced else {}] * 3
