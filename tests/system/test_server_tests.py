"""What Triton's own test suite (qa/L0_http, L0_grpc, L0_parameters, L0_decoupled and others) asks of a server."""

from __future__ import annotations

import asyncio
import json
import queue
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from tests import client_models
from tests.system.process import GatewayProcess, started

MODULES = {"http": tritonclient.http, "grpc": tritonclient.grpc}
FLOATS = np.arange(8, dtype=np.float32).tobytes()
RAW = {"Inference-Header-Content-Length": "0"}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        forward = [f"--{wire}-header-forward-pattern=my_header.*" for wire in ("http", "grpc")]
        trace = ("--trace-config", f"triton,file={folder}/global.log", "--trace-config", "level=TIMESTAMPS")
        flags = (*client_models.make(Path(folder)), *forward, *trace, "--trace-config", "rate=1")
        with started(*flags) as process:
            process.wait_ready()
            yield process


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, gateway: GatewayProcess) -> Iterator[Any]:
    module = MODULES[request.param]
    with module.InferenceServerClient(f"127.0.0.1:{gateway.ports[request.param]}") as made:
        yield made


def library(client: Any) -> Any:
    return MODULES["grpc" if isinstance(client, tritonclient.grpc.InferenceServerClient) else "http"]


def post(gateway: GatewayProcess, path: str, **what: Any) -> requests.Response:
    return requests.post(gateway.url(f"/v2/models/{path}"), timeout=30, **what)


def refused(answer: requests.Response, status: int, text: str) -> None:
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"]


# --- raw binary requests


@pytest.mark.parametrize("count", [8, 32])
def test_raw_binary(gateway: GatewayProcess, count: int):
    data = np.arange(count, dtype=np.float32).tobytes()
    answer = post(gateway, "onnx_zero_1_float32/infer", data=data, headers=RAW)
    assert answer.status_code == 200
    assert answer.content[int(answer.headers["Inference-Header-Content-Length"]) :] == data


def test_raw_text(gateway: GatewayProcess):
    answer = post(gateway, "onnx_zero_1_object_1_element/infer", data="427", headers=RAW)
    assert answer.status_code == 200
    assert answer.content[int(answer.headers["Inference-Header-Content-Length"]) + 4 :] == b"427"


@pytest.mark.parametrize(
    ("model", "data", "text"),
    [
        ("onnx_zero_1_object", b"427", "For BYTE datatype raw input 'INPUT0', the model must have input shape [1]"),
        (
            "onnx_zero_1_float16",
            np.ones((2, 2), np.float16).tobytes(),
            "The shape of the raw input 'INPUT0' can not be deduced because there are more than one variable-sized dimension",
        ),
        (
            "onnx_zero_3_float32",
            np.arange(24, dtype=np.float32).tobytes(),
            "Raw request must only have 1 input (found 1) to be deduced but got 3 inputs in",
        ),
    ],
    ids=["texts", "two open dimensions", "three inputs"],
)
def test_raw_requests_that_cannot_be_deduced(gateway: GatewayProcess, model: str, data: bytes, text: str):
    refused(post(gateway, f"{model}/infer", data=data, headers=RAW), 400, text)


