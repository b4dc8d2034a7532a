"""Which links a version has on a device, from its configuration and its artefacts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gateway import errors
from gateway.artefacts import Artefact
from gateway.engines.base import EngineSpec
from gateway.engines.chain import Link, links, read
from tests.support import model_config

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
BACKENDS = ("onnxruntime", "tensorrt", "remote", "fake")

FP32 = Artefact("fp32", "model.onnx", "onnxruntime", "FP32", verdict="passed")
INT8 = Artefact("int8", "artefacts/1/int8.onnx", "onnxruntime", "INT8", verdict="passed")
INT4 = Artefact("int4", "artefacts/1/int4.onnx", "onnxruntime", "INT4", verdict="passed")
FP16 = Artefact("fp16", "artefacts/1/fp16.onnx", "onnxruntime", "FP16", verdict="passed")
MODEL_PLAN = Artefact("fp32", "model.plan", "tensorrt", "FP32", verdict="passed")
PLAN = Artefact("trt-int8", "artefacts/1/int8.plan", "tensorrt", "INT8", verdict="passed")


def spec(device="cpu", *, backend="onnxruntime", providers=(CPU,), **parameters: str) -> EngineSpec:
    named = {key.replace("__", "."): value for key, value in parameters.items()}
    file = "model.plan" if backend == "tensorrt" else ""
    config = model_config(parameters=named)
    config = replace(config, backend=backend, execution_providers=providers, default_model_filename=file)
    return EngineSpec(config, "1", Path("m/1"), device, threads=2, cores=4, cpu_cores=8)


def names(found) -> list[str]:
    return [link.name for link in found.links]


def runs(link: Link) -> tuple[str, str, str, str]:
    """Backend, file, provider and device."""
    assert link.spec.artefact is not None
    return link.spec.config.backend, link.spec.artefact.file, link.spec.provider, link.spec.device


@pytest.mark.parametrize(
    ("asked", "on_gpu", "on_cpu", "expected"),
    [
        (spec(), [], [FP32], ["cpu"]),
        (spec(), [], [INT8, FP32], ["cpu-int8", "cpu"]),
        (spec(), [], [INT8, INT4, FP32], ["cpu-int8", "cpu"]),
        (spec(), [], [FP32, INT8], ["cpu"]),  # the artefact is slower: nobody falls back to it
        (spec(), [], [INT8], ["cpu-int8"]),  # a precision is pinned
        (spec(providers=(OPENVINO, CPU)), [], [INT8, FP32], ["openvino-int8", "cpu-int8", "cpu"]),
        (spec("gpu:1", providers=(CUDA, CPU)), [FP32], [FP32], ["cuda", "cpu"]),
        (
            spec("gpu:1", providers=(CUDA, CPU)), [PLAN, FP16, FP32], [INT8, FP32],
            ["tensorrt-int8", "cuda-fp16", "cpu-int8", "cpu"],
        ),
        (spec("gpu:0", providers=(TENSORRT, CUDA, CPU)), [FP32], [FP32], ["tensorrt-ep", "cuda", "cpu"]),
        (spec("gpu:0", providers=(CUDA, CPU)), [PLAN], [], ["tensorrt-int8"]),
        (spec("gpu:0", providers=(CUDA, CPU), fallback="none"), [PLAN, FP32], [INT8, FP32], ["tensorrt-int8"]),
        (spec(fallback="none"), [], [INT8, FP32], ["cpu-int8"]),
        (spec(fallback="cpu"), [], [INT8, FP32], ["cpu"]),
        (spec(fallback=" cpu , cpu-int4, cpu "), [], [INT8, INT4, FP32], ["cpu", "cpu-int4"]),
        (spec(fallback="cuda,cpu"), [FP32], [FP32], ["cuda", "cpu"]),
        (spec(fallback="remote,cpu-int8,cpu"), [], [INT8, FP32], ["remote", "cpu-int8", "cpu"]),
        (spec(fallback="remote:a,remote:b"), [], [FP32], ["remote:a", "remote:b"]),
        (spec(backend="tensorrt"), [], [MODEL_PLAN], ["tensorrt"]),
        (spec("gpu:0", backend="tensorrt", providers=(CUDA, CPU)), [MODEL_PLAN], [MODEL_PLAN], ["tensorrt"]),
        (spec(backend="fake"), [], [], ["fake"]),
        (spec(backend="fake", fallback="fake,fake:slow"), [], [], ["fake", "fake:slow"]),
    ],
)  # fmt: skip
def test_the_links_of_a_version(asked, on_gpu, on_cpu, expected) -> None:
    assert names(links(asked, on_gpu, on_cpu, BACKENDS)) == expected


def test_each_link_asks_for_one_backend_file_provider_and_device() -> None:
    found = links(spec("gpu:1", providers=(TENSORRT, CUDA, CPU)), [PLAN, FP16, FP32], [INT8, FP32], BACKENDS)
    assert [runs(link) for link in found.links] == [
        ("tensorrt", "artefacts/1/int8.plan", "", "gpu:1"),
        ("onnxruntime", "artefacts/1/fp16.onnx", TENSORRT, "gpu:1"),
        ("onnxruntime", "artefacts/1/fp16.onnx", CUDA, "gpu:1"),
        ("onnxruntime", "artefacts/1/int8.onnx", CPU, "cpu"),
        ("onnxruntime", "model.onnx", CPU, "cpu"),
    ]
    assert [(link.spec.threads, link.spec.cores) for link in found.links] == [(2, 4)] * 3 + [(8, 8)] * 2


def test_a_gpu_link_of_a_model_on_the_cpu_is_on_the_first_gpu() -> None:
    found = links(spec(fallback="cuda,cpu"), [FP32], [FP32], BACKENDS)
    assert [link.spec.device for link in found.links] == ["gpu:0", "cpu"]
    assert [(link.spec.threads, link.spec.cores) for link in found.links] == [(2, 4)] * 2


def test_a_parameter_may_be_one_links_own() -> None:
    asked = spec(backend="fake", fallback="fake,fake:slow", a_us="1", fake__a_us="2", fake__b_us="3")
    first, second = links(asked, [], [], BACKENDS).links
    assert first.spec.config.parameters["a_us"] == "2"
    assert first.spec.config.parameters["b_us"] == "3"
    assert second.spec.config.parameters["a_us"] == "1"
    assert "b_us" not in second.spec.config.parameters


def test_what_is_named_and_not_there_is_left_out_with_a_warning() -> None:
    found = links(spec(fallback="remote,cpu-int8,cpu"), [], [FP32], BACKENDS)
    assert names(found) == ["remote", "cpu"]
    assert found.warnings == ("link 'cpu-int8' of parameter 'fallback' is left out: no such artefact may be run here",)


def test_a_name_that_means_nothing_is_refused_with_those_that_do() -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        links(spec(fallback="cpi"), [], [INT8, FP32], BACKENDS)
    assert caught.value.message == (
        "parameter 'fallback' of model 'm' names 'cpi', which is no engine; there are here: openvino-int8, openvino, "
        "cpu-int8, cpu, remote, fake, and 'none'. Correct it in config.pbtxt"
    )


def test_when_to_load_is_true_or_false() -> None:
    with pytest.raises(
        errors.InvalidArgument, match=r"'fallback.preload' of model 'm' must be true or false, got 'yes'"
    ):
        links(spec(fallback__preload="yes"), [], [FP32], BACKENDS)


def test_nothing_left_is_an_error_with_a_remedy() -> None:
    with pytest.raises(errors.Unavailable, match=r"has nothing to run on cpu: link 'cuda-fp16' .* is left out"):
        links(spec(fallback="cuda-fp16"), [], [FP32], BACKENDS)
    with pytest.raises(errors.Unavailable, match="has nothing to run on gpu:0; build an artefact"):
        links(spec("gpu:0", providers=(CUDA, CPU)), [], [], BACKENDS)


def test_artefacts_are_looked_up_where_links_may_run(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(b"x")

    def here(asked: EngineSpec) -> EngineSpec:
        return replace(asked, path=tmp_path / "1")

    assert names(read(here(spec()), BACKENDS)) == ["cpu"]
    assert names(read(here(spec("gpu:0", providers=(CUDA, CPU))), BACKENDS)) == ["cuda", "cpu"]
    assert names(read(here(spec(backend="remote", fallback="remote,cpu")), BACKENDS)) == ["remote", "cpu"]
    assert names(read(here(spec(backend="fake")), BACKENDS)) == ["fake"]
    with pytest.raises(errors.Unavailable, match="pinned to precision INT8"):
        read(here(spec(precision="INT8")), BACKENDS)


@pytest.mark.parametrize(
    ("given", "files", "expected"),
    [
        ("model.onnx", {"model.onnx": b"float"}, ["tensorrt", "cpu"]),
        ("model.plan", {"model.plan": b"plan", "model.onnx": b"float"}, ["tensorrt", "cpu-fp32"]),
        ("model.plan", {"model.plan": b"plan"}, ["tensorrt"]),
        # Made for TensorRT, and another model on a CPU: its integer kernels saturate.
        ("model.onnx", {"model.onnx": b"... QuantizeLinear ..."}, ["tensorrt"]),
    ],
)
def test_onnx_runtime_stands_in_for_a_model_of_tensorrt_that_has_its_onnx_file(
    tmp_path: Path, given: str, files: dict[str, bytes], expected: list[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    asked = spec(backend="tensorrt")
    asked = replace(asked, path=tmp_path, config=replace(asked.config, default_model_filename=given))
    found = read(asked, BACKENDS)
    assert names(found) == expected
    assert [link.spec.config.backend for link in found.links] == ["tensorrt", "onnxruntime"][: len(expected)]


def test_on_a_gpu_the_onnx_file_runs_there_too(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"QuantizeLinear")
    asked = spec("gpu:0", backend="tensorrt", providers=(CUDA, CPU))
    asked = replace(asked, path=tmp_path, config=replace(asked.config, default_model_filename="model.onnx"))
    assert names(read(asked, BACKENDS)) == ["tensorrt", "cuda"]
