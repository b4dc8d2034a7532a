"""ONNX models whose batches are not rows of one shape, and repositories of them."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

FLOAT, INT32, INT64, STRING = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.STRING


def value(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def saved(folder: Path, config: str, graph: onnx.GraphProto) -> Path:
    """A model's folder, named as the graph."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    (folder / graph.name / "1").mkdir(parents=True)
    (folder / graph.name / "config.pbtxt").write_text(config)
    onnx.save(model, folder / graph.name / "1" / "model.onnx")
    return folder / graph.name


def identity(folder: Path, name: str = "identity", *, kind: int = FLOAT, more: str = "") -> Path:
    """Elements come out as they went in; each request gets its own, in its shape."""
    dtype = "TYPE_STRING" if kind == STRING else f"TYPE_{ {FLOAT: 'FP32', INT64: 'INT64'}[kind] }"
    config = f"""max_batch_size: 8 {more}
    input {{ name: "IN" data_type: {dtype} dims: [ -1, -1 ] allow_ragged_batch: true }}
    output {{ name: "OUT" data_type: {dtype} dims: [ -1, -1 ] }}
    batch_output {{ target_name: "OUT" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "IN" }}
    dynamic_batching {{ }}"""
    nodes = [helper.make_node("Identity", ["IN"], ["OUT"])]
    return saved(
        folder, config, helper.make_graph(nodes, name, [value("IN", kind, ["n"])], [value("OUT", kind, ["m"])])
    )


def sums(folder: Path, name: str = "sums", *, carried: bool = False) -> Path:
    """The sum of each request's elements, which it finds by where they end: row i is of request i, if they have a row each.

    ENDS is made by the gateway (BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO). With `carried` it is that of a sequence up to then.
    """
    batching = "dynamic_batching { }"
    if carried:
        state = 'state { input_name: "SO_FAR" output_name: "NOW" data_type: TYPE_FP32 dims: [ 1 ] }'
        batching = f"sequence_batching {{ oldest {{ max_candidate_sequences: 4 }} {state} }}"
    config = f"""max_batch_size: 8
    input {{ name: "IN" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }}
    output {{ name: "SUM" data_type: TYPE_FP32 dims: [ 1 ] }}
    batch_input {{ kind: BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO target_name: "ENDS" data_type: TYPE_INT32 source_input: "IN" }}
    {batching}"""
    numbers = [
        helper.make_tensor(name, INT64, [1], [number])
        for name, number in (("zero", 0), ("one", 1), ("last", 1 << 60), ("minus", -1))
    ]
    numbers += [helper.make_tensor("axis", INT64, [], [0]), helper.make_tensor("none", FLOAT, [1], [0.0])]
    nodes = [
        helper.make_node("Cast", ["ENDS"], ["ends"], to=INT64),
        helper.make_node("CumSum", ["IN", "axis"], ["running"]),
        helper.make_node("Concat", ["none", "running"], ["totals"], axis=0),
        helper.make_node("Gather", ["totals", "ends"], ["at"], axis=0),
        helper.make_node("Slice", ["at", "one", "last"], ["upper"]),
        helper.make_node("Slice", ["at", "zero", "minus"], ["lower"]),
        helper.make_node("Sub", ["upper", "lower"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "one"], ["own" if carried else "SUM"]),
    ]
    inputs, outputs = [value("IN", FLOAT, ["n"]), value("ENDS", INT32, ["e"])], [value("SUM", FLOAT, ["r", 1])]
    if carried:
        nodes += [helper.make_node("Add", ["own", "SO_FAR"], ["SUM"]), helper.make_node("Identity", ["SUM"], ["NOW"])]
        inputs.append(value("SO_FAR", FLOAT, ["r", 1]))
        outputs.append(value("NOW", FLOAT, ["r", 1]))
    return saved(folder, config, helper.make_graph(nodes, name, inputs, outputs, numbers))


KINDS = {
    "BATCH_ELEMENT_COUNT": 1,
    "BATCH_ACCUMULATED_ELEMENT_COUNT": 1,
    "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO": 1,
    "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE": 1,
    "BATCH_ITEM_SHAPE": 2,
    "BATCH_ITEM_SHAPE_FLATTEN": 1,
}
"""Of `batch_input`, and how many dimensions it has."""


