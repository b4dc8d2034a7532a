"""Triton's `sequence_batching`: checked in Triton's words, read into plain values, and what the model's file has of it.

Clients never see the inputs that say where in its sequence a request stands, nor the states: `model_side` is the
configuration that an engine runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gateway.config.check import plain_name
from gateway.config.model import (
    ModelConfig,
    ModelConfigProto,
    SequenceBatching,
    SequenceControl,
    SequenceState,
    TensorConfig,
)
from gateway.config.parse import Source
from gateway.types import DataType

_KINDS = ("start", "ready", "end", "corrid")  # by Triton's numbers
_CORRID = 3
_TYPES = {"int32_false_true": DataType.INT32, "fp32_false_true": DataType.FP32, "bool_false_true": DataType.BOOL}
_ID_TYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")


def read_sequences(proto: ModelConfigProto) -> SequenceBatching:
    """The field's values, checked and normalised before."""
    given = proto.sequence_batching
    oldest, direct = given.oldest, given.direct
    of_oldest = given.HasField("oldest")
    preferred = tuple(oldest.preferred_batch_size)
    return SequenceBatching(
        idle_us=given.max_sequence_idle_microseconds,
        candidates=oldest.max_candidate_sequences if of_oldest else 0,
        # Triton's default, the largest batch, asks for nothing: a batch grows to that size anyway.
        preferred_batch_sizes=() if preferred == (proto.max_batch_size,) else preferred,
        max_queue_delay_us=oldest.max_queue_delay_microseconds if of_oldest else direct.max_queue_delay_microseconds,
        minimum_slot_utilization=direct.minimum_slot_utilization,
        controls=tuple(_control(each.name, control) for each in given.control_input for control in each.control),
        states=tuple(_state(state) for state in given.state),
    )


def model_side(config: ModelConfig) -> ModelConfig:
    """The configuration with every tensor that the model's file has; of a model without sequences it is the same."""
    sequences = config.sequences
    if sequences is None:
        return config
    controls = [TensorConfig(control.name, control.datatype, (1,)) for control in sequences.controls]
    ins = [TensorConfig(state.input, state.datatype, state.dims) for state in sequences.states]
    outs = [TensorConfig(state.output, state.datatype, state.dims) for state in sequences.states]
    known = {tensor.name for tensor in config.outputs}
    return replace(
        config,
        inputs=(*config.inputs, *controls, *ins),
        outputs=(*config.outputs, *(tensor for tensor in outs if tensor.name not in known)),
        sequences=None,
    )


def _control(name: str, control: Any) -> SequenceControl:
    kind = _KINDS[control.kind]
    if control.kind == _CORRID:
        return SequenceControl(name, kind, _datatype(control))
    field = next(field for field in _TYPES if getattr(control, field))
    off, on = map(float, getattr(control, field))  # of bools too
    return SequenceControl(name, kind, _TYPES[field], off, on)


def _state(state: Any) -> SequenceState:
    dims = tuple(state.dims)
    initial = next(iter(state.initial_state), None)
    first = dims if initial is None else tuple(initial.dims)
    return SequenceState(
        input=state.input_name,
        output=state.output_name,
        datatype=_datatype(state),
        dims=dims,
        initial=initial.data_file if initial is not None else "",
        initial_dims=tuple(1 if dim == -1 else dim for dim in first),
    )


def _datatype(message: Any) -> DataType:
    name = _type_name(message)
    return DataType.BYTES if name == "TYPE_STRING" else DataType(name.removeprefix("TYPE_"))


def _type_name(message: Any) -> str:
    return str(message.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[message.data_type].name)


# --- checks


