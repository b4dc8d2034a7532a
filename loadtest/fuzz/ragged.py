"""A random model of ragged batches: its requests have different shapes, and it is told by `batch_input` which elements are whose.

Each request has one row, so that what is told of a request is a row of an output. Kinds whose values depend on the batch are
used to find a request's first or last element, which does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from onnx import NodeProto, TensorProto, helper

from loadtest.fuzz.operators import ALL, NUMBERS, TYPES, whole

Shape = tuple[int, ...]
SOURCE, ROW = "RAGGED", "ROW"


class Told(NamedTuple):
    """An input that the gateway makes: what it holds for a batch of one request of a shape, the batch included."""

    name: str
    datatype: str
    kind: str

    def of(self, shape: Shape) -> npt.NDArray[np.generic]:
        """The array."""
        dtype = np.int32 if self.datatype == "INT32" else np.float32
        return np.asarray(_HOLDS[self.kind](shape)).astype(dtype)


class Output(NamedTuple):
    """An output: `dims` as clients see them, `inner` the model's; one that is `like` the ragged input has none of its own."""

    name: str
    datatype: str
    dims: Shape
    inner: Shape
    like: str = ""


class Ragged(NamedTuple):
    """A model in the making; `dims` are those of the ragged input. Without `empty` every request must have an element."""

    file: bytes
    config: str
    datatype: str
    dims: Shape
    outputs: list[Output]
    told: list[Told]
    empty: bool


_HOLDS: dict[str, Callable[[Shape], object]] = {
    "ELEMENT_COUNT": lambda shape: [np.prod(shape)],
    "ACCUMULATED_ELEMENT_COUNT": lambda shape: [np.prod(shape)],
    "ACCUMULATED_ELEMENT_COUNT_WITH_ZERO": lambda shape: [0, np.prod(shape)],
    "ITEM_SHAPE": lambda shape: [shape[1:]],
    "ITEM_SHAPE_FLATTEN": lambda shape: shape[1:],
}


def make(rng: Generator, most: int) -> Ragged:
    """A model that takes so many rows."""
    kind = ALL[rng.integers(len(ALL))]
    dims = ((-1,), (-1, 2), (-1, -1), (3, -1, 1))[rng.integers(4)]
    outputs = [Output("OUT0", kind, dims, (), SOURCE), Output("OUT1", "FP32", (2,), (2,))]
    nodes, constants = _element(rng, kind)
    nodes.append(helper.make_node("Identity", [ROW], ["OUT1"]))
    told = []
    kinds = [list(_HOLDS)[place] for place in rng.permutation(len(_HOLDS))[: rng.integers(1, 4)]]
    for number, what in enumerate(kinds, 2):
        exact = what in ("ACCUMULATED_ELEMENT_COUNT", "ACCUMULATED_ELEMENT_COUNT_WITH_ZERO") or rng.random() < 0.5
        each = Told(f"TOLD{number}", "INT32" if exact else "FP32", what)
        output, more, fixed = _use(each, f"OUT{number}", kind, len(dims))
        told.append(each)
        outputs.append(output)
        nodes += more
        constants += fixed
    file = _file(kind, told, outputs, nodes, constants)
    config = _config(most, kind, dims, told, outputs)
    return Ragged(file, config, kind, dims, outputs, told, not any("ACCUMULATED" in each.kind for each in told))


def _element(rng: Generator, kind: str) -> tuple[list[NodeProto], list[TensorProto]]:
    """What becomes of each element."""
    if kind not in NUMBERS or rng.random() < 0.5:
        return [helper.make_node("Identity", [SOURCE], ["OUT0"])], []
    constant = helper.make_tensor("c", TYPES[kind], [], [int(rng.integers(1, 9))])
    return [helper.make_node("Add", [SOURCE, "c"], ["OUT0"])], [constant]


def _use(told: Told, name: str, kind: str, rank: int) -> tuple[Output, list[NodeProto], list[TensorProto]]:
    """An output that shows what was told, the same in whatever batch."""
    if told.kind == "ELEMENT_COUNT":
        return Output(name, told.datatype, (1,), ()), [helper.make_node("Identity", [told.name], [name])], []
    if told.kind == "ITEM_SHAPE":
        return Output(name, told.datatype, (rank,), (rank,)), [helper.make_node("Identity", [told.name], [name])], []
    if told.kind == "ITEM_SHAPE_FLATTEN":
        shape = whole(f"{name}_s", [-1, rank])
        node = helper.make_node("Reshape", [told.name, shape.name], [name])
        return Output(name, told.datatype, (rank,), (rank,)), [node], [shape]
    place = f"{name}_i"
    if told.kind == "ACCUMULATED_ELEMENT_COUNT":  # the last of each
        one = helper.make_tensor(f"{name}_1", TensorProto.INT32, [], [1])
        nodes, constants = [helper.make_node("Sub", [told.name, one.name], [place])], [one]
    else:  # the first of each
        constants = [whole(f"{name}_{key}", [number]) for key, number in (("s", 0), ("e", -1))]
        nodes = [helper.make_node("Slice", [told.name, *(each.name for each in constants)], [place])]
    nodes.append(helper.make_node("Gather", [SOURCE, place], [name]))
    return Output(name, kind, (1,), ()), nodes, constants


def _file(
    kind: str, told: list[Told], outputs: list[Output], nodes: list[NodeProto], constants: list[TensorProto]
) -> bytes:
    rows = [("n",) if each.like else ("rows", *each.inner) for each in outputs]
    given = [
        helper.make_tensor_value_info(SOURCE, TYPES[kind], ["n"]),
        helper.make_tensor_value_info(ROW, TYPES["FP32"], ["rows", 2]),
        *(
            helper.make_tensor_value_info(
                each.name, TYPES[each.datatype], [None] * (2 if each.kind == "ITEM_SHAPE" else 1)
            )
            for each in told
        ),
    ]
    gives = [
        helper.make_tensor_value_info(each.name, TYPES[each.datatype], list(shape))
        for each, shape in zip(outputs, rows, strict=True)
    ]
    graph = helper.make_graph(nodes, "ragged", given, gives, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def _config(most: int, kind: str, dims: Shape, told: list[Told], outputs: list[Output]) -> str:
    text = {"BYTES": "STRING"}.get(kind, kind)
    lines = [
        f"max_batch_size: {most}",
        f'input {{ name: "{SOURCE}" data_type: TYPE_{text} dims: {list(dims)} allow_ragged_batch: true }}',
        f'input {{ name: "{ROW}" data_type: TYPE_FP32 dims: [2] }}',
    ]
    for each in outputs:
        reshape = "" if each.like or each.dims == each.inner else f" reshape {{ shape: {list(each.inner)} }}"
        each_text = {"BYTES": "STRING"}.get(each.datatype, each.datatype)
        lines.append(f'output {{ name: "{each.name}" data_type: TYPE_{each_text} dims: {list(each.dims)}{reshape} }}')
        if each.like:
            lines.append(
                f'batch_output {{ target_name: "{each.name}" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "{SOURCE}" }}'
            )
    lines += [
        f'batch_input {{ kind: BATCH_{each.kind} target_name: "{each.name}" data_type: TYPE_{each.datatype} '
        f'source_input: "{SOURCE}" }}'
        for each in told
    ]
    lines.append("dynamic_batching { max_queue_delay_microseconds: 20000 }")
    lines.append("instance_group { kind: KIND_CPU count: 1 }")
    return "\n".join(lines) + "\n"
