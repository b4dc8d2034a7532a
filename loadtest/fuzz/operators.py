"""What a random model computes: one ONNX operator per output, with the type and the dimensions of its result.

Rows are independent of each other in all of them, so that a row's answer does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from onnx import NodeProto, TensorProto, helper

Dim = int | str | None
"""A dimension of a model: fixed, open under a name, or open without one."""

TYPES = {
    "BOOL": TensorProto.BOOL, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE, "BYTES": TensorProto.STRING,
}  # fmt: skip
"""The datatypes of the protocol that ONNX has, by ONNX's numbers."""

SIGNED = ("INT8", "INT16", "INT32", "INT64")
INTEGERS = (*SIGNED, "UINT8", "UINT16", "UINT32", "UINT64")
FLOATS = ("FP16", "FP32", "FP64")
NUMBERS = (*INTEGERS, *FLOATS)
ALL = tuple(TYPES)
ROUGH = ("FP32", "FP64")  # FP16 has no five digits to compare
MOST_DIMS = 5


class Value(NamedTuple):
    """A tensor of a model without its batch dimension."""

    name: str
    datatype: str
    dims: tuple[Dim, ...]


@dataclass(slots=True)
class Made:
    """One output and what makes it. `exact` says that every bit of it is due, whatever the batch."""

    output: Value
    nodes: list[NodeProto]
    constants: list[TensorProto] = field(default_factory=list)
    exact: bool = True


class Site(NamedTuple):
    """Where an operator is put: the values of one type and shape that it may use, and the dimensions before theirs."""

    values: Sequence[Value]
    batch: int  # 1 with a batch dimension, else 0
    name: str  # of the output
    rng: Generator


Make = Callable[[Site], Made | None]


class Operator(NamedTuple):
    """`make` returns None for values that the operator does not take."""

    takes: Sequence[str]
    make: Make


def choose(site: Site) -> Made:
    """A random operator that takes the values of the site."""
    fitting = [each for each in OPERATORS if site.values[0].datatype in each.takes]
    while True:
        made = fitting[site.rng.integers(len(fitting))].make(site)
        if made is not None and len(made.output.dims) + site.batch <= MOST_DIMS:
            return made


def whole(name: str, numbers: Sequence[int]) -> TensorProto:
    """A constant vector of INT64."""
    return helper.make_tensor(name, TensorProto.INT64, [len(numbers)], list(numbers))


def _same(kind: str, *, exact: bool = True) -> Make:
    def make(site: Site) -> Made:
        first = site.values[0]
        node = helper.make_node(kind, [first.name], [site.name])
        return Made(Value(site.name, first.datatype, first.dims), [node], exact=exact)

    return make


def _pair(kind: str, result: str = "") -> Make:
    def make(site: Site) -> Made | None:
        if len(site.values) < 2:
            return None
        first, second = site.values[:2]
        node = helper.make_node(kind, [first.name, second.name], [site.name])
        return Made(Value(site.name, result or first.datatype, first.dims), [node])

    return make


def _with_constant(site: Site) -> Made:
    first = site.values[0]
    kind = ("Add", "Sub", "Mul")[site.rng.integers(3)]
    constant = helper.make_tensor(f"{site.name}_c", TYPES[first.datatype], [], [int(site.rng.integers(1, 100))])
    node = helper.make_node(kind, [first.name, constant.name], [site.name])
    return Made(Value(site.name, first.datatype, first.dims), [node], [constant])


def _cast(site: Site) -> Made | None:
    first = site.values[0]
    # A float that an integer type cannot hold becomes anything, and C++ promises no text for a float.
    to = {"BYTES": (), "FP16": FLOATS, "FP32": (*FLOATS, "BF16"), "FP64": FLOATS, "BF16": ("FP32",)}
    results = to.get(first.datatype, (*NUMBERS, "BOOL", "BYTES") if first.datatype != "BOOL" else NUMBERS)
    if not results:
        return None
    result = results[site.rng.integers(len(results))]
    node = helper.make_node("Cast", [first.name], [site.name], to=TYPES[result])
    return Made(Value(site.name, result, first.dims), [node])


def _transpose(site: Site) -> Made | None:
    first = site.values[0]
    if len(first.dims) < 2:
        return None
    order = [int(place) for place in site.rng.permutation(len(first.dims))]
    perm = [*range(site.batch), *(place + site.batch for place in order)]
    node = helper.make_node("Transpose", [first.name], [site.name], perm=perm)
    return Made(Value(site.name, first.datatype, tuple(first.dims[place] for place in order)), [node])


def _reverse(site: Site) -> Made | None:
    first = site.values[0]
    if not first.dims:
        return None
    axis = int(site.rng.integers(len(first.dims))) + site.batch
    parts = {"s": -1, "e": -(1 << 40), "a": axis, "t": -1}
    constants = [whole(f"{site.name}_{key}", [number]) for key, number in parts.items()]
    node = helper.make_node("Slice", [first.name, *(each.name for each in constants)], [site.name])
    return Made(Value(site.name, first.datatype, first.dims), [node], constants)


def _unsqueeze(site: Site) -> Made:
    first = site.values[0]
    place = int(site.rng.integers(len(first.dims) + 1))
    axes = whole(f"{site.name}_a", [place + site.batch])
    node = helper.make_node("Unsqueeze", [first.name, axes.name], [site.name])
    return Made(Value(site.name, first.datatype, (*first.dims[:place], 1, *first.dims[place:])), [node], [axes])


