"""Whether a configuration fits the model file: the same tensors, element types and shapes.

Mirrors onnxruntime_backend `ValidateInputs`/`ValidateOutputs`. Call it with what the engine reports after a
load, so that a model whose file and configuration disagree is unavailable instead of failing each request.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.config.model import ModelConfig, TensorConfig
from gateway.config.sequences import model_side
from gateway.errors import InvalidArgument
from gateway.types import ModelIO, TensorSpec


def check_fit(config: ModelConfig, io: ModelIO) -> None:
    """Raise `InvalidArgument` for the first tensor of `config` that the model of `io` does not have."""
    config = model_side(config)
    for kind, tensors, specs in (("input", config.inputs, io.inputs), ("output", config.outputs, io.outputs)):
        known = {spec.name: spec for spec in specs}
        for tensor in tensors:
            if tensor.name not in known:
                raise InvalidArgument(
                    f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {', '.join(known)}. "
                    f"Correct the name of the {kind} in the model configuration of '{config.name}'"
                )
            _check_tensor(config, tensor, known[tensor.name])
    given = {tensor.name for tensor in config.inputs}
    if missing := [spec.name for spec in io.inputs if spec.name not in given]:
        raise InvalidArgument(
            f"the model file of '{config.name}' wants the input '{missing[0]}', which its configuration does not "
            "list; add it, or leave out input and output to have both filled in"
        )


def _check_tensor(config: ModelConfig, tensor: TensorConfig, spec: TensorSpec) -> None:
    head = f"model '{config.name}', tensor '{tensor.name}'"
    if tensor.datatype is not spec.datatype:
        raise InvalidArgument(
            f"{head}: the model has data type {spec.datatype.name} and the configuration {tensor.datatype.name}. "
            "Correct data_type in the configuration"
        )
    batched = config.max_batch_size > 0
    if batched and spec.shape and spec.shape[0] != -1:
        raise InvalidArgument(
            f"{head}: for the model to support batching the first dimension must be -1; but shape expected by the "
            f"model is {_text(spec.shape)}. Set max_batch_size: 0, or export the model with a dynamic batch dimension"
        )
    dims = tensor.dims if tensor.reshape is None else tensor.reshape
    complete = (-1, *dims) if batched else dims
    # A scalar is written as dims [1] where there is no batch dimension to reshape.
    if spec.shape == () and complete == (1,):
        return
    if len(complete) != len(spec.shape) or any(
        want not in (-1, dim) for want, dim in zip(spec.shape, complete, strict=True)
    ):
        raise InvalidArgument(
            f"{head}: the model expects shape {_text(spec.shape)} and the configuration gives {_text(complete)}"
            + (" (the batch dimension, then dims)" if batched else "")
            + f". {_remedy(complete, spec.shape, config.max_batch_size)}"
        )


def _remedy(complete: Sequence[int], shape: Sequence[int], max_batch_size: int) -> str:
    if max_batch_size > 0 and len(complete) == len(shape) + 1:
        return f"With max_batch_size {max_batch_size} dims exclude the batch dimension: remove their first number"
    if max_batch_size == 0 and len(complete) == len(shape) - 1:
        return "With max_batch_size 0 dims include the batch dimension: put it first, or set max_batch_size"
    return "Correct dims in the configuration"


def _text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
