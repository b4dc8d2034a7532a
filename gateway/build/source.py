"""The model that is built from: its file, its configuration, and what its graph is made of.

Reads the ONNX file once and keeps it. The graph's facts are what recipes decide by; no recipe looks at a model's name.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gateway import artefacts, errors
from gateway.config.model import ModelConfig

OPSET = 18  # of the files that are made from an older one: per-channel QDQ needs 13, ReduceMax with axes as input 18
_INTEGER = {
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "MatMulNBits",
    "QLinearConv",
}
_BIG = 1 << 18  # elements of a weight matrix that is worth a quantized operator of its own


@dataclass(frozen=True)
class Source:
    """One version's FP32 model. `file` is its ONNX file, `version` the folder that it and its artefacts lie in."""

    config: ModelConfig
    version: Path
    file: Path

    @cached_property
    def sha256(self) -> str:
        """The hash that the artefacts are bound to."""
        return artefacts.sha256(self.file)

    @cached_property
    def batched(self) -> bool:
        """Whether rows of several clients may share a run, so that a row must not change another's answer."""
        return self.config.max_batch_size > 1

    def rows(self, wanted: int) -> int:
        """How many rows may share a run, of those wanted; one where rows cannot be joined."""
        return min(wanted, max(1, self.config.max_batch_size))

    def load(self) -> Any:
        """A copy of the model for a recipe to change, weights included. Raises `Unsupported` when it cannot be read."""
        import onnx

        copy = onnx.ModelProto()
        copy.CopyFrom(self._model)
        return copy

    @cached_property
    def _model(self) -> Any:
        import onnx
        from google.protobuf.message import DecodeError

        try:
            return onnx.load(self.file)
        except (OSError, DecodeError) as problem:
            raise errors.Unsupported(
                f"'{self.file.name}' cannot be read as an ONNX model: {problem}. Export it again; weights beside it "
                "must lie in the version's folder, and the whole must be below 2 GB"
            ) from problem

    @cached_property
    def operators(self) -> Counter[str]:
        """How many nodes there are of each operator."""
        return Counter(node.op_type for node in self._model.graph.node)

    @property
    def quantized(self) -> bool:
        """Whether it is in INT8 already, so that nothing can be compared with FP32."""
        return bool(_INTEGER & set(self.operators))

    @cached_property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The constant tensors by name, with their shapes."""
        return {tensor.name: tuple(tensor.dims) for tensor in self._model.graph.initializer}

    @cached_property
    def attends(self) -> bool:
        """Whether two activations are multiplied with each other, as attention does and convolutions do not."""
        return any(
            node.op_type == "MatMul" and not set(node.input) & set(self.weights) for node in self._model.graph.node
        )

    @cached_property
    def matrices(self) -> int:
        """How many multiplications by a constant matrix there are."""
        return sum(node.op_type == "MatMul" and node.input[1] in self.weights for node in self._model.graph.node)

    @cached_property
    def big_matrices(self) -> list[str]:
        """The constant matrices that are large enough to be kept in fewer bits for their size alone."""
        return [
            node.input[1]
            for node in self._model.graph.node
            if node.op_type == "MatMul" and _elements(self.weights.get(node.input[1], ())) >= _BIG
        ]

    @cached_property
    def depthwise(self) -> list[str]:
        """The weights of convolutions that have one input channel for each output channel."""
        return [
            node.input[1]
            for node in self._model.graph.node
            if node.op_type == "Conv"
            and node.input[1] in self.weights
            and self.weights[node.input[1]][1] == 1
            and _attribute(node, "group", 1) == self.weights[node.input[1]][0]
        ]


def save(model: Any, file: Path) -> None:
    """Write a model, the same bytes for the same model, checked, and readable by servers of 2024."""
    import onnx

    model.producer_name, model.producer_version = "gateway build", ""
    # Its order comes from Python sets in the quantizer, and differs from run to run; a model's meaning has no order.
    graph = model.graph
    for field in (graph.initializer, graph.value_info):
        items = sorted(field, key=lambda item: item.name)
        del field[:]
        field.extend(items)
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString(deterministic=True))


def _elements(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] if len(shape) == 2 else 0


def _attribute(node: Any, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
