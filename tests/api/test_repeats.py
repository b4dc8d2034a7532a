"""Repeated requests as clients send them: `Idempotency-Key` on both wires, and the response cache, on the real app."""

import asyncio
import http.client
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import requests
import tritonclient.grpc.aio as triton
import tritonclient.http
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from gateway.app import Gateway, running
from gateway.config.settings import Settings
from gateway.engines.fake import Gate
from gateway.middleware.idempotency import idempotency
from gateway.middleware.store import MemoryStore
from gateway.service import Service
from gateway.transport.auth import Callers
from gateway.transport.http import HttpLimits
from gateway.transport.http.endpoint import InferEndpoint
from gateway.transport.http.routes import build
from gateway.types import InferRequest
from tests.api.grpc_support import IMPLEMENTATIONS, inputs, message, serving
from tests.support import until

CONFIG = """backend: "fake" max_batch_size: 8 {more}
dynamic_batching {{ default_queue_policy {{ max_queue_size: 99 }} }}
input {{ name: "IN" data_type: TYPE_FP32 dims: 2 }} output {{ name: "OUT" data_type: TYPE_FP32 dims: 2 }}
parameters {{ key: "gate" value {{ string_value: "{gate}" }} }}"""
CACHED = "response_cache { enable: true }"
KEY = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}


