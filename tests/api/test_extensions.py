"""The list of extensions names exactly what works, in Triton's order: each is tried, and told the same on both wires."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.system.process import CONFIG, GatewayProcess, started, write_model

ORDER = [  # core/src/server.cc
    "classification", "sequence", "model_repository", "model_repository(unload_dependents)", "schedule_policy",
    "model_configuration", "system_shared_memory", "cuda_shared_memory", "binary_tensor_data", "parameters",
    "statistics", "trace", "logging",
]  # fmt: skip
LEVELS = "dynamic_batching { priority_levels: 2 default_priority_level: 1 }"
STEP = """input_map { key: "IN" value: "IN" } output_map { key: "OUT" value: "OUT" }"""
TENSORS = CONFIG[CONFIG.index("input {") : CONFIG.index("instance_group")]


@pytest.fixture(scope="module")
def process() -> Iterator[GatewayProcess]:
    with tempfile.TemporaryDirectory(prefix="gw") as name:
        folder = Path(name)
        write_model(folder, "m")
        for model, config in {
            "levels": CONFIG.replace("dynamic_batching {}", LEVELS),
            "sequences": CONFIG.replace("dynamic_batching {}", "sequence_batching {}"),
            "ensemble": f'platform: "ensemble" max_batch_size: 8 {TENSORS} ensemble_scheduling {{ step {{ '
            f'model_name: "m" model_version: -1 {STEP} }} }}',
        }.items():
            write_model(folder, model)
            (folder / model / "config.pbtxt").write_text(config)
        with started("--model-repository", name) as process:
            process.wait_ready()
            yield process


def infer(process: GatewayProcess, wanted: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {
        "inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}],
        "outputs": [{"name": "OUT", "parameters": wanted}],
        **more,
    }
    answer = requests.post(process.url("/v2/models/m/infer"), json=body, timeout=20)
    return answer.json()["outputs"][0] if answer.headers["content-type"] == "application/json" else {"binary": True}


def answers(path: str, body: object = None) -> Callable[[GatewayProcess], bool]:
    return lambda process: requests.request(
        "GET" if body is None else "POST", process.url(path), json=body, timeout=20
    ).ok  # fmt: skip


def settles(call: str, message: Any) -> Callable[[GatewayProcess], bool]:
    def works(process: GatewayProcess) -> bool:
        with grpc.insecure_channel(f"127.0.0.1:{process.ports['grpc']}") as channel:
            try:
                getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), call)(message, timeout=20)
            except grpc.RpcError:
                return False
        return True

    return works


WORKS: dict[str, Callable[[GatewayProcess], bool]] = {
    "classification": lambda process: infer(process, {"classification": 1})["datatype"] == "BYTES",
    "sequence": answers("/v2/models/sequences/ready"),
    "model_repository": answers("/v2/repository/index", {}),
    "model_repository(unload_dependents)": answers("/v2/models/ensemble/ready"),  # what else has dependents
    "schedule_policy": answers("/v2/models/levels/ready"),
    "model_configuration": answers("/v2/models/m/config"),
    "system_shared_memory": settles("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()),
    "cuda_shared_memory": settles("CudaSharedMemoryRegister", pb.CudaSharedMemoryRegisterRequest(name="x")),
    "binary_tensor_data": lambda process: infer(process, {"binary_data": True}) == {"binary": True},
    "parameters": lambda process: "datatype" in infer(process, {}, parameters={"any": 1}),
    "statistics": answers("/v2/models/m/stats"),
    "trace": settles("TraceSetting", pb.TraceSettingRequest()),
    "logging": settles("LogSettings", pb.LogSettingsRequest()),
}


def test_the_list_is_what_works(process: GatewayProcess):
    listed = requests.get(process.url("/v2"), timeout=20).json()["extensions"]
    assert list(WORKS) == ORDER
    assert {name: name in listed for name in ORDER} == {name: works(process) for name, works in WORKS.items()}
    assert listed == [name for name in ORDER if name in listed]


def test_both_wires_tell_the_same(process: GatewayProcess):
    told = requests.get(process.url("/v2"), timeout=20).json()
    with grpc.insecure_channel(f"127.0.0.1:{process.ports['grpc']}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=20)
    assert (told["name"], told["extensions"]) == (metadata.name, list(metadata.extensions))
    assert told["name"] == "triton"
