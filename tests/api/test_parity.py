"""One gateway, two wires: the same request gives the same numbers and the same error over HTTP and gRPC.

The gateway is a process of its own serving the real models; the clients are the ones people use.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

from tests.system.process import ROOT, GatewayProcess, started

FIXED = """backend: "fake" max_batch_size: 8 dynamic_batching {{}} {more}
input {{ name: "IN" data_type: {type} dims: 2 }} output {{ name: "OUT" data_type: {type} dims: 2 }}"""
TYPES = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
)


def repository(folder: Path) -> None:
    for datatype in TYPES:
        write(folder, f"echo_{datatype}", type="TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}", more="")
    slow = 'parameters { key: "a_us" value { string_value: "300000" } }'
    write(folder, "slow", type="TYPE_FP32", more=slow)
    poison = 'parameters { key: "poison" value { string_value: "13" } }'
    write(folder, "poison", type="TYPE_FP32", more=poison)
    (folder / "broken" / "1").mkdir(parents=True)
    (folder / "broken" / "config.pbtxt").write_text('backend: "nonesuch"')


def write(folder: Path, name: str, **values: str) -> None:
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(FIXED.format(**values))


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        repository(Path(folder))
        models = ("--model-repository", str(ROOT / "model_repo"), "--model-repository", folder)
        with started(*models) as process:
            process.wait_ready()
            yield process


@dataclass
class Wires:
    """One request sent both ways."""

    gateway: GatewayProcess
    stub: Any = field(init=False)
    channel: Any = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.gateway.ports['grpc']}")
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def http(self, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        answer = requests.request(
            method, self.gateway.url(path), data=None if body is None else data, headers=headers, timeout=20
        )
        assert answer.headers["content-type"].startswith("application/json"), answer.text
        return answer.status_code, answer.json().get("error", "")

    def grpc(self, call: str, message: object) -> tuple[str, str]:
        try:
            getattr(self.stub, call)(message, timeout=20)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""


@pytest.fixture(scope="module")
def wires(gateway: GatewayProcess) -> Iterator[Wires]:
    both = Wires(gateway)
    yield both
    both.channel.close()


def json_input(name: str = "INPUT0", shape: tuple[int, ...] = (1, 16), datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": [1] * int(np.prod(shape))}


def as_proto(model: str, body: dict[str, Any], version: str = "") -> pb.ModelInferRequest:
    """The gRPC message that says what this JSON body says."""
    message = pb.ModelInferRequest(model_name=model, model_version=version, id=body.get("id", ""))
    for each in body["inputs"]:
        message.inputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
        array = np.array(each["data"], triton_to_np_dtype(each["datatype"]))
        message.raw_input_contents.append(array.tobytes())
    for each in body.get("outputs", ()):
        output = message.outputs.add(name=each["name"])
        if "classification" in each.get("parameters", {}):
            output.parameters["classification"].int64_param = each["parameters"]["classification"]
    for key, value in body.get("parameters", {}).items():
        if isinstance(value, str):
            message.parameters[key].string_param = value
        else:
            message.parameters[key].int64_param = value
    return message


GOOD = [json_input("INPUT0"), json_input("INPUT1")]
PREFIX = "[request id: <id_unknown>] "
INFER_ERRORS = {
    "wrong shape": (
        "add_sub", {"inputs": [json_input("INPUT0", (1, 15)), json_input("INPUT1")]}, 400, "INVALID_ARGUMENT",
        PREFIX + "unexpected shape for input 'INPUT0' for model 'add_sub'. Expected [-1,16], got [1,15]",
    ),
    "batch too big": (
        "add_sub", {"inputs": [json_input("INPUT0", (65, 16)), json_input("INPUT1", (65, 16))]}, 400,
        "INVALID_ARGUMENT", PREFIX + "inference request batch-size must be <= 64 for 'add_sub'",
    ),
    "batches differ": (
        "add_sub", {"inputs": [json_input("INPUT0", (1, 16)), json_input("INPUT1", (2, 16))]}, 400,
        "INVALID_ARGUMENT", PREFIX + "input 'INPUT1' batch size does not match other inputs for 'add_sub'",
    ),
    "wrong datatype": (
        "add_sub", {"inputs": [json_input("INPUT0", datatype="INT32"), json_input("INPUT1")]}, 400, "INVALID_ARGUMENT",
        PREFIX + "inference input 'INPUT0' data-type is 'INT32', but model 'add_sub' expects 'FP32'",
    ),
    "missing input": (
        "add_sub", {"inputs": GOOD[:1]}, 400, "INVALID_ARGUMENT",
        PREFIX + "expected 2 inputs but got 1 inputs for model 'add_sub'. Got input(s) ['INPUT0'], but missing "
        "required input(s) ['INPUT1']. Please provide all required input(s).",
    ),
    "unknown input": (
        "add_sub", {"inputs": [GOOD[0], json_input("OTHER")]}, 400, "INVALID_ARGUMENT",
        PREFIX + "unexpected inference input 'OTHER' for model 'add_sub'",
    ),
    "unknown output": (
        "add_sub", {"inputs": GOOD, "outputs": [{"name": "OTHER"}]}, 400, "INVALID_ARGUMENT",
        PREFIX + "unexpected inference output 'OTHER' for model 'add_sub'",
    ),
    "output twice": (
        "add_sub", {"inputs": GOOD, "outputs": [{"name": "OUTPUT0"}, {"name": "OUTPUT0"}]}, 400, "INVALID_ARGUMENT",
        "output 'OUTPUT0' already exists in request",
    ),
    "reserved parameter": (
        "add_sub", {"inputs": GOOD, "parameters": {"triton_x": "1"}}, 400, "INVALID_ARGUMENT",
        "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified.",
    ),
    "unknown model": (
        "nope", {"inputs": GOOD}, 404, "NOT_FOUND", "Request for unknown model: 'nope' is not found",
    ),
    "model without versions": (
        "broken", {"inputs": GOOD}, 404, "NOT_FOUND", "Request for unknown model: 'broken' has no available versions",
    ),
    "own deadline": (
        "slow", {"inputs": [json_input("IN", (1, 2))], "parameters": {"timeout": 20_000}}, 504, "DEADLINE_EXCEEDED",
        "",
    ),
    "model fails": (
        "poison", {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [13, 13]}]}, 500, "INTERNAL",
        "the fake model 'poison' failed on its poison value",
    ),
    "shared memory": (
        "add_sub",
        {"inputs": [GOOD[0], {"name": "INPUT1", "datatype": "FP32", "shape": [1, 16], "data": [],
                              "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 64}}]},
        501, "UNIMPLEMENTED",
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", INFER_ERRORS)
def test_an_infer_error_means_the_same_on_both_wires(wires: Wires, row: str):
    model, body, status, code, text = INFER_ERRORS[row]
    message = as_proto(model, body)
    if row == "shared memory":
        for each in body["inputs"]:
            if "parameters" in each:
                del each["data"]
        message.inputs[1].parameters["shared_memory_region"].string_param = "r"
        message.inputs[1].parameters["shared_memory_byte_size"].int64_param = 64
        del message.raw_input_contents[1]
    over_http = wires.http(f"/v2/models/{model}/infer", body)
    over_grpc = wires.grpc("ModelInfer", message)
    assert over_http[0] == status, over_http
    assert over_grpc[0] == code, over_grpc
    assert text in over_http[1]
    if row == "own deadline":
        # An idle model is given a try once in a while, and one that runs is known to take too long.
        told = (over_http[1], over_grpc[1].removeprefix("Deadline Exceeded: "))  # the call's deadline may be the nearer
        assert {re.sub(r":.*", "", text) for text in told} <= {
            "Request timeout expired", "deadline below service time",
        }  # fmt: skip
        return
    assert over_grpc[1] == over_http[1]


def test_a_version_that_is_not_there(wires: Wires):
    body = {"inputs": GOOD}
    text = "Request for unknown model: 'add_sub' version 99 is not found"
    assert wires.http("/v2/models/add_sub/versions/99/infer", body) == (404, text)
    assert wires.grpc("ModelInfer", as_proto("add_sub", body, "99")) == ("NOT_FOUND", text)


def test_a_version_that_is_no_number(wires: Wires):
    assert wires.http("/v2/models/add_sub/versions/x/infer", {"inputs": GOOD}) == (404, "Not Found")
    code, text = wires.grpc("ModelInfer", as_proto("add_sub", {"inputs": GOOD}, "x"))
    assert code == "INVALID_ARGUMENT"
    assert text.endswith(
        "failed to get model version from specified version string 'x' (details: stol), version should be an "
        "integral value > 0"
    )


def test_bytes_that_do_not_fill_the_shape(wires: Wires):
    head = {
        "inputs": [
            {"name": name, "datatype": "FP32", "shape": [1, 16], "parameters": {"binary_data_size": 60}}
            for name in ("INPUT0", "INPUT1")
        ]
    }
    text = json.dumps(head).encode()
    over_http = wires.http(
        "/v2/models/add_sub/infer", text + bytes(120), **{"Inference-Header-Content-Length": str(len(text))}
    )
    message = as_proto("add_sub", {"inputs": GOOD})
    message.raw_input_contents[0] = message.raw_input_contents[1] = bytes(60)
    wanted = PREFIX + "input byte size mismatch for input 'INPUT0' for model 'add_sub'. Expected 64, got 60"
    assert over_http == (400, wanted)
    assert wires.grpc("ModelInfer", message) == ("INVALID_ARGUMENT", wanted)


@pytest.mark.parametrize(
    ("path", "call", "message", "status", "code", "text"),
    [
        ("/v2/models/nope", "ModelMetadata", pb.ModelMetadataRequest(name="nope"), 404, "NOT_FOUND",
         "Request for unknown model: 'nope' is not found"),
        ("/v2/models/nope/config", "ModelConfig", pb.ModelConfigRequest(name="nope"), 404, "NOT_FOUND",
         "Request for unknown model: 'nope' is not found"),
        ("/v2/models/add_sub/versions/7", "ModelMetadata", pb.ModelMetadataRequest(name="add_sub", version="7"), 404,
         "NOT_FOUND", "Request for unknown model: 'add_sub' version 7 is not found"),
        ("/v2/models/nope/stats", "ModelStatistics", pb.ModelStatisticsRequest(name="nope"), 400, "INVALID_ARGUMENT",
         "requested model 'nope' is not available"),
    ],
)  # fmt: skip
def test_a_control_error_means_the_same_on_both_wires(wires: Wires, path, call, message, status, code, text):
    assert wires.http(path) == (status, text)
    assert wires.grpc(call, message) == (code, text)


def test_model_control_outside_explicit_mode(wires: Wires):
    text = "explicit model load / unload is not allowed if polling is enabled"
    assert wires.http("/v2/repository/models/add_sub/load", {}) == (503, text)
    assert wires.grpc("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="add_sub")) == (
        "UNAVAILABLE",
        text,
    )
    assert wires.http("/v2/repository/models/add_sub/unload", {}) == (503, text)


@pytest.mark.parametrize("datatype", TYPES)
def test_every_datatype_comes_back_alike(gateway: GatewayProcess, datatype: str):
    values = np.array([[0, 1], [1, 0]]).astype(triton_to_np_dtype(datatype))
    if datatype == "BYTES":
        values = np.array([[b"a", b""], ["\N{SNOWMAN}".encode(), b"\0"]], dtype=object)
    answers = []
    for module, port in ((tritonclient.http, "http"), (tritonclient.grpc, "grpc")):
        tensor = module.InferInput("IN", [2, 2], datatype)
        tensor.set_data_from_numpy(values)
        client = module.InferenceServerClient(f"127.0.0.1:{gateway.ports[port]}")
        answers.append(client.infer(f"echo_{datatype}", [tensor]).as_numpy("OUT"))
        client.close()
    np.testing.assert_array_equal(answers[0], values)
    np.testing.assert_array_equal(answers[1], values)


@pytest.mark.parametrize("model", ["add_sub", "digits", "minilm"])
def test_a_real_model_gives_the_same_numbers_every_way(gateway: GatewayProcess, wires: Wires, model: str):
    if model == "add_sub":
        body: dict[str, Any] = {"inputs": GOOD}
    else:
        body = json.loads((ROOT / "model_repo" / model / "sample_request.json").read_text())
    answer = requests.post(gateway.url(f"/v2/models/{model}/infer"), json=body, timeout=20).json()
    over_json = {each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in answer["outputs"]}
    raw = wires.stub.ModelInfer(as_proto(model, body), timeout=20)
    over_grpc = {
        output.name: np.frombuffer(data, triton_to_np_dtype(output.datatype)).reshape(output.shape)
        for output, data in zip(raw.outputs, raw.raw_output_contents, strict=True)
    }
    assert over_json.keys() == over_grpc.keys()
    for name, array in over_grpc.items():
        np.testing.assert_array_equal(over_json[name].astype(array.dtype), array)


@pytest.mark.parametrize(("module", "port"), [(tritonclient.http, "http"), (tritonclient.grpc, "grpc")])
def test_a_photograph_gets_its_label_by_classification(gateway: GatewayProcess, module: Any, port: str):
    from model_repo.efficientnet_lite0.client import preprocess

    image = preprocess(ROOT / "model_repo" / "efficientnet_lite0" / "sample.jpg")
    tensor = module.InferInput("image", list(image.shape), "FP32")
    tensor.set_data_from_numpy(image)
    client = module.InferenceServerClient(f"127.0.0.1:{gateway.ports[port]}")
    answer = client.infer(
        "efficientnet_lite0", [tensor], outputs=[module.InferRequestedOutput("logits", class_count=2)]
    )
    client.close()
    top = answer.as_numpy("logits")
    assert top.shape == (1, 2)
    value, index, label = top[0, 0].decode().split(":")
    assert (index, label) == ("967", "espresso")
    assert len(value.partition(".")[2]) == 6


def test_perf_analyzers_calls_in_its_order_over_http(gateway: GatewayProcess):
    base = "/v2/models/add_sub"
    metadata = json.loads(gateway.get(base))
    config = json.loads(gateway.get(base + "/config"))
    server = json.loads(gateway.get("/v2"))
    assert "statistics" in server["extensions"]
    assert {each["name"] for each in metadata["inputs"]} == {each["name"] for each in config["input"]}
    assert config["max_batch_size"] == 64
    assert int(metadata["versions"][0]) == 1

    def count() -> int:
        stats = json.loads(gateway.get(base + "/stats"))["model_stats"][0]
        assert int(stats["version"]) == 1
        assert "cache_hit" in stats["inference_stats"]
        return int(stats["inference_stats"]["queue"]["count"])

    before = count()
    body = {"id": "", "inputs": GOOD}
    assert requests.post(gateway.url(base + "/infer"), json=body, timeout=20).status_code == 200
    assert count() == before + 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_posts_json_with_its_own_content_type(gateway: GatewayProcess):
    done = subprocess.run(
        ["curl", "-s", "-d", json.dumps({"inputs": GOOD}), gateway.url("/v2/models/add_sub/infer")],
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["outputs"][0]["data"] == [2.0] * 16
