"""What this version does not do of what a model configuration can ask for.

Asking for something whose absence would change answers makes the model unavailable; asking for something that
only tunes how they are reached is accepted with a warning. Nothing is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from gateway.config.backends import instead_of
from gateway.config.ensemble import is_ensemble
from gateway.config.model import ModelConfigProto
from gateway.config.parse import Source
from gateway.errors import InvalidArgument


class Gap(NamedTuple):
    """A field that is not done: when it is asked for, where it stands, and what to tell its author."""

    asked: Callable[[ModelConfigProto], bool]
    words: tuple[str, ...]
    text: str


def require_supported(proto: ModelConfigProto, backends: Collection[str], source: Source) -> None:
    """Raise `InvalidArgument` for a configuration that this version cannot serve faithfully.

    `backends` are the names of the engines there are; the backend of `proto` is already filled in.
    """
    for problem in unsupported(proto, backends, source):
        raise problem


def unsupported(proto: ModelConfigProto, backends: Collection[str], source: Source) -> Iterator[InvalidArgument]:
    """Everything that `require_supported` refuses, the first first."""
    for gap in _REFUSED:
        if gap.asked(proto):
            yield source.error(f"{gap.words[-1]} is not supported by this version. {gap.text}", *gap.words)
    if is_ensemble(proto):
        return
    if proto.backend == "python" and "python" not in backends:
        yield source.error(
            f"backend 'python' runs the code in '{proto.default_model_filename or 'model.py'}', which is not allowed. If "
            "you trust every model.py of this repository, start the gateway with --allow-python-models",
            "backend",
        )
        return
    known = ", ".join(sorted(backends))
    if proto.backend and proto.backend not in backends:
        yield source.error(
            f"backend '{proto.backend}' is not supported by this version, which has: {known}. {instead_of(proto.backend)}",
            "backend" if "backend" in source.text else "platform",
        )
    if not proto.backend:
        asked = f"platform '{proto.platform}' is not known" if proto.platform else "the configuration names no backend"
        yield source.error(
            f"{asked} for model '{proto.name}' and no model file tells it. Set backend to one of: {known}; or put "
            f"model.onnx into {proto.name}/1/",
            "platform",
        )


def warnings(proto: ModelConfigProto, source: Source) -> tuple[str, ...]:
    """Say which fields of the configuration have no effect here, one text each."""
    return tuple(
        source.describe(f"{gap.words[-1]} has no effect in this version. {gap.text}", *gap.words)
        for gap in _WITHOUT_EFFECT
        if gap.asked(proto)
    )


def _has(field: str) -> Callable[[ModelConfigProto], bool]:
    return lambda proto: bool(proto.HasField(field))


def _any(field: str) -> Callable[[ModelConfigProto], bool]:
    return lambda proto: bool(getattr(proto, field))


def _groups(*fields: str) -> Callable[[ModelConfigProto], bool]:
    return lambda proto: any(_set_in(group, fields) for group in proto.instance_group)


def _set_in(message: ModelConfigProto, fields: Iterable[str]) -> bool:
    return any(field.name in fields for field, _ in message.ListFields())


_JOINS: dict[str, Callable[[ModelConfigProto], bool]] = {
    "allow_ragged_batch": lambda proto: any(tensor.allow_ragged_batch for tensor in proto.input),
    "batch_input": _any("batch_input"),
    "batch_output": _any("batch_output"),
}
"""What makes batches more than rows of requests of one shape."""


def _has_whole(proto: ModelConfigProto) -> bool:
    return any(tensor.is_shape_tensor for tensor in (*proto.input, *proto.output))


_REFUSED = (
    Gap(
        lambda proto: bool(proto.sequence_batching.iterative_sequence),
        ("sequence_batching", "iterative_sequence"),
        "Let the client send each step, or write a decoupled model",
    ),
    Gap(
        lambda proto: bool(proto.sequence_batching.oldest.preserve_ordering),
        ("sequence_batching", "preserve_ordering"),
        "Remove it: answers within a sequence keep its order",
    ),
    Gap(
        lambda proto: proto.HasField("sequence_batching") and proto.backend == "remote",
        ("sequence_batching",),
        "Its requests would have to reach one server in their order. Send them to that server",
    ),
    Gap(
        lambda proto: bool(proto.sequence_batching.state) and proto.backend == "python",
        ("sequence_batching", "state"),
        "As in Triton a Python model keeps its own state, by correlation_id()",
    ),
    Gap(
        lambda proto: (
            bool(proto.model_transaction_policy.decoupled)
            and proto.backend != "python"
            and not proto.HasField("ensemble_scheduling")  # whose models say it
        ),
        ("model_transaction_policy", "decoupled"),
        "Only models of backend 'python' can be. Set it to false if the model gives exactly one response per request",
    ),
    *(
        Gap(
            lambda proto, field=field: proto.backend == "remote" and _JOINS[field](proto),  # type: ignore[misc]
            (field,),
            "Remove it: the remote server makes its batches by itself",
        )
        for field in ("allow_ragged_batch", "batch_input", "batch_output")
    ),
    Gap(
        lambda proto: (
            (_has_whole(proto) or any(asked(proto) for asked in _JOINS.values()))
            and proto.HasField("sequence_batching")
            and not proto.sequence_batching.HasField("oldest")
        ),
        ("sequence_batching",),
        "With ragged inputs or shape tensors sequences cannot keep their row. Use the oldest strategy",
    ),
    Gap(
        lambda proto: _has_whole(proto) and proto.backend not in ("onnxruntime", "fake"),
        ("is_shape_tensor",),
        "Of other models than ONNX files no tensor can be one for the whole batch",
    ),
    Gap(_has("model_operations"), ("model_operations",), "Export the model with standard ONNX operators"),
    Gap(_has("model_repository_agents"), ("model_repository_agents",), "Remove it and check the files before serving"),
    Gap(_any("cc_model_filenames"), ("cc_model_filenames",), "Use default_model_filename"),
)

_WITHOUT_EFFECT = (
    Gap(
        lambda proto: any(
            state.use_same_buffer_for_input_output or state.use_growable_memory
            for state in proto.sequence_batching.state
        ),
        ("sequence_batching", "state"),
        "Each run gives its states new memory",
    ),
    Gap(
        lambda proto: (
            not proto.dynamic_batching.priority_levels
            and _set_in(proto.dynamic_batching, ("default_priority_level", "priority_queue_policy"))
        ),
        ("dynamic_batching", "priority_levels"),
        "Set it to the number of levels; without it all requests have the same priority",
    ),
    Gap(
        _groups("profile"), ("instance_group", "profile"), "Of a plan's profiles the one is taken that fits the request"
    ),
    Gap(
        _groups("passive", "secondary_devices", "host_policy"),
        ("instance_group",),
        "Of an instance group only name, kind, count and gpus count: passive, secondary_devices and host_policy do not",
    ),
    Gap(
        lambda proto: any(group.kind == group.KIND_MODEL for group in proto.instance_group),
        ("instance_group", "KIND_MODEL"),
        "The instances are placed as with KIND_AUTO",
    ),
    Gap(
        lambda proto: (
            _set_in(proto.optimization, ("graph", "priority", "gather_kernel_buffer_threshold", "eager_batching"))
            or (proto.backend != "tensorrt" and proto.optimization.HasField("cuda"))
        ),
        ("optimization",),
        "Of optimization only execution_accelerators counts and, for TensorRT, cuda { graphs }",
    ),
    Gap(
        lambda proto: (
            proto.backend == "tensorrt"
            and _set_in(proto.optimization.cuda, ("graph_spec", "busy_wait_events", "output_copy_stream"))
        ),
        ("optimization", "cuda"),
        "Of cuda only graphs counts: a graph is captured for each of the first shapes that come",
    ),
    Gap(
        lambda proto: any(
            accelerator.parameters
            for accelerator in proto.optimization.execution_accelerators.cpu_execution_accelerator
        ),
        ("optimization", "execution_accelerators", "parameters"),
        "The execution provider runs with its defaults",
    ),
    Gap(
        lambda proto: (
            bool(proto.batch_input or proto.batch_output) and (proto.backend == "python" or is_ensemble(proto))
        ),
        ("batch_input", "batch_output"),
        "A Python model gets each request by itself, and the steps of an ensemble have their own",
    ),
    Gap(_any("metric_tags"), ("metric_tags",), "Metrics carry the labels model and version"),
    Gap(_has("model_metrics"), ("model_metrics",), "The histograms have fixed buckets"),
    Gap(_any("runtime"), ("runtime",), "Each backend has one runtime"),
)
