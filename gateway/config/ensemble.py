"""Ensembles: what a configuration's `ensemble_scheduling` says, and whether it makes sense, in Triton's words.

By itself (core `ValidateEnsembleSchedulingConfig`) a configuration is checked as it is read; against the models of its
steps (core `ValidateEnsembleConfig`), which must be loaded for that, as the ensemble is loaded and whenever one of them
changes. The graph is of tensors: a step's outputs can be had once all tensors that it takes are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gateway.config.complete import proto_type
from gateway.config.model import ModelConfig, ModelConfigProto, Step, TensorConfig
from gateway.config.parse import Source
from gateway.errors import InvalidArgument

PLATFORM = "ensemble"
_FIELD = "ensemble_scheduling"

ConfigOf = Callable[[str, str], ModelConfig]
"""The configuration of a model's loaded version, the newest if empty. Raises `InvalidArgument` when there is none."""


def is_ensemble(proto: ModelConfigProto) -> bool:
    """Whether the configuration is of an ensemble, or claims to be."""
    return bool(proto.HasField(_FIELD)) or proto.platform == PLATFORM


def read_steps(proto: ModelConfigProto) -> tuple[Step, ...]:
    """The steps in the order in which they stand there."""
    return tuple(
        Step(
            step.model_name,
            "" if step.model_version in (0, -1) else str(step.model_version),
            dict(sorted(step.input_map.items())),
            dict(sorted(step.output_map.items())),
        )
        for step in proto.ensemble_scheduling.step
    )


def check_ensemble(proto: ModelConfigProto, source: Source) -> None:
    """Raise `InvalidArgument` for the first thing that is wrong with an ensemble by itself; other models are let by."""
    if not is_ensemble(proto):
        return
    name = proto.name
    faults = (
        (
            proto.platform != PLATFORM,
            f"ensemble scheduling cannot be set for model '{name}' whose platform is not {PLATFORM}",
            _FIELD,
        ),
        (
            not proto.HasField(_FIELD),
            f"ensemble scheduling must be set for ensemble '{name}' whose platform is {PLATFORM}",
            "platform",
        ),
        (
            bool(proto.backend),
            f"an ensemble has no backend, and '{name}' names '{proto.backend}'. Remove backend",
            "backend",
        ),
        (
            len(proto.instance_group) > 0,
            f"instance group should not be specified for ensemble '{name}'",
            "instance_group",
        ),
        (proto.HasField("optimization"), f"optimization should not be specified for ensemble '{name}'", "optimization"),
        (len(proto.model_warmup) > 0, f"model_warmup can not be specified for ensemble '{name}'", "model_warmup"),
        (not proto.ensemble_scheduling.step, f"must specify 'step' for ensemble '{name}'", _FIELD),
    )
    for wrong, text, word in faults:
        if wrong:
            raise source.error(text, word)
    for index, step in enumerate(proto.ensemble_scheduling.step):
        _check_step(name, index, step, source)
    steps = read_steps(proto)
    _check_written_once(name, steps, source)
    _check_flow(proto, steps, source)


def _check_step(name: str, index: int, step: Any, source: Source) -> None:
    for field in ("model_name", "input_map", "output_map"):
        if not getattr(step, field):
            raise source.error(f"must specify '{field}' in step {index} of ensemble '{name}'", _FIELD)
    if step.model_namespace:
        raise source.error(
            f"model_namespace is not supported by this version, and step {index} of ensemble '{name}' has it. Remove it "
            "and give every model a name of its own",
            "model_namespace",
        )


def _check_written_once(name: str, steps: Sequence[Step], source: Source) -> None:
    written: set[str] = set()
    for index, step in enumerate(steps):
        for tensor in step.outputs.values():
            if tensor in written:
                raise source.error(
                    f"ensemble tensor '{tensor}' can appear in an output map only once for ensemble '{name}' step {index}",
                    _FIELD,
                    tensor,
                )
            written.add(tensor)


def _check_flow(proto: ModelConfigProto, steps: Sequence[Step], source: Source) -> None:
    """Every tensor comes from somewhere and goes somewhere."""
    name = proto.name
    read = {tensor for step in steps for tensor in step.inputs.values()}
    mapped = read.union(*(step.outputs.values() for step in steps))
    for kind, tensors in (("input", proto.input), ("output", proto.output)):
        for unused in sorted({each.name for each in tensors} - mapped):
            raise source.error(f"ensemble {kind} '{unused}' for ensemble '{name}' is not used", kind, unused)
    there = reachable(steps, {each.name for each in proto.input})
    outputs = {each.name for each in proto.output}
    for output in sorted(outputs - there):
        raise source.error(f"output '{output}' for ensemble '{name}' is not written", "output", output)
    for tensor in sorted(mapped - outputs):
        if tensor not in there or tensor not in read:
            raise source.error(f"ensemble tensor '{tensor}' is unused in ensemble '{name}'", _FIELD, tensor)


def reachable(steps: Sequence[Step], given: Collection[str]) -> set[str]:
    """The tensors that there will be once all steps have run that can."""
    return {*given}.union(*(step.outputs.values() for step in in_order(steps, given)))


def in_order(steps: Sequence[Step], given: Collection[str]) -> list[Step]:
    """The steps that can run where these tensors are given, each after those whose outputs it takes."""
    there, waiting, order = set(given), list(steps), list[Step]()
    while ready := [step for step in waiting if there.issuperset(step.inputs.values())]:
        for step in ready:
            there.update(step.outputs.values())
        order += ready
        waiting = [step for step in waiting if step not in ready]
    return order


