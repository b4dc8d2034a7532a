"""The generate extension over a real HTTP port: JSON to tensors and back, server-sent events, errors inside the stream."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.queues.base import Job, Lane, PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.transport.http import HttpApp, HttpServer
from gateway.types import DataType, InferResponse, Tensor
from tests.support import background, model_config, tensor_config

STREAM = "text/event-stream; charset=utf-8"
LLM = model_config(
    name="llm",
    inputs=(tensor_config("PROMPT", DataType.BYTES, (1,)), tensor_config("STREAM", DataType.BOOL, (1,))),
    outputs=(tensor_config("TEXT", DataType.BYTES, (-1,)),),
    decoupled=True,
)
SHAPES = model_config(
    name="shapes",
    inputs=(tensor_config("A", DataType.INT64, (-1, -1, 2)), tensor_config("B", dims=(2,), optional=True)),
    outputs=(tensor_config("A", DataType.INT64, (-1, -1, 2)),),
    max_batch_size=0,
)
BOTH = {"PROMPT": "hello", "STREAM": True}


@asynccontextmanager
async def serving(*configs: ModelConfig) -> AsyncIterator[httpx.AsyncClient]:
    queue = MemoryQueue()
    for config in configs:
        queue.publish(PoolState(config.name, (VersionState("1", "READY", config=config),)))

    async def names() -> list[str]:
        return [config.name for config in configs]

    service = Service(queue, Statistics(), names, ServiceOptions())
    service.start()
    app = HttpApp(service, service.infer)
    lanes = [Lane(config.name, "1") for config in configs]
    async with (
        background(work(queue, lanes)),
        app,
        HttpServer(app, "127.0.0.1", 0) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=10) as client,
    ):
        yield client


async def work(queue: MemoryQueue, lanes: list[Lane]) -> None:
    consumer = queue.consumer(lanes)
    while True:
        for job in await consumer.take(1):
            repeat(job) if job.request.model_name == "llm" else echo(job)


def echo(job: Job) -> None:
    asked = job.request
    told = {f"got_{key}": value for key, value in asked.parameters.items()}
    job.reply(
        InferResponse(
            "shapes", "1", {"A": asked.inputs["A"]}, asked.id, {**told, "shape": str(asked.inputs["A"].shape)}
        )
    )


def repeat(job: Job) -> None:
    """What NVIDIA's mock model does: REPETITION times the prompt, then the end or, with FAIL_LAST, an error."""
    asked = job.request
    text = Tensor.from_array(DataType.BYTES, np.array([[asked.inputs["PROMPT"].array.flat[0]]], object))
    for _ in range(int(asked.parameters.get("REPETITION", 1))):
        job.reply(InferResponse("llm", "1", {"TEXT": text}, asked.id, final=False))
    if asked.parameters.get("FAIL_LAST"):
        job.fail(errors.Internal("An Error Occurred"))
    else:
        job.reply(InferResponse("llm", "1", {}, asked.id))


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(LLM, SHAPES) as running:
        yield running


async def generate(client: httpx.AsyncClient, body: Any, word: str = "generate", model: str = "llm") -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    return await client.post(f"/v2/models/{model}/{word}", content=content)


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"] == STREAM
    *parts, last = response.text.split("\n\n")
    assert last == ""
    assert all(part.startswith("data: ") for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


async def test_one_response_is_one_object(client: httpx.AsyncClient) -> None:
    response = await generate(client, {"id": "7", **BOTH})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"id": "7", "model_name": "llm", "model_version": "1", "TEXT": "hello"}


