"""Arrays in a block of bytes that two processes share: where each one lies, and whether what the other says can be.

A layout travels as its `form`, a few bytes of msgpack. Whoever reads one trusts nothing in it: `read_form` refuses a
type, shape or size that does not fit, so that a view is made only of what lies inside the block. BYTES arrays lie there
as on the wire, and what is read of them is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from mmap import mmap
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec
import numpy as np

from gateway.message import BadMessage
from gateway.types import Array, Buffer, DataType, Pieces, decode_bytes, encode_bytes, wires

Block: TypeAlias = mmap | bytearray | memoryview
Value: TypeAlias = Array | bytes | list[Buffer]

MOST = 1 << 32
"""Bytes that the arrays of one message may have."""

_ALIGNMENT = 64  # bytes, of a cache line and of the widest registers
_SMALL = 1 << 14  # bytes, below which a copy with the interpreter's lock is the quicker one
_MAX_ELEMENTS = 1 << 48
_REMEMBERED = 512  # forms
_DTYPES = {datatype.dtype.str: datatype.dtype for datatype in DataType}
_OBJECT = np.dtype(object)

_Dim = Annotated[int, msgspec.Meta(ge=0, le=_MAX_ELEMENTS)]
_Shape = Annotated[tuple[_Dim, ...], msgspec.Meta(max_length=64)]
_Described: TypeAlias = tuple[tuple[str, str, _Shape, Annotated[int, msgspec.Meta(ge=0, le=MOST)]], ...]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Described).decode


class Cut(NamedTuple):
    """One array's place."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    size: int


class Layout(NamedTuple):
    """The places of all arrays in a block of at least `size` bytes."""

    cuts: tuple[Cut, ...]
    size: int
    form: bytes


def lay_out(arrays: Mapping[str, Array] | Mapping[str, Pieces]) -> tuple[Layout, Sequence[Value]]:
    """Where to put these arrays, and what to put there. Raises TypeError for a type that no tensor has."""
    values: list[Value] = []
    described = []
    for name, array in arrays.items():
        if isinstance(array, Pieces):
            parts = wires(array.tensors)
            values.append(parts)
            dtype = array.tensors[0].datatype.dtype.str
            described.append((name, dtype, array.shape, sum(map(len, parts))))
        elif array.dtype == _OBJECT:
            wire = encode_bytes(array)
            values.append(wire)
            described.append((name, "|O", array.shape, len(wire)))
        else:
            values.append(array)
            described.append((name, array.dtype.str, array.shape, array.nbytes))
    return _laid(tuple(described)), values


def write(block: Block, layout: Layout, values: Sequence[Value]) -> None:
    """Put the values where `lay_out` said."""
    for (_, dtype, shape, start, size), value in zip(layout.cuts, values, strict=True):
        if isinstance(value, bytes):
            block[start : start + size] = value
        elif isinstance(value, list):
            _join(block, start, size, value)
        else:
            np.copyto(np.ndarray(shape, dtype, block, start), value)


def _join(block: Block, start: int, size: int, parts: list[Buffer]) -> None:
    if size <= _SMALL:
        block[start : start + size] = b"".join(parts)
        return
    whole = np.ndarray(size, np.uint8, block, start)
    at = 0
    for part in parts:  # numpy's copies leave the interpreter to others
        whole[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)


def read(block: Block, layout: Layout, *, copy: bool) -> dict[str, Array]:
    """The arrays of a block: views of it or, with `copy`, arrays of their own. Raises `BadMessage`."""
    arrays: dict[str, Array] = {}
    for name, dtype, shape, start, size in layout.cuts:
        if dtype is _OBJECT:
            try:
                elements = decode_bytes(bytes(block[start : start + size]), math.prod(shape))
            except ValueError as problem:
                raise BadMessage(f"array '{name}': {problem}") from None
            arrays[name] = elements.reshape(shape)
        else:
            array: Array = np.ndarray(shape, dtype, block, start)
            arrays[name] = array.copy() if copy else array
    return arrays


@lru_cache(maxsize=_REMEMBERED)
def read_form(form: bytes) -> Layout:
    """The layout of a form, checked. Raises `BadMessage`."""
    try:
        described = _decode(form)
    except (msgspec.DecodeError, ValueError) as problem:
        raise BadMessage(f"the form of a message cannot be read: {problem}") from None
    for name, dtype, shape, size in described:
        if dtype not in _DTYPES:
            raise BadMessage(f"array '{name}' is of the type {dtype!r}, which no tensor has")
        count = math.prod(shape)
        fits = count * 4 <= size if dtype == "|O" else count * _DTYPES[dtype].itemsize == size
        if not fits or math.prod([dim or 1 for dim in shape]) > _MAX_ELEMENTS:  # a dimension of 0 hides the others
            raise BadMessage(f"array '{name}' has {size} bytes, which is not {dtype} of shape {list(shape)}")
    if len({name for name, *_ in described}) != len(described):
        raise BadMessage("two arrays of a message have one name")
    layout = _placed(described, form)
    if layout.size > MOST:
        raise BadMessage(f"the arrays of a message have {layout.size} bytes; {MOST} are the most")
    return layout


@lru_cache(maxsize=_REMEMBERED)
def _laid(described: _Described) -> Layout:
    for name, dtype, _, _ in described:
        if dtype not in _DTYPES:
            raise TypeError(f"array '{name}' is of the type {dtype}, which no tensor has")
    return _placed(described, _encode(described))


def _placed(described: _Described, form: bytes) -> Layout:
    at = 0
    cuts = []
    for name, dtype, shape, size in described:
        cuts.append(Cut(name, _OBJECT if dtype == "|O" else _DTYPES[dtype], shape, at, size))
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return Layout(tuple(cuts), at, form)
