"""Arrays as the gateway has them and as ONNX Runtime wants them: strings, BF16, memory layout.

Strings are `bytes` here and UTF-8 `str` there; BF16 is uint16 here and its own type there, which numpy does
not have. Nothing is copied that need not be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from gateway.types import Array, DataType

DATATYPES = {
    "tensor(bool)": DataType.BOOL,
    "tensor(uint8)": DataType.UINT8,
    "tensor(uint16)": DataType.UINT16,
    "tensor(uint32)": DataType.UINT32,
    "tensor(uint64)": DataType.UINT64,
    "tensor(int8)": DataType.INT8,
    "tensor(int16)": DataType.INT16,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
    "tensor(float16)": DataType.FP16,
    "tensor(float)": DataType.FP32,
    "tensor(double)": DataType.FP64,
    "tensor(bfloat16)": DataType.BF16,
    "tensor(string)": DataType.BYTES,
}
"""ONNX Runtime's type names that the protocol can carry."""

_BF16 = 16  # onnx.TensorProto.BFLOAT16


def aligned(array: Array) -> Array:
    """The array in one piece and on its type's boundary, as kernels expect; the same object if it is already."""
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    return np.require(array, requirements=["C", "A"])


def to_text(array: Array) -> Array:
    """An object array of `bytes` as one of `str`. Raises UnicodeDecodeError."""
    return _each(array, lambda element: element if isinstance(element, str) else bytes(element).decode())


def to_bytes(array: Array) -> Array:
    """An object array of `str` as one of `bytes`; any other array as it is."""
    return _each(array, str.encode) if array.dtype == object else array


def _each(array: Array, convert: Callable[[Any], object]) -> Array:
    result = np.empty(array.size, dtype=object)
    result[:] = [convert(element) for element in array.reshape(-1).tolist()]
    return result.reshape(array.shape)


def to_values(feed: Mapping[str, Array], bf16: Collection[str]) -> dict[str, Any]:
    """Every array as an OrtValue over its memory; those named in `bf16` as BF16."""
    return {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BF16)
        if name in bf16
        else ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in feed.items()
    }


def from_value(value: Any) -> Array:
    """An OrtValue in CPU memory as an array; BF16 as uint16."""
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()  # type: ignore[no-any-return]
    array = np.empty(value.shape(), np.uint16)
    ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array
