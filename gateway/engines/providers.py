"""ONNX Runtime's execution providers for one engine, with the options that Triton's configuration gives them.

`optimization.execution_accelerators` names the providers (`tensorrt`, `cuda`) and their parameters, under the keys of
Triton's onnxruntime backend. Refuses a key that it does not know: ONNX Runtime would start on the CPU for it, in
silence. Says why a provider did not start. Opens no session.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from gateway import errors
from gateway.engines import driver
from gateway.engines.base import EngineSpec

Asked: TypeAlias = tuple[str, dict[str, str]]
"""A provider and its options, as `onnxruntime.InferenceSession` takes them."""

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

NVIDIA = (TENSORRT, CUDA)
"""The providers that need an NVIDIA driver."""

_LIBRARIES = {
    CUDA: "libonnxruntime_providers_cuda.so",
    TENSORRT: "libonnxruntime_providers_tensorrt.so",
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_RENAMED = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
_TENSORRT_FLAGS = _names(
    "trt_dla_enable trt_engine_cache_enable trt_dump_subgraphs trt_force_sequential_engine_build "
    "trt_context_memory_sharing_enable trt_layer_norm_fp32_fallback trt_timing_cache_enable trt_force_timing_cache "
    "trt_detailed_build_log trt_build_heuristics_enable trt_sparsity_enable trt_cuda_graph_enable "
    "trt_dump_ep_context_model trt_int8_use_native_calibration_table trt_engine_hw_compatible "
    "trt_fp16_enable trt_bf16_enable trt_int8_enable"
)
_TENSORRT_VALUES = _names(
    "trt_max_workspace_size trt_max_partition_iterations trt_min_subgraph_size trt_int8_calibration_table_name "
    "trt_dla_core trt_engine_cache_path trt_engine_cache_prefix trt_timing_cache_path trt_builder_optimization_level "
    "trt_auxiliary_streams trt_tactic_sources trt_extra_plugin_lib_paths trt_profile_min_shapes trt_profile_opt_shapes "
    "trt_profile_max_shapes trt_ep_context_file_path trt_ep_context_embed_mode trt_op_types_to_exclude "
    "trt_preview_features"
)
_CUDA_FLAGS = _names(
    "cudnn_conv_use_max_workspace cudnn_conv1d_pad_to_nc1d do_copy_in_default_stream enable_cuda_graph "
    "enable_skip_layer_norm_strict_mode fuse_conv_bias prefer_nhwc tunable_op_enable tunable_op_tuning_enable "
    "use_ep_level_unified_stream use_tf32"
)
_CUDA_VALUES = _names(
    "gpu_mem_limit arena_extend_strategy cudnn_conv_algo_search sdpa_kernel tunable_op_max_tuning_duration_ms"
)
_PRECISIONS = {"FP32": {}, "FP16": {"trt_fp16_enable": "1"}, "INT8": {"trt_int8_enable": "1"}}
_NUMBERED = {  # values that Triton gives as numbers and ONNX Runtime by name
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
}
_TOP_LEVEL = ("cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy", "do_copy_in_default_stream")
_PATHS = {"trt_engine_cache_enable": "trt_engine_cache_path", "trt_timing_cache_enable": "trt_timing_cache_path"}


def wanted(spec: EngineSpec) -> list[Asked]:
    """The providers to ask ONNX Runtime for, best first, the CPU last, and the options of each.

    With `spec.provider` it is that one first, and CUDA before the CPU for what TensorRT leaves over. Raises
    `InvalidArgument` for a parameter that the provider does not have.
    """
    names = _chain(spec.provider) if spec.provider else (*spec.config.execution_providers, CPU)
    return [(name, _options(name, spec)) for name in dict.fromkeys(names)]


def _chain(provider: str) -> tuple[str, ...]:
    return (provider, CUDA, CPU) if provider == TENSORRT else (provider, CPU)


def _options(name: str, spec: EngineSpec) -> dict[str, str]:
    if name not in _LIBRARIES:
        return {}
    given = dict(spec.config.accelerators.get(name, {}))
    if name == CUDA:  # the older form of Triton's onnxruntime backend
        given = {key: spec.config.parameters[key] for key in _TOP_LEVEL if key in spec.config.parameters} | given
    options = {"device_id": spec.device.removeprefix("gpu:") if spec.device.startswith("gpu:") else "0"}
    read = _tensorrt if name == TENSORRT else _cuda
    for key, value in given.items():
        options |= read(key, value, spec.config.name)
    for flag, path in _PATHS.items():  # ONNX Runtime would write where the process was started
        if options.get(flag) == "1" and path not in options:
            options[path] = str(spec.path / "artefacts" / "onnxruntime-tensorrt")
    return options


def _tensorrt(key: str, value: str, model: str) -> Mapping[str, str]:
    if key == "precision_mode":
        if value not in _PRECISIONS:
            raise _refused(key, value, model, f"one of {', '.join(_PRECISIONS)}")
        return _PRECISIONS[value]
    name = _RENAMED.get(key, key)
    if name in _TENSORRT_FLAGS:
        return {name: _flag(key, value, model)}
    if name in _TENSORRT_VALUES:
        return {name: value}
    raise _unknown("tensorrt", key, model, {"precision_mode", *_RENAMED, *_TENSORRT_FLAGS, *_TENSORRT_VALUES})


def _cuda(key: str, value: str, model: str) -> Mapping[str, str]:
    if key in _CUDA_FLAGS:
        return {key: _flag(key, value, model)}
    if key not in _CUDA_VALUES:
        raise _unknown("cuda", key, model, _CUDA_FLAGS | _CUDA_VALUES)
    names = _NUMBERED.get(key, ())
    if names and value.isdecimal() and int(value) < len(names):
        return {key: names[int(value)]}
    if names and value not in names:
        raise _refused(key, value, model, f"one of {', '.join(names)}")
    return {key: value}


def _flag(key: str, value: str, model: str) -> str:
    text = value.lower()
    if text not in ("0", "1", "false", "true"):
        raise _refused(key, value, model, "1 or true, 0 or false")
    return "1" if text in ("1", "true") else "0"


def _refused(key: str, value: str, model: str, expected: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"execution accelerator parameter '{key}' of model '{model}' must be {expected}, got '{value}'; correct it in "
        "config.pbtxt"
    )


def _unknown(accelerator: str, key: str, model: str, known: Iterable[str]) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"execution accelerator {accelerator} of model '{model}' has no parameter '{key}'; it has: "
        f"{', '.join(sorted(known))}. Correct it in config.pbtxt"
    )


def why_not(name: str, available: Sequence[str], folder: Path) -> str:
    """Why a provider did not start, for the operator; `folder` is where ONNX Runtime's libraries are. Blocking."""
    if name not in available:
        return "this build of onnxruntime does not have it; install 'lockgate[gpu]' for NVIDIA GPUs"
    reasons = list(_obstacles(name, folder))
    return "; ".join(reasons) or "it did not start here, the log above says why; check driver, CUDA and cuDNN versions"


def _obstacles(name: str, folder: Path) -> Iterator[str]:
    if name not in _LIBRARIES:
        return
    try:
        driver.probe()
    except errors.GatewayError as problem:
        yield problem.message
    try:
        ctypes.CDLL(str(folder / _LIBRARIES[name]))
    except OSError as problem:
        missing = str(problem).partition(":")[0]
        if ".so" in missing and "/" not in missing:  # else it is ONNX Runtime's own library, which only it can load
            remedy = (
                "TensorRT 10 for CUDA 13" if "nvinfer" in missing else "'lockgate[gpu]', which brings CUDA and cuDNN"
            )
            yield f"the library {missing} is missing; install {remedy}"
