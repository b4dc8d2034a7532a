"""Has each file answer the held-out rows and race FP32, on its own device or, where that is not here, simulated.

A run is timed with as many cores as it has in a loaded server: one, unless the model's instance groups say less instances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from gateway import artefacts, errors, placement
from gateway.artefacts import Artefact, Measured
from gateway.build import measure
from gateway.build.data import Row
from gateway.build.gate import Gate, drift, gate
from gateway.build.measure import Runner
from gateway.build.recipes import Recipe
from gateway.build.source import Source
from gateway.config.model import InstanceGroup, ModelConfig
from gateway.engines.base import EngineSpec
from gateway.engines.tensorrt.plan import PlanMissing

Phase = Callable[[str], None]


class Judge:
    """The gate of one model, with FP32's answers to the held-out rows. Raises `Unavailable` when FP32 does not run."""

    def __init__(self, source: Source, rows: Sequence[Row]) -> None:
        self._source = source
        self._rows = rows
        self._threads = _threads(source.config)
        self._references = {"cpu": measure.load(source.file, threads=self._threads)}
        self._present: dict[str, bool] = {}
        self._batch = source.rows(measure.BATCH)
        self._expected = measure.answers(self._references["cpu"], rows, self._batch)
        labels = np.array([row.label for row in rows])
        self.labelled = int((labels >= 0).sum())
        self._labels = labels if self.labelled == len(rows) else None
        self.gate: Gate = gate(source.config, self._expected, labelled=self._labels is not None)

    def device(self, target: str) -> str:
        """The kind of device that a target's files are judged on here; empty where there is none."""
        return artefacts.device_kind("cpu" if target == "cpu" else "gpu:0") if self._here(target) else ""

    def artefact(self, recipe: Recipe, file: Path, phase: Phase) -> Artefact:
        """What the gate says of a file of the version."""
        made = Artefact(
            recipe.name,
            file.relative_to(self._source.version).as_posix(),
            recipe.backend,
            recipe.precision,
            artefacts.sha256(file),
            file.stat().st_size,
            self.device(recipe.target),
        )
        return self._judged(made, recipe, file, phase)

    def _judged(self, made: Artefact, recipe: Recipe, file: Path, phase: Phase) -> Artefact:
        try:
            runner, here = self._opened(made, recipe, file)
            phase("comparing" if here else "comparing, simulated")
            found = measure.answers(runner, self._rows, self._batch)
        except Exception as problem:  # noqa: BLE001 - whatever ONNX Runtime raises, it is the file that is at fault
            return self._silent(made, recipe, problem)
        accuracy = self.gate.compare(self._expected, found, self._labels)
        if here and self._source.batched and "non_finite" not in accuracy:
            accuracy["batch_drift"] = self._drift(runner)
        speed = self._speed(runner, recipe.target, phase) if here else ()
        absent = "" if here else f"answers were simulated in floating point; {_prove(recipe.target)}"
        verdict, reasons = self.gate.judge(accuracy, speed, len(self._rows), absent)
        limits = self.gate.thresholds(accuracy, timed=bool(speed))
        return msgspec.structs.replace(
            made, verdict=verdict, accuracy=accuracy, thresholds=limits, speed=speed, reasons=reasons
        )

    def _silent(self, made: Artefact, recipe: Recipe, problem: Exception) -> Artefact:
        """The verdict of a file that gives no answers."""
        why = problem.message if isinstance(problem, errors.GatewayError) else str(problem)[:300]
        if self._here(recipe.target):
            return msgspec.structs.replace(made, verdict="failed", reasons=(why,))
        return msgspec.structs.replace(made, reasons=(f"not simulated: {why}; {_prove(recipe.target)}",))

    def _opened(self, made: Artefact, recipe: Recipe, file: Path) -> tuple[Runner, bool]:
        """The file on its own device and True, else simulated; what TensorRT has not compiled yet is not there."""
        if self._here(recipe.target):
            if recipe.backend != "tensorrt":
                return measure.load(file, target=recipe.target, threads=self._threads), True
            version = self._source.version
            spec = EngineSpec(self._source.config, version.name, version, "gpu:0", artefact=made)
            with suppress(PlanMissing):
                return measure.compiled(spec, self._references["cpu"].outputs), True
        model = recipe.simulate(self._source) if recipe.simulate else file
        return measure.load(model, simulated=True), False

    def _drift(self, runner: Runner) -> float:
        rows = measure.companions(self._rows)
        return drift(measure.answers(runner, rows, 1), measure.answers(runner, rows, self._batch))

    def _speed(self, runner: Runner, target: str, phase: Phase) -> tuple[Measured, ...]:
        phase("timing")
        # TensorRT too is held against FP32 in ONNX Runtime, which would answer in its place.
        at = "gpu" if target != "cpu" and self._here("gpu") else "cpu"
        if at not in self._references:
            self._references[at] = measure.load(self._source.file, target=at, threads=self._threads)
        most = self._source.config.max_batch_size
        return tuple(measure.turns(self._references[at], runner, self._rows, most))

    def _here(self, target: str) -> bool:
        if target not in self._present:
            self._present[target] = measure.present(target)
        return self._present[target]


def _threads(config: ModelConfig) -> int:
    """The cores of a run when a server without GPUs is loaded: what is asked is throughput."""
    groups = tuple(InstanceGroup("cpu", group.count) for group in config.instance_groups[:1])
    return placement.plan(replace(config, instance_groups=groups), placement.devices())[0].threads


def _prove(target: str) -> str:
    return f"run `gateway build --prove` where there is a {'CUDA' if target == 'gpu' else 'TensorRT'} device"