def body(value: float = 1.0, **more: Any) -> bytes:
    tensor = {"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [value, value]}
    return json.dumps({"inputs": [tensor], **more}).encode()


@dataclass
class App:
    """The whole gateway in this process, and the gate that its models wait at while somebody holds it."""

    gateway: Gateway
    gate: Path

    async def post(self, model: str, data: bytes, **headers: str) -> requests.Response:
        url = f"http://127.0.0.1:{self.gateway.ports['http']}/v2/models/{model}/infer"
        return await asyncio.to_thread(requests.post, url, data=data, headers=headers, timeout=15)

    async def stats(self, model: str) -> dict[str, Any]:
        (entry,) = await self.gateway.service.statistics(model)
        return {"inferences": entry["inference_count"]} | {
            name: duration["count"] for name, duration in entry["inference_stats"].items()
        }

    async def metrics(self) -> str:
        url = f"http://127.0.0.1:{self.gateway.ports['metrics']}/metrics"
        return (await asyncio.to_thread(requests.get, url, timeout=15)).text


@asynccontextmanager
async def serving_app(folder: Path, **more: Any) -> AsyncIterator[App]:
    gate = folder / "gate"
    for name, config in (("plain", ""), ("cached", CACHED)):
        (folder / "models" / name / "1").mkdir(parents=True, exist_ok=True)
        (folder / "models" / name / "config.pbtxt").write_text(CONFIG.format(more=config, gate=gate))
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    settings = Settings(model_repository=(folder / "models",), response_cache_bytes=1 << 20, **ports, **more)
    async with running(settings) as gateway:
        await gateway.loaded.wait()
        yield App(gateway, gate)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with serving_app(tmp_path) as made:
        yield made


# --- Idempotency-Key


async def test_a_key_gives_one_result_over_http(app: App) -> None:
    before = await app.stats("plain")
    first = await app.post("plain", body(id="a"), **KEY)
    again = await app.post("plain", body(id="b"), **KEY)
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json()["outputs"] == again.json()["outputs"]
    assert (first.json()["id"], again.json()["id"]) == ("a", "b")
    after = await app.stats("plain")
    assert after["inferences"] - before["inferences"] == 1
    assert after["success"] - before["success"] == 2


async def test_another_body_under_a_key_is_409_byte_for_byte(app: App) -> None:
    assert (await app.post("plain", body(), **KEY)).status_code == 200

    def raw() -> tuple[int, str | None, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", app.gateway.ports["http"], timeout=15)) as connection:
            connection.request("POST", "/v2/models/plain/infer", body(2.0), KEY)
            answer = connection.getresponse()
            return answer.status, answer.headers["content-type"], answer.read()

    status, kind, text = await asyncio.to_thread(raw)
    assert (status, kind) == (409, "application/json")
    assert json.loads(text) == {
        "error": "this Idempotency-Key was used before with other inputs, outputs or parameters; give each request a "
        "key of its own, and repeat a request as it was"
    }
    assert 'gateway_requests_refused_total{model="plain",version="1",reason="conflict"} 1' in await app.metrics()


async def test_a_repeat_joins_over_the_other_wire_and_outlives_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[InferRequest] = []
    prepare = Service.prepare
    monkeypatch.setattr(Service, "prepare", lambda self, request: seen.append(request) or prepare(self, request))
    async with (
        serving_app(tmp_path) as app,
        Gate(app.gate) as gate,
        triton.InferenceServerClient(f"127.0.0.1:{app.gateway.ports['grpc']}") as client,
        asyncio.TaskGroup() as tasks,
    ):
        first = tasks.create_task(client.infer("plain", inputs(size=2), headers={"idempotency-key": "k"}))
        run = await gate.arrival()
        repeat = tasks.create_task(app.post("plain", body(), **{"Idempotency-Key": "k"}))
        await until(lambda: len(seen) == 3)  # the first twice: by the key, and as it was submitted
        first.cancel()
        await until(lambda: len(seen) == 4)  # the repeat takes over
        run.release()
        (await gate.arrival()).release()
        assert (await repeat).json()["outputs"][0]["data"] == [1, 1]
        assert (await app.stats("plain"))["fail"] == 1


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_key_that_is_none_is_refused(app: App, key: str) -> None:
    answer = await app.post("plain", body(), **{"Idempotency-Key": key})
    assert answer.status_code == 400
    assert "1 to 255 printable characters" in answer.json()["error"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
async def test_a_key_in_grpc_metadata(implementation: str) -> None:
    async with (
        serving(implementation, infer=lambda s: idempotency(s.infer, s.prepare, MemoryStore(1 << 20))) as server,
        server.stub() as stub,
    ):
        server.model.hold = True
        calls = [stub.ModelInfer(message(str(n)), metadata=[("idempotency-key", "k")]) for n in range(2)]
        job = await server.model.held.get()
        other = message("other")
        other.raw_input_contents[0] = b"\1" * 8
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(other, metadata=[("idempotency-key", "k")])
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        server.model.echo(job)
        answers = [await call for call in calls]
        assert sorted(each.id for each in answers) == ["0", "1"]
        assert answers[0].raw_output_contents == answers[1].raw_output_contents
        assert server.model.held.empty()
        (stats,) = await server.service.statistics("m")
        assert (stats["inference_stats"]["success"]["count"], stats["inference_stats"]["fail"]["count"]) == (2, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
async def test_a_key_of_no_use_in_grpc_metadata_is_refused(implementation: str) -> None:
    async with serving(implementation) as server, server.stub() as stub:
        for metadata in ([("idempotency-key", "")], [("idempotency-key", "k" * 256)]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(message(), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stream = stub.ModelStreamInfer(metadata=[("idempotency-key", "k")])
        assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "send it with ModelInfer" in await stream.details()


async def test_a_key_on_the_fastapi_route(app: App) -> None:
    service = app.gateway.service
    endpoint = InferEndpoint(service, idempotency(service.infer, service.prepare, MemoryStore(1 << 20)), HttpLimits())
    transport = httpx.ASGITransport(build(service, endpoint, HttpLimits(), Callers()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answers = [
            await client.post("/v2/models/plain/infer", content=data, headers=KEY) for data in (body(), body(), body(2))
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 409]
    assert (await app.stats("plain"))["inferences"] == 1


async def test_keys_belong_to_tenants(tmp_path: Path) -> None:
    async with serving_app(tmp_path, tenant_header="x-tenant") as app:
        one = await app.post("plain", body(1), **KEY, **{"X-Tenant": "a"})
        two = await app.post("plain", body(2), **KEY, **{"X-Tenant": "b"})
        assert [each.json()["outputs"][0]["data"] for each in (one, two)] == [[1, 1], [2, 2]]


# --- the response cache


async def test_equal_requests_over_both_wires_are_computed_once(app: App) -> None:
    before = await app.stats("cached")
    tensor = tritonclient.http.InferInput("IN", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.full((1, 2), 3, np.float32))

    def ask() -> np.ndarray:
        with tritonclient.http.InferenceServerClient(f"127.0.0.1:{app.gateway.ports['http']}") as client:
            return client.infer("cached", [tensor]).as_numpy("OUT")

    assert (await asyncio.to_thread(ask)).tolist() == [[3, 3]]
    async with triton.InferenceServerClient(f"127.0.0.1:{app.gateway.ports['grpc']}") as client:
        assert (await client.infer("cached", inputs(3, 2))).as_numpy("OUT").tolist() == [[3, 3]]
        statistics = await client.get_inference_statistics("cached")
    assert (await app.post("cached", body(3))).json()["outputs"][0]["data"] == [3, 3]
    assert statistics.model_stats[0].inference_stats.cache_hit.count == 1
    after = await app.stats("cached")
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        "inferences": 1,
        "success": 3,
        "queue": 3,
        "compute_input": 1,
        "compute_infer": 1,
        "compute_output": 1,
        "cache_hit": 2,
        "cache_miss": 1,
    }
    metrics = await app.metrics()
    assert 'nv_cache_num_hits_per_model{model="cached",version="1"} 2' in metrics
    assert 'nv_cache_num_misses_per_model{model="cached",version="1"} 1' in metrics


async def test_top_classes_come_from_the_cached_tensor(app: App) -> None:
    outputs = [{"name": "OUT", "parameters": {"classification": 1}}]
    assert (await app.post("cached", body(3, outputs=outputs))).json()["outputs"][0]["data"] == ["3.000000:1"]
    assert (await app.post("cached", body(3, outputs=[{"name": "OUT"}]))).json()["outputs"][0]["data"] == [3, 3]
    assert (await app.stats("cached"))["inferences"] == 1


async def test_a_model_loaded_anew_with_other_files_is_asked_anew(tmp_path: Path) -> None:
    async with serving_app(tmp_path, model_control_mode="explicit", load_model=("cached",)) as app:
        await app.post("cached", body(3))
        await app.gateway.service.load("cached", {})  # nothing has changed
        await app.post("cached", body(3))
        assert (await app.stats("cached"))["inferences"] == 1
        (tmp_path / "models" / "cached" / "1" / "weights").write_bytes(b"2")
        await app.gateway.service.load("cached", {})
        await app.post("cached", body(3))
        assert (await app.stats("cached"))["cache_miss"] == 2
        await app.gateway.service.unload("cached")
        assert (await app.post("cached", body(3))).status_code == 404


async def test_a_stream_call_is_answered_from_the_cache(app: App) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.gateway.ports['grpc']}") as channel:
        stream = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
        for number in range(2):
            await stream.write(message(str(number), model="cached"))
            answer: pb.ModelStreamInferResponse = await stream.read()
            assert (answer.infer_response.id, answer.error_message) == (str(number), "")
            assert answer.infer_response.parameters["triton_final_response"].bool_param
        await stream.done_writing()
    assert (await app.stats("cached"))["cache_hit"] == 1


# --- a fleet


@pytest.mark.slow
async def test_two_gateways_give_one_result_and_share_what_is_cached(tmp_path: Path, redis_url: str) -> None:
    fleet = {"queue": redis_url, "queue_prefix": f"test-{secrets.token_hex(8)}"}
    async with serving_app(tmp_path, **fleet) as one, serving_app(tmp_path, role="gateway", **fleet) as two:
        models = two.gateway.queue
        await until(lambda: all((pool := models.pool(name)) and pool.versions for name in ("plain", "cached")))
        async with Gate(one.gate) as gate, asyncio.TaskGroup() as tasks:
            first = tasks.create_task(one.post("plain", body(id="a"), **KEY))
            run = await gate.arrival()
            repeat = tasks.create_task(two.post("plain", body(id="b"), **KEY))
            assert (await two.post("plain", body(2.0), **KEY)).status_code == 409
            run.release()
            assert [each.json()["outputs"][0]["data"] for each in (await first, await repeat)] == [[1, 1]] * 2
        assert (await two.post("cached", body(3))).json()["outputs"][0]["data"] == [3, 3]
        await models.client.call("PING")  # what was sent before it has arrived
        assert (await one.post("cached", body(3))).json()["outputs"][0]["data"] == [3, 3]
        assert (await one.stats("cached"))["cache_hit"] == 1
