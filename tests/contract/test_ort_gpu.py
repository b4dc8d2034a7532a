"""The real onnxruntime-gpu wheel on a machine without a GPU: what runs, and what an operator reads.

In a process of a Python that has it (`LOCKGATE_ORT_GPU_PYTHON`), because it cannot live beside onnxruntime.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from gateway.engines import driver

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import asyncio, json, sys
from pathlib import Path
from gateway import engines, errors
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines.base import EngineSpec

folder, provider, accelerator = sys.argv[1:]
source = Source("m/config.pbtxt", '''platform: "onnxruntime_onnx" backend: "onnxruntime" name: "m" max_batch_size: 8
    default_model_filename: "model.onnx"
    input { name: "IN" data_type: TYPE_FP32 dims: [2] } output { name: "OUT" data_type: TYPE_FP32 dims: [2] }
    instance_group { kind: KIND_GPU } optimization { execution_accelerators { gpu_execution_accelerator { name: "%s" } } }
''' % accelerator)
spec = EngineSpec(build(parse_text(source), source, gpus=(0,)), "1", Path(folder), "gpu:0", provider=provider)

async def main():
    try:
        (engine,) = await engines.create(spec)
    except errors.GatewayError as error:
        return {"error": error.message, "kind": type(error).__name__}
    await engine.close()
    return {"provider": engine.provider, "warnings": engine.warnings}

print("ANSWER", json.dumps(asyncio.run(main())))
"""

REASONS = {
    "cuda": "no NVIDIA driver: libcuda.so.1 is missing; install the driver or, in a container, start it with --gpus all; "
    "the library libcublasLt.so.13 is missing; install 'lockgate[gpu]', which brings CUDA and cuDNN",
    "tensorrt": "no NVIDIA driver: libcuda.so.1 is missing; install the driver or, in a container, start it with --gpus "
    "all; the library libcublas.so.13 is missing; install 'lockgate[gpu]', which brings CUDA and cuDNN",
}
LINKS = {"cuda": "cuda", "tensorrt": "tensorrt-ep"}
NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


@pytest.fixture
def ask(ort_gpu_python: str, tmp_path: Path):
    """What becomes of an engine in that Python: its provider and warnings, or its error; and what was printed."""
    if driver.present():
        pytest.skip("there is an NVIDIA driver here")
    shape: list[int | str] = ["batch", 2]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("IN", "OUT")]
    graph = helper.make_graph([helper.make_node("Relu", ["IN"], ["OUT"])], "g", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx"
    )

    def run(provider: str, accelerator: str) -> tuple[dict, str]:
        done = subprocess.run(
            [ort_gpu_python, "-c", SCRIPT, tmp_path, provider, accelerator],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        noise, _, answer = done.stdout.partition("ANSWER ")
        return json.loads(answer), noise + done.stderr

    return run


@pytest.mark.parametrize("accelerator", ["cuda", "tensorrt"])
def test_what_must_run_on_a_gpu_is_refused_with_the_reason_and_nothing_else_is_printed(ask, accelerator: str) -> None:
    name = NAMES[accelerator]
    answer, printed = ask(name, accelerator)
    assert answer == {
        "kind": "Unavailable",
        "error": f"m/1/model.onnx must run on {name}, and ONNX Runtime would run it on CPUExecutionProvider: "
        f"{REASONS[accelerator]}",
    }
    assert printed == ""


@pytest.mark.parametrize("accelerator", ["cuda", "tensorrt"])
def test_what_may_run_elsewhere_says_that_it_does(ask, accelerator: str) -> None:
    answer, printed = ask("", accelerator)
    why = (
        f"m/1/model.onnx must run on {NAMES[accelerator]}, and ONNX Runtime would run it on CPUExecutionProvider: "
        + REASONS[accelerator]
    )
    assert answer == {
        "provider": "CPUExecutionProvider",
        "warnings": [f"runs on cpu, not on {LINKS[accelerator]}: it does not load: {why}"],
    }
    assert {line.split()[0] for line in printed.splitlines()} == {"engine_out_of_use", "engine_changed"}


def test_the_cpu_can_be_demanded_of_the_gpu_build(ask) -> None:
    assert ask("CPUExecutionProvider", "cuda") == (
        {
            "provider": "CPUExecutionProvider",
            "warnings": [],
        },
        "",
    )
