"""What TensorRT demands of quantized files: each rule broken alone, in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gateway import errors
from gateway.build.qdq import faults, require

SYMMETRIC = "extra_options={'ActivationSymmetric': True, 'WeightSymmetric': True}"


def constant(name: str, array: np.ndarray):
    return numpy_helper.from_array(array, name)


def model(nodes, constants=(), domain: str = ""):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [None, 2])],
        [value("y", TensorProto.FLOAT, [None, 2])],
        list(constants),
    )
    opsets = [helper.make_opsetid("", 21)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets)


SCALE = constant("scale", np.float32(0.1))
SCALES = constant("scales", np.float32([0.1, 0.2]))


def pair(point: np.ndarray | None, scale: str = "scale", **attributes):
    """x through QuantizeLinear and DequantizeLinear."""
    points = [] if point is None else ["point"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", scale, *points], ["q"], name="quantize", **attributes),
        helper.make_node("DequantizeLinear", ["q", scale, *points], ["y"], name="dequantize"),
    ]
    return model(nodes, [SCALE, SCALES, *([] if point is None else [constant("point", point)])])


def weight(array: np.ndarray, point: np.ndarray | None = None):
    """Weights through DequantizeLinear, added to x."""
    points = [] if point is None else ["point"]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", *points], ["d"], name="weights"),
        helper.make_node("Add", ["x", "d"], ["y"], name="add"),
    ]
    return model(nodes, [SCALE, constant("w", array), *([] if point is None else [constant("point", point)])])


def test_what_tensorrt_takes_has_no_faults() -> None:
    assert faults(pair(np.int8(0))) == []
    assert faults(pair(None, output_dtype=TensorProto.INT8)) == []
    assert faults(weight(np.int8([1, 2]))) == []
    assert faults(weight(np.int8([1, 2]), np.int8(0))) == []
    assert faults(model([helper.make_node("Relu", ["x"], ["y"])])) == []
    per_channel = helper.make_node("DequantizeLinear", ["w", "scales"], ["d"], axis=0)
    assert faults(model([per_channel], [SCALES, constant("w", np.int8([1, 2]))])) == []


@pytest.mark.parametrize(
    ("broken", "nodes", "text"),
    [
        (weight(np.int32([1, 2])), ("weights",), "dequantizes a bias of INT32; keep biases in floating point"),
        (pair(np.int8(3)), ("quantize", "dequantize"), f"a zero point that is not zero; .*: {SYMMETRIC}"),
        (pair(np.uint8(0)), ("quantize", "dequantize"), r"unsigned \(UINT8\), which TensorRT takes for signed"),
        (pair(None), ("quantize",), r"unsigned \(UINT8\)"),  # ONNX's default
        (weight(np.uint8([1, 2])), ("weights",), r"unsigned \(UINT8\)"),
        (pair(np.int16(0)), ("quantize", "dequantize"), "is of type INT16; TensorRT takes INT8, FLOAT8E4M3FN"),
        (pair(np.int8([0, 0]), "scales"), ("quantize",), "quantizes activations with several scales"),
        (
            model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="n")]),
            ("n",),
            "is dynamic quantization, whose scales are computed in each run; .*: quantize statically, with calibration data",
        ),
        (
            model([helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="n")], [constant("w", np.int8([1]))]),
            ("n",),
            "is dynamic quantization",
        ),
        (
            model([helper.make_node("QLinearConv", ["x"] * 8, ["y"], name="n")]),
            ("n",),
            r"QOperator format\); quantize with",
        ),
        (
            model(
                [helper.make_node("FusedConv", ["x"], ["y"], name="n", domain="com.microsoft")], domain="com.microsoft"
            ),
            ("n",),
            "is an operator of 'com.microsoft', which TensorRT has not; build from the model before ONNX Runtime optimized",
        ),
        (
            model([helper.make_node("QuantizeLinear", ["x", "x", "x"], ["y"], name="n")]),
            ("n",),
            "has a scale that is computed in the run",
        ),
    ],
)
def test_each_rule_that_is_broken_is_named_with_its_nodes(broken, nodes: tuple[str, ...], text: str) -> None:
    import re

    found = [fault for fault in faults(broken) if re.search(text, fault.text)]
    assert [fault.nodes for fault in found] == [nodes]


def test_constants_may_be_nodes_and_graphs_may_be_inside_graphs() -> None:
    point = helper.make_node("Constant", [], ["point"], value=constant("v", np.int8(5)))
    scale = helper.make_node("Constant", [], ["scale"], value=SCALE)
    quantize = helper.make_node("QuantizeLinear", ["x", "scale", "point"], ["y"], name="inner")
    branch = helper.make_graph(
        [point, scale, quantize], "b", [], [helper.make_tensor_value_info("y", TensorProto.INT8, None)]
    )
    outer = model([helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)])
    (fault,) = faults(outer)
    assert fault.nodes == ("inner", "inner")
    assert "zero point that is not zero" in fault.text


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    both = pair(np.int8(3))
    both.graph.node.append(helper.make_node("ConvInteger", ["x", "x"], ["z"], name="conv"))
    onnx.save(both, tmp_path / "model.onnx")
    with pytest.raises(errors.InvalidArgument) as caught:
        require(tmp_path / "model.onnx")
    assert caught.value.message.startswith(
        "TensorRT does not take 'model.onnx': 'quantize' and 1 more: has a zero point that is not zero; "
    )
    assert "; 'conv': is dynamic quantization" in caught.value.message
    onnx.save(pair(np.int8(0)), tmp_path / "model.onnx")
    require(tmp_path / "model.onnx")


def test_zero_points_beside_the_file_are_read(tmp_path: Path) -> None:
    onnx.save(
        pair(np.int8([3] * 2), "scales"), tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0,
        location="model.onnx.data",
    )  # fmt: skip
    with pytest.raises(errors.InvalidArgument, match="zero point that is not zero"):
        require(tmp_path / "model.onnx")