class _Tensor(NamedTuple):
    """What is known of an ensemble tensor, and from which model; `batched` says whether dimension -1 stands before."""

    model: str
    config: TensorConfig
    batched: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return (-1, *self.config.dims) if self.batched else self.config.dims


def fit(ensemble: ModelConfig, config_of: ConfigOf) -> ModelConfig:
    """The ensemble with what its steps' models say filled in: which of them take batches, and labels of outputs.

    Raises `InvalidArgument` where they do not fit together.
    """
    batched = ensemble.max_batch_size > 0
    known = {each.name: _Tensor(ensemble.name, each, batched) for each in (*ensemble.inputs, *ensemble.outputs)}
    labels: dict[str, tuple[str, ...]] = {}
    steps = []
    for step in ensemble.steps:
        config = config_of(step.model, step.version)
        if 0 < config.max_batch_size < ensemble.max_batch_size:
            raise InvalidArgument(
                f"ensemble '{ensemble.name}' allows maximum batch size {ensemble.max_batch_size}, but it contains model "
                f"'{step.model}' which only allows maximum batch size to be {config.max_batch_size}"
            )
        _check_done(ensemble.name, step, config)
        inputs = {each.name: each for each in config.inputs}
        outputs = {each.name: each for each in config.outputs}
        _check_names(ensemble.name, step, inputs, outputs)
        for mapped, tensors in ((step.inputs, inputs), (step.outputs, outputs)):
            for name, tensor in mapped.items():
                found = _Tensor(step.model, tensors[name], config.max_batch_size > 0)
                _check_same(ensemble.name, tensor, known.setdefault(tensor, found), found)
        labels.update({tensor: outputs[name].labels for name, tensor in step.outputs.items()})
        dims = {name: inputs[name].dims for name in step.inputs}
        steps.append(replace(step, batched=config.max_batch_size > 0, dims=dims, decoupled=config.decoupled))
    _check_origins(ensemble, steps)
    given = tuple(replace(each, labels=each.labels or labels.get(each.name, ())) for each in ensemble.outputs)
    fitting = replace(ensemble, steps=tuple(steps), outputs=given)
    return _with_policy(fitting, decoupled=any(step.decoupled for step in steps))


def _with_policy(config: ModelConfig, *, decoupled: bool) -> ModelConfig:
    """As in Triton an ensemble is decoupled where one of its models is, whatever its own file says."""
    if config.decoupled is decoupled:
        return config
    proto = copy.deepcopy(config.proto)
    proto.model_transaction_policy.decoupled = decoupled
    return replace(config, decoupled=decoupled, proto=proto)


def _check_origins(ensemble: ModelConfig, steps: Sequence[Step]) -> None:
    """Nothing may take the tensors of different decoupled models: their responses do not belong to each other."""
    origins = {
        each.name: "" for each in ensemble.inputs
    }  # by tensor, one of those that the model gave which it is from

    def origin_of(tensors: Collection[str], model: str) -> str:
        found = {origins[tensor] for tensor in tensors}
        if len(found) > 1:
            raise InvalidArgument(
                f"in ensemble '{ensemble.name}', step of model '{model}' receives inputs originated from different "
                "decoupled models"
            )
        return found.pop()

    for step in in_order(steps, origins):
        origin = origin_of(step.inputs.values(), step.model)
        own = next(iter(step.outputs.values())) if step.decoupled else origin
        origins.update(dict.fromkeys(step.outputs.values(), own))
    origin_of([each.name for each in ensemble.outputs], ensemble.name)


def _check_done(ensemble: str, step: Step, config: ModelConfig) -> None:
    """Raise for what this version does not do in an ensemble."""
    whole = {each.name for each in (*config.inputs, *config.outputs) if each.whole}
    for name in sorted(whole.intersection((*step.inputs, *step.outputs))):
        raise InvalidArgument(
            f"in ensemble '{ensemble}', model '{step.model}' has the shape tensor '{name}', which this version does not "
            "support in an ensemble. Let clients call the model itself"
        )


def _check_names(
    ensemble: str, step: Step, inputs: Mapping[str, TensorConfig], outputs: Mapping[str, TensorConfig]
) -> None:
    for name, tensor in step.inputs.items():
        if name not in inputs:
            raise InvalidArgument(
                f"in ensemble '{ensemble}', ensemble tensor '{tensor}' is mapping to non-existing input '{name}' in "
                f"model '{step.model}'"
            )
    for name, config in inputs.items():
        if name not in step.inputs and not config.optional:
            raise InvalidArgument(
                f"in ensemble '{ensemble}', input '{name}' in model '{step.model}' is not mapped to any ensemble tensors"
            )
    for name, tensor in step.outputs.items():
        if name not in outputs:
            raise InvalidArgument(
                f"in ensemble '{ensemble}', ensemble tensor '{tensor}' is mapped from non-existing output '{name}' in "
                f"model '{step.model}'"
            )


def _check_same(ensemble: str, tensor: str, known: _Tensor, found: _Tensor) -> None:
    head = f"in ensemble '{ensemble}', ensemble tensor '{tensor}': inconsistent"
    if known.config.datatype is not found.config.datatype:
        one, other = (proto_type(each.config.datatype) for each in (known, found))
        raise InvalidArgument(
            f"{head} data type: {one} is inferred from model '{known.model}' while {other} is inferred from model "
            f"'{found.model}'"
        )
    # A batch may go to a model without batches, as a tensor with one dimension more.
    if not alike(known.config.dims, found.config.dims) and not alike(known.shape, found.shape):
        raise InvalidArgument(
            f"{head} shape: {_dims(known.shape)} is inferred from model '{known.model}' while {_dims(found.shape)} is "
            f"inferred from model '{found.model}'"
        )


def alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes may be of one tensor; -1 is any size."""
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
