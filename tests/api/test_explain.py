"""`/v2/models/MODEL/explain` and `gateway explain`, of a real worker with the fake engine."""

import asyncio
from contextlib import aclosing, asynccontextmanager

import pytest
import requests

from gateway import engines, errors
from gateway.placement import Device
from gateway.queues.base import Load
from gateway.queues.memory import MemoryQueue
from gateway.repository import Repository
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.transport import explain
from gateway.transport.auth import Callers, Tokens
from gateway.transport.http import HttpApp, HttpServer
from gateway.transport.metrics import MetricsApp
from gateway.worker import Worker
from tests.api.test_metrics import get as scrape
from tests.support import background, refusal, request, soon

CONFIG = """
backend: "fake"
max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: 2 }
output { name: "OUT" data_type: TYPE_FP32 dims: 2 }
instance_group { kind: KIND_CPU count: 1 }
dynamic_batching {}
"""
TOKEN = "t" * 16


@asynccontextmanager
async def serving(folder, *, more="", tokens=None, default_deadline_ms=0.0):
    """A service with the model `m`, the URL of its HTTP port, its metrics and its worker."""
    (folder / "m" / "1").mkdir(parents=True)
    (folder / "m" / "config.pbtxt").write_text(CONFIG + more)
    queue, statistics, repository = MemoryQueue(), Statistics(), Repository([folder], engines.describe)
    worker = Worker(queue, repository.read, [Device("cpu", "cpu", 2)], statistics)

    async def names():
        return ["m"]

    service = Service(queue, statistics, names, ServiceOptions(default_deadline_ms=default_deadline_ms))
    app = HttpApp(service, service.infer, callers=Callers(tokens))
    async with background(worker.run()), app, HttpServer(app, "127.0.0.1", 0) as server:
        await queue.send(Load("m"))
        yield service, f"http://127.0.0.1:{server.port}", MetricsApp(statistics.whole), worker


async def infer(service, **more):
    async with aclosing(service.infer(request(**more))) as responses:
        return [response async for response in responses]


async def get(url, path, **headers):
    return await asyncio.to_thread(requests.get, url + path, headers=headers, timeout=10)


async def test_a_model_is_explained(tmp_path):
    async with serving(tmp_path) as (service, url, *_):
        for _ in range(3):
            await infer(service, rows=2, deadline=soon(10))
        assert isinstance(await refusal(infer(service, deadline=soon(-1))), errors.DeadlineExceeded)
        for path in ("/v2/models/m/explain", "/v2/models/m/versions/1/explain"):
            response = await get(url, path)
            assert response.status_code == 200
            told = response.json()
            assert (told["model"], told["version"]) == ("m", "1")
            assert (told["answered"], told["admitted"], told["late"]) == (3, 3, 0)
            assert told["refused"] == {"deadline": 1}
            assert (told["batches"], told["mean_rows"], told["closed"]) == (3, 2.0, {"drained": 3})
            assert told["predictions_trusted"]
            assert told["next"]["deadline_ms"] is None
            assert told["next"]["refused"] is None
            assert told["next"]["answered_in_ms"] > 0
            device = told["devices"]["cpu"]
            assert (device["batches_seen"], device["largest_rows_seen"]) == (3, 2)
            assert set(device["predicted_ms_by_rows"]) == {"1", "2"}


async def test_the_next_request_would_be_told_what_it_then_is(tmp_path):
    deadline = 'parameters { key: "default_deadline_ms" value { string_value: "20" } }'
    slow = 'parameters { key: "a_us" value { string_value: "60000" } }'
    async with serving(tmp_path, more=slow + deadline) as (service, url, *_):
        await infer(service, deadline=soon(10))  # teaches that a run takes longer than that
        told = (await get(url, "/v2/models/m/explain")).json()["next"]
        assert (told["deadline_ms"], told["refused"]) == (20.0, "deadline")
        error = await refusal(infer(service))
        assert error.reason == told["refused"]
        assert error.message.split(":")[0] == told["text"].split(":")[0]