async def test_a_version_may_be_named(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v2/models/llm/versions/1/generate", json=BOTH)).json()["TEXT"] == "hello"
    assert (await client.post("/v2/models/llm/versions/2/generate", json=BOTH)).status_code == 404
    assert (await client.post("/v2/models/llm/versions/x/generate", json=BOTH)).json() == {"error": "Not Found"}
    assert (await client.get("/v2/models/llm/generate")).status_code == 405


async def test_each_response_is_an_event(client: httpx.AsyncClient) -> None:
    body = {"PROMPT": ["hi"], "STREAM": [True], "parameters": {"REPETITION": 3}}
    response = await generate(client, body, "generate_stream")
    assert response.status_code == 200
    assert events(response) == [{"model_name": "llm", "model_version": "1", "TEXT": "hi"}] * 3
    assert events(await generate(client, {**BOTH, "REPETITION": 0}, "generate_stream")) == []


async def test_an_error_after_a_response_is_an_event_and_one_before_sets_the_status(client: httpx.AsyncClient) -> None:
    late = await generate(client, {**BOTH, "FAIL_LAST": True}, "generate_stream")
    assert late.status_code == 200
    assert [sorted(event) for event in events(late)] == [["TEXT", "model_name", "model_version"], ["error"]]
    early = await generate(client, {**BOTH, "FAIL_LAST": True, "REPETITION": 0}, "generate_stream")
    assert early.status_code == 500
    assert events(early) == [{"error": "An Error Occurred"}]


@pytest.mark.parametrize("repetition", [0, 2])
async def test_generate_wants_exactly_one_response(client: httpx.AsyncClient, repetition: int) -> None:
    response = await generate(client, {**BOTH, "REPETITION": repetition})
    assert response.status_code == 500
    assert "generate expects model to produce exactly 1 response" in response.json()["error"]


@pytest.mark.parametrize("word", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ("", 400, "expected 2 inputs but got 0"),
        ({"abc": 123}, 400, "expected 2 inputs but got 0"),
        ({"PROMPT": "hello"}, 400, "expected 2 inputs but got 1"),
        ({"PROMPT": 123, "STREAM": False}, 500, "attempt to access JSON non-string as string"),
        ({"PROMPT": {"USER": "x"}, "STREAM": True}, 500, "attempt to access JSON non-string as string"),
        ({"PROMPT": "x", "STREAM": "false"}, 500, "attempt to access JSON non-boolean as boolean"),
        ({"STREAM": 1, "PROMPT": True}, 500, "attempt to access JSON non-boolean as boolean"),
        ('{"PROMPT":"a","STREAM":false,"PROMPT":"b"}', 400, "input 'PROMPT' already exists in request"),
        ({**BOTH, "PARAMS": {"a": 0}}, 400, "parameter 'PARAMS' has invalid type"),
        ({**BOTH, "parameters": 1}, 500, "Expected JSON object for keyword: 'parameters'"),
        (
            {**BOTH, "parameters": {"nested": {"twice": 1}}},
            400,
            "Converting keyword: 'parameters': parameter 'nested' has invalid type.",
        ),
        ("[1]", 500, "failed to parse the request JSON buffer"),
        ("{", 500, "failed to parse the request JSON buffer"),
        ("[" * 200, 400, "JSON nesting depth exceeds maximum allowed limit (100)"),
        ({**BOTH, "triton_x": 1}, 400, "parameter keys starting with 'triton_' are reserved"),
    ],
)
async def test_a_bad_request_is_answered_with_json(
    client: httpx.AsyncClient, word: str, body: Any, status: int, text: str
) -> None:
    response = await generate(client, body, word)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert text in response.json()["error"]


async def test_an_unknown_model_and_an_encoding_are_refused(client: httpx.AsyncClient) -> None:
    unknown = await generate(client, BOTH, model="foo")
    assert (unknown.status_code, unknown.json()["error"]) == (404, "Request for unknown model: 'foo' is not found")
    packed = await client.post("/v2/models/llm/generate", json=BOTH, headers={"content-encoding": "gzip"})
    assert packed.status_code == 400
    assert packed.json()["error"] == "Unsupported content-encoding, only 'identity' is supported."


async def test_the_innermost_open_dimension_takes_what_the_fixed_leave(client: httpx.AsyncClient) -> None:
    body = {"A": [1, 2, 3, 4, 5, 6], "parameters": {"text": "x", "n": 2, "f": 0.5, "b": True}}
    told = (await generate(client, body, model="shapes")).json()
    assert told["A"] == [1, 2, 3, 4, 5, 6]
    assert told["shape"] == "(1, 3, 2)"
    assert {key: told[f"got_{key}"] for key in body["parameters"]} == body["parameters"]
    odd = await generate(client, {"A": [1, 2, 3]}, model="shapes")
    assert odd.json()["error"] == "The schema can not convert input 'A' to tensor with proper shape"


async def test_a_client_that_leaves_the_stream_ends_its_request() -> None:
    """The model answers once and never ends; only the client's going can."""
    queue = MemoryQueue()
    queue.publish(PoolState("llm", (VersionState("1", "READY", config=LLM),)))

    async def names() -> list[str]:
        return ["llm"]

    service = Service(queue, Statistics(), names, ServiceOptions())
    service.start()
    app = HttpApp(service, service.infer)
    consumer = queue.consumer([Lane("llm", "1")])
    async with app, HttpServer(app, "127.0.0.1", 0) as server, httpx.AsyncClient(timeout=10) as client:
        url = f"http://127.0.0.1:{server.port}/v2/models/llm/generate_stream"
        answering = asyncio.create_task(client.send(client.build_request("POST", url, json=BOTH), stream=True))
        (job,) = await consumer.take(1)
        text = Tensor.from_array(DataType.BYTES, np.array([[b"x"]], object))
        job.reply(InferResponse("llm", "1", {"TEXT": text}, final=False))
        response = await answering
        chunks = response.aiter_text()
        assert json.loads((await anext(chunks)).removeprefix("data: "))["TEXT"] == "x"
        await response.aclose()
        await service.finished()
        assert job.done
