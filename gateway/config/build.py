"""From a complete protobuf message to the plain, checked `ModelConfig` that the rest of the gateway reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.config.check import ACCELERATORS, check, default_deadline_ms, response_cache_public
from gateway.config.complete import normalise
from gateway.config.ensemble import read_steps
from gateway.config.model import (
    Batching,
    InstanceGroup,
    ModelConfig,
    ModelConfigProto,
    QueuePolicy,
    RateLimiter,
    Resource,
    ResponseCache,
    TensorConfig,
    Warmup,
    WarmupInput,
)
from gateway.config.parse import Source
from gateway.config.ragged import read_batch_inputs, read_scattered
from gateway.config.sequences import check_sequences, read_sequences
from gateway.types import DataType


def build(
    proto: ModelConfigProto,
    source: Source,
    *,
    gpus: Sequence[int] = (),
    labels: Mapping[str, tuple[str, ...]] | None = None,
) -> ModelConfig:
    """Normalise, check and read a message whose name, backend, input and output are filled in.

    `gpus` are the ids of the usable GPUs, `labels` the class names of outputs that have a label_filename.
    Raises `InvalidArgument` naming the source, the line and a remedy.
    """
    full = normalise(proto, gpus)
    check(full, gpus, source)
    check_sequences(full, source)
    public = response_cache_public(full, source)
    scattered = read_scattered(full)
    return ModelConfig(
        name=full.name,
        backend=full.backend,
        platform=full.platform,
        max_batch_size=full.max_batch_size,
        inputs=tuple(_tensor(tensor, ()) for tensor in full.input),
        outputs=tuple(
            replace(_tensor(tensor, (labels or {}).get(tensor.name, ())), like=scattered.get(tensor.name, ""))
            for tensor in full.output
        ),
        instance_groups=_groups(proto, full, gpus),
        batching=_batching(full),
        warmup=tuple(_warmup(sample) for sample in full.model_warmup),
        default_model_filename=full.default_model_filename,
        parameters={key: value.string_value for key, value in full.parameters.items()},
        execution_providers=_providers(full, gpus),
        decoupled=full.model_transaction_policy.decoupled,
        proto=full,
        default_deadline_ms=default_deadline_ms(full, source),
        response_cache=ResponseCache(public) if _caches(full) else None,
        accelerators=_accelerators(full),
        sequences=read_sequences(full) if full.HasField("sequence_batching") else None,
        steps=read_steps(full),
        batch_inputs=read_batch_inputs(full),
    )


def datatype(name: str) -> DataType:
    """The element type of a name in the schema, e.g. BYTES for TYPE_STRING."""
    return DataType.BYTES if name == "TYPE_STRING" else DataType(name.removeprefix("TYPE_"))


def _datatype(message: Any) -> DataType:
    enum = message.DESCRIPTOR.fields_by_name["data_type"].enum_type
    return datatype(enum.values_by_number[message.data_type].name)


def _tensor(tensor: Any, labels: tuple[str, ...]) -> TensorConfig:
    return TensorConfig(
        name=tensor.name,
        datatype=_datatype(tensor),
        dims=tuple(tensor.dims),
        reshape=tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None,
        optional=getattr(tensor, "optional", False),
        label_filename=getattr(tensor, "label_filename", ""),
        labels=labels,
        ragged=getattr(tensor, "allow_ragged_batch", False),
        whole=tensor.is_shape_tensor,
    )


def _groups(given: ModelConfigProto, full: ModelConfigProto, gpus: Sequence[int]) -> tuple[InstanceGroup, ...]:
    # The count as the author gave it: the full message holds Triton's default, which says nothing of this machine.
    counts = [group.count for group in given.instance_group] or [0] * len(full.instance_group)
    one = int(given.backend == "python")  # its code may rely on being there once
    return tuple(
        InstanceGroup(
            kind=_kind(group, gpus), count=count or one, gpus=tuple(group.gpus), limiter=_limiter(group.rate_limiter)
        )
        for group, count in zip(full.instance_group, counts, strict=True)
    )


def _limiter(given: Any) -> RateLimiter | None:
    # A priority alone has no effect, as in Triton: nobody waits for an instance that needs nothing.
    resources = tuple(Resource(each.name, each.count, everywhere=getattr(each, "global")) for each in given.resources)
    return RateLimiter(resources, max(given.priority, 1)) if resources else None


def _kind(group: Any, gpus: Sequence[int]) -> str:
    return "gpu" if group.kind == group.KIND_GPU or (group.kind == group.KIND_MODEL and gpus) else "cpu"


def _batching(full: ModelConfigProto) -> Batching | None:
    if not full.HasField("dynamic_batching"):
        return None
    batching = full.dynamic_batching
    return Batching(
        max_queue_delay_us=batching.max_queue_delay_microseconds,
        preferred_batch_sizes=tuple(batching.preferred_batch_size),
        queue_policy=_queue_policy(batching.default_queue_policy),
        priority_levels=batching.priority_levels,
        default_priority_level=batching.default_priority_level,
        priority_queue_policies={
            level: _queue_policy(policy) for level, policy in sorted(batching.priority_queue_policy.items())
        },
        preserve_ordering=batching.preserve_ordering,
    )


def _queue_policy(policy: Any) -> QueuePolicy:
    return QueuePolicy(
        max_queue_size=policy.max_queue_size,
        default_timeout_us=policy.default_timeout_microseconds,
        delays=policy.timeout_action == policy.DELAY,
        allow_timeout_override=policy.allow_timeout_override,
    )


def _caches(full: ModelConfigProto) -> bool:
    # As in Triton: an answer is kept where it is the only one, and depends on nothing but its request.
    kinds = full.WhichOneof("scheduling_choice")
    alone = kinds not in ("sequence_batching", "ensemble_scheduling") and not full.model_transaction_policy.decoupled
    return bool(full.response_cache.enable and alone)


def _warmup(sample: Any) -> Warmup:
    return Warmup(
        name=sample.name,
        batch_size=max(sample.batch_size, 1),
        count=max(sample.count, 1),
        inputs={name: _warmup_input(data) for name, data in sample.inputs.items()},
    )


def _warmup_input(data: Any) -> WarmupInput:
    kind = data.WhichOneof("input_data_type")
    source = data.input_data_file if kind == "input_data_file" else kind.removesuffix("_data")
    return WarmupInput(_datatype(data), tuple(data.dims), source)


def _providers(full: ModelConfigProto, gpus: Sequence[int]) -> tuple[str, ...]:
    on_gpu = any(_kind(group, gpus) == "gpu" for group in full.instance_group)
    accelerators = full.optimization.execution_accelerators
    asked = accelerators.gpu_execution_accelerator if on_gpu else accelerators.cpu_execution_accelerator
    names = [ACCELERATORS[accelerator.name] for accelerator in asked]
    defaults = ["CUDAExecutionProvider", "CPUExecutionProvider"] if on_gpu else ["CPUExecutionProvider"]
    return tuple(dict.fromkeys(names + defaults))


def _accelerators(full: ModelConfigProto) -> dict[str, Mapping[str, str]]:
    accelerators = full.optimization.execution_accelerators
    return {
        ACCELERATORS[accelerator.name]: dict(accelerator.parameters)
        for accelerator in (*accelerators.cpu_execution_accelerator, *accelerators.gpu_execution_accelerator)
    }
