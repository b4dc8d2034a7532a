"""The real TensorRT-RTX, without a GPU: files of the digits model are checked, parsed and compiled. None is executed.

In a process of a Python that has it, which may be this one; see `trtrtx_python`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gateway.engines import driver

pytestmark = [pytest.mark.trtrtx, pytest.mark.slow, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "model_repo/digits/1/model.onnx"
SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}

SCRIPT = """
import json, sys
from pathlib import Path
from gateway import errors
from gateway.build import plans, qdq
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines.base import EngineSpec
from gateway.engines.tensorrt import plan

folder, checks, sm, again = sys.argv[1:]
source = Source("m/config.pbtxt", '''name: "m" backend: "tensorrt" platform: "tensorrt_plan" max_batch_size: 16
    default_model_filename: "model.onnx" parameters { key: "tensorrt_package" value { string_value: "tensorrt_rtx" } }
    input { name: "image" data_type: TYPE_FP32 dims: [1, 8, 8] } output { name: "logits" data_type: TYPE_FP32 dims: [10] }
''')
spec = EngineSpec(build(parse_text(source), source, gpus=(0,)), "1", Path(folder), "gpu:0")
if checks == "no":
    qdq.require = lambda file: None
told = []
try:
    made = plans.build(plans.Order(spec, again=again == "yes"), plans.target(spec, sm), lambda what, share: told.append([what, share]))
    answer = {"plan": made.path.name, "bytes": made.info.bytes, "version": made.info.version, "executed": made.info.executed}
    answer["stale"] = plan.stale(spec, made.info, plans.target(spec, sm).package, "80")
except errors.GatewayError as error:
    answer = {"error": error.message, "kind": type(error).__name__}
print("ANSWER", json.dumps(answer | {"told": told}))
"""


@pytest.fixture
def compiled(trtrtx_python: str, tmp_path: Path):
    """What becomes of an ONNX file in that Python."""

    def run(model: Path = MODEL, *, checks: bool = True, sm: str = "89", again: bool = False) -> dict:
        (tmp_path / "model.onnx").write_bytes(model.read_bytes())
        arguments = [tmp_path, "yes" if checks else "no", sm, "yes" if again else "no"]
        done = subprocess.run(
            [trtrtx_python, "-c", SCRIPT, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        return json.loads(done.stdout.partition("ANSWER ")[2])

    return run


class Samples:
    """Calibration data: noise will do, as nobody looks at answers here."""

    def __init__(self) -> None:
        self._rows = iter({"image": np.random.default_rng(seed).random((8, 1, 8, 8), "f4")} for seed in range(2))

    def get_next(self):
        return next(self._rows, None)


def quantized(folder: Path, activations: str = "QInt8", kind: str = "QDQ", **options: bool) -> Path:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    file = folder / "quantized.onnx"
    quantize_static(
        MODEL,
        file,
        Samples(),
        quant_format=QuantFormat[kind],
        activation_type=QuantType[activations],
        weight_type=QuantType.QInt8,
        per_channel=kind == "QDQ",
        extra_options=options,
    )
    return file


def test_the_fp32_model_compiles_and_the_second_build_finds_it(compiled, tmp_path: Path) -> None:
    first = compiled()
    assert first["bytes"] > 100_000
    assert first["executed"] is False
    assert first["stale"] == "one is for compute capability 8.9, and this GPU has 8.0"
    assert ["parsing", 0.0] in first["told"]
    assert [what for what, share in first["told"] if share == 1.0] != []
    second = compiled()
    assert second["plan"] == first["plan"]
    assert second["told"] == [["there is a plan already", 1.0]]
    times = f"tensorrt_rtx-{first['version']}-sm89.timing"
    assert (tmp_path / "artefacts/plans" / times).is_file()
    assert compiled(again=True)["plan"] == first["plan"]  # with the kept kernel times


def test_the_recipe_for_tensorrt_compiles(compiled, tmp_path: Path) -> None:
    answer = compiled(quantized(tmp_path, QuantizeBias=False, **SYMMETRIC))
    assert answer["bytes"] > 100_000


@pytest.mark.parametrize(
    ("options", "ours", "theirs"),
    [
        (SYMMETRIC, "dequantizes a bias of INT32", "input has type Int32 but must have type"),
        ({"QuantizeBias": False}, "a zero point that is not zero", "Non-zero zero point is not supported"),
        ({"activations": "QUInt8", "QuantizeBias": False, **SYMMETRIC}, "is unsigned (UINT8)", "zero point"),
        (
            {"activations": "QInt16", "QuantizeBias": False, **SYMMETRIC},
            "is of type INT16",
            "Failed to import initializer",
        ),
        ({"activations": "QUInt8", "kind": "QOperator"}, "QOperator format", "QLinearConv"),
    ],
    ids=["bias", "asymmetric", "unsigned", "int16", "qoperator"],
)
def test_what_our_rules_refuse_the_parser_refuses_too(
    compiled, tmp_path: Path, options, ours: str, theirs: str
) -> None:
    file = quantized(tmp_path, **options)
    checked, unchecked = compiled(file), compiled(file, checks=False)
    assert ours in checked["error"]
    assert theirs in unchecked["error"]
    assert {checked["kind"], unchecked["kind"]} == {"InvalidArgument"}


def test_gpus_that_it_does_not_build_for_are_named(compiled) -> None:
    assert compiled(sm="90")["error"].startswith(
        "TensorRT-RTX does not build for compute capability 90; it does for: 75, 80, 86, 89, 120"
    )


INTERFACE = """
import json, sys
from gateway import errors
from gateway.engines.tensorrt import cuda, packages
from gateway.engines.tensorrt.fakes import api
from gateway.engines.tensorrt.fakes import cuda as fake_runtime

