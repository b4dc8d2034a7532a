"""The part of `gateway build` that compiles TensorRT plans: of which files, for which GPU, and what is told of it.

After `--target tensorrt` the files that were made are compiled; `--plan` makes nothing and compiles what the version is
served from. The server runs the latter in the background for a plan that is missing or stale. What could not be
executed here is said to be so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway import artefacts, errors
from gateway.artefacts import Artefact
from gateway.build import plans
from gateway.build.plans import Order, Target
from gateway.build.progress import Progress
from gateway.config.model import ModelConfig
from gateway.engines.base import EngineSpec
from gateway.engines.tensorrt.plan import Plan
from gateway.engines.tensorrt.profiles import Shape


@dataclass(frozen=True)
class Compile:
    """What to compile of a version, and how. `sm` and `rtx` as `plans.target`; `build` None is the one that is served."""

    config: ModelConfig
    version: Path
    device: str = "gpu:0"
    sm: str = ""
    rtx: bool = False
    again: bool = False
    file: str = ""  # only this one, relative to the version's folder
    build: int | None = None
    observed: Mapping[str, Sequence[Shape]] = field(default_factory=dict)

    def run(self, progress: Progress, found: Sequence[Artefact | None]) -> Iterator[str]:
        """Compile each and tell what became of it, in a line. Raises as `plans.build` does."""
        specs = [self._spec(artefact) for artefact in found]
        given = plans.target(specs[0], self.sm, rtx=self.rtx)
        for artefact, spec in zip(found, specs, strict=True):
            name = artefact.name if artefact else spec.config.default_model_filename
            precision = artefact.precision if artefact else "FP32"
            progress.begin(name)
            told = _Told(progress)
            made = plans.build(Order(spec, precision, self.observed, self.again), given, told.phase)
            progress.end("compiled")
            yield _line(name, made, given)

    def files(self) -> list[Artefact | None]:
        """What of the version TensorRT is to run: artefacts of its build, None for its model file.

        Raises `NotFound` when there is nothing, or not the file that was asked for.
        """
        report = artefacts.read(self.version, self.build)
        built = report.artefacts if report else ()
        found: dict[str, Artefact | None] = {
            each.file: each
            for each in built
            if each.backend == "tensorrt" and each.file.endswith(".onnx") and each.verdict != "failed"
        }
        own = self.config.default_model_filename
        if self.config.backend == "tensorrt" and own.endswith(".onnx"):
            found.setdefault(own, None)
        if self.file:
            found = {name: each for name, each in found.items() if name == self.file}
        if not found:
            raise errors.NotFound(
                f"model '{self.config.name}' has {f'no file {self.file!r}' if self.file else 'nothing'} for TensorRT; make "
                'an artefact with --target tensorrt, or set backend: "tensorrt" and default_model_filename: '
                '"model.onnx" in config.pbtxt'
            )
        return list(found.values())

    def _spec(self, artefact: Artefact | None) -> EngineSpec:
        return EngineSpec(self.config, self.version.name, self.version, self.device, artefact=artefact)


class _Told:
    """Turns what `plans.build` tells into steps of a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phase = ""

    def phase(self, what: str, share: float) -> None:
        """Progress of a build: what it does, and how far that is."""
        if what != self._phase:
            self._phase = what
            self._progress.step(what)
        self._progress.tick(share)


def _line(name: str, made: Plan, given: Target) -> str:
    assert made.info is not None
    info = made.info
    where = f" for compute capability {info.sm[:-1]}.{info.sm[-1:]}" if info.sm else ""
    if info.executed:
        proof = "It has run here."
    elif given.executes:
        proof = "Nothing has been executed yet; gateway build --prove does that."
    else:
        proof = "Nothing has been executed: there is no such GPU here, so speed and answers are unproven."
    return f"{name}: plan of {info.bytes / 1e6:.2f} MB by {info.package} {info.version}{where}. {proof}"
