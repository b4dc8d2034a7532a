"""A model repository with small models, and real-looking rows for them, for the tests of `gateway build`."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gateway import engines
from gateway.build.data import Row
from gateway.build.source import Source
from gateway.repository import Repository

CLASSES = 7
SIDE = 8


def classifier() -> onnx.ModelProto:
    """Two convolutions, one of them depthwise, and a Gemm; the classes are well apart."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(0, 0.5, (8, 3, 3, 3)),
        "b1": random.normal(0, 0.1, 8),
        "w2": random.normal(0, 0.5, (8, 1, 3, 3)),
        "w3": random.normal(0, 1.0, (8 * SIDE * SIDE, CLASSES)),
        "b3": np.zeros(CLASSES),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1], group=8),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Flatten", ["r2"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"]),
    ]
    return model(nodes, weights, ("image", [3, SIDE, SIDE]), ("logits", [CLASSES]))


def encoder(width: int = 64) -> onnx.ModelProto:
    """Attention over the row's own tokens, then a mean of unit length: as a sentence encoder does."""
    random = np.random.default_rng(1)
    weights = {name: random.normal(0, width**-0.5, (width, width)) for name in ("q", "k", "v", "o")}
    nodes = [
        helper.make_node("MatMul", ["tokens", "q"], ["tq"]),
        helper.make_node("MatMul", ["tokens", "k"], ["tk"]),
        helper.make_node("MatMul", ["tokens", "v"], ["tv"]),
        helper.make_node("Transpose", ["tk"], ["tkt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tq", "tkt"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["attention"], axis=-1),
        helper.make_node("MatMul", ["attention", "tv"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "o"], ["out"]),
        helper.make_node("ReduceMean", ["out", "axis"], ["mean"], keepdims=0),
        helper.make_node("LpNormalization", ["mean"], ["embedding"], axis=-1),
    ]
    made = model(nodes, weights, ("tokens", [5, width]), ("embedding", [width]))
    made.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    return made


def model(
    nodes: list[Any], weights: dict[str, NDArray[Any]], given: tuple[str, list[int]], gives: tuple[str, list[int]]
) -> onnx.ModelProto:
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *d]) for n, d in (given, gives)]
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "tiny", tensors[:1], tensors[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def put(
    repository: Path, name: str, proto: onnx.ModelProto, *, batch: int = 32, labels: bool = False, **parameters: str
):
    """Write a model folder. `parameters` have `_` for the dot: `gate_speedup="0"`."""
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    onnx.save(proto, folder / "1" / "model.onnx")
    lines = [f'max_batch_size: {batch}\nbackend: "onnxruntime"\n']
    if labels:
        (folder / "labels.txt").write_text("".join(f"class {index}\n" for index in range(CLASSES)))
        dims = [dim.dim_value for dim in proto.graph.output[0].type.tensor_type.shape.dim[1:]]
        lines.append(
            f'output [ {{ name: "logits" data_type: TYPE_FP32 dims: {dims} label_filename: "labels.txt" }} ]\n'
        )
    for key, value in parameters.items():
        name = key.replace("gate_", "gate.")
        lines.append(f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n')
    (folder / "config.pbtxt").write_text("".join(lines))
    return folder


def source(repository: Path, name: str) -> Source:
    found = Repository([repository], engines.describe).read(name)
    return Source(found.config, found.versions[1], found.versions[1] / "model.onnx")


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, (count, 3, SIDE, SIDE)).astype(np.float32)


def rows(count: int, seed: int = 0) -> list[Row]:
    return [Row({"image": image[None]}) for image in images(count, seed)]


def tokens(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows of very different size, so that one scale for all of them fits few."""
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.uniform(-1.5, 1.5, (count, 1, 1))
    return (random.normal(0, 1, (count, 5, 64)) * scale).astype(np.float32)