def check_sequences(proto: ModelConfigProto, source: Source) -> None:
    """Raise `InvalidArgument` for the first thing wrong with `sequence_batching` (core `ValidateModelConfig`)."""
    if not proto.HasField("sequence_batching"):
        return
    given = proto.sequence_batching
    names: list[str] = []
    kinds: list[int] = []
    for each in given.control_input:
        if not each.name:
            raise _error(source, f"control tensor must have a name for {proto.name}", "control_input")
        if each.name in names:
            raise _error(
                source,
                f"control tensor '{each.name}' is specified for multiple control kinds for {proto.name}",
                each.name,
            )
        names.append(each.name)
        for control in each.control:
            _check_control(control, kinds, each.name, proto.name, source)
            kinds.append(control.kind)
    for state in given.state:
        _check_state(state, proto.name, source)
    _check_candidates(proto, source)


def _check_control(control: Any, kinds: list[int], name: str, model: str, source: Source) -> None:
    kind = control.DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number[control.kind].name
    tail = f"for {kind} for {model}"
    if control.kind in kinds:
        raise _error(source, f"specifies multiple {kind} tensors for {model}", name)
    given = [field for field in _TYPES if getattr(control, field)]
    if control.kind == _CORRID:
        if given:
            raise _error(
                source,
                f"must not specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' {tail}",
                name,
            )
        if _type_name(control) not in _ID_TYPES:
            raise source.error(
                "unexpected control data type, expected TYPE_UINT64, TYPE_INT64, TYPE_UINT32, TYPE_INT32, or "
                f"TYPE_STRING {tail}. Set data_type",
                "sequence_batching",
                name,
            )
        return
    if not given:
        raise _error(
            source, f"must specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' {tail}", name
        )
    if len(given) > 1:
        raise _error(
            source,
            f"specifies more than one from 'int32_false_true', 'fp32_false_true' and 'bool_false_true' {tail}",
            name,
        )
    if len(getattr(control, given[0])) != 2:
        raise _error(source, f"control '{given[0]}' must have exactly 2 entries {tail}", name)


def _check_state(state: Any, model: str, source: Source) -> None:
    words = ("sequence_batching", state.input_name or "state")
    head = f"sequence batching state '{state.input_name}' of {model}"
    if not state.input_name or not state.output_name or not state.data_type or not state.dims:
        raise source.error(f"{head} must specify input_name, output_name, data_type and dims", *words)
    if any(dim < 1 and dim != -1 for dim in state.dims):
        raise source.error(f"{head}: dimension must be integer >= 1, or -1 for one that varies", *words)
    if len(state.initial_state) > 1:
        raise source.error(f"{head} has more than one initial_state; leave one", *words)
    for initial in state.initial_state:
        _check_initial(initial, state, head, words, source)


def _check_initial(initial: Any, state: Any, head: str, words: tuple[str, ...], source: Source) -> None:
    if initial.data_type != state.data_type:
        raise source.error(f"{head}: its initial_state has another data_type; make them equal", *words)
    if initial.WhichOneof("state_data") is None:
        raise source.error(f"{head}: its initial_state must have zero_data or data_file", *words)
    if initial.data_file and not plain_name(initial.data_file):
        raise source.error(f"{head}: data_file is the name of a file in the model's folder initial_state", *words)
    fits = len(initial.dims) == len(state.dims) and all(
        size > 0 and dim in (-1, size) for size, dim in zip(initial.dims, state.dims, strict=True)
    )
    if not fits:
        raise source.error(
            f"{head}: its initial_state has dims {list(initial.dims)} and the state {list(state.dims)}; give each -1 a "
            "size",
            *words,
        )


def _check_candidates(proto: ModelConfigProto, source: Source) -> None:
    if not proto.sequence_batching.HasField("oldest"):
        return
    oldest = proto.sequence_batching.oldest
    if oldest.max_candidate_sequences < 1:
        raise _error(source, f"max candidate sequences must be positive for {proto.name}", "max_candidate_sequences")
    for size in oldest.preferred_batch_size:
        for at_fault, text in (
            (size <= 0, "must be positive"),
            (size > max(proto.max_batch_size, 1), "must be <= max batch size"),
        ):
            if at_fault:
                raise _error(source, f"preferred batch size {text} for {proto.name}: {size}", "preferred_batch_size")


def _error(source: Source, text: str, *words: str) -> Exception:
    return source.error(f"sequence batching {text}", "sequence_batching", *words)