def told(folder: Path, name: str, kind: str, datatype: str) -> Path:
    """As NVIDIA's `batch_input` models (qa/common/gen_qa_ragged_models.py): each row has the whole batch input, and so shows
    what it was; with its number of elements. It waits for four rows.
    """
    rank, onnx_type = KINDS[kind], {"TYPE_INT32": INT32, "TYPE_FP32": FLOAT}[datatype]
    config = f"""max_batch_size: 4
    input {{ name: "IN" data_type: TYPE_FP32 dims: [ -1, -1 ] allow_ragged_batch: true }}
    input {{ name: "ROWS" data_type: TYPE_FP32 dims: [ 1 ] }}
    output {{ name: "OUT" data_type: {datatype} dims: [ -1 ] }}
    output {{ name: "ALL" data_type: TYPE_FP32 dims: [ -1 ] }}
    batch_input {{ kind: {kind} target_name: "MADE" data_type: {datatype} source_input: "IN" }}
    dynamic_batching {{ max_queue_delay_microseconds: 60000000 }}"""
    nodes = [
        helper.make_node("Shape", ["ROWS"], ["shape"]),
        helper.make_node("Reshape", ["MADE", "row"], ["made"]),
        helper.make_node("Expand", ["made", "shape"], ["OUT"]),
        helper.make_node("Reshape", ["IN", "row"], ["in"]),
        helper.make_node("Expand", ["in", "shape"], ["ALL"]),
    ]
    graph = helper.make_graph(
        nodes,
        name,
        [
            value("IN", FLOAT, ["n"]),
            value("ROWS", FLOAT, ["rows", 1]),
            value("MADE", onnx_type, ["a", "b"][:rank]),
        ],
        [value("OUT", onnx_type, ["rows", "o"]), value("ALL", FLOAT, ["rows", "p"])],
        [helper.make_tensor("row", INT64, [2], [1, -1])],
    )
    return saved(folder, config, graph)


def reshaper(folder: Path, name: str = "reshaper") -> Path:
    """Rows of X in the shape that SHAPE says, which is no row's but the batch's; it is given back as OF."""
    config = """max_batch_size: 4
    input { name: "X" data_type: TYPE_FP32 dims: [ 4 ] }
    input { name: "SHAPE" data_type: TYPE_INT64 dims: [ -1 ] is_shape_tensor: true }
    output { name: "Y" data_type: TYPE_FP32 dims: [ -1, -1 ] }
    output { name: "OF" data_type: TYPE_INT64 dims: [ -1 ] is_shape_tensor: true }
    dynamic_batching { max_queue_delay_microseconds: 60000000 }"""
    nodes = [
        helper.make_node("Concat", ["rows", "SHAPE"], ["target"], axis=0),
        helper.make_node("Reshape", ["X", "target"], ["Y"]),
        helper.make_node("Identity", ["SHAPE"], ["OF"]),
    ]
    graph = helper.make_graph(
        nodes,
        name,
        [value("X", FLOAT, ["r", 4]), value("SHAPE", INT64, ["s"])],
        [value("Y", FLOAT, ["r", "a", "b"]), value("OF", INT64, ["s"])],
        [helper.make_tensor("rows", INT64, [1], [0])],
    )
    return saved(folder, config, graph)


def defaulted(folder: Path, name: str = "defaulted", *, batched: bool = False) -> Path:
    """IN + INITIALIZER, which is ones where the client gives none (onnxruntime_backend/test/initializer_as_input)."""
    shape: list[int | str] = ["r", "n"] if batched else [1, 3]
    dims, size = ("[ -1 ]", 4) if batched else ("[ 1, 3 ]", 0)
    config = f"""max_batch_size: {size}
    input {{ name: "INPUT" data_type: TYPE_FP32 dims: {dims} }}
    input {{ name: "INITIALIZER" data_type: TYPE_FP32 dims: {dims} optional: true }}
    output {{ name: "OUTPUT" data_type: TYPE_FP32 dims: {dims} }}
    {"dynamic_batching { max_queue_delay_microseconds: 60000000 }" if batched else ""}"""
    graph = helper.make_graph(
        [helper.make_node("Add", ["INPUT", "INITIALIZER"], ["OUTPUT"])],
        name,
        [value("INPUT", FLOAT, shape), value("INITIALIZER", FLOAT, shape)],
        [value("OUTPUT", FLOAT, shape)],
        [helper.make_tensor("INITIALIZER", FLOAT, [1, 3], [1.0, 1.0, 1.0])],
    )
    return saved(folder, config, graph)
