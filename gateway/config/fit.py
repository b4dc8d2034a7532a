"""Whether a configuration fits the model file: the same tensors, element types and shapes.

Mirrors onnxruntime_backend `ValidateInputs`/`ValidateOutputs`. Call it with what the engine reports after a
load, so that a model whose file and configuration disagree is unavailable instead of failing each request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from gateway.config.complete import proto_type
from gateway.config.model import ModelConfig, TensorConfig
from gateway.config.sequences import model_side
from gateway.errors import InvalidArgument
from gateway.types import ModelIO, TensorSpec


class Misfit(NamedTuple):
    """What does not fit: a tensor of the configuration, or an input of the file that the configuration lacks."""

    kind: str  # "input" or "output"
    tensor: str
    text: str


def check_fit(config: ModelConfig, io: ModelIO) -> None:
    """Raise `InvalidArgument` for the first tensor of `config` that the model of `io` does not have."""
    for misfit in misfits(config, io):
        raise InvalidArgument(misfit.text)


def misfits(config: ModelConfig, io: ModelIO) -> Iterator[Misfit]:
    """Everything in which a configuration differs from the model file, and what to write instead."""
    config = model_side(config)
    for kind, tensors, specs in (("input", config.inputs, io.inputs), ("output", config.outputs, io.outputs)):
        known = {spec.name: spec for spec in specs}
        for tensor in tensors:
            if tensor.name in known:
                texts = _differences(config, tensor, known[tensor.name])
                yield from (Misfit(kind, tensor.name, text) for text in texts)
                continue
            text = (
                f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {', '.join(known)}. "
                f"Correct the name of the {kind} in the model configuration of '{config.name}'"
            )
            yield Misfit(kind, tensor.name, text)
    yield from _made(config, {spec.name: spec for spec in io.inputs})
    given = {tensor.name for tensor in config.inputs}
    given.update(name for made in config.batch_inputs for name in made.targets)
    for spec in io.inputs:
        if spec.name not in given and not spec.optional:
            yield Misfit(
                "input",
                spec.name,
                f"the model file of '{config.name}' wants the input '{spec.name}', which its configuration does not "
                "list; add it, or leave out input and output to have both filled in",
            )


def _made(config: ModelConfig, takes: Mapping[str, TensorSpec]) -> Iterator[Misfit]:
    """What of the inputs that the gateway makes for a batch does not fit."""
    for made in config.batch_inputs:
        rank = 2 if made.kind == "item_shape" else 1
        for name in made.targets:
            spec = takes.get(name)
            if spec is None:
                text = f"batch_input makes the input '{name}', which the model file of '{config.name}' has not; there are: "
                yield Misfit("batch_input", name, f"{text}{', '.join(takes)}. Correct its target_name")
                continue
            if spec.datatype is not made.datatype:
                text = f"the model has data type {spec.datatype.name} and batch_input {made.datatype.name}"
                yield Misfit("batch_input", name, f"model '{config.name}', tensor '{name}': {text}. Make them equal")
            if len(spec.shape) != rank or spec.shape[0] != -1:
                text = f"batch_input makes {rank} open dimension(s), and the model expects shape {_text(spec.shape)}"
                yield Misfit(
                    "batch_input",
                    name,
                    f"model '{config.name}', tensor '{name}': {text}. Export it so, or use another kind",
                )


def _differences(config: ModelConfig, tensor: TensorConfig, spec: TensorSpec) -> Iterator[str]:
    head = f"model '{config.name}', tensor '{tensor.name}'"
    if tensor.datatype is not spec.datatype:
        yield (
            f"{head}: the model has data type {spec.datatype.name} and the configuration {tensor.datatype.name}. "
            f"Write data_type: {proto_type(spec.datatype)}"
        )
    if tensor.ragged:
        yield from _not_ragged(head, tensor, spec)
    elif not tensor.like:  # those elements are one after the other, in whatever shape
        yield from _not_optional(head, tensor, spec)
        yield from _shapes(config, head, tensor, spec)


def _not_optional(head: str, tensor: TensorConfig, spec: TensorSpec) -> Iterator[str]:
    if tensor.optional and not spec.optional:
        yield (
            f"{head}: the configuration says optional: true, and the model has no value of its own for it. Remove "
            "optional, or export the model with an initializer of this name among its inputs"
        )


def _shapes(config: ModelConfig, head: str, tensor: TensorConfig, spec: TensorSpec) -> Iterator[str]:
    batched = config.max_batch_size > 0 and not tensor.whole
    if batched and spec.shape and spec.shape[0] != -1:
        yield (
            f"{head}: for the model to support batching the first dimension must be -1; but shape expected by the "
            f"model is {_text(spec.shape)}. Set max_batch_size: 0, or export the model with a dynamic batch dimension"
        )
        return
    dims = tensor.dims if tensor.reshape is None else tensor.reshape
    complete = (-1, *dims) if batched else dims
    # A scalar is written as dims [1] where there is no batch dimension to reshape.
    if spec.shape == () and complete == (1,):
        return
    if len(complete) != len(spec.shape) or any(
        want not in (-1, dim) for want, dim in zip(spec.shape, complete, strict=True)
    ):
        yield (
            f"{head}: the model expects shape {_text(spec.shape)} and the configuration gives {_text(complete)}"
            + (" (the batch dimension, then dims)" if batched else "")
            + f". {_remedy(complete, spec.shape, config.max_batch_size if batched else 0)}"
        )


def _not_ragged(head: str, tensor: TensorConfig, spec: TensorSpec) -> Iterator[str]:
    what = f"{head}: configuration expects model provides input with shape [-1] for ragged input '{tensor.name}'"
    if tensor.optional:
        yield f"{what}, which is not supported for optional input. Remove optional or allow_ragged_batch"
    if spec.shape != (-1,):
        yield (
            f"{what}, model provides {_text(spec.shape)}. Remove allow_ragged_batch, or export the model so that it takes "
            "the elements of all requests in one dimension"
        )


def _remedy(complete: Sequence[int], shape: Sequence[int], max_batch_size: int) -> str:
    if max_batch_size > 0 and len(complete) == len(shape) + 1:
        return f"With max_batch_size {max_batch_size} dims exclude the batch dimension: remove their first number"
    if max_batch_size == 0 and len(complete) == len(shape) - 1:
        return "With max_batch_size 0 dims include the batch dimension: put it first, or set max_batch_size"
    own = shape[1:] if max_batch_size else shape
    return f"Write dims: [ {', '.join(map(str, own)) or '1'} ]"


def _text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