def test_a_body_in_chunks_whose_length_is_told_too(gateway: GatewayProcess):
    chunked = f"{len(FLOATS):X}\r\n".encode() + FLOATS + b"\r\n0\r\n\r\n"
    headers = {**RAW, "Transfer-Encoding": "chunked"}
    answer = post(gateway, "onnx_zero_1_float32/infer", data=chunked, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.content[int(answer.headers["Inference-Header-Content-Length"]) :] == FLOATS


# --- JSON requests


@pytest.mark.parametrize(
    ("shape", "status", "text"),
    [
        ([2**4, 2**60 + 2], 400, "causes total element count to exceed maximum size of"),
        ([2**2, 2**60 + 2], 400, "byte size overflow for input"),
        (
            [2, -5],
            500,
            "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
    ],
)
def test_shapes_beyond_all_measure(gateway: GatewayProcess, shape: list[int], status: int, text: str):
    tensor = {"name": "INPUT0", "shape": shape, "datatype": "FP32", "data": [1.0]}
    refused(post(gateway, "onnx_zero_1_float32/infer", json={"inputs": [tensor]}), status, text)


@pytest.mark.parametrize(
    ("model", "datatype", "value"), [("simple_identity", "BYTES", "hello"), ("simple_identity_int64", "INT64", 123)]
)
def test_nested_data(gateway: GatewayProcess, model: str, datatype: str, value: Any):
    def ask(depth: int) -> requests.Response:
        data = value
        for _ in range(depth):
            data = [data]
        tensor = {"name": "INPUT0", "datatype": datatype, "shape": [1, 1], "data": data}
        return post(gateway, f"{model}/infer", json={"inputs": [tensor]})

    assert ask(50).json()["outputs"][0]["data"] == [value]
    refused(ask(120), 400, "JSON nesting depth exceeds maximum allowed limit (100)")


def test_an_output_named_twice(gateway: GatewayProcess):
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [1, 8], "data": [list(range(8))]}
    body = {"inputs": [tensor], "outputs": [{"name": "OUTPUT0"}] * 2}
    refused(post(gateway, "onnx_zero_1_float32/infer", json=body), 400, "output 'OUTPUT0' already exists in request")


# --- inputs that may be missing


@pytest.mark.parametrize(
    ("model", "given", "text"),
    [
        ("input_all_required", 0, "expected 3 inputs but got 0 inputs for model 'input_all_required'. Got input(s) []"),
        (
            "input_all_required",
            1,
            (
                "expected 3 inputs but got 1 inputs for model 'input_all_required'. Got input(s) ['INPUT0'], but missing "
                "required input(s) ['INPUT1','INPUT2']. Please provide all required input(s)."
            ),
        ),
        (
            "input_optional",
            0,
            (
                "expected number of inputs between 3 and 4 but got 0 inputs for model 'input_optional'. Got input(s) [], but "
                "missing required input(s) ['INPUT0','INPUT1','INPUT2']. Please provide all required input(s)."
            ),
        ),
    ],
)
def test_inputs_that_are_missing(client: Any, model: str, given: int, text: str):
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, one(library(client)) * given)
    assert text in caught.value.message()


@pytest.mark.parametrize("given", [0, 1])
def test_inputs_that_may_all_be_missing(client: Any, given: int):
    result = client.infer("input_all_optional", one(library(client)) * given)
    assert result.as_numpy("OUTPUT0").tolist() == [given]


# --- generate


def generate(gateway: GatewayProcess, body: Any, route: str = "generate") -> requests.Response:
    data = body if isinstance(body, str) else json.dumps(body)
    return post(gateway, f"mock_llm/{route}", data=data, headers={"Accept": "text/event-stream"})


