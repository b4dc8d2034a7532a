"""Random requests to a random model, and the answers of ONNX Runtime in this process: one request at a time, without a batch.

Arrays are as the gateway's own: BYTES are objects of `bytes`, BF16 is its bits in UINT16.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from numpy.random import Generator

from loadtest.fuzz import ragged
from loadtest.fuzz.models import Model, Shape, Tensor

Array = npt.NDArray[Any]
ROUGHLY = 1e-5  # of the value, or of the largest there is where it is a sum

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "INT8": np.dtype("i1"), "INT16": np.dtype("<i2"), "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"), "UINT8": np.dtype("u1"), "UINT16": np.dtype("<u2"), "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"), "FP16": np.dtype("<f2"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"), "BYTES": np.dtype("O"),
}  # fmt: skip
_WORDS = ("", "a", "Lockgate", "zwölf Boxkämpfer", "日本語", "\U0001f9ea", "a\0b", '"quotes" \\ and\nlines', "x" * 300)
_SIZES = (0, 1, 2, 3, 4, 5, 7, 9)
_MANY = 50_000  # elements of a large tensor
_ODDS = (1, 5, 5, 5, 5, 3, 3, 2)  # of the sizes


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sends, in the shapes that it knows. Without `outputs` it wants them all."""

    inputs: Mapping[str, Array]
    outputs: tuple[str, ...] = ()


def sizes_of(model: Model, rng: Generator) -> dict[str, int]:
    """A size for each open dimension."""
    odds = np.array(_ODDS) / sum(_ODDS)
    symbols = sorted({symbol for each in model.inputs for symbol in each.symbols})
    sizes = {symbol: max(int(rng.choice(_SIZES, p=odds)), int(not model.empty)) for symbol in symbols}
    if symbols and rng.random() < 0.1:
        large = symbols[rng.integers(len(symbols))]
        others = max(  # elements, but for this dimension
            math.prod(_filled(each.dims, [1 if key == large else sizes[key] for key in each.symbols]))
            for each in model.inputs
        )
        sizes[large] = max(1, _MANY // (max(1, others) * max(1, model.max_batch_size)))
    return sizes


def make(model: Model, rng: Generator, sizes: Mapping[str, int]) -> Request:
    """A request of 1 to `max_batch_size` rows, fewer more often, with or without each optional input."""
    most = 1 if model.told else max(model.max_batch_size, 1)
    rows = [int(rng.integers(rng.integers(most) + 1) + 1)] * model.batch
    moderate = not all(each.exact for each in model.outputs)
    inputs = {
        each.name: values(
            rng, each.datatype, (*rows, *_filled(each.dims, [sizes[key] for key in each.symbols])), moderate
        )
        for each in model.inputs
        if not each.optional or rng.random() < 0.5
    }
    outputs: Sequence[str] = ()
    if rng.random() < 0.4:
        names = [each.name for each in model.outputs]
        outputs = [names[place] for place in rng.permutation(len(names))[: rng.integers(1, len(names) + 1)]]
    order = [list(inputs)[place] for place in rng.permutation(len(inputs))]
    return Request({name: inputs[name] for name in order}, tuple(outputs))


def values(rng: Generator, datatype: str, shape: Shape, moderate: bool) -> Array:
    """Random values of a type, its extremes among them unless they are to be `moderate`."""
    if datatype == "BYTES":
        words = rng.integers(len(_WORDS), size=math.prod(shape))
        array = np.empty(words.size, object)
        array[:] = [_WORDS[place].encode() for place in words]
        return array.reshape(shape)
    dtype = DTYPES[datatype]
    if datatype == "BOOL":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if datatype == "BF16":
        return _floats(rng, shape, moderate).astype(ml_dtypes.bfloat16).view(np.uint16)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return _floats(rng, shape, moderate).astype(dtype)
    limits = np.iinfo(dtype)
    small = rng.integers(0 if dtype.kind == "u" else -9, 10, shape)
    if moderate:
        return small.astype(dtype)
    large = rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    return np.where(rng.random(shape) < 0.5, small.astype(dtype), large)


def _floats(rng: Generator, shape: Shape, moderate: bool) -> Array:
    array = rng.uniform(-4, 4, shape)
    if moderate:
        return array
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-40, 3e38, 65504.0, 1 / 3])
    return np.where(rng.random(shape) < 0.2, rng.choice(special, shape), array)


def _filled(dims: Sequence[int], sizes: Sequence[int]) -> Shape:
    left = iter(sizes)
    return tuple(next(left) if dim == -1 else dim for dim in dims)


