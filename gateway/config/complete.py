"""Fills in what a `config.pbtxt` leaves out, as Triton does: backend, batching, inputs and outputs, defaults.

Pure functions from message to message (core `AutoCompleteBackendFields`, `NormalizeModelConfig`,
`NormalizeInstanceGroup`; onnxruntime_backend `AutoCompleteConfig`). None of them judges the result: that is
`check.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from gateway.config.model import ModelConfigProto
from gateway.config.parse import Source
from gateway.types import DataType, ModelIO, TensorSpec


class Format(NamedTuple):
    """A kind of model file, and what Triton calls its backend and platform."""

    backend: str
    platform: str
    filename: str


FORMATS = (
    Format("tensorrt", "tensorrt_plan", "model.plan"),
    Format("onnxruntime", "onnxruntime_onnx", "model.onnx"),
    Format("openvino", "", "model.xml"),
    Format("pytorch", "pytorch_libtorch", "model.pt"),
    Format("tensorflow", "tensorflow_savedmodel", "model.savedmodel"),
    Format("tensorflow", "tensorflow_graphdef", "model.graphdef"),
    Format("python", "", "model.py"),
)
"""In the order in which Triton tries them."""


def fill_backend(proto: ModelConfigProto, name: str, files: Collection[str]) -> ModelConfigProto:
    """Fill name, backend, platform and default_model_filename from each other.

    `files` are the names in a version folder; they count only when the configuration names none of the three.
    """
    result = _copy(proto)
    result.name = result.name or name
    found = next((known for known in FORMATS if _matches(result, known, files)), None)
    if found is not None:
        result.backend = result.backend or found.backend
        result.platform = result.platform or found.platform
        result.default_model_filename = result.default_model_filename or found.filename
    return result


def _matches(proto: ModelConfigProto, known: Format, files: Collection[str]) -> bool:
    if proto.platform:
        return bool(proto.platform == known.platform)
    if proto.backend:
        return bool(proto.backend == known.backend)
    return known.filename in ([proto.default_model_filename] if proto.default_model_filename else files)


def complete(proto: ModelConfigProto, io: ModelIO, default_max_batch_size: int, source: Source) -> ModelConfigProto:
    """Fill max_batch_size, dynamic_batching, input and output from what the model file says of itself.

    Optional inputs are the configuration's to name. A configuration with both input and output is returned as it is. Raises `InvalidArgument` when it asks for
    batches and the model cannot take them.
    """
    result = _copy(proto)
    if result.input and result.output:
        return result
    inputs = [spec for spec in io.inputs if not spec.optional]
    if all(tensor.shape and tensor.shape[0] == -1 for tensor in (*inputs, *io.outputs)):
        result.max_batch_size = result.max_batch_size or default_max_batch_size
        scheduled = result.HasField("sequence_batching") or result.HasField("dynamic_batching")
        if result.max_batch_size > 1 and not scheduled:
            result.dynamic_batching.SetInParent()
    elif result.max_batch_size != 0:
        raise source.error(
            f"autofill failed for model '{result.name}': model does not support batching while non-zero "
            "max_batch_size is specified. Set max_batch_size: 0, or export the model with a dynamic first dimension",
            "max_batch_size",
        )
    batched = result.max_batch_size > 0
    kept = _kept(result)
    if not result.input:
        _add(result.input, [spec for spec in inputs if spec.name not in kept], batched=batched)
    if not result.output:
        _add(result.output, [spec for spec in io.outputs if spec.name not in kept], batched=batched)
    return result


def _kept(proto: ModelConfigProto) -> set[str]:
    """What is filled in for a batch, or kept for a sequence, and is no business of clients."""
    sequences = proto.sequence_batching
    states = {name for state in sequences.state for name in (state.input_name, state.output_name)}
    made = {name for each in proto.batch_input for name in each.target_name}
    return states | made | {control.name for control in sequences.control_input}


def adopt(proto: ModelConfigProto, theirs: ModelConfigProto) -> ModelConfigProto:
    """Fill max_batch_size, dynamic_batching, input and output from a remote server's configuration of the same model."""
    result = _copy(proto)
    result.max_batch_size = result.max_batch_size or theirs.max_batch_size
    if result.max_batch_size > 1 and not result.HasField("dynamic_batching"):
        result.dynamic_batching.SetInParent()
    for ours, tensors in ((result.input, theirs.input), (result.output, theirs.output)):
        if not ours:
            for tensor in tensors:
                ours.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return result


def _add(tensors: Any, specs: Sequence[TensorSpec], *, batched: bool) -> None:
    for spec in specs:
        dims = spec.shape[1:] if batched else spec.shape
        tensor = tensors.add(name=spec.name, data_type=proto_type(spec.datatype), dims=dims or (1,))
        if batched and not dims:
            # One number per row: clients see [1], the model gets no dimension but the batch.
            tensor.reshape.SetInParent()


def normalise(proto: ModelConfigProto, gpus: Sequence[int]) -> ModelConfigProto:
    """Fill the defaults of version policy, batching, pinned memory and instance groups.

    `gpus` are the ids of the usable GPUs; without one, KIND_AUTO becomes KIND_CPU.
    """
    result = _copy(proto)
    if not result.HasField("version_policy"):
        result.version_policy.latest.num_versions = 1
    _normalise_batching(result)
    if result.HasField("ensemble_scheduling"):
        return result  # it runs nowhere
    if not result.optimization.HasField("input_pinned_memory"):
        result.optimization.input_pinned_memory.enable = True
    if not result.optimization.HasField("output_pinned_memory"):
        result.optimization.output_pinned_memory.enable = True
    if not result.instance_group:
        result.instance_group.add(name=result.name)
    for index, group in enumerate(result.instance_group):
        _normalise_group(group, f"{result.name}_{index}", result.backend, gpus)
    return result


def _normalise_batching(proto: ModelConfigProto) -> None:
    sequences = proto.sequence_batching
    if proto.HasField("sequence_batching"):
        sequences.max_sequence_idle_microseconds = sequences.max_sequence_idle_microseconds or 1_000_000
    for has, batching in (
        (proto.HasField("dynamic_batching"), proto.dynamic_batching),
        (proto.HasField("sequence_batching") and sequences.HasField("oldest"), sequences.oldest),
    ):
        if has and proto.max_batch_size > 0 and not batching.preferred_batch_size:
            batching.preferred_batch_size.append(proto.max_batch_size)


def _normalise_group(group: Any, name: str, backend: str, gpus: Sequence[int]) -> None:
    group.name = group.name or name
    if group.kind == group.KIND_AUTO:
        usable = bool(gpus) and set(group.gpus) <= set(gpus)
        group.kind = group.KIND_GPU if usable else group.KIND_CPU
    if group.kind == group.KIND_GPU and not group.gpus:
        group.gpus.extend(gpus)
    # Triton's default (core `SetDefaultInstanceCount`); `build` still knows that nobody asked for it.
    group.count = group.count or (2 if group.kind == group.KIND_CPU and backend == "onnxruntime" else 1)


def proto_type(datatype: DataType) -> str:
    """The schema's name of an element type, e.g. TYPE_STRING for BYTES."""
    return "TYPE_STRING" if datatype is DataType.BYTES else f"TYPE_{datatype.value}"


def _copy(proto: ModelConfigProto) -> ModelConfigProto:
    result = type(proto)()
    result.CopyFrom(proto)
    return result
