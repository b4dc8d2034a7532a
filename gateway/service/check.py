"""Checks a request against its model: names, types, shapes, batch and byte sizes, in Triton's order and words.

A `Checker` is compiled once per model version, so that a request costs a few comparisons. It fills in the
request's `rows`, `size` and `signature`, and remembers which forms have passed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable
from typing import NamedTuple

from gateway import errors
from gateway.config.model import ModelConfig, TensorConfig
from gateway.types import DataType, InferRequest, Tensor, element_count

_REMEMBERED = 512
_MAX_ELEMENTS = 1 << 48  # what numpy can address in any type


class _Passed(NamedTuple):
    """What the checks found for a form."""

    rows: int
    size: int
    signature: Hashable


class Checker:
    """The checks of one model version."""

    def __init__(self, config: ModelConfig) -> None:
        self._model = config.name
        self._max_batch_size = config.max_batch_size
        self._inputs = {tensor.name: tensor for tensor in config.inputs}
        self._required = [tensor.name for tensor in config.inputs if not tensor.optional]
        self._outputs = frozenset(tensor.name for tensor in config.outputs)
        # What says with whom a request may share a batch: of a ragged input no more than that it is there.
        self._ragged = frozenset(tensor.name for tensor in config.inputs if tensor.ragged)
        self._whole = frozenset(tensor.name for tensor in config.inputs if tensor.whole)
        # With every shape fixed all requests fit one batch, and the signature need not be built.
        self._fixed = len(self._required) == len(self._inputs) and not any(
            tensor.whole or (-1 in tensor.dims and not tensor.ragged) for tensor in config.inputs
        )
        # BYTES elements are data, and no form says anything about data.
        self._forms_tell = not any(tensor.datatype is DataType.BYTES or tensor.whole for tensor in config.inputs)
        self._passed: dict[object, _Passed] = {}

    def check(self, request: InferRequest) -> None:
        """Raise `InvalidArgument` for a request the model cannot take; else set `rows`, `size` and `signature`."""
        passed = self._passed.get(request.form) if request.form is not None else None
        if passed is not None:
            request.rows, request.size, request.signature = passed.rows, passed.size, passed.signature
            return
        self._check(request)
        if request.form is not None and self._forms_tell:
            if len(self._passed) >= _REMEMBERED:
                self._passed.clear()
            self._passed[request.form] = _Passed(request.rows, request.size, request.signature)

    def _check(self, request: InferRequest) -> None:
        try:
            self._check_outputs(request)
            self._check_names(request)
            request.rows = self._rows(request)
            request.size = 0
            for name, tensor in request.inputs.items():
                request.size += self._check_tensor(self._inputs[name], tensor)
        except errors.InvalidArgument as error:
            raise errors.InvalidArgument(errors.request_prefix(request.id) + error.message) from None
        if not self._fixed:
            request.signature = self._signature(request)

    def _signature(self, request: InferRequest) -> Hashable:
        """What must be equal for two requests to share a batch."""
        skip = 1 if self._max_batch_size else 0
        if not self._ragged and not self._whole:
            return tuple(sorted((name, tensor.shape[skip:]) for name, tensor in request.inputs.items()))
        parts: list[tuple[str, tuple[int, ...], bytes]] = []
        for name, tensor in sorted(request.inputs.items()):
            if name in self._whole:
                parts.append((name, tensor.shape, hashlib.blake2b(tensor.wire).digest()))
            else:
                parts.append((name, () if name in self._ragged else tensor.shape[skip:], b""))
        return tuple(parts)

    def _check_outputs(self, request: InferRequest) -> None:
        seen: set[str] = set()
        for output in request.outputs:
            if output.name not in self._outputs:
                raise errors.unexpected_output(output.name, self._model)
            if output.name in seen:
                raise errors.duplicate_output(output.name)
            seen.add(output.name)

    def _check_names(self, request: InferRequest) -> None:
        got = request.inputs.keys()
        if got == self._inputs.keys():
            return
        least, most = len(self._required), len(self._inputs)
        missing = [name for name in self._required if name not in got]
        unknown = [name for name in got if name not in self._inputs]
        # Triton's order: the count first, then names it does not know.
        if unknown and least <= len(got) <= most:
            raise errors.unexpected_input(unknown[0], self._model)
        if missing or unknown:
            raise errors.wrong_inputs(self._model, list(got), missing, least, most)

    def _rows(self, request: InferRequest) -> int:
        if not self._max_batch_size:
            return 1
        rows: int | None = None
        for name, tensor in request.inputs.items():
            if name in self._whole:
                continue
            if not tensor.shape:
                raise self._bad_shape(self._inputs[name], tensor)
            if rows is None:
                rows = tensor.shape[0]
            elif tensor.shape[0] != rows:
                raise errors.batch_mismatch(name, self._model)
        return 1 if rows is None else self._bounded(rows)

    def _bounded(self, rows: int) -> int:
        if rows > self._max_batch_size:
            raise errors.batch_too_big(self._max_batch_size, self._model)
        if rows < 1:
            raise errors.InvalidArgument(f"inference request batch-size must be >= 1 for '{self._model}'")
        return rows

    def _check_tensor(self, config: TensorConfig, tensor: Tensor) -> int:
        """Returns the tensor's bytes on the wire."""
        if tensor.datatype is not config.datatype:
            raise errors.wrong_datatype(config.name, self._model, tensor.datatype.name, config.datatype.name)
        if math.prod([dim or 1 for dim in tensor.shape]) > _MAX_ELEMENTS:  # a dimension of 0 would hide the others
            raise errors.InvalidArgument(
                f"shape of input '{config.name}' causes total element count to exceed maximum size of {_MAX_ELEMENTS}"
            )
        shape = tensor.shape[1:] if self._batched(config) else tensor.shape
        if -1 in shape or (shape != config.dims and not _fits(shape, config.dims)):
            raise self._bad_shape(config, tensor)
        if tensor.datatype is DataType.BYTES:
            self._check_elements(config, tensor)
            return tensor.nbytes
        expected = element_count(tensor.shape) * tensor.datatype.itemsize
        size = tensor.nbytes
        if size != expected:
            raise errors.byte_size_mismatch(config.name, self._model, expected, size)
        return size

    def _check_elements(self, config: TensorConfig, tensor: Tensor) -> None:
        # Reading the elements now is no extra work: the engine needs them, and the array is kept.
        try:
            _ = tensor.array
        except ValueError as problem:
            raise errors.InvalidArgument(
                f"{problem} for inference input '{config.name}' for model '{self._model}'"
            ) from None

    def _bad_shape(self, config: TensorConfig, tensor: Tensor) -> errors.InvalidArgument:
        batched = self._batched(config)
        expected = (-1, *config.dims) if batched else config.dims
        return errors.unexpected_shape(config.name, self._model, expected, tensor.shape, batched=batched)

    def _batched(self, config: TensorConfig) -> bool:
        """Whether its first dimension is the batch's."""
        return self._max_batch_size > 0 and not config.whole


def _fits(shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    return len(shape) == len(dims) and all(
        size == dim or (dim == -1 and size >= 0) for size, dim in zip(shape, dims, strict=True)
    )
