"""Where an artefact's error comes from: its layers' outputs against FP32's, on a few rows, the worst layers first.

Runs both graphs unfused and with QuantizeLinear in floating point, because a fused integer kernel has no values in
between to look at. What integer kernels lose on top of that shows in the artefact's own accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gateway import errors
from gateway.build import measure
from gateway.build.data import Row, batches
from gateway.build.source import Source
from gateway.types import Array

ROWS = 8
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_AT_ONCE = 4  # rows: all values of a graph are in memory at the same time
_WORST = 10

Layers = tuple[tuple[str, float], ...]


def worst(source: Source, file: Path, rows: Sequence[Row]) -> Layers:
    """The layers that both graphs have, with their error: RMS of the difference over RMS of FP32's values.

    Empty when the file's graph cannot be run here.
    """
    import onnx

    reference, candidate = source.load(), onnx.load(file)
    pairs = _pairs(reference, {name for node in candidate.graph.node for name in node.output})
    if not pairs:
        return ()
    names = [name for name, _ in pairs]
    try:
        runners = [
            measure.load(_opened(model, values), values, simulated=True)
            for model, values in ((reference, names), (candidate, [name for _, name in pairs]))
        ]
    except errors.Unavailable:
        return ()
    difference, size = np.zeros(len(names)), np.zeros(len(names))
    for batch in batches(rows[:: max(1, len(rows) // ROWS)][:ROWS], source.rows(_AT_ONCE)):
        for index, (expected, found) in enumerate(zip(*(runner.run(batch) for runner in runners), strict=True)):
            difference[index] += _squares(expected - found)
            size[index] += _squares(expected)
    share = np.sqrt(difference / np.maximum(size, 1e-24))
    order = np.argsort(-share, kind="stable")[:_WORST]
    return tuple((names[index], float(share[index])) for index in order)


def _pairs(reference: Any, there: set[str]) -> list[tuple[str, str]]:
    """For each layer the value to look at in FP32, and what it is called in the other graph."""
    activation = {
        node.input[0]: node.output[0]
        for node in reference.graph.node
        if node.op_type in ("Relu", "Clip") and node.input
    }
    pairs = []
    for node in reference.graph.node:
        if node.op_type not in _LAYERS:
            continue
        name = node.output[0]
        # A quantizer drops a Relu that the range of its values stands for; what it is after that has a name of its own.
        after = activation.get(name, name)
        for pair in ((name, name), (after, f"{after}_DequantizeLinear_Output")):
            if pair[1] in there:
                pairs.append(pair)
                break
    return pairs


def _opened(model: Any, names: Sequence[str]) -> bytes:
    """The model with the values of these names among its outputs, of whatever type they are."""
    import onnx

    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    content: bytes = model.SerializeToString()
    return content


def _squares(values: Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())
