"""Owns `add_sub`: two vectors in, their sum and difference out; the smallest model with two inputs and two outputs.

It is the "simple" model of Triton's quickstart in FP32. It needs the `onnx` package only, and it is byte-identical
wherever it is built with the same version of that package.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gateway.build.zoo import export
from gateway.build.zoo.files import Model, infer_body

NAME = "add_sub"
WIDTH = 16
CONFIG = f"""\
name: "{NAME}"
backend: "onnxruntime"
max_batch_size: 64
input [
  {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ {WIDTH} ] }},
  {{ name: "INPUT1" data_type: TYPE_FP32 dims: [ {WIDTH} ] }}
]
output [
  {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ {WIDTH} ] }},
  {{ name: "OUTPUT1" data_type: TYPE_FP32 dims: [ {WIDTH} ] }}
]
dynamic_batching {{ }}
"""


def build() -> tuple[list[Model], str]:
    """Build the model and say what was checked."""
    counting, ones = np.arange(WIDTH, dtype=np.float32)[None], np.ones((1, WIDTH), np.float32)
    sample = infer_body("add_sub sample", {"INPUT0": counting, "INPUT1": ones}, ["OUTPUT0", "OUTPUT1"])
    model = Model(NAME, _onnx(), CONFIG, {"sample_request.json": sample})
    return [model], "exact by construction (one Add, one Sub)"


def _onnx() -> bytes:
    from onnx import TensorProto, helper

    def vector(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH])

    nodes = [
        helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"], name="add"),
        helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"], name="sub"),
    ]
    graph = helper.make_graph(nodes, NAME, [vector("INPUT0"), vector("INPUT1")], [vector("OUTPUT0"), vector("OUTPUT1")])
    opsets = [helper.make_opsetid("", export.OPSET)]
    model = helper.make_model(graph, producer_name="gateway.build.zoo", opset_imports=opsets)
    return export.to_bytes(export.tidy(model, "written by hand"))
