"""A gateway on the real onnxruntime-gpu wheel and a machine with no GPU: what an operator reads, and what answers.

In a Python that has that wheel (`LOCKGATE_ORT_GPU_PYTHON`), because it cannot live beside onnxruntime.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import onnx
import pytest
from onnx import TensorProto, helper

from gateway.engines import driver
from tests.system.process import GatewayProcess, started

pytestmark = pytest.mark.slow

NO_CUDA = (
    "{name}/1/model.onnx must run on CUDAExecutionProvider, and ONNX Runtime would run it on CPUExecutionProvider: no "
    "NVIDIA driver: libcuda.so.1 is missing; install the driver or, in a container, start it with --gpus all; the library "
    "libcublasLt.so.13 is missing; install 'lockgate[gpu]', which brings CUDA and cuDNN"
)
FALLBACK = " parameters { key: 'fallback' value { string_value: '%s' } }"
MODELS = {
    "on_gpu": "instance_group { kind: KIND_GPU }",
    "gpu_or_nothing": "instance_group { kind: KIND_GPU }" + FALLBACK % "none",
    "cuda_only": FALLBACK % "cuda",
    "on_cpu": "",
}


@pytest.fixture(scope="module")
def gateway(ort_gpu_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    if driver.present():
        pytest.skip("there is an NVIDIA driver here")
    folder = tmp_path_factory.mktemp("models")
    shape: list[int | str] = ["batch", 2]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("IN", "OUT")]
    graph = helper.make_graph([helper.make_node("Relu", ["IN"], ["OUT"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for name, text in MODELS.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(f"platform: 'onnxruntime_onnx' {text}")
        onnx.save(model, folder / name / "1" / "model.onnx")
    with started("--model-repository", str(folder), python=ort_gpu_python) as running:
        running.wait_ready()
        yield running


def row(gateway: GatewayProcess, name: str) -> str:
    """A model's line of the start-up table."""
    (line,) = [line for line in gateway.lines if line.startswith(f"{name} ")]
    return " ".join(line.split())


def reason(gateway: GatewayProcess, name: str) -> str:
    asked = urllib.request.Request(gateway.url("/v2/repository/index"), data=b"{}")
    with urllib.request.urlopen(asked) as answer:
        (entry,) = [each for each in json.load(answer) if each["name"] == name]
    return entry.get("reason", "")


def infer(gateway: GatewayProcess, name: str) -> dict:
    body = {"inputs": [{"name": "IN", "shape": [1, 2], "datatype": "FP32", "data": [-1.0, 2.0]}]}
    asked = urllib.request.Request(gateway.url(f"/v2/models/{name}/infer"), data=json.dumps(body).encode())
    with urllib.request.urlopen(asked) as answer:
        told = json.load(answer)
    assert told["outputs"][0]["data"] == [0.0, 2.0]
    return told.get("parameters", {})


def test_a_model_for_the_gpu_answers_from_the_cpu_and_says_so_everywhere(gateway: GatewayProcess) -> None:
    why = "not on cuda: it does not load: " + NO_CUDA.format(name="on_gpu")
    assert infer(gateway, "on_gpu") == {
        "engine": "CPUExecutionProvider", "precision": "FP32", "artefact": "fp32", "link": "cpu", "fallback": "load",
    }  # fmt: skip
    assert row(gateway, "on_gpu") == f"on_gpu 1 READY 1 x cpu CPUExecutionProvider {why}"
    gateway.wait_for("engine_out_of_use", model="on_gpu", engine="cuda", error=NO_CUDA.format(name="on_gpu"))
    gateway.wait_for("model_warning", model="on_gpu", warning=f"runs on cpu, {why}")
    with pytest.raises(urllib.error.HTTPError) as answer:  # models are missing that were wanted
        gateway.get("/v2/health/ready")
    with answer.value as body:
        told = json.load(body)
    (degraded,) = [each for each in told["degraded"] if each["model"] == "on_gpu"]
    assert degraded["instances"][0]["reason"] == why
    with urllib.request.urlopen(f"http://127.0.0.1:{gateway.ports['metrics']}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (sample,) = [line for line in lines if line.startswith("gateway_instances{") and 'model="on_gpu"' in line]
    assert 'provider="CPUExecutionProvider"' in sample
    assert 'link="cpu"' in sample


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(
            "gpu_or_nothing",
            "gpu_or_nothing/config.pbtxt line 1: instance group gpu_or_nothing_0 has kind KIND_GPU but no GPUs are "
            "available. Use KIND_AUTO to run on whatever there is, KIND_CPU, or let the parameter 'fallback' name what to "
            "run on instead",
            id="gpu_or_nothing",
        ),
        pytest.param("cuda_only", NO_CUDA.format(name="cuda_only"), id="cuda_only"),
    ],
)
def test_a_model_that_may_not_fall_back_does_not_load_and_says_why(
    gateway: GatewayProcess, name: str, expected: str
) -> None:
    assert reason(gateway, name) == expected
    assert "UNAVAILABLE" in row(gateway, name)
    with pytest.raises(urllib.error.HTTPError, match=r"404|503") as refused:
        infer(gateway, name)
    refused.value.close()


def test_a_model_for_the_cpu_says_nothing_of_gpus(gateway: GatewayProcess) -> None:
    assert infer(gateway, "on_cpu") == {}
    assert row(gateway, "on_cpu").startswith("on_cpu 1 READY")
    assert row(gateway, "on_cpu").endswith("x cpu CPUExecutionProvider")


def test_nothing_is_printed_but_the_log(gateway: GatewayProcess) -> None:
    names = {*MODELS, "MODEL"}
    assert [line for line in gateway.lines if not line.startswith("{") and line.split()[:1][0] not in names] == []
