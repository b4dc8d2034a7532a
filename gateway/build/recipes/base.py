"""The `Recipe`: one way to make a file of a model; and what recipes have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.build.data import Row
from gateway.build.source import Source


@dataclass(frozen=True)
class Job:
    """What a recipe is given: the model, the rows to calibrate with, and the file to write.

    `folder` is the build's: what an earlier recipe made lies there under `<name>.onnx`. `tick` is told how many of the
    calibration rows are done, for the progress bar.
    """

    source: Source
    calibration: Sequence[Row]
    file: Path
    folder: Path
    tick: Callable[[int], None]
    modelopt_python: Path | None = None


def _suits(_source: Source) -> str:
    return ""


@dataclass(frozen=True)
class Recipe:
    """One way to make an artefact. `applies` gives the reason why it does not suit a model, or an empty text.

    `make` writes `job.file`, the same bytes for the same model and rows. `simulate` gives a model for the CPU that
    computes what the file would on its own device; without it the file itself is run with its QuantizeLinear nodes in
    floating point. `revision` is raised when the same inputs would give another file.
    """

    name: str
    precision: str
    target: str  # "cpu", "gpu", "tensorrt"
    make: Callable[[Job], None]
    applies: Callable[[Source], str] = _suits
    calibrated: bool = False
    on_request: bool = False  # made only when it is named
    backend: str = "onnxruntime"
    suffix: str = ".onnx"
    simulate: Callable[[Source], bytes] | None = None
    revision: int = 1


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice that quantizers log for each model: what is wrong with a file the gate finds out."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def current(model: Any, least: int) -> Any:
    """The model in at least this opset."""
    from onnx import version_converter

    versions = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    return model if versions and versions[0] >= least else version_converter.convert_version(model, least)