def events(answer: requests.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts.pop() == ""
    assert all(each.startswith("data: ") for each in parts)
    return [json.loads(each.removeprefix("data: ")) for each in parts]


ROUTES = ("generate", "generate_stream")
STREAM = {"PROMPT": ["hello world"], "STREAM": True}


def test_generate(gateway: GatewayProcess):
    answer = generate(gateway, {"PROMPT": "hello world", "STREAM": False})
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["TEXT"] == "hello world"
    for route in ROUTES:
        for stream in (True, False):
            assert generate(gateway, {"PROMPT": "hello world", "STREAM": stream}, route).status_code == 200


@pytest.mark.parametrize("parameters", [{"REPETITION": 3}, {"parameters": {"REPETITION": 3}}])
def test_generate_a_stream(gateway: GatewayProcess, parameters: dict[str, Any]):
    answers = events(generate(gateway, {**STREAM, **parameters}, "generate_stream"))
    assert [each["TEXT"] for each in answers] == ["hello world"] * 3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "expected 2 inputs but got 0"),
        ({"abc": 123}, "expected 2 inputs but got 0"),
        ({"PROMPT": "hello"}, "expected 2 inputs but got 1"),
        ({"STREAM": False, "other": "param"}, "expected 2 inputs but got 1"),
        ({"PROMPT": 123, "STREAM": False}, "attempt to access JSON non-string as string"),
        ({"PROMPT": "hello", "STREAM": "false"}, "attempt to access JSON non-boolean as boolean"),
        ({"PROMPT": True, "STREAM": 123}, "attempt to access JSON non-string as string"),
        ({"STREAM": 123, "PROMPT": True}, "attempt to access JSON non-boolean as boolean"),
        ('{"PROMPT": "hello", "STREAM": false, "PROMPT": "duplicate"}', "input 'PROMPT' already exists in request"),
        ('{"PROMPT": "hello", "STREAM": false, "STREAM": false}', "input 'STREAM' already exists in request"),
        ('{"PROMPT": "h", "STREAM": false, "STREAM": true, "PROMPT": "d"}', "input 'STREAM' already exists in request"),
        ({**STREAM, "PARAMS": {"PARAM_0": 0, "PARAM_1": True}}, "parameter 'PARAMS' has invalid type"),
        ({"PROMPT": {"USER": "hello world"}, "STREAM": True}, "attempt to access JSON non-string as string"),
    ],
)
def test_generate_refuses(gateway: GatewayProcess, route: str, body: Any, text: str):
    answer = generate(gateway, body, route)
    assert answer.status_code >= 400
    assert text in answer.json()["error"]


@pytest.mark.parametrize("count", [0, 2])
def test_generate_wants_one_answer(gateway: GatewayProcess, count: int):
    answer = generate(gateway, {**STREAM, "REPETITION": count})
    assert answer.status_code >= 400
    assert "generate expects model to produce exactly 1 response" in answer.json()["error"]
    assert generate(gateway, {**STREAM, "REPETITION": count}, "generate_stream").status_code == 200


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("code", "status"), [("INTERNAL", 500), ("UNAVAILABLE", 503)])
def test_a_models_error_is_the_first_answer(gateway: GatewayProcess, route: str, code: str, status: int):
    answer = generate(gateway, {**STREAM, "REPETITION": 0, "FAIL_LAST": True, "ERROR_CODE": code}, route)
    assert answer.status_code == status
    assert json.loads(answer.text.removeprefix("data: ")) == {"error": "An Error Occurred"}


def test_a_models_error_after_an_answer(gateway: GatewayProcess):
    answer = generate(gateway, {**STREAM, "REPETITION": 1, "FAIL_LAST": True}, "generate_stream")
    assert answer.status_code == 200
    good, bad = events(answer)
    assert (good["TEXT"], bad) == ("hello world", {"error": "An Error Occurred"})


def test_many_streams_at_once(gateway: GatewayProcess):
    codes: list[int] = []

    def ask(body: dict[str, Any]) -> None:
        codes.append(generate(gateway, body, "generate_stream").status_code)

    bodies = [{**STREAM, "STREAM": False, "param": "x"}, {**STREAM, "REPETITION": 3, "param": "x"}] * 25
    threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
    for each in threads:
        each.start()
    for each in threads:
        each.join(timeout=60)
    assert codes == [200] * len(bodies)


# --- parameters

PARAMETERS = (
    {"key1": "value1", "key2": "value2"},
    {"key1": 1, "key2": 2},
    {"key1": 123.123, "key2": 321.321},
    {"key1": True, "key2": "value2"},
)
FORWARDED = {"my_header_1": "my_value_1", "my_header_3": 'This is a "quoted" string with a backslash\\ '}
HEADERS = {"header_1": "value_1", **FORWARDED}


