"""Typed tensor contents (`InferTensorContents`) to wire bytes, without one Python object per number.

Protobuf keeps repeated numbers packed, so a re-serialized message holds them as one run of bytes that numpy
reads: floats and booleans as they are, integers as varints. How many there must be is not checked here.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from gateway.errors import InvalidArgument
from gateway.types import Array, Buffer, DataType

_FIELD_OF = {
    DataType.BOOL: "bool_contents",
    DataType.INT8: "int_contents",
    DataType.INT16: "int_contents",
    DataType.INT32: "int_contents",
    DataType.INT64: "int64_contents",
    DataType.UINT8: "uint_contents",
    DataType.UINT16: "uint_contents",
    DataType.UINT32: "uint_contents",
    DataType.UINT64: "uint64_contents",
    DataType.FP32: "fp32_contents",
    DataType.FP64: "fp64_contents",
    DataType.BYTES: "bytes_contents",
}
_TYPE_IN = {
    "bool_contents": "BOOL",
    "int_contents": "INT32",
    "int64_contents": "INT64",
    "uint_contents": "UINT32",
    "uint64_contents": "UINT64",
    "fp32_contents": "FP32",
    "fp64_contents": "FP64",
    "bytes_contents": "BYTES",
}
_AS_ON_THE_WIRE = ("bool_contents", "fp32_contents", "fp64_contents")


def read_contents(contents: Any, name: str, model: str, datatype: DataType) -> Buffer:
    """The wire bytes of a tensor's `contents`. Raises `InvalidArgument` for elements of another type."""
    found = [field.name for field, _ in contents.ListFields()]
    if not found:
        return b""
    head = f"unexpected explicit tensor data for input tensor '{name}' for model '{model}'"
    if len(found) > 1:
        raise InvalidArgument(f"{head}, binary data was already supplied.")
    field = found[0]
    if field != _FIELD_OF.get(datatype):
        raise InvalidArgument(f"{head} of type '{_TYPE_IN[field]}', expected datatype '{datatype.name}'")
    if field == "bytes_contents":
        return _length_prefixed(contents.bytes_contents)
    packed = _packed(contents)
    if field in _AS_ON_THE_WIRE:
        return packed
    return _varints(packed).astype(datatype.dtype).data.cast("B")


def _length_prefixed(elements: Any) -> bytes:
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def _packed(contents: Any) -> memoryview:
    # Only unknown fields could stand beside the one that is set.
    contents.DiscardUnknownFields()
    view = memoryview(contents.SerializeToString())
    at = 1
    while view[at] > 127:
        at += 1
    return view[at + 1 :]


def _varints(packed: memoryview) -> Array:
    """Decode a run of varints to uint64; a negative number is its two's complement, as protobuf sends it."""
    digits = np.frombuffer(packed, np.uint8)
    ends = np.flatnonzero(digits < 128) + 1
    starts = np.concatenate(([0], ends[:-1]))
    place = np.arange(digits.size) - np.repeat(starts, ends - starts)
    return np.add.reduceat((digits & 127).astype(np.uint64) << (7 * place).astype(np.uint64), starts)
