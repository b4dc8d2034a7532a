"""Models, plans and engines for tests of the TensorRT backend with its fakes."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from gateway import engines
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines.base import EngineSpec
from gateway.engines.tensorrt.fakes.cuda import GPU
from gateway.engines.tensorrt.fakes.network import serialize
from gateway.types import Array, Batch

ADD_SUB = (
    "input { name: 'A' data_type: TYPE_FP32 dims: [-1] } input { name: 'B' data_type: TYPE_FP32 dims: [-1] }"
    " output { name: 'SUM' data_type: TYPE_FP32 dims: [-1] } output { name: 'DIFFERENCE' data_type: TYPE_FP32 dims: [-1] }"
)
WIDE = {"A": [[1, 1], [4, 4], [8, 16]], "B": [[1, 1], [4, 4], [8, 16]]}


def add_sub(path: Path) -> bytes:
    """An ONNX file of A + B and A - B, open in both dimensions, written to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "size"])
        for name in ("A", "B", "SUM", "DIFFERENCE")
    ]
    nodes = [helper.make_node("Add", ["A", "B"], ["SUM"]), helper.make_node("Sub", ["A", "B"], ["DIFFERENCE"])]
    graph = helper.make_graph(nodes, "g", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path.read_bytes()


def spec(version: Path, text: str = "", filename: str = "model.plan", **changes: Any) -> EngineSpec:
    """A spec of the model add_sub, in a folder, for the fake package unless `text` names another.

    A plan is run by TensorRT or not at all; an ONNX file by whatever can.
    """
    package = (
        "" if "tensorrt_package" in text else "parameters { key: 'tensorrt_package' value { string_value: 'fake' } }"
    )
    config = f"platform: 'tensorrt_plan' backend: 'tensorrt' name: 'm' {ADD_SUB} {package} {text}"
    if filename == "model.plan":
        config += " parameters { key: 'fallback' value { string_value: 'none' } }"
    if "max_batch_size" not in text:
        config += " max_batch_size: 8"
    source = Source("m/config.pbtxt", f"{config} default_model_filename: '{filename}'")
    return EngineSpec(build(parse_text(source), source, gpus=(0,)), "1", version, "gpu:0", **changes)


def write_plan(
    version: Path, profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]] = (WIDE,), **options: Any
) -> Path:
    """Write model.plan, a fake plan of add_sub, into a version's folder."""
    model = add_sub(version / "model.onnx")
    (version / "model.plan").write_bytes(serialize(model, profiles, **options))
    return version


@asynccontextmanager
async def opened(given: EngineSpec, count: int = 1) -> AsyncIterator[list[Any]]:
    """Engines of a spec, closed at the end."""
    created = await engines.create(given, count)
    try:
        yield created
    finally:
        for engine in created:
            await engine.close()
        gc.collect()


async def run(engine: Any, outputs: tuple[str, ...] = (), **inputs: Array) -> dict[str, Array]:
    """The outputs of one batch."""
    async with aclosing(engine.run(Batch(len(next(iter(inputs.values()))), lambda: inputs, outputs))) as results:
        return (await anext(results)).outputs


def pair(rows: int, size: int, start: float = 1.0) -> dict[str, Array]:
    """Inputs of add_sub whose sums and differences all differ."""
    a = np.arange(start, start + rows * size, dtype="<f4").reshape(rows, size)
    return {"A": a, "B": a * 100}


def right(inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> bool:
    """Whether these are the sum and the difference."""
    return bool(
        np.array_equal(outputs["SUM"], inputs["A"] + inputs["B"])
        and np.array_equal(outputs["DIFFERENCE"], inputs["A"] - inputs["B"])
    )


def left_over() -> dict[str, int]:
    """What nobody gave back to the fake GPU."""
    held = {"device": GPU.device, "host": GPU.host, "streams": GPU.streams, "graphs": GPU.graphs}
    return {name: len(each) for name, each in held.items() if each}