def one(module: Any) -> list[Any]:
    tensor = module.InferInput("INPUT0", [1], "FP32")
    tensor.set_data_from_numpy(np.ones(1, np.float32))
    return [tensor]


def told(result: Any) -> dict[str, str]:
    keys, values = (result.as_numpy(name).astype(str).tolist() for name in ("key", "value"))
    return dict(zip(keys, (each.strip() for each in values), strict=True))


def texts(parameters: dict[str, Any]) -> dict[str, str]:
    return {key: str(value).strip() for key, value in {**parameters, **FORWARDED}.items()}


@pytest.mark.parametrize("model", ["parameter", "ensemble"])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_parameters_and_headers(client: Any, model: str, parameters: dict[str, Any]):
    result = client.infer(model, one(library(client)), parameters=parameters, headers=dict(HEADERS))
    assert told(result) == texts(parameters)


def test_parameters_that_are_tritons_own(client: Any):
    with pytest.raises(InferenceServerException, match="reserved"):
        client.infer("parameter", one(library(client)), parameters={"triton_": True, "key2": "value2"})


@pytest.mark.parametrize("wire", ["http", "grpc"])
async def test_parameters_of_asyncio_clients(gateway: GatewayProcess, wire: str):
    module = tritonclient.grpc.aio if wire == "grpc" else tritonclient.http.aio
    async with module.InferenceServerClient(f"127.0.0.1:{gateway.ports[wire]}") as client:
        for parameters in PARAMETERS:
            result = await client.infer("parameter", one(module), parameters=parameters, headers=dict(HEADERS))
            assert told(result) == texts(parameters)


@contextmanager
def stream(gateway: GatewayProcess, **options: Any) -> Iterator[tuple[Any, queue.Queue[Any]]]:
    answers: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
        client.start_stream(lambda result, error: answers.put(error or result), **options)
        yield client, answers


def test_parameters_of_a_stream(gateway: GatewayProcess):
    with stream(gateway, headers=dict(HEADERS)) as (client, answers):
        for parameters in PARAMETERS:
            client.async_stream_infer("parameter", one(tritonclient.grpc), parameters=parameters)
            assert told(answers.get(timeout=30)) == texts(parameters)


# --- decoupled models


@pytest.mark.parametrize("requests_at_once", [1, 5])
@pytest.mark.parametrize("repeat", [0, 1, 5])
@pytest.mark.parametrize("wait", [0, 100])
def test_a_decoupled_model(gateway: GatewayProcess, requests_at_once: int, repeat: int, wait: int):
    module = tritonclient.grpc
    values = {
        "IN": np.arange(100, 100 + repeat, dtype=np.int32),
        "DELAY": np.full(repeat, 20, np.uint32),
        "WAIT": np.array([wait], np.uint32),
    }
    inputs = []
    for name, each in values.items():
        inputs.append(module.InferInput(name, list(each.shape), "INT32" if name == "IN" else "UINT32"))
        inputs[-1].set_data_from_numpy(each)
    found: dict[str, list[int]] = {}
    with stream(gateway) as (client, answers):
        for n in range(requests_at_once):
            client.async_stream_infer(
                "repeat_int32", inputs, request_id=str(n), outputs=[module.InferRequestedOutput("OUT")]
            )
        for _ in range(repeat * requests_at_once):
            result = answers.get(timeout=30)
            assert not isinstance(result, InferenceServerException), result
            found.setdefault(result.get_response().id, []).append(*result.as_numpy("OUT").tolist())
        client.stop_stream()
        assert answers.empty()
    assert found == {str(n): values["IN"].tolist() for n in range(requests_at_once) if repeat}


# --- time limits


def slow(module: Any) -> list[Any]:
    tensor = module.InferInput("INPUT", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.array([[10]], np.int32))
    return [tensor]


