"""`gateway build` from beginning to end: read, make, judge, report; and `--prove`, which judges again on another device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec

from gateway import __version__, artefacts, errors
from gateway.artefacts import Artefact, Report
from gateway.build import data, layers, workshop
from gateway.build.data import Row
from gateway.build.judge import Judge
from gateway.build.progress import Progress
from gateway.build.recipes import CATALOGUE, Job, Recipe
from gateway.build.report import page
from gateway.build.source import Source
from gateway.build.workshop import Record, Workshop

_PACKAGES = ("onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")
_PAGE = "report.html"


@dataclass(frozen=True)
class Data:
    """Where real rows are, None for beside the model, and how many of them to use at most."""

    calibration: Path | None = None
    held_out: Path | None = None
    calibration_rows: int = 128
    held_out_rows: int = 1000


@dataclass(frozen=True)
class Rows:
    """Rows to calibrate with and rows to judge by; none is in both. `note` says how they came about."""

    calibration: list[Row]
    held_out: list[Row]
    note: str


def rows(source: Source, given: Data, *, calibrated: bool) -> Rows:
    """Read the data; only where a recipe is to be `calibrated` is a lone set divided. Raises `InvalidArgument` when there is none, or a row is in both sets."""
    calibration = _read(source, given.calibration, "calibration", given.calibration_rows)
    held_out = _read(source, given.held_out, "held_out", given.held_out_rows)
    if calibration and held_out:
        data.apart(calibration, held_out)
        return Rows(calibration, held_out, "calibration and held-out data were given apart")
    found = calibration or held_out
    if not found:
        raise errors.InvalidArgument(
            f"model '{source.config.name}' has no data to be judged by; give real inputs with --held-out (and "
            "--calibration), or put them beside the model as held_out.npz and calibration.npz"
        )
    if not calibrated:
        return Rows([], found, "nothing was calibrated")
    return Rows(
        *data.split(found, given.calibration_rows), "one set of data was divided into calibration and held-out rows"
    )


def choose(source: Source, targets: Sequence[str], named: Sequence[str]) -> tuple[list[Recipe], dict[str, str]]:
    """The recipes to make, and why the others of these targets are not. Raises `InvalidArgument` for an unknown name."""
    unknown = [name for name in named if name not in CATALOGUE]
    if unknown:
        raise errors.InvalidArgument(f"there is no recipe '{unknown[0]}'; there are: {', '.join(CATALOGUE)}")
    if source.quantized:
        raise errors.Unsupported(
            f"'{source.file.name}' of model '{source.config.name}' is quantized already; build from its FP32 export"
        )
    chosen, skipped = [], {}
    for recipe in CATALOGUE.values():
        if recipe.name not in named and (named or recipe.target not in targets):
            continue
        if recipe.on_request and not named:
            skipped[recipe.name] = "made only when named with --recipe"
        elif reason := recipe.applies(source):
            skipped[recipe.name] = reason
        else:
            chosen.append(recipe)
    return chosen, skipped


@dataclass
class Build:
    """One build of one version: `run` makes and judges what was chosen, and returns the number of the build."""

    source: Source
    rows: Rows
    judge: Judge
    progress: Progress
    named: Sequence[str] = ()
    modelopt_python: Path | None = None

    def run(self, recipes: Sequence[Recipe], skipped: dict[str, str]) -> int:
        """Make, judge, report. Raises `Unavailable` when a recipe that was named cannot be made here."""
        with workshop.workshop(self.source.version) as work:
            found = []
            for recipe in recipes:
                self.progress.begin(recipe.name)
                try:
                    file = self._made(work, recipe)
                except errors.GatewayError as problem:
                    if recipe.name in self.named:
                        raise
                    skipped[recipe.name] = problem.message
                    self.progress.end(f"left out: {problem.message}")
                    continue
                found.append(self.judge.artefact(recipe, file, self.progress.step))
                self.progress.end(told(found[-1]))
            work.record.skipped = skipped
            work.record.kind = f"{self.judge.gate.kind} ({self.judge.gate.why})"
            work.record.notes = [self.rows.note]
            number = work.finish([Path(artefact.file).name for artefact in found])
            report = self._report([_moved(artefact, number) for artefact in found])
            publish(self.source.version, number, report, work.record)
            return number

    def _made(self, work: Workshop, recipe: Recipe) -> Path:
        name = recipe.name + recipe.suffix
        calibration = self.rows.calibration if recipe.calibrated else []
        if recipe.calibrated and not calibration:
            raise errors.InvalidArgument("it needs calibration rows, and there are too few")
        key = workshop.key(
            self.source.sha256, recipe.name, str(recipe.revision), data.digest(calibration), str(versions())
        )
        if work.reuse(name, key):
            self.progress.step("made before")
            return work.folder / name
        self.progress.step("making")
        unfinished = work.folder / f".{name}"
        total = max(len(calibration), 1)
        job = Job(
            self.source,
            calibration,
            unfinished,
            work.folder,
            lambda count: self.progress.tick(count / total),
            self.modelopt_python,
        )
        try:
            recipe.make(job)
        except (errors.GatewayError, ModuleNotFoundError):
            raise
        except Exception as problem:  # quantizers raise anything for a graph that they do not know
            raise errors.Unsupported(f"it could not be made: {type(problem).__name__}: {problem}") from problem
        file = work.keep(name, key, unfinished)
        if file.suffix == ".onnx":
            self.progress.step("looking at its layers")
            work.layers(name, layers.worst(self.source, file, self.rows.held_out))
        return file

    def _report(self, found: list[Artefact]) -> Report:
        return Report(
            model=self.source.config.name,
            version=self.source.version.name,
            source_sha256=self.source.sha256,
            built=round(time.time()),
            device=artefacts.device_kind("cpu"),
            versions=versions(),
            samples={
                "calibration": len(self.rows.calibration),
                "held_out": len(self.rows.held_out),
                "labelled": self.judge.labelled,
            },
            artefacts=tuple(found),
        )


def prove(
    source: Source, given: Data, number: int, progress: Callable[[int], Progress], backend: str = ""
) -> list[Artefact]:
    """Judge the files of a build, or those for a backend, on this machine's devices, and put the verdicts in its report.

    Returns them. A file that was judged on another kind of device is listed for both. Raises `InvalidArgument` when a file is
    not the one that was built.
    """
    report = artefacts.read(source.version, number)
    assert report is not None
    if report.source_sha256 != source.sha256:
        raise errors.InvalidArgument(f"build {number} is of another '{source.file.name}'; run `gateway build` again")
    calibrated = any(each.name in CATALOGUE and CATALOGUE[each.name].calibrated for each in report.artefacts)
    judge = Judge(source, rows(source, given, calibrated=calibrated).held_out)
    bar = progress(len({each.file for each in report.artefacts}))
    entries, proven = list(report.artefacts), []
    for name, artefact in {each.file: each for each in report.artefacts}.items():
        recipe = CATALOGUE.get(artefact.name)
        device = judge.device(recipe.target) if recipe else ""
        if recipe is None or not device or backend not in ("", recipe.backend):
            continue
        file = source.version / name
        if not file.is_file() or artefacts.sha256(file) != artefact.sha256:
            raise errors.InvalidArgument(f"'{name}' is not the file that was built; run `gateway build` again")
        bar.begin(artefact.name)
        judged = judge.artefact(recipe, file, bar.step)
        bar.end(told(judged))
        proven.append(judged)
        entries = [each for each in entries if each.file != name or each.device not in ("", device)] + [judged]
    report = msgspec.structs.replace(report, artefacts=tuple(entries))
    publish(source.version, number, report, workshop.read_record(artefacts.build_folder(source.version, number)))
    return proven


def publish(version: Path, number: int, report: Report, record: Record) -> None:
    """Write report.html, then report.json, which makes the build known."""
    folder = artefacts.build_folder(version, number)
    unfinished = folder / f".{_PAGE}"
    unfinished.write_text(page(report, number, record), encoding="utf-8")
    unfinished.replace(folder / _PAGE)
    artefacts.write(version, number, report)


def told(artefact: Artefact) -> str:
    """An artefact's verdict and its reasons, in one line."""
    fast = f", x{artefacts.speedup(artefact):.2f}" if artefact.speed else ""
    why = f": {'; '.join(artefact.reasons)}" if artefact.reasons else ""
    return f"{artefact.verdict}, {artefact.bytes / 1e6:.2f} MB{fast}{why}"


def versions() -> dict[str, str]:
    """This package and those that have a hand in what a recipe writes."""
    found = {"lockgate": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _moved(artefact: Artefact, number: int) -> Artefact:
    """As it is called in the finished build's folder."""
    return msgspec.structs.replace(artefact, file=f"{artefacts.FOLDER}/{number}/{Path(artefact.file).name}")


def _read(source: Source, given: Path | None, name: str, most: int) -> list[Row]:
    if given is not None:
        return data.read(given, source.config, most)
    beside = source.version.parent
    for path in (beside / f"{name}.npz", beside / name):
        if path.exists():
            return data.read(path, source.config, most)
    return []