def _concat(site: Site) -> Made | None:
    first, second = site.values[0], site.values[-1]
    if not first.dims:
        return None
    place = int(site.rng.integers(len(first.dims)))
    size = first.dims[place]
    dims = (*first.dims[:place], 2 * size if isinstance(size, int) else None, *first.dims[place + 1 :])
    node = helper.make_node("Concat", [first.name, second.name], [site.name], axis=place + site.batch)
    return Made(Value(site.name, first.datatype, dims), [node])


def _sum(site: Site) -> Made | None:
    first = site.values[0]
    if not first.dims:
        return None
    place = int(site.rng.integers(len(first.dims)))
    axes = whole(f"{site.name}_a", [place + site.batch])
    node = helper.make_node("ReduceSum", [first.name, axes.name], [site.name], keepdims=0)
    dims = (*first.dims[:place], *first.dims[place + 1 :])
    # ONNX Runtime adds integers up as doubles, so that the last digits of large ones depend on the batch.
    return Made(Value(site.name, first.datatype, dims), [node], [axes], exact=False)


def _softmax(site: Site) -> Made | None:
    first = site.values[0]
    if not first.dims:
        return None
    node = helper.make_node("Softmax", [first.name], [site.name], axis=-1)
    return Made(Value(site.name, first.datatype, first.dims), [node], exact=False)


def _matmul(site: Site) -> Made | None:
    first = site.values[0]
    if not first.dims or not isinstance(first.dims[-1], int):
        return None
    size, width = first.dims[-1], int(site.rng.integers(1, 5))
    weights = site.rng.uniform(-1, 1, size * width).astype(np.float32).tolist()
    constant = helper.make_tensor(f"{site.name}_w", TYPES[first.datatype], [size, width], weights)
    node = helper.make_node("MatMul", [first.name, constant.name], [site.name])
    return Made(Value(site.name, first.datatype, (*first.dims[:-1], width)), [node], [constant], exact=False)


def _nonzero(site: Site) -> Made | None:
    first = site.values[0]
    if site.batch or not first.dims:
        return None  # its answer has no rows
    node = helper.make_node("NonZero", [first.name], [site.name])
    return Made(Value(site.name, "INT64", (len(first.dims), None)), [node])


def _shape(site: Site) -> Made | None:
    first = site.values[0]
    if site.batch or not first.dims:
        return None
    node = helper.make_node("Shape", [first.name], [site.name])
    return Made(Value(site.name, "INT64", (len(first.dims),)), [node])


def _lookup(site: Site) -> Made:
    """Fails for some numbers: an index that is outside its table."""
    first = site.values[0]
    table = helper.make_tensor(f"{site.name}_t", TensorProto.FLOAT, [7], [float(number) for number in range(7)])
    step = helper.make_tensor(f"{site.name}_s", TensorProto.INT64, [], [1 << 60])
    place = f"{site.name}_i"
    nodes = [
        helper.make_node("Div", [first.name, step.name], [place]),
        helper.make_node("Gather", [table.name, place], [site.name]),
    ]
    return Made(Value(site.name, "FP32", first.dims), nodes, [table, step])


def _halved(site: Site) -> Made | None:
    """Fails for some sizes: an open dimension that is odd."""
    first = site.values[0]
    if not first.dims or isinstance(first.dims[-1], int):
        return None
    shape = whole(f"{site.name}_s", [0] * (len(first.dims) - 1 + site.batch) + [2, -1])
    node = helper.make_node("Reshape", [first.name, shape.name], [site.name])
    return Made(Value(site.name, first.datatype, (*first.dims[:-1], 2, None)), [node], [shape])


OPERATORS: Sequence[Operator] = (
    Operator(ALL, _same("Identity")),
    Operator(NUMBERS, _with_constant),
    Operator(NUMBERS, _same("Abs")),
    Operator((*SIGNED, *FLOATS), _same("Neg")),
    Operator((*NUMBERS, "BF16"), _same("Sign")),
    Operator(("BOOL",), _same("Not")),
    *(Operator(ROUGH, _same(kind, exact=False)) for kind in ("Exp", "Sigmoid", "Tanh")),
    *(Operator(NUMBERS, _pair(kind)) for kind in ("Add", "Sub", "Mul")),
    *(Operator(("BOOL",), _pair(kind)) for kind in ("And", "Or", "Xor")),
    *(Operator((*NUMBERS, "BOOL", "BYTES"), _pair(kind, "BOOL")) for kind in ("Equal",)),
    Operator(NUMBERS, _pair("Less", "BOOL")),
    Operator(INTEGERS, _pair("BitwiseXor")),
    Operator(("BYTES",), _pair("StringConcat")),
    Operator(ALL, _cast),
    Operator(ALL, _transpose),
    Operator(ALL, _reverse),
    Operator(ALL, _unsqueeze),
    Operator(ALL, _concat),
    Operator((*ROUGH, "INT32", "INT64"), _sum),
    Operator(ROUGH, _softmax),
    Operator(ROUGH, _matmul),
    Operator(("BOOL", "INT32", "INT64", "UINT8", "FP32"), _nonzero),
    Operator(ALL, _shape),
    *[Operator(("INT64",), _lookup)] * 3,
    Operator(ALL, _halved),
)


def tensor_info(value: Value, batch: int) -> Any:
    """An input or output of a graph."""
    return helper.make_tensor_value_info(value.name, TYPES[value.datatype], [*["batch"] * batch, *value.dims])
