"""What TensorRT demands of a quantized ONNX file, checked before it sees the file, and said in words.

TensorRT's parser stops at the first thing that it does not like and names an assertion; some of what it does not like
it accepts, and computes something else (unsigned values taken for signed). Rules from NVIDIA's guide, "Explicit
Quantization", and from builds that failed (FACTS.md 3.3). Pure: reads a model, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gateway import errors

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_DYNAMIC = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
_TYPES = ("INT8", "FLOAT8E4M3FN", "INT4", "FLOAT4E2M1")
_MOST = 8  # faults that are listed


class Fault(NamedTuple):
    """A rule that nodes break: the nodes' names, what is wrong, and what to do."""

    nodes: tuple[str, ...]
    text: str


def require(file: Path) -> None:
    """Raise `InvalidArgument` with all that is wrong with a file, for people; do nothing for one that is fine."""
    import onnx

    found = faults(onnx.load(file, load_external_data=False), file.parent)
    if found:
        lines = "; ".join(f"{_names(fault.nodes)} {fault.text}" for fault in found[:_MOST])
        raise errors.InvalidArgument(f"TensorRT does not take '{file.name}': {lines}")


def faults(model: Any, folder: Path | None = None) -> list[Fault]:
    """What TensorRT does not take of a model, one entry a rule. `folder` is where its external data lies."""
    broken: dict[str, list[str]] = {}
    for graph in _graphs(model.graph):
        values = _Values(graph, folder)
        for node in graph.node:
            for text in _judge(node, values):
                broken.setdefault(text, []).append(node.name or node.output[0])
    return [Fault(tuple(nodes), text) for text, nodes in broken.items()]


class _Values:
    """The constants of a graph by name."""

    def __init__(self, graph: Any, folder: Path | None) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                value = next((each.t for each in node.attribute if each.name == "value"), None)
                if value is not None:
                    self._tensors[node.output[0]] = value
        self._folder = folder

    def constant(self, name: str) -> bool:
        """Whether it is known before a run."""
        return name in self._tensors

    def kind(self, name: str) -> str:
        """The type of its elements, as ONNX calls it; empty for what is computed."""
        from onnx import TensorProto

        return TensorProto.DataType.Name(self._tensors[name].data_type) if name in self._tensors else ""

    def array(self, name: str) -> Any:
        """Its elements."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self._tensors[name], str(self._folder or ""))


def _judge(node: Any, values: _Values) -> Iterator[str]:
    if node.op_type in _DYNAMIC:
        yield (
            "is dynamic quantization, whose scales are computed in each run; TensorRT wants QuantizeLinear and "
            "DequantizeLinear with constant scales: quantize statically, with calibration data"
        )
    elif node.op_type.startswith("QLinear") or node.op_type.startswith("QGemm"):
        yield (
            "computes on quantized tensors itself (QOperator format); quantize with quant_format QDQ, which TensorRT "
            "fuses"
        )
    elif node.domain not in ("", "ai.onnx") and node.op_type not in (_QUANTIZE, _DEQUANTIZE):
        yield (
            f"is an operator of '{node.domain}', which TensorRT has not; build from the model before ONNX Runtime "
            "optimized it"
        )
    elif node.op_type in (_QUANTIZE, _DEQUANTIZE):
        yield from _judge_linear(node, values)


def _judge_linear(node: Any, values: _Values) -> Iterator[str]:
    scale = node.input[1]
    point = node.input[2] if len(node.input) > 2 else ""
    if not values.constant(scale):
        yield "has a scale that is computed in the run; TensorRT wants constant scales"
    elif node.op_type == _QUANTIZE and not values.constant(node.input[0]) and values.array(scale).size > 1:
        yield "quantizes activations with several scales; TensorRT wants one scale for each tensor that is no weight"
    kind = (
        values.kind(point) or values.kind(node.input[0])
        if node.op_type == _DEQUANTIZE
        else _target(node, values, point)
    )
    if node.op_type == _DEQUANTIZE and kind == "INT32":
        yield "dequantizes a bias of INT32; keep biases in floating point: extra_options={'QuantizeBias': False}"
        return
    if kind == "UINT8":
        yield (
            "is unsigned (UINT8), which TensorRT takes for signed, if at all; quantize activations and weights as INT8 with "
            "ActivationSymmetric and WeightSymmetric"
        )
    elif kind and kind not in _TYPES:
        yield f"is of type {kind}; TensorRT takes {', '.join(_TYPES)}"
    if point and not values.constant(point):
        yield "has a zero point that is computed in the run; TensorRT wants it constant, and zero"
    elif point and values.kind(point) == "INT8" and values.array(point).any():
        yield (
            "has a zero point that is not zero; TensorRT's quantization is symmetric: extra_options={'ActivationSymmetric': "
            "True, 'WeightSymmetric': True}"
        )


def _target(node: Any, values: _Values, point: str) -> str:
    """The type that a QuantizeLinear quantizes to: its zero point's, else its attribute's, else ONNX's default."""
    from onnx import TensorProto

    if point:
        return values.kind(point)
    given = next((each.i for each in node.attribute if each.name == "output_dtype"), 0)
    return TensorProto.DataType.Name(given) if given else "UINT8"


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for each in attribute.graphs:
                yield from _graphs(each)


def _names(nodes: Iterable[str]) -> str:
    first, *others = nodes
    return f"'{first}'" + (f" and {len(others)} more:" if others else ":")
