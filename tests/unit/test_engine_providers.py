"""ONNX Runtime's execution providers: Triton's parameters as their options, and no silent change of provider."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import onnx
import pytest
from onnx import TensorProto, helper

from gateway import engines, errors
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines import onnxruntime as backend
from gateway.engines import providers
from gateway.engines.base import EngineSpec

CPU, CUDA, TENSORRT = providers.CPU, providers.CUDA, providers.TENSORRT
IO = (
    "max_batch_size: 8 input { name: 'IN' data_type: TYPE_FP32 dims: [2] }"
    " output { name: 'OUT' data_type: TYPE_FP32 dims: [2] }"
)


def spec(accelerators: str = "", folder: Path = Path("/models/m/1"), device: str = "gpu:1", **changes) -> EngineSpec:
    text = f"platform: 'onnxruntime_onnx' backend: 'onnxruntime' name: 'm' default_model_filename: 'model.onnx' {IO}"
    if accelerators:
        text += f" optimization {{ execution_accelerators {{ {accelerators} }} }} instance_group {{ kind: KIND_GPU }}"
    source = Source("m/config.pbtxt", text)
    return EngineSpec(build(parse_text(source), source, gpus=(0, 1)), "1", folder, device, **changes)


def accelerator(name: str, **parameters: str) -> str:
    each = " ".join(f"parameters {{ key: '{key}' value: '{value}' }}" for key, value in parameters.items())
    return f"gpu_execution_accelerator {{ name: '{name}' {each} }}"


def test_tritons_keys_become_onnx_runtimes_options() -> None:
    given = accelerator(
        "tensorrt", precision_mode="FP16", max_workspace_size_bytes="1073741824", trt_engine_cache_enable="true",
        trt_profile_min_shapes="IN:1x2", int8_use_native_calibration_table="0", trt_timing_cache_enable="0",
    )  # fmt: skip
    asked = providers.wanted(spec(given + accelerator("cuda", cudnn_conv_algo_search="1", use_tf32="False")))
    assert asked == [
        (
            TENSORRT,
            {
                "device_id": "1", "trt_fp16_enable": "1", "trt_max_workspace_size": "1073741824",
                "trt_engine_cache_enable": "1", "trt_profile_min_shapes": "IN:1x2",
                "trt_int8_use_native_calibration_table": "0", "trt_timing_cache_enable": "0",
                "trt_engine_cache_path": "/models/m/1/artefacts/onnxruntime-tensorrt",
            },
        ),
        (CUDA, {"device_id": "1", "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}),
        (CPU, {}),
    ]  # fmt: skip


def test_tritons_older_parameters_for_cuda() -> None:
    config = dataclasses.replace(
        spec().config, parameters={"gpu_mem_limit": "1000", "arena_extend_strategy": "1", "other": "x"}
    )
    asked = dict(providers.wanted(dataclasses.replace(spec(), config=config, provider=CUDA)))
    assert asked == {
        CUDA: {"device_id": "1", "gpu_mem_limit": "1000", "arena_extend_strategy": "kSameAsRequested"},
        CPU: {},
    }


@pytest.mark.parametrize(
    ("provider", "names"), [(TENSORRT, [TENSORRT, CUDA, CPU]), (CUDA, [CUDA, CPU]), (CPU, [CPU]), ("", [CUDA, CPU])]
)
def test_the_provider_of_the_spec_goes_before_the_configuration(provider: str, names: list[str]) -> None:
    config = dataclasses.replace(spec().config, execution_providers=(CUDA, CPU))
    asked = providers.wanted(dataclasses.replace(spec(), config=config, provider=provider))
    assert [name for name, _ in asked] == names


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            accelerator("tensorrt", precision_mode="FP8"),
            "'precision_mode' of model 'm' must be one of FP32, FP16, INT8",
        ),
        (accelerator("tensorrt", trt_nonsense="1"), "tensorrt of model 'm' has no parameter 'trt_nonsense'; it has: "),
        (accelerator("tensorrt", trt_sparsity_enable="yes"), "must be 1 or true, 0 or false, got 'yes'"),
        (accelerator("cuda", trt_fp16_enable="1"), "cuda of model 'm' has no parameter 'trt_fp16_enable'"),
        (accelerator("cuda", cudnn_conv_algo_search="7"), "one of EXHAUSTIVE, HEURISTIC, DEFAULT, got '7'"),
    ],
)
def test_a_parameter_that_onnx_runtime_would_fall_back_for_is_refused(given: str, text: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        providers.wanted(spec(given))
    assert text in caught.value.message


def no_driver() -> None:
    raise errors.Unavailable("no NVIDIA driver: libcuda.so.1 is missing")


def test_why_a_provider_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = "OpenVINOExecutionProvider"
    monkeypatch.setattr(providers.driver, "probe", no_driver)
    assert "install 'lockgate[gpu]'" in providers.why_not(CUDA, [CPU], tmp_path)
    assert providers.why_not(CUDA, [CUDA, CPU], tmp_path) == "no NVIDIA driver: libcuda.so.1 is missing"
    assert "the log above says why" in providers.why_not(openvino, [openvino], tmp_path)
    monkeypatch.setattr(providers.driver, "probe", lambda: None)
    assert "the log above says why" in providers.why_not(CUDA, [CUDA, CPU], tmp_path)


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shape: list[int | str] = ["batch", 2]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("IN", "OUT")]
    graph = helper.make_graph([helper.make_node("Relu", ["IN"], ["OUT"])], "g", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    return folder


async def test_a_provider_that_must_run_the_model_and_is_not_there_is_refused(tmp_path: Path) -> None:
    given = spec(folder=write(tmp_path / "m/1"), provider=CUDA)
    with pytest.raises(errors.Unavailable) as caught:
        await engines.create(given)
    assert caught.value.message == (
        "m/1/model.onnx must run on CUDAExecutionProvider, and ONNX Runtime would run it on CPUExecutionProvider: this "
        "build of onnxruntime does not have it; install 'lockgate[gpu]' for NVIDIA GPUs"
    )


class FakeSession:
    """An `InferenceSession` of a build with NVIDIA's providers, of which those in `broken` do not start."""

    broken: tuple[str, ...] = ()
    raising: tuple[str, ...] = ()
    opened: ClassVar[list[list[str]]] = []

    def __init__(self, _path, _options, providers, enable_fallback: int) -> None:
        assert enable_fallback == 0  # ONNX Runtime's own fallback goes on in silence, even in the middle of a run
        names = [name for name, _ in providers]
        self.opened.append(names)
        if names[0] in self.raising:
            raise RuntimeError("Please install TensorRT libraries")
        self._providers = [name for name in names if name not in self.broken]

    def get_providers(self):
        return self._providers

    def get_inputs(self):
        return []

    get_outputs = get_overridable_initializers = get_inputs


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    class Session(FakeSession):
        opened: ClassVar[list[list[str]]] = []

    monkeypatch.setattr(backend.ort, "InferenceSession", Session)
    monkeypatch.setattr(backend.ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(backend.ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(backend.driver, "probe", lambda: None)
    monkeypatch.setattr(backend, "check_fit", lambda *_: None)
    return Session


@pytest.mark.parametrize(
    ("provider", "broken", "raising", "opened", "error"),
    [
        (TENSORRT, (), (), [[TENSORRT, CUDA, CPU]], ""),
        (CUDA, (), (), [[CUDA, CPU]], ""),
        (CUDA, (CUDA,), (), [[CUDA, CPU]], "would run it on CPUExecutionProvider"),
        (TENSORRT, (), (TENSORRT,), [[TENSORRT, CUDA, CPU], [CUDA, CPU]], "would run it on CUDAExecutionProvider"),
        (TENSORRT, (CUDA,), (TENSORRT,), [[TENSORRT, CUDA, CPU], [CUDA, CPU]], "would run it on CPUExecutionProvider"),
    ],
)
def test_what_would_run_elsewhere_is_refused(
    gpu_build, tmp_path: Path, provider, broken, raising, opened, error
) -> None:
    gpu_build.broken, gpu_build.raising = broken, raising
    given = spec(folder=write(tmp_path / "m/1"), provider=provider)
    if error:
        with pytest.raises(errors.Unavailable, match=error):
            backend.load(given, 1)
    else:
        (model,) = backend.load(given, 1)
        assert (model.provider, model.warnings) == (provider, ())
    assert gpu_build.opened == opened


def test_without_a_driver_no_session_is_opened_for_a_provider_that_must_run(
    gpu_build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.driver, "probe", no_driver)
    with pytest.raises(errors.Unavailable, match=r"would run it on CPUExecutionProvider: no NVIDIA driver"):
        backend.load(spec(folder=write(tmp_path / "m/1"), provider=CUDA), 1)
    assert gpu_build.opened == []


def test_a_provider_that_may_fall_back_does_so_with_a_warning(
    gpu_build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.driver, "probe", no_driver)
    given = spec(accelerator("cuda"), folder=write(tmp_path / "m/1"))
    (model,) = backend.load(given, 1)
    assert gpu_build.opened == [[CPU]]
    assert model.provider == CPU
    assert model.warnings == (
        "runs on CPUExecutionProvider and not on CUDAExecutionProvider: no NVIDIA driver: libcuda.so.1 is missing",
    )
