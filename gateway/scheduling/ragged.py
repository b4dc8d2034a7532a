"""Requests of different shapes in one batch, as Triton's backends join them (user_guide/ragged_batching.md).

A ragged input reaches the model as one dimension: the elements of all requests, one after the other. What the model must know
to tell them apart it is given in inputs that no request has (`batch_input`; backend `BackendInputCollector`), and an output
with such elements is cut by the shapes of the requests' inputs (`batch_output`; `BackendOutputResponder`). Elements that are
left over, or missing, fail the batch: an answer never goes to the wrong request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np

from gateway import errors
from gateway.config.model import BatchInput, ModelConfig, TensorConfig, translate
from gateway.types import Array, InferRequest, Pieces, Tensor, element_count

Shape: TypeAlias = tuple[int, ...]

_MOST_EMPTY = 65_536  # items of which a client sends nothing, and each of which has a shape here


def joined(parts: Sequence[Tensor]) -> Pieces:
    """The elements of these, in one dimension."""
    return Pieces((sum([element_count(part.shape) for part in parts]),), parts)


def described(requests: Sequence[InferRequest], wanted: BatchInput, config: ModelConfig) -> dict[str, Pieces]:
    """A batch input by each of its names; none where its source is optional and absent from all requests."""
    if wanted.source not in requests[0].inputs:
        return {}
    array = _DESCRIBED[wanted.kind](_shapes(requests, wanted.source, config)).astype(wanted.datatype.dtype)
    return dict.fromkeys(wanted.targets, Pieces(array.shape, [Tensor.from_array(wanted.datatype, array)]))


def scattered(
    array: Array, tensor: TensorConfig, requests: Sequence[InferRequest], config: ModelConfig
) -> list[Tensor]:
    """The elements of an output for each request, in the shape that its input `tensor.like` gives it.

    Raises `Internal` where there are more elements than that, or fewer.
    """
    dims = tensor.dims if tensor.reshape is None else tensor.reshape
    wanted = (-1, *dims) if config.max_batch_size else dims
    shapes = [
        tuple(shape[place] if dim == -1 else dim for place, dim in enumerate(wanted))
        for shape in _shapes(requests, tensor.like, config)
    ]
    ends = list(accumulate(map(element_count, shapes)))
    if array.size != ends[-1]:
        raise errors.Internal(
            f"model '{config.name}' gave {array.size} elements in output '{tensor.name}' for a batch whose inputs "
            f"'{tensor.like}' have shapes of {ends[-1]}; a model must give one element for each"
        )
    flat = array.reshape(-1)
    parts = [flat[end - element_count(shape) : end].reshape(shape) for shape, end in zip(shapes, ends, strict=True)]
    if tensor.reshape is not None:
        parts = [part.reshape(translate(part.shape, tensor.reshape, tensor.dims)) for part in parts]
    return [Tensor.from_array(tensor.datatype, part) for part in parts]


def _shapes(requests: Sequence[InferRequest], name: str, config: ModelConfig) -> list[Shape]:
    """The shapes of an input as the model would see them, each request alone, batch dimension included."""
    tensor = next(each for each in config.inputs if each.name == name)
    shapes = [request.inputs[name].shape for request in requests]
    if tensor.reshape is None:
        return shapes
    return [translate(shape, tensor.dims, tensor.reshape) for shape in shapes]


def _element_count(shapes: list[Shape]) -> Array:
    return np.array([element_count(shape) for shape in shapes])


def _accumulated(shapes: list[Shape]) -> Array:
    return np.cumsum(_element_count(shapes))


def _accumulated_with_zero(shapes: list[Shape]) -> Array:
    return np.concatenate(([0], _accumulated(shapes)))


def _most_as_shape(shapes: list[Shape]) -> Array:
    """Only its shape says something; Triton leaves the elements as the memory was."""
    return np.zeros(max(_element_count(shapes)))


def _item_shapes(shapes: list[Shape]) -> Array:
    counts = [shape[0] for shape in shapes]
    if any(count > _MOST_EMPTY and not element_count(shape) for count, shape in zip(counts, shapes, strict=True)):
        raise errors.InvalidArgument(f"an input without elements may have {_MOST_EMPTY} items, got {max(counts)}")
    return np.repeat(np.array([shape[1:] for shape in shapes]), counts, axis=0)


def _item_shapes_flat(shapes: list[Shape]) -> Array:
    return _item_shapes(shapes).reshape(-1)


_DESCRIBED: dict[str, Callable[[list[Shape]], Array]] = {
    "element_count": _element_count,
    "accumulated_element_count": _accumulated,
    "accumulated_element_count_with_zero": _accumulated_with_zero,
    "max_element_count_as_shape": _most_as_shape,
    "item_shape": _item_shapes,
    "item_shape_flatten": _item_shapes_flat,
    "shapes": np.array,
}
