"""Triton's `batch_input` and `batch_output`, and whether inputs that are ragged or whole make sense: checked in Triton's
words (core `ValidateBatchIO`), and read into plain values.

A model that is code gets each request by itself and makes nothing of a batch, so it is only told the requests' shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from gateway.config.model import BatchInput, ModelConfigProto
from gateway.config.parse import Source
from gateway.types import DataType

_TYPES = {"TYPE_INT32": DataType.INT32, "TYPE_FP32": DataType.FP32}


def shapes_of(name: str) -> str:
    """Under which name code is told the shapes of the requests of a ragged input: one that no tensor has."""
    return f"{name}\0shapes"


def read_batch_inputs(proto: ModelConfigProto) -> tuple[BatchInput, ...]:
    """What the gateway has to make of a batch's requests, checked before."""
    if proto.backend == "python":
        ragged = [tensor.name for tensor in proto.input if tensor.allow_ragged_batch]
        return tuple(BatchInput("shapes", (shapes_of(name),), DataType.INT64, name) for name in ragged)
    return tuple(
        BatchInput(_kind(each).removeprefix("BATCH_").lower(), tuple(each.target_name), _TYPES[_type(each)], source)
        for each in proto.batch_input
        for source in each.source_input
    )


def read_scattered(proto: ModelConfigProto) -> dict[str, str]:
    """By output the input whose shapes it is cut by."""
    if proto.backend == "python":
        return {}
    return {name: source for each in proto.batch_output for name in each.target_name for source in each.source_input}


def ragged_checks(proto: ModelConfigProto, source: Source) -> Iterator[Callable[[], object]]:
    """The checks of `batch_input` and `batch_output`, one by one: each raises `InvalidArgument`."""
    for field, made in (("batch_input", proto.batch_input), ("batch_output", proto.batch_output)):
        for each in made:
            yield partial(_check_sources, each, field, proto, source)
    seen: list[str] = [tensor.name for tensor in proto.input]
    for each in proto.batch_input:
        yield partial(_check_input, each, seen, proto, source)
    scattered: list[str] = []
    for each in proto.batch_output:
        yield partial(_check_output, each, scattered, proto, source)


def _kind(message: Any) -> str:
    return str(message.DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number[message.kind].name)


def _type(message: Any) -> str:
    return str(message.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[message.data_type].name)


def _check_sources(made: Any, field: str, proto: ModelConfigProto, source: Source) -> None:
    what = field.replace("_", " ")
    if len(made.source_input) != 1:
        raise source.error(
            f"{what} kind '{_kind(made)}' expects 1 source input, got {len(made.source_input)} for {proto.name}. Set "
            "source_input to the name of one input",
            field,
        )
    (name,) = made.source_input
    known = {tensor.name: tensor for tensor in proto.input}
    if name not in known:
        raise source.error(
            f"unknown source input name '{name}' for {proto.name}. There are: {', '.join(known)}", field, name
        )
    if known[name].optional and proto.backend != "python":
        raise source.error(
            f"{what} of {proto.name} has the source input '{name}', which is optional. Remove optional", field, name
        )
    if not made.target_name:
        raise source.error(f"{what} kind '{_kind(made)}' of {proto.name} must specify target_name", field)


def _check_input(made: Any, seen: list[str], proto: ModelConfigProto, source: Source) -> None:
    if _type(made) not in _TYPES:
        raise source.error(
            f"batch input data type must be TYPE_INT32 or TYPE_FP32 for {proto.name}, got {_type(made)}", "batch_input"
        )
    for name in made.target_name:
        if name in seen:
            raise source.error(
                f"batch input target '{name}' of {proto.name} is an input already. Remove one of the two",
                "batch_input",
                name,
            )
        seen.append(name)


def _check_output(made: Any, seen: list[str], proto: ModelConfigProto, source: Source) -> None:
    known = {tensor.name: tensor for tensor in proto.output}
    for name in made.target_name:
        if name not in known:
            raise source.error(
                f"unknown target output name '{name}' for {proto.name}. There are: {', '.join(known)}",
                "batch_output",
                name,
            )
        if name in seen:
            raise source.error(f"target output name '{name}' can only be specified once for {proto.name}", name)
        seen.append(name)
        of = next((tensor for tensor in proto.input if tensor.name in made.source_input), None)
        if of is not None and not _cut_by(_dims(known[name]), _dims(of)):
            raise source.error(
                f"batch output '{name}' of {proto.name} has an open dimension where its source input '{of.name}' has "
                f"none: {list(_dims(known[name]))} and {list(_dims(of))}. Give it the source's dims",
                "batch_output",
                name,
            )


def _dims(tensor: Any) -> Sequence[int]:
    return tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims  # type: ignore[no-any-return]


def _cut_by(dims: Sequence[int], source: Sequence[int]) -> bool:
    """Whether an input of these dims says the size of every open dimension."""
    return all(dim != -1 or place < len(source) for place, dim in enumerate(dims))
