"""Whether a complete, normalised configuration makes sense by itself, in Triton's words plus a remedy.

Mirrors core `ValidateModelConfig`, `ValidateInstanceGroup` and `ValidateModelIOConfig` for what this version
serves. Whether it fits the model file is `fit.py`; whether we do what it asks, `support.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from gateway.config.complete import FORMATS
from gateway.config.ensemble import check_ensemble
from gateway.config.model import ModelConfigProto, may_leave_gpu
from gateway.config.parse import Source
from gateway.config.ragged import ragged_checks

ACCELERATORS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
"""Triton's execution accelerators by ONNX Runtime's names."""


def check(proto: ModelConfigProto, gpus: Sequence[int], source: Source) -> None:
    """Raise `InvalidArgument` for the first thing wrong; `gpus` are the ids of the usable GPUs."""
    for each in checks(proto, gpus, source):
        each()


def checks(proto: ModelConfigProto, gpus: Sequence[int], source: Source) -> Iterator[Callable[[], object]]:
    """All checks, one by one: each raises `InvalidArgument` for what it finds wrong."""
    yield partial(_check_platform, proto, source)
    yield partial(check_ensemble, proto, source)
    for kind, tensors in (("input", proto.input), ("output", proto.output)):
        yield partial(_check_some, proto.name, tensors, kind, source)
        yield from _tensor_checks(proto, kind, tensors, source)
    yield from ragged_checks(proto, source)
    for about_batches in (_check_batching, _check_priorities, _check_ordering):
        yield partial(about_batches, proto, source)
    for group in proto.instance_group:
        yield partial(_check_profile, group, proto.backend, source)
        may_leave = may_leave_gpu(proto.backend, _fallback(proto))
        yield partial(_check_group, group, gpus, source, may_leave=may_leave)
    accelerators = proto.optimization.execution_accelerators
    for accelerator in (*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator):
        yield partial(_check_accelerator, accelerator.name, source)
    for warmup in proto.model_warmup:
        yield partial(_check_warmup, warmup, proto, source)
    for parameter in (default_deadline_ms, response_cache_public):
        yield partial(parameter, proto, source)


def _tensor_checks(
    proto: ModelConfigProto, kind: str, tensors: Sequence[Any], source: Source
) -> Iterator[Callable[[], object]]:
    for tensor in tensors:
        for text in tensor_faults(tensor, kind, proto.max_batch_size):
            yield partial(_refuse, source, text, kind, tensor.name)
    yield partial(_check_unique, [tensor.name for tensor in tensors], kind, source)


def _refuse(source: Source, text: str, *words: str) -> None:
    raise source.error(text, *words)


def _check_some(model: str, tensors: Sequence[Any], kind: str, source: Source) -> None:
    if not tensors:
        raise source.error(
            f"model '{model}' must specify '{kind}': list name, data_type and dims of each {kind} tensor"
        )


def _check_accelerator(name: str, source: Source) -> None:
    if name not in ACCELERATORS:
        raise source.error(
            f"unknown Execution Accelerator '{name}' is requested; there are: {', '.join(ACCELERATORS)}",
            "execution_accelerators",
            name,
        )


def _check_platform(proto: ModelConfigProto, source: Source) -> None:
    platforms = {known.platform for known in FORMATS if known.backend == proto.backend}
    if platforms and proto.platform not in platforms:
        raise source.error(
            f"unexpected 'platform' and 'backend' pair, got:{proto.platform}, {proto.backend}. Remove platform",
            "platform",
        )


def _check_unique(names: list[str], kind: str, source: Source) -> None:
    for name in names:
        if names.count(name) > 1:
            raise source.error(f"model {kind} '{name}' is given twice; remove one", kind, name)


def tensor_faults(tensor: Any, kind: str, max_batch_size: int) -> Iterator[str]:
    """What is wrong with one tensor, a text each; `kind` is "input" or "output"."""
    if not tensor.name:
        yield f"model {kind} must specify 'name'"
        return
    scalar = tensor.HasField("reshape") and not tensor.reshape.shape
    faults = (
        (not tensor.data_type, "must specify 'data_type', e.g. TYPE_FP32"),
        (not tensor.dims, "must specify 'dims'; for one number per row use dims: [ 1 ] with reshape: { shape: [ ] }"),
        (
            any(dim < 1 and dim != -1 for dim in (*tensor.dims, *tensor.reshape.shape)),
            "dimension must be integer >= 1, or -1 to indicate a variable-size dimension",
        ),
        (
            scalar and max_batch_size == 0,
            "cannot have empty reshape for non-batching model as scalar tensors are not supported. Remove reshape",
        ),
        (
            tensor.HasField("reshape") and _segments(tensor.dims) != _segments(tensor.reshape.shape),
            "has different size for dims and reshape. Both must hold equally many elements",
        ),
        (
            kind == "input" and tensor.format and len(tensor.dims) != 3,
            "has format NHWC/NCHW, which require 3 dims. Remove format",
        ),
        (
            tensor.is_non_linear_format_io,
            "has a non-linear format, which is only supported for TensorRT models",
        ),
        (
            tensor.is_shape_tensor and kind == "input" and tensor.allow_ragged_batch,
            "is a shape tensor, which is the same for all requests of a batch. Remove allow_ragged_batch",
        ),
    )
    for at_fault, text in faults:
        if at_fault:
            yield f"model {kind} '{tensor.name}' {text}"


def _segments(dims: Sequence[int]) -> list[int]:
    """Element counts between the open dimensions: equal for shapes that always hold equally many elements."""
    counts = [1]
    for dim in dims:
        if dim == -1:
            counts.append(1)
        else:
            counts[-1] *= dim
    return counts


def _check_batching(proto: ModelConfigProto, source: Source) -> None:
    if proto.max_batch_size < 0:
        raise source.error(
            f"'max_batch_size' must be non-negative value for {proto.name}; 0 means no batching", "max_batch_size"
        )
    words = ("dynamic_batching", "preferred_batch_size")
    for size in proto.dynamic_batching.preferred_batch_size:
        if size <= 0:
            raise source.error(f"dynamic batching preferred size must be positive for {proto.name}", *words)
        if size > proto.max_batch_size:
            raise source.error(
                f"dynamic batching preferred size must be <= max batch size for {proto.name}: {size} is more than "
                f"{proto.max_batch_size}",
                *words,
            )


_MOST_LEVELS = 900  # the scheduler numbers its own levels beyond these


def _check_priorities(proto: ModelConfigProto, source: Source) -> None:
    batching = proto.dynamic_batching
    levels = batching.priority_levels
    if not levels:
        return
    if levels > _MOST_LEVELS:
        raise source.error(
            f"priority_levels of {proto.name} is {levels}, and the most is {_MOST_LEVELS}. Use fewer levels",
            "dynamic_batching",
            "priority_levels",
        )
    if not 1 <= batching.default_priority_level <= levels:
        raise source.error(
            f"default priority level must be in range [1, {levels}] for {proto.name}. Set default_priority_level to "
            "the level of requests that name none; 1 is the highest",
            "dynamic_batching",
            "default_priority_level" if batching.default_priority_level else "priority_levels",
        )
    for level in batching.priority_queue_policy:
        if not 1 <= level <= levels:
            raise source.error(
                f"priority queue policy must have priority level in range [1, {levels}] for {proto.name}, got {level}. "
                "Correct its key, or raise priority_levels",
                "dynamic_batching",
                "priority_queue_policy",
                "key",
                str(level),
            )


def _check_ordering(proto: ModelConfigProto, source: Source) -> None:
    batching = proto.dynamic_batching
    if not batching.preserve_ordering:
        return
    words = ("dynamic_batching", "preserve_ordering")
    if batching.priority_levels > 1:
        raise source.error(
            f"Only one priority level is allowed when 'preserve_ordering' is true for {proto.name}. Remove one of "
            "the two",
            *words,
        )
    for policy in (batching.default_queue_policy, *batching.priority_queue_policy.values()):
        if policy.default_timeout_microseconds and policy.timeout_action == policy.DELAY:
            raise source.error(
                f"Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for {proto.name}. "
                "Use REJECT, or remove preserve_ordering",
                *words,
            )


_DEFAULT_DEADLINE = "default_deadline_ms"
_CACHE_PUBLIC = "response_cache_public"


def default_deadline_ms(proto: ModelConfigProto, source: Source) -> float | None:
    """The parameter of this name, which only this gateway knows; None when it is not there."""
    if _DEFAULT_DEADLINE not in proto.parameters:
        return None
    text = proto.parameters[_DEFAULT_DEADLINE].string_value
    with suppress(ValueError):
        milliseconds = float(text)
        if 0 <= milliseconds < 1e12:
            return milliseconds
    raise source.error(
        f"parameter {_DEFAULT_DEADLINE} must be a number of milliseconds, 0 for no deadline, got '{text}'",
        "parameters",
        _DEFAULT_DEADLINE,
    )


def response_cache_public(proto: ModelConfigProto, source: Source) -> bool:
    """The parameter of this name, which only this gateway knows; False when it is not there."""
    text = proto.parameters[_CACHE_PUBLIC].string_value if _CACHE_PUBLIC in proto.parameters else "false"
    if text not in ("true", "false"):
        raise source.error(
            f"parameter {_CACHE_PUBLIC} must be true, to give responses to other tenants than they were computed for, "
            f"or false, got '{text}'",
            "parameters",
            _CACHE_PUBLIC,
        )
    return text == "true"


def _fallback(proto: ModelConfigProto) -> str:
    return str(proto.parameters["fallback"].string_value) if "fallback" in proto.parameters else ""


def _check_profile(group: Any, backend: str, source: Source) -> None:
    if group.profile and backend != "tensorrt":
        raise source.error(
            f"instance group {group.name} has a profile, which is only supported for TensorRT models", "profile"
        )


def _check_group(group: Any, gpus: Sequence[int], source: Source, *, may_leave: bool) -> None:
    head = f"instance group {group.name}"
    if group.count < 0:
        raise source.error(f"{head} has a negative count; leave it out or use 1 or more", "instance_group", "count")
    if group.kind == group.KIND_GPU and not may_leave:
        if not gpus:
            raise source.error(
                f"{head} has kind KIND_GPU but no GPUs are available. Use KIND_AUTO to run on whatever there is, "
                "KIND_CPU, or let the parameter 'fallback' name what to run on instead",
                "instance_group",
                "KIND_GPU",
            )
        if missing := sorted(set(group.gpus) - set(gpus)):
            raise source.error(
                f"{head} specifies invalid or unsupported gpu id {missing[0]}; there are: {list(gpus)}",
                "instance_group",
                "gpus",
            )
    elif group.gpus and group.kind != group.KIND_GPU:
        raise source.error(
            f"{head} lists gpus {list(group.gpus)} and runs on the CPU. Remove gpus, or serve it where they exist",
            "instance_group",
            "gpus",
        )


def _check_warmup(warmup: Any, proto: ModelConfigProto, source: Source) -> None:
    words = ("model_warmup", warmup.name)
    head = f"model_warmup '{warmup.name}'"
    if warmup.batch_size > max(proto.max_batch_size, 1):
        raise source.error(
            f"{head} has batch_size {warmup.batch_size}, more than max_batch_size {proto.max_batch_size}", *words
        )
    known = {tensor.name: tensor for tensor in proto.input}
    if proto.HasField("sequence_batching"):
        raise source.error(
            f"{head}: a model of sequences is warmed up by a row of zeros, not by samples. Remove model_warmup", *words
        )
    for name, sample in warmup.inputs.items():
        if name not in known:
            raise source.error(
                f"{head} has an input '{name}', which the model has not; it has: {', '.join(known)}", *words, name
            )
        _check_sample(sample, known[name], f"{head} input '{name}'", (*words, name), source)
    if missing := [name for name, tensor in known.items() if name not in warmup.inputs and not tensor.optional]:
        raise source.error(f"{head} lacks the input '{missing[0]}'; add it", *words)


def _check_sample(sample: Any, tensor: Any, head: str, words: tuple[str, ...], source: Source) -> None:
    if sample.data_type != tensor.data_type:
        raise source.error(f"{head} has another data_type than the model's input; make them equal", *words)
    if any(dim < 0 for dim in sample.dims):
        raise source.error(f"{head} has an open dimension; give the size to run with", *words)
    if sample.WhichOneof("input_data_type") is None:
        raise source.error(f"{head} has no data; set zero_data, random_data or input_data_file", *words)


def plain_name(name: str) -> bool:
    """Whether a file name from a configuration stays below the folder it is relative to."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
