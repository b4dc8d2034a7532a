"""Recipes for GPUs: half precision for ONNX Runtime's CUDA provider, and what TensorRT takes.

TensorRT's networks are strongly typed: precision is what the file says. Its INT8 wants QDQ with signed, symmetric
values on both sides and no quantized bias; ONNX Runtime's own defaults are refused by its parser.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gateway.build.recipes import static
from gateway.build.recipes.base import Job, Recipe, quiet
from gateway.build.source import Source, save


def _floats(source: Source) -> str:
    return "" if source.weights else "it has no weights"


def _multiplies(source: Source) -> str:
    suited = {"Conv", "Gemm", "MatMul"} & set(source.operators)
    return "" if suited else "it has no convolution and no matrix multiplication"


def _half(source: Source) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with quiet():
        model = convert_float_to_float16(source.load(), keep_io_types=True)
        OnnxModel(model).topological_sort(is_deterministic=True)  # it leaves its casts at the end
        return model


def _fp16(job: Job) -> None:
    save(_half(job.source), job.file)


def _bf16(job: Job) -> None:
    """The FP16 graph with BF16 in its place, and the weights rounded from FP32 once."""
    from onnx import TensorProto, numpy_helper

    model = _half(job.source)
    exact = {tensor.name: tensor for tensor in job.source.load().graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            value = numpy_helper.to_array(exact.get(tensor.name, tensor)).astype(np.float32)
            tensor.CopyFrom(_to_bf16(value, tensor.name))
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for node in model.graph.node:
        for attribute in node.attribute:
            _retype(node, attribute)
    save(model, job.file)


def _retype(node: Any, attribute: Any) -> None:
    from onnx import TensorProto, numpy_helper

    if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
        attribute.i = TensorProto.BFLOAT16
    elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT16:
        attribute.t.CopyFrom(_to_bf16(numpy_helper.to_array(attribute.t).astype(np.float32), attribute.t.name))


def _to_bf16(value: Any, name: str) -> Any:
    from onnx import TensorProto, helper

    bits = _rounded(value).view(np.uint32) >> 16
    return helper.make_tensor(name, TensorProto.BFLOAT16, value.shape, bits.astype(np.uint16).tobytes(), raw=True)


def _rounded(value: Any) -> Any:
    """FP32 values rounded to what BF16 can hold, to the nearest and to even."""
    bits = np.ascontiguousarray(value, np.float32).reshape(value.shape).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _simulated_bf16(source: Source) -> bytes:
    """The FP32 model with every weight and every value in between rounded to BF16, which CPUs have no kernels for."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.shape_inference.infer_shapes(source.load())
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(_rounded(numpy_helper.to_array(tensor)), tensor.name))
    floats = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in floats:
                node.output[index] = f"{name}_exact"
                nodes.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_bf16"], to=TensorProto.BFLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}_bf16"], [name], to=TensorProto.FLOAT))
    # Copies: emptying the field would empty the nodes that are still in it.
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    content: bytes = model.SerializeToString()
    return content


def _tensorrt_int8(job: Job) -> None:
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    static.quantize(job, activations="QInt8", options=options)


RECIPES = (
    Recipe("fp16", "FP16", "gpu", _fp16, _floats),
    Recipe("bf16", "BF16", "gpu", _bf16, _floats, simulate=_simulated_bf16),
    Recipe("trt-fp16", "FP16", "tensorrt", _fp16, _floats, backend="tensorrt"),
    Recipe("trt-int8", "INT8", "tensorrt", _tensorrt_int8, _multiplies, calibrated=True, backend="tensorrt"),
)