async def test_the_gateways_own_default_deadline_counts(tmp_path):
    async with serving(tmp_path, default_deadline_ms=5000.0) as (_, url, *_):
        assert (await get(url, "/v2/models/m/explain")).json()["next"]["deadline_ms"] == 5000.0


async def test_unknown_models_and_versions_are_not_found(tmp_path):
    async with serving(tmp_path) as (_, url, *_):
        for path in ("/v2/models/x/explain", "/v2/models/m/versions/2/explain", "/v2/models/m/versions/a/explain"):
            response = await get(url, path)
            assert response.status_code == 404
            assert response.json()["error"]


async def test_where_callers_need_a_token_this_needs_one_too(tmp_path, capsys):
    async with serving(tmp_path, tokens=Tokens({TOKEN: "acme"})) as (_, url, *_):
        assert (await get(url, "/v2/models/m/explain")).status_code == 401
        assert (await get(url, "/v2/models/m/explain", authorization=f"Bearer {TOKEN}")).status_code == 200
        assert await asyncio.to_thread(explain.run, ["m", "--url", url]) == 1
        assert "the server wants a token" in capsys.readouterr().err
        assert await asyncio.to_thread(explain.run, ["m", "--url", url, "--token", TOKEN]) == 0


async def test_the_command_reads_what_the_server_says(tmp_path, capsys):
    async with serving(tmp_path) as (service, url, *_):
        await infer(service)
        assert await asyncio.to_thread(explain.run, ["m", "--url", url]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("model m, version 1\n")
    assert "  closed: drained                    1  100.0%  nothing else waited\n" in printed
    assert "\nDEVICE cpu\n" in printed


async def test_a_model_that_has_run_nothing_is_explained(tmp_path, capsys):
    async with serving(tmp_path) as (_, url, *_):
        assert await asyncio.to_thread(explain.run, ["m", "--url", url]) == 0
    assert "run                                0  " in capsys.readouterr().out


async def test_the_metrics_say_who_was_late_and_how_good_predictions_are(tmp_path):
    slow = 'parameters { key: "a_us" value { string_value: "60000" } }'
    labels = '{model="m",version="1"}'
    async with serving(tmp_path, more=slow) as (service, _, metrics, _):
        before = (await scrape(metrics)).body.decode()
        assert f"# TYPE gateway_requests_late_total counter\ngateway_requests_late_total{labels} 0\n" in before
        # Nothing is known yet, so it is accepted; its run ends after its caller was told.
        assert (await refusal(infer(service, deadline=soon(0.03)))).reason == "expired"
        told = await service.explain("m")
        assert (told["admitted"], told["late"], told["late_share"]) == (1, 1, 1.0)
        after = (await scrape(metrics)).body.decode()
        assert f"\ngateway_requests_late_total{labels} 1\n" in after
        assert f"\ngateway_prediction_error_ratio{labels} {told['prediction_error']}\n" in after
        assert f"\ngateway_predictions_trusted{labels} 1\n" in after


async def test_a_drained_model_explains_no_more_and_its_predictions_leave_the_metrics(tmp_path):
    async with serving(tmp_path) as (_, url, metrics, worker):
        assert b"gateway_predictions_trusted{" in (await scrape(metrics)).body
        await worker.drain()
        response = await scrape(metrics)
        assert response.status == 200
        assert b"gateway_predictions_trusted{" not in response.body
        assert (await get(url, "/v2/models/m/explain")).status_code == 503


@pytest.mark.parametrize("path", ["/v2/models/{model}/explain", "/v2/models/{model}/versions/{version}/explain"])
async def test_it_is_documented_as_not_tritons(tmp_path, path):
    async with serving(tmp_path) as (_, url, *_):
        document = (await get(url, "/openapi.json")).json()
    assert "Not part of Triton's protocol" in document["paths"][path]["get"]["description"]
