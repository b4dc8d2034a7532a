"""On a machine with an NVIDIA GPU: CUDA, TensorRT by ONNX Runtime, TensorRT by itself. Skipped, with the reason, elsewhere.

None of this has run where it was written, which had no GPU. What each test demands is what the fakes cannot show: that
answers are right, that graphs give the same ones, that memory comes back.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
from collections.abc import Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway import engines, errors
from gateway.artefacts import Artefact
from gateway.build import plans
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines import driver
from gateway.engines.base import DeviceOutOfMemory, EngineSpec
from gateway.engines.tensorrt import packages
from gateway.engines.tensorrt.cuda import Cuda
from gateway.types import Array, Batch

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]

DIGITS = Path(__file__).resolve().parents[2] / "model_repo/digits"
GRAPHS = "optimization { cuda { graphs: true } }"


@pytest.fixture(scope="module", autouse=True)
def gpu() -> driver.Gpu:
    try:
        return driver.probe().gpu(0)
    except errors.Unavailable as problem:
        pytest.skip(f"needs an NVIDIA GPU: {problem.message}")


@pytest.fixture(scope="module")
def package(gpu: driver.Gpu) -> packages.Package:
    try:
        return packages.installed()
    except errors.Unavailable as problem:
        pytest.skip(problem.message)


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array]:
    """540 held-out images, and their labels."""
    with np.load(DIGITS / "held_out.npz") as held_out:
        return held_out["images"].astype("<f4"), held_out["labels"]


@pytest.fixture(scope="module")
def expected(digits) -> Array:
    """ONNX Runtime's FP32 answers on the CPU."""
    import onnxruntime as ort

    session = ort.InferenceSession(DIGITS / "1/model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: digits[0]})[0]


@pytest.fixture
def version(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "digits/1").mkdir(parents=True)
    shutil.copy(DIGITS / "1/model.onnx", tmp_path / "digits/1/model.onnx")
    yield tmp_path / "digits/1"
    gc.collect()


def spec(version: Path, backend: str, text: str = "", **changes: Any) -> EngineSpec:
    platform = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}[backend]
    source = Source(
        "digits/config.pbtxt",
        f"name: 'digits' backend: '{backend}' platform: '{platform}' max_batch_size: 64 "
        "default_model_filename: 'model.onnx' instance_group { kind: KIND_GPU } "
        "parameters { key: 'fallback' value { string_value: 'none' } } "
        "input { name: 'image' data_type: TYPE_FP32 dims: [1, 8, 8] } "
        f"output {{ name: 'logits' data_type: TYPE_FP32 dims: [10] }} {text}",
    )
    return EngineSpec(build(parse_text(source), source, gpus=(0,)), "1", version, "gpu:0", **changes)


@asynccontextmanager
async def opened(given: EngineSpec, count: int = 1):
    created = await engines.create(given, count)
    try:
        yield created
    finally:
        for engine in created:
            await engine.close()


async def answers(engine: Any, images: Array, rows: int = 32) -> Array:
    parts = []
    for start in range(0, len(images), rows):
        inputs = {"image": images[start : start + rows]}
        async with aclosing(engine.run(Batch(len(inputs["image"]), lambda inputs=inputs: inputs))) as results:
            parts.append((await anext(results)).outputs["logits"])
    return np.concatenate(parts)


def compiled(given: EngineSpec, precision: str = "FP32") -> None:
    plans.build(plans.Order(given, precision), plans.target(given), lambda *_: None)


def close(found: Array, expected: Array) -> bool:
    """The same digits, and nearly the same logits: TF32 and other orders of summing are allowed."""
    same = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
    return bool(same >= 0.998 and np.abs(found - expected).max() <= 0.02 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("provider", "accelerator"),
    [
        ("CUDAExecutionProvider", "name: 'cuda'"),
        (
            "TensorrtExecutionProvider",
            "name: 'tensorrt' parameters { key: 'trt_engine_cache_enable' value: '1' }",
        ),
    ],
)
async def test_onnx_runtimes_providers(version: Path, digits, expected: Array, provider: str, accelerator: str) -> None:
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    text = f"optimization {{ execution_accelerators {{ gpu_execution_accelerator {{ {accelerator} }} }} }}"
    async with opened(spec(version, "onnxruntime", text, provider=provider)) as (engine,):
        assert engine.provider == provider
        assert close(await answers(engine, digits[0]), expected)
    if provider.startswith("Tensorrt"):
        assert list((version / "artefacts/onnxruntime-tensorrt").glob("*.engine"))


