"""Runs a model file the way it will be served, or simulated in floating point, and times two of them in turns.

A `Runner` says what it really runs on: a session that ONNX Runtime moved to the CPU in silence is refused. Times are of
runs that alternate, A B A B, since a shared machine's speed changes within seconds; the best turn of each is told,
because what disturbs a run only ever makes it longer. What runs on one thread is timed by that thread's CPU clock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gateway import artefacts, errors, placement
from gateway.artefacts import Measured
from gateway.build.data import Row, batches, together
from gateway.engines.base import EngineSpec
from gateway.engines.threads import Loaded
from gateway.telemetry import log_event
from gateway.types import Array, Batch

CPU = "CPUExecutionProvider"
PROVIDERS = {"cpu": CPU, "gpu": "CUDAExecutionProvider"}
BATCH = 16  # rows of a run whose answers are compared
_SIZES = (1, 8, 32, 128)
_BURST = 0.005  # seconds: shorter runs are timed several at once
_WARM_UP = 4  # runs
_TICK = 1e-6  # seconds: what a clock can tell
_LEAST_TURNS, _MOST_TURNS, _SECONDS = 7, 200, 3.0


@dataclass(frozen=True)
class Runner:
    """A loaded model: `run` takes arrays by input name and gives the outputs in the model's order."""

    session: Any
    provider: str
    outputs: tuple[str, ...]
    clock: Callable[[], float] = time.perf_counter  # that its runs are timed with

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """One run. Raises what ONNX Runtime raises."""
        found: list[Array] = self.session.run(list(self.outputs), dict(inputs))
        return found


def load(
    model: Path | bytes, outputs: Sequence[str] = (), *, target: str = "cpu", threads: int = 0, simulated: bool = False
) -> Runner:
    """Open a model on a target, with all cores unless told; `simulated` has QuantizeLinear and the like in floating point.

    Raises `Unavailable` when it does not load, or not on what the target is.
    """
    import onnxruntime as ort

    provider = PROVIDERS[target]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or placement.cpu_cores()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it takes the cores of the one timed next
    if simulated:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model, options, providers=[provider])
    except Exception as problem:  # ONNX Runtime's exceptions have no other common base
        raise errors.Unavailable(
            f"it does not load in ONNX Runtime {ort.__version__}: {str(problem)[:300]}"
        ) from problem
    if session.get_providers()[0] != provider:
        raise errors.Unavailable(f"it runs on {session.get_providers()[0]} and not on {provider}")
    names = tuple(outputs) or tuple(output.name for output in session.get_outputs())
    # A run on one thread takes as long as it computes, unless others take the core away: that is not its fault.
    alone = provider == CPU and options.intra_op_num_threads == 1
    return Runner(session, provider, names, time.thread_time if alone else time.perf_counter)


def compiled(spec: EngineSpec, outputs: Sequence[str]) -> Runner:
    """A TensorRT artefact by the engine that serves it. Raises `PlanMissing` when it is not compiled for this GPU."""
    from gateway.engines.tensorrt import backend

    (model,) = backend.load(spec, 1)
    return Runner(_Plan(model), model.provider, tuple(outputs))


class _Plan:
    """What TensorRT loaded, used as a session is."""

    def __init__(self, model: Loaded) -> None:
        self._model = model

    def run(self, names: Sequence[str], inputs: dict[str, Array]) -> list[Array]:
        rows = len(next(iter(inputs.values())))
        found = self._model.compute(inputs, Batch(rows, lambda: inputs, tuple(names)))
        return [found[name] for name in names]


def present(target: str) -> bool:
    """Whether what a target's artefacts run on is in this machine."""
    if target == "cpu":
        return True
    if artefacts.device_kind("gpu:0").endswith("unknown"):
        return False
    if target == "tensorrt":
        return True
    try:
        load(_identity(), target=target)
    except errors.Unavailable as problem:
        log_event("device_not_usable", logging.WARNING, reason=problem.message)
        return False
    return True


def answers(runner: Runner, rows: Sequence[Row], size: int) -> list[Array]:
    """The outputs for all rows, each row's first axis put together again."""
    found = [runner.run(batch) for batch in batches(rows, size)]
    return [_joined([each[index] for each in found]) for index in range(len(runner.outputs))]


def companions(rows: Sequence[Row]) -> list[Row]:
    """The first rows that can share one batch: of one shape, at most `BATCH`."""
    return [row for row in rows if row.shapes == rows[0].shapes][:BATCH]


def sizes(most: int) -> tuple[int, ...]:
    """The batch sizes to time for a model that takes so many rows."""
    return tuple(size for size in _SIZES if size <= max(most, 1))


def turns(reference: Runner, candidate: Runner, rows: Sequence[Row], most: int) -> Iterator[Measured]:
    """Time both at each batch size, in turns."""
    alike = [row for row in rows if row.shapes == rows[0].shapes]
    for size in sizes(most):
        inputs = together([alike[index % len(alike)] for index in range(size)])
        yield _measured(reference, candidate, inputs, size)


def _measured(reference: Runner, candidate: Runner, inputs: Mapping[str, Array], size: int) -> Measured:
    times: dict[bool, list[float]] = {True: [], False: []}
    bursts = {}
    for is_reference, runner in ((True, reference), (False, candidate)):
        # The first runs allocate, and one that was disturbed would make all turns short.
        once = min(_timed(runner, inputs, 1) for _ in range(_WARM_UP))
        bursts[is_reference] = max(1, int(_BURST / max(once, _TICK)))
    started = time.monotonic()
    while len(times[True]) < _LEAST_TURNS or (len(times[True]) < _MOST_TURNS and time.monotonic() - started < _SECONDS):
        for is_reference, runner in ((True, reference), (False, candidate)):
            times[is_reference].append(_timed(runner, inputs, bursts[is_reference]))
    return Measured(size, min(times[False]), min(times[True]))


def _timed(runner: Runner, inputs: Mapping[str, Array], count: int) -> float:
    started = runner.clock()
    for _ in range(count):
        runner.run(inputs)
    return (runner.clock() - started) / count


def _joined(parts: Sequence[Array]) -> Array:
    shapes = {part.shape[1:] for part in parts if part.ndim}
    if len(shapes) == 1 and all(part.ndim for part in parts):
        return np.concatenate(parts)
    # Answers of different shapes can only be compared value by value.
    return np.concatenate([part.reshape(-1) for part in parts])


def _identity() -> bytes:
    from onnx import TensorProto, helper

    one = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", one[:1], one[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content