trt, runtime = packages.RTX.api(), packages.RTX.cuda()
lacking = []
for owner, names in json.loads(sys.argv[1]).items():
    for name in names.split():
        for module in (trt, api):
            holder = getattr(module, owner, None) if owner else module
            if not hasattr(holder, name):
                lacking.append(f"{module.__name__}.{owner}.{name}")
for name in dir(fake_runtime):
    if name.startswith("cuda"):
        if not hasattr(runtime, name):
            lacking.append(name)
        members = getattr(getattr(fake_runtime, name), "__members__", {})
        lacking += [f"{name}.{key}" for key, value in members.items() if int(getattr(getattr(runtime, name), key)) != value]
device = cuda.Cuda(runtime, 0)
raised = []
for call, arguments in (("select", ()), ("stream", ()), ("allocate", (64,)), ("pin", (64,))):
    try:
        getattr(device, call)(*arguments)
    except errors.Internal as problem:
        raised.append(problem.message)
print("ANSWER", json.dumps({"lacking": lacking, "raised": raised}))
"""

USED = {
    "": "Runtime Builder OnnxParser ILogger IProgressMonitor TensorIOMode TensorLocation MemoryPoolType",
    "ILogger": "ERROR INTERNAL_ERROR",
    "TensorIOMode": "INPUT",
    "TensorLocation": "DEVICE",
    "MemoryPoolType": "WORKSPACE",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "DataType": "FLOAT HALF BF16 INT8 INT32 INT64 UINT8 BOOL",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "create_execution_context get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape "
    "get_tensor_location get_tensor_profile_shape",
    "IExecutionContext": "set_device_memory set_tensor_address set_optimization_profile_async set_input_shape "
    "get_tensor_shape get_max_output_size execute_async_v3",
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "IBuilderConfig": "add_optimization_profile create_timing_cache set_timing_cache get_timing_cache "
    "set_memory_pool_limit",
    "IOptimizationProfile": "set_shape",
    "ITimingCache": "serialize",
    "OnnxParser": "parse_from_file num_errors get_error",
    "ParserError": "desc node_name node_operator",
}
"""What the backend and the builder call."""


def test_what_we_call_is_there_and_the_fakes_have_nothing_else(trtrtx_python: str) -> None:
    done = subprocess.run(
        [trtrtx_python, "-c", INTERFACE, json.dumps(USED)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    answer = json.loads(done.stdout.partition("ANSWER ")[2])
    assert answer["lacking"] == []
    if not driver.present():
        why = "CUDA driver version is insufficient for CUDA runtime version (CUDA error 35)"
        calls = ("cudaSetDevice", "cudaStreamCreateWithFlags", "cudaMalloc", "cudaHostAlloc")
        assert answer["raised"] == [f"{call}: {why}" for call in calls]
