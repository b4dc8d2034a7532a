"""Traces of requests on their way from the wire through models that ask others: the files that a gateway leaves."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from gateway.app import running
from gateway.config.settings import Settings
from tests.api.test_ensembles import FAKE, add, ensemble, step
from tests.api.test_ensembles_decoupled import COUNTS, DECOUPLED
from tests.python_support import CONFIG, write

pytestmark = pytest.mark.slow

CALLS = """def execute(self, requests):
    responses = []
    for each in requests:
        asked = [pb_utils.InferenceRequest(model_name="echo", requested_output_names=["OUT"], inputs=each.inputs(), **more)
                 for more in ({}, {"trace": each.trace()})]
        responses.append([one.exec() for one in asked][1])
    return responses
"""
COMPUTE = ["COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END"]


def repository(folder: Path) -> Path:
    add(folder, "echo", FAKE.format(more=""))
    write(folder / "models" / "calls", CALLS, CONFIG)
    write(folder / "models" / "counts", COUNTS, DECOUPLED)
    add(folder, "chain", ensemble(step("echo", "IN", "x"), step("calls", "x")))
    add(folder, "around", ensemble(step("chain")))
    add(folder, "stream", ensemble(step("counts", "IN", "x"), step("echo", "x")))
    return folder


def ask(ports: dict[str, int], wire: str, model: str, *values: float) -> None:
    """One request; of a decoupled model on a stream. Blocking."""
    library: Any = tritonclient.http if wire == "http" else tritonclient.grpc
    data = library.InferInput("IN", [1, 2], "FP32")
    data.set_data_from_numpy(np.array([values or (1, 2)], np.float32))
    with library.InferenceServerClient(f"127.0.0.1:{ports[wire]}") as client:
        if not values:
            client.infer(model, [data], request_id="r")
            return
        errors: list[Any] = []
        client.start_stream(lambda result, error: errors.append(error))
        client.async_stream_infer(model, [data])
        client.stop_stream()
        assert not any(errors)


async def traced(tmp_path: Path, wire: str, model: str, *values: float) -> list[dict[str, Any]]:
    """The traces that one request leaves, each its head with the names of its timestamps."""
    file = tmp_path / "trace.json"
    config = ("level=TIMESTAMPS", "rate=1", f"triton,file={file}")
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    repositories = (repository(tmp_path) / "models",)
    settings = Settings(model_repository=repositories, **ports, allow_python_models=True, trace_config=config)
    async with running(settings) as gateway:
        await gateway.loaded.wait()
        await asyncio.to_thread(ask, gateway.ports, wire, model, *values)
    return heads(json.loads(file.read_text()))


def heads(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    traces = {each["id"]: {**each, "stamps": [], "ns": []} for each in told if "model_name" in each}
    for each in told:
        for stamp in each.get("timestamps", ()):
            traces[each["id"]]["stamps"].append(stamp["name"])
            traces[each["id"]]["ns"].append(stamp["ns"])
    return [*traces.values()]


@pytest.mark.parametrize(
    ("wire", "before", "after"),
    [
        ("http", ["HTTP_RECV_START", "HTTP_RECV_END"], ["HTTP_SEND_START", "HTTP_SEND_END"]),
        ("grpc", ["GRPC_WAITREAD_START", "GRPC_WAITREAD_END"], ["GRPC_SEND_START", "GRPC_SEND_END"]),
        ("grpcio", ["GRPC_WAITREAD_START", "GRPC_WAITREAD_END"], ["GRPC_SEND_START", "GRPC_SEND_END"]),
    ],
)
async def test_a_request_is_traced_from_wire_to_wire(
    tmp_path: Path, wire: str, before: list[str], after: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wire == "grpcio":  # though there may be another library
        monkeypatch.setattr("gateway.transport.grpc.server._native_can", lambda _: False)
        wire = "grpc"
    (trace,) = await traced(tmp_path, wire, "echo")
    stages = ["REQUEST_START", "QUEUE_START", *COMPUTE, "INFER_RESPONSE_COMPLETE", "REQUEST_END"]
    assert trace["stamps"] == [*before, *stages, *after]
    assert trace["ns"][:2] == sorted(trace["ns"][:2])
    assert trace["ns"][-4:] == sorted(trace["ns"][-4:])
    assert trace["request_id"] == "r"


async def test_steps_and_calls_are_traced_with_their_parents(tmp_path: Path) -> None:
    traces = await traced(tmp_path, "grpc", "around")
    assert [(each["model_name"], each["id"], each.get("parent_id")) for each in traces] == [
        ("around", 1, None),
        ("chain", 2, 1),
        ("echo", 3, 2),
        ("calls", 4, 2),
        ("echo", 5, 4),  # and not the call that was made without the trace
    ]
    parts = ["REQUEST_START", "QUEUE_START", "INFER_RESPONSE_COMPLETE", "REQUEST_END"]
    assert [name for name in traces[0]["stamps"] if not name.startswith("GRPC_")] == parts
    assert traces[1]["stamps"] == parts
    for each in traces[2:]:
        assert [name for name in each["stamps"] if name.startswith("COMPUTE")] == COMPUTE


async def test_each_run_of_a_step_is_traced_and_each_response_that_goes_out(tmp_path: Path) -> None:
    traces = await traced(tmp_path, "grpc", "stream", 3, 1)
    names = [(each["model_name"], each.get("parent_id")) for each in traces]
    assert names == [("stream", None), ("counts", 1), ("echo", 1), ("echo", 1), ("echo", 1)]
    sends = [name for name in traces[0]["stamps"] if "SEND" in name]
    assert sends == ["GRPC_SEND_START", "GRPC_SEND_END"] * 3


async def test_what_is_refused_and_what_is_streamed_is_traced(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    config = ("level=TIMESTAMPS", "rate=1", f"triton,file={file}")
    repositories = (repository(tmp_path) / "models",)
    settings = Settings(
        model_repository=repositories, http_port=0, grpc_port=0, metrics_port=0, allow_python_models=True,
        trace_config=config,
    )  # fmt: skip
    async with running(settings) as gateway, httpx.AsyncClient() as client:
        await gateway.loaded.wait()
        url = f"http://127.0.0.1:{gateway.ports['http']}/v2/models"
        streamed = await client.post(f"{url}/stream/generate_stream", json={"IN": [2, 0]})
        assert streamed.text.count("data:") == 2
        shape = {"name": "IN", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
        assert (await client.post(f"{url}/echo/infer", json={"inputs": [shape]})).status_code == 400
    traces = heads(json.loads(file.read_text()))
    whole = [each for each in traces if "parent_id" not in each]
    assert [each["model_name"] for each in whole] == ["stream", "echo"]
    for each in whole:
        assert each["stamps"][:2] == ["HTTP_RECV_START", "HTTP_RECV_END"]
        assert each["stamps"][-2:] == ["HTTP_SEND_START", "HTTP_SEND_END"]
