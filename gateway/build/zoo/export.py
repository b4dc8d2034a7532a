"""Owns the way from a torch module to ONNX bytes that are self-contained, free of local paths, and checked.

It promises that what it returns loads in ONNX Runtime and that `worst_difference` compares it with the module it came
from. It does not quantize.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from gateway.build.zoo.files import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    Feeds = Mapping[str, NDArray[Any]]

OPSET = 18
IR_VERSION = 10  # of ONNX 1.16, March 2024: the `onnx` package would write a newer one that older servers refuse


def to_onnx(module: Any, example: Feeds, axes: Mapping[int, tuple[str, int]], output: str) -> Any:
    """Export `module` to an ONNX model whose `axes` (position -> name, maximum) are dynamic in every input."""
    import torch

    # The dynamo exporter: EfficientNet in INT8 made from its graph ran twice as fast as from the older tracer's.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dims = {axis: torch.export.Dim(name, min=1, max=most) for axis, (name, most) in axes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            module,
            tuple(torch.from_numpy(array) for array in example.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=[output],
            dynamic_shapes=tuple(dims for _ in example),
            verbose=False,
        )
    return program.model_proto


def tidy(model: Any, source: str) -> Any:
    """Drop what the exporter noted about this machine (stack traces with paths), and record the source instead."""
    from onnx import helper

    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    helper.set_model_props(model, {"source": source, "built_by": "gateway.build.zoo"})
    return model


def rename_value(model: Any, old: str, new: str) -> None:
    """Rename one value wherever the graph mentions it."""
    graph = model.graph
    for node in graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name == old:
                    names[position] = new
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        if value.name == old:
            value.name = new


def to_bytes(model: Any) -> bytes:
    """Check a model and serialize it, the same bytes for the same model."""
    import onnx

    model.ir_version = min(model.ir_version, IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def runner(content: bytes) -> Callable[[Feeds], NDArray[np.float32]]:
    """Open ONNX bytes on the CPU and return a function from input tensors to the first output."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(feeds: Feeds) -> NDArray[np.float32]:
        output: NDArray[np.float32] = session.run(None, dict(feeds))[0]
        return output

    return run


def worst_difference(module: Any, content: bytes, cases: Iterable[Feeds], limit: float) -> float:
    """Run torch and ONNX on each case and return the largest difference; above `limit` the export is refused.

    Give cases of different shapes: a graph with a size frozen into it loads, and is wrong only at the other sizes.
    """
    import torch

    run = runner(content)
    worst = 0.0
    with torch.inference_mode():
        for feeds in cases:
            expected = module(*(torch.from_numpy(array) for array in feeds.values())).numpy()
            worst = max(worst, float(abs(run(feeds) - expected).max()))
    if worst > limit:
        raise BuildError(f"the exported graph differs from torch by {worst:.2g}, more than {limit:.2g}")
    return worst