def test_a_calls_deadline(gateway: GatewayProcess):
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
        for _ in range(3):
            with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
                client.infer("slow", slow(tritonclient.grpc), client_timeout=0.2)
        assert client.infer("slow", slow(tritonclient.grpc), client_timeout=20).as_numpy("OUTPUT").tolist() == [[10]]


def test_a_streams_deadline(gateway: GatewayProcess):
    with stream(gateway, stream_timeout=0.2) as (client, answers):
        client.async_stream_infer("slow", slow(tritonclient.grpc))
        assert "Deadline Exceeded" in str(answers.get(timeout=30))
    with stream(gateway, stream_timeout=50) as (client, answers):
        client.async_stream_infer("slow", slow(tritonclient.grpc))
        assert answers.get(timeout=30).as_numpy("OUTPUT").tolist() == [[10]]


async def test_a_cancelled_call(gateway: GatewayProcess):
    module = tritonclient.grpc.aio
    async with module.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
        call = asyncio.create_task(client.infer("slow", slow(module)))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


# --- the rest


def test_settings_of_a_model_that_is_not_there(client: Any):
    for call in (client.get_trace_settings, client.update_trace_settings):
        with pytest.raises(InferenceServerException, match="Request for unknown model : does-not-exist"):
            call(model_name="does-not-exist")


def test_calls_without_arguments(client: Any):
    client.update_trace_settings()
    client.get_inference_statistics()
    client.unregister_system_shared_memory("nonesuch")
    with pytest.raises(
        InferenceServerException, match="explicit model load / unload is not allowed if polling is enabled"
    ):
        client.unload_model("simple")
    with pytest.raises(InferenceServerException, match="Unable to open shared memory region: ''"):
        client.register_system_shared_memory("", "", 0)
    with pytest.raises(InferenceServerException):
        client.register_cuda_shared_memory("", b"", 0, 0)


@pytest.mark.parametrize(("size", "offset"), [(65, 0), (64, 1), (1, 64), (0, 65)])
def test_regions_beyond_their_memory(client: Any, size: int, offset: int):
    key = f"/gwtest-{secrets.token_hex(8)}"
    handle = shm.create_shared_memory_region("r", key, 64)
    try:
        with pytest.raises(InferenceServerException, match=r"failed to register shared memory region.*invalid args"):
            client.register_system_shared_memory("r", key, size, offset=offset)
    finally:
        shm.destroy_shared_memory_region(handle)


def test_response_statistics_count_each_answer(client: Any, gateway: GatewayProcess):
    def stats() -> dict[str, dict[str, Any]]:
        (entry,) = requests.get(gateway.url("/v2/models/square_int32/stats"), timeout=30).json()["model_stats"]
        return entry["response_stats"]

    def count(of: dict[str, dict[str, Any]], index: int, name: str) -> int:
        return of.get(str(index), {}).get(name, {}).get("count", 0)

    before = stats()
    tensor = tritonclient.grpc.InferInput("IN", [1], "INT32")
    tensor.set_data_from_numpy(np.array([2], np.int32))
    with stream(gateway) as (streaming, answers):
        streaming.async_stream_infer("square_int32", [tensor])
        assert [answers.get(timeout=30).as_numpy("OUT").tolist() for _ in range(2)] == [[2], [2]]
        streaming.stop_stream()
    after = stats()
    names = ("compute_infer", "compute_output", "success", "fail", "empty_response")
    grown = [{name: count(after, n, name) - count(before, n, name) for name in names} for n in range(3)]
    answer = {"compute_infer": 1, "compute_output": 1, "success": 1, "fail": 0, "empty_response": 0}
    assert grown == [answer, answer, {**dict.fromkeys(names, 0), "compute_infer": 1, "empty_response": 1}]
    module = library(client)
    told_stats = client.get_inference_statistics(
        "square_int32", **({"as_json": True} if module is MODULES["grpc"] else {})
    )
    (entry,) = told_stats["model_stats"]
    assert entry["response_stats"].keys() == after.keys()