async def test_a_plan_gives_the_answers_of_the_onnx_file(version: Path, package, digits, expected: Array) -> None:
    given = spec(version, "tensorrt")
    compiled(given)
    async with opened(given) as (engine,):
        assert engine.provider == package.provider
        assert close(await answers(engine, digits[0]), expected)
        assert close(await answers(engine, digits[0], rows=7), expected)


async def test_an_int8_plan_keeps_the_accuracy_of_fp32(version: Path, package, digits, expected: Array) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    class Samples:
        def __init__(self) -> None:
            self._rows = iter({"image": digits[0][start : start + 32]} for start in range(0, 128, 32))

        def get_next(self):
            return next(self._rows, None)

    quantize_static(
        version / "model.onnx", version / "int8.onnx", Samples(), quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, per_channel=True,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )  # fmt: skip
    given = spec(version, "tensorrt", artefact=Artefact("trt-int8", "int8.onnx", "tensorrt", "INT8"))
    compiled(given, "INT8")
    async with opened(given) as (engine,):
        found = await answers(engine, digits[0][128:])
    labels = digits[1][128:]
    before, after = ((each.argmax(axis=1) == labels).mean() for each in (expected[128:], found))
    assert before - after <= 0.004


async def test_graphs_give_the_same_answers_and_are_used(version: Path, package, digits) -> None:
    plain, graphs = spec(version, "tensorrt"), spec(version, "tensorrt", GRAPHS)
    compiled(plain)
    async with opened(plain) as (engine,):
        wanted = await answers(engine, digits[0], rows=16)
    async with opened(graphs) as (engine,):
        for rows in (16, 4, 16, 4):  # in turns, so that contexts and graphs must not disturb each other
            found = await answers(engine, digits[0], rows=rows)
            assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max()
        captured = [graph for graph in engine.loaded.execution._graphs.values() if graph is not None]
        assert len(captured) >= 2


async def test_two_instances_run_at_once_and_keep_their_rows_apart(
    version: Path, package, digits, expected: Array
) -> None:
    given = spec(version, "tensorrt", GRAPHS)
    compiled(given)
    async with opened(given, 2) as created, asyncio.TaskGroup() as tasks:
        halves = digits[0][:256], digits[0][256:]
        results = [tasks.create_task(answers(engine, half)) for engine, half in zip(created, halves, strict=True)]
        found = np.concatenate([await result for result in results])
    assert close(found, expected)


def test_a_lack_of_memory_is_told_as_that_and_leaves_the_process_usable(package) -> None:
    cuda = Cuda(package.cuda(), 0)
    cuda.select()
    with pytest.raises(DeviceOutOfMemory, match="the GPU is out of memory: cudaMalloc"):
        cuda.allocate(1 << 50)
    cuda.free(cuda.allocate(1 << 20))


async def test_memory_comes_back(version: Path, package, digits) -> None:
    runtime = package.cuda()
    given = spec(version, "tensorrt", GRAPHS)
    compiled(given)

    async def free_after_a_life() -> int:
        async with opened(given) as (engine,):
            await answers(engine, digits[0])
        gc.collect()
        _, free, _ = runtime.cudaMemGetInfo()
        return free

    for _ in range(3):  # what CUDA keeps for itself, it takes at first
        before = await free_after_a_life()
    for _ in range(20):
        after = await free_after_a_life()
    assert before - after < 8 << 20


def test_the_driver_knows_the_gpu(gpu: driver.Gpu) -> None:
    assert gpu.sm.isdecimal()
    assert gpu.memory > 1 << 30