class Reference:
    """ONNX Runtime's answers to requests to one model."""

    def __init__(self, model: Model) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self._model = model
        self._session = ort.InferenceSession(model.file, options, providers=["CPUExecutionProvider"])
        self._inputs = {each.name: each for each in model.inputs}
        self._by_value = any(each.datatype == "BF16" for each in (*model.inputs, *model.outputs))

    def answer(self, request: Request) -> dict[str, Array] | None:
        """The outputs that the request wants, in the shapes that clients see; None where ONNX Runtime raises."""
        batch = self._model.batch
        feed = {}
        for name, array in request.inputs.items():
            tensor = self._inputs[name]
            if tensor.like:
                feed[name] = array.reshape(-1)
                continue
            sizes = [size for size, dim in zip(array.shape[batch:], tensor.dims, strict=True) if dim == -1]
            feed[name] = array.reshape((*array.shape[:batch], *_filled(tensor.inner, sizes)))
        feed |= {each.name: each.of(request.inputs[ragged.SOURCE].shape) for each in self._model.told}
        wanted = [each for each in self._model.outputs if each.name in (request.outputs or (each.name,))]
        try:
            arrays = self._run([each.name for each in wanted], feed)
        except Exception:  # noqa: BLE001 - ONNX Runtime's exceptions have no other common base
            return None
        return {
            each.name: array.reshape((*request.inputs[each.like].shape, *each.inner))
            if each.like
            else self._seen(each, array)
            for each, array in zip(wanted, arrays, strict=True)
        }

    def _run(self, names: list[str], feed: dict[str, Array]) -> list[Array]:
        options = ort.RunOptions()
        options.log_severity_level = 4
        if self._by_value:
            return self._run_values(names, feed, options)
        texts = {name: _as_text(array) if array.dtype == object else array for name, array in feed.items()}
        return [_as_bytes(each) for each in self._session.run(names, texts, options)]

    def _run_values(self, names: list[str], feed: dict[str, Array], options: Any) -> list[Array]:
        """BF16 goes in and out as values with memory of their own, because numpy does not have it."""
        kinds = {each.name: each.datatype for each in (*self._model.inputs, *self._model.told)}
        given = {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, 16)
            if kinds[name] == "BF16"
            else ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in feed.items()
        }
        return [_as_bytes(_bits(each)) for each in self._session.run_with_ort_values(names, given, options)]

    def _seen(self, tensor: Tensor, array: Array) -> Array:
        batch = self._model.batch
        if tensor.dims == tensor.inner:
            return array
        sizes = [size for size, dim in zip(array.shape[batch:], tensor.inner, strict=True) if dim == -1]
        return array.reshape((*array.shape[:batch], *_filled(tensor.dims, sizes)))


def _bits(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()  # type: ignore[no-any-return]
    array = np.empty(value.shape(), np.uint16)
    ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array


def _as_text(array: Array) -> Array:
    made = np.empty(array.size, object)
    made[:] = [each.decode() for each in array.reshape(-1)]
    return made.reshape(array.shape)


def _as_bytes(array: Array) -> Array:
    if array.dtype != object:
        return array
    made = np.empty(array.size, object)
    made[:] = [each.encode() for each in array.reshape(-1)]
    return made.reshape(array.shape)


def difference(want: Array, got: Array, datatype: str, *, exact: bool) -> str:
    """What is wrong with an output; empty if nothing is."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, not {list(want.shape)}"
    if got.dtype != want.dtype:
        return f"type {got.dtype}, not {want.dtype}"
    same = _same(want, got, datatype) if exact else _alike(want, got)
    if same.all():
        return ""
    place = tuple(int(each) for each in np.argwhere(~same)[0]) if same.shape else ()
    return f"{int((~same).sum())} of {want.size} elements differ, the first at {list(place)}: {got[place]!r}, not {want[place]!r}"


def _same(want: Array, got: Array, datatype: str) -> Array:
    if want.dtype.kind == "f":
        bits = f"u{want.dtype.itemsize}"
        equal = np.ascontiguousarray(want).view(bits) == np.ascontiguousarray(got).view(bits)
        return np.asarray(equal | (np.isnan(want) & np.isnan(got)))  # a NaN has no payload in JSON
    if datatype == "BF16":
        return np.asarray((want == got) | (((want & 0x7FFF) > 0x7F80) & ((got & 0x7FFF) > 0x7F80)))
    return np.asarray(want == got)


def _alike(want: Array, got: Array) -> Array:
    if want.dtype.kind != "f":
        return np.asarray(want == got)
    most = float(np.abs(want[np.isfinite(want)]).max(initial=0.0))
    return np.asarray(np.isclose(got, want, rtol=ROUGHLY, atol=ROUGHLY * most, equal_nan=True))
