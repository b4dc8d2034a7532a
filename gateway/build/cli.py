"""The command `gateway build`: its options, and what it prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway import artefacts, errors
from gateway.artefacts import Artefact
from gateway.build import builder
from gateway.build.builder import Build, Data
from gateway.build.data import Row
from gateway.build.judge import Judge
from gateway.build.progress import Progress
from gateway.build.recipes import CATALOGUE, TARGETS
from gateway.build.source import Source
from gateway.config.model import ModelConfig

_MOST_GPUS = 64
_NEEDS = "pip install 'lockgate[build]'"


def run(argv: Sequence[str]) -> int:
    """Build or prove what a command line asks for, and return the exit status: 1 when nothing may be served.

    Prints a problem, and raises `SystemExit` 2 on a bad option.
    """
    options = _parser().parse_args(argv)
    try:
        if options.plan:
            _plan(options)
            return 0
        found = _prove(options) if options.prove else _build(options)
    except (errors.GatewayError, OSError) as problem:
        sys.stderr.write(f"gateway build: {problem}\n")
        return 1
    except ModuleNotFoundError as missing:
        sys.stderr.write(f"gateway build: module {missing.name!r} is not installed: {_NEEDS}\n")
        return 1
    return 0 if any(each.verdict != "failed" for each in found) else 1


def _build(options: argparse.Namespace) -> list[Artefact]:
    source = _source(options)
    recipes, skipped = builder.choose(source, options.target or ["cpu"], options.recipe)
    if not recipes:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise errors.Unsupported(f"nothing can be made of model '{source.config.name}': {reasons}")
    progress = Progress(sys.stderr, len(recipes))
    progress.begin(source.file.name)
    progress.step("reading data")
    rows = builder.rows(source, _data(options), calibrated=any(recipe.calibrated for recipe in recipes))
    progress.step(f"answering {len(rows.held_out)} held-out rows")
    judge = Judge(source, rows.held_out)
    build = Build(source, rows, judge, progress, options.recipe, options.modelopt_python)
    number = build.run(recipes, skipped)
    report = artefacts.read(source.version, number)
    assert report is not None
    folder = artefacts.build_folder(source.version, number)
    sys.stdout.write(f"{_table(report.artefacts)}\n\nbuild {number}: {folder / 'report.html'}\n")
    for name, why in skipped.items():
        sys.stdout.write(f"  not made: {name}: {why}\n")
    _compile_made(options, source, rows.calibration or rows.held_out, number)
    if judge.device("tensorrt") and any(each.backend == "tensorrt" for each in report.artefacts):
        found = builder.prove(source, _data(options), number, lambda files: Progress(sys.stderr, files), "tensorrt")
        sys.stdout.write(f"{_table(found)}\n")
        report = artefacts.read(source.version, number) or report
    if any(each.verdict == "passed" for each in report.artefacts):
        sys.stdout.write(
            f"serve it with: gateway promote {source.config.name} --version {source.version.name} "
            f"--model-repository {source.version.parent.parent}\n"
        )
    return list(report.artefacts)


def _plan(options: argparse.Namespace) -> None:
    """`--plan`: compile what the version is served from, and make nothing."""
    from gateway.build.compile import Compile

    config, version = _model(options)
    job = Compile(
        config, version, f"gpu:{options.gpu}", options.sm, options.rtx, options.again, options.file, options.build
    )
    found = job.files()
    for line in job.run(Progress(sys.stderr, len(found)), found):
        sys.stdout.write(f"{line}\n")


def _compile_made(options: argparse.Namespace, source: Source, rows: Sequence[Row], number: int) -> None:
    """Compile what was made for TensorRT, where TensorRT is; what cannot be is told, and no reason to fail."""
    from gateway.build.compile import Compile

    if "tensorrt" not in (options.target or []):
        return
    observed = {name: [row.inputs[name].shape for row in rows] for name in rows[0].inputs}
    job = Compile(
        source.config, source.version, f"gpu:{options.gpu}", options.sm, options.rtx, build=number, observed=observed
    )
    try:
        found = job.files()
        for line in job.run(Progress(sys.stderr, len(found)), found):
            sys.stdout.write(f"{line}\n")
    except errors.GatewayError as problem:
        sys.stdout.write(f"  not compiled: {problem}\n")


def _prove(options: argparse.Namespace) -> list[Artefact]:
    source = _source(options)
    number = options.build or max(artefacts.builds(source.version), default=0)
    if not number:
        raise errors.NotFound(f"model '{source.config.name}' has no build to prove; run `gateway build` first")
    found = builder.prove(source, _data(options), number, lambda files: Progress(sys.stderr, files))
    if not found:
        raise errors.Unavailable(f"none of build {number}'s artefacts is for a device of this machine")
    sys.stdout.write(f"{_table(found)}\n")
    return found


def _source(options: argparse.Namespace) -> Source:
    config, version = _model(options)
    name = config.default_model_filename
    if not name.endswith(".onnx"):
        raise errors.Unsupported(
            f"model '{options.model}' is no ONNX file but '{name}', and nothing is built from that"
        )
    return Source(config, version, version / name)


def _model(options: argparse.Namespace) -> tuple[ModelConfig, Path]:
    """The model's configuration and the folder of the version that is meant."""
    from gateway import engines
    from gateway.repository import Repository

    # A model for GPUs may be built where there are none.
    repository = Repository(
        options.model_repository, engines.describe, config_name=options.model_config_name, gpus=range(_MOST_GPUS)
    )
    found = repository.read(options.model, _override(options.config))
    version = options.version or max(found.versions)
    if version not in found.versions:
        raise errors.NotFound(
            f"model '{options.model}' has no version {version}; there are: {', '.join(map(str, found.versions))}"
        )
    return found.config, found.versions[version]


def _override(file: str) -> dict[str, str]:
    if not file:
        return {}
    return {"config": sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")}


def _data(options: argparse.Namespace) -> Data:
    return Data(options.calibration, options.held_out, options.calibration_rows, options.held_out_rows)


def _table(found: Sequence[Artefact]) -> str:
    rows = [("ARTEFACT", "PRECISION", "SIZE", "SPEED", "DEVICE", "VERDICT", "")]
    for each in found:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in each.accuracy.items())
        speed = f"x{artefacts.speedup(each):.2f}" if each.speed else "-"
        size = f"{each.bytes / 1e6:.2f} MB"
        rows.append((each.name, each.precision, size, speed, each.device or "-", each.verdict, figures))
        rows += [("", "", "", "", "", "", reason) for reason in each.reasons]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join([*map(str.ljust, row[:6], widths), row[6]]).rstrip() for row in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway build",
        description="Make smaller and faster files of an FP32 ONNX model, and have each judged against it on real data.",
        epilog=f"Recipes: {', '.join(f'{each.name} ({each.target})' for each in CATALOGUE.values())}. "
        "Thresholds are parameters of the model, gate.NAME; the README has them all.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL")
    add("--model-repository", type=Path, action="append", required=True, metavar="DIR", help="as for gateway serve")
    add("--model-config-name", default="", metavar="NAME", help="as for gateway serve")
    add("--config", default="", metavar="FILE", help="JSON in place of config.pbtxt; - for standard input")
    add("--version", type=_count, metavar="N", help="of the model (default: the newest)")
    add("--target", action="append", choices=TARGETS, help="what to build for; may be repeated (default: cpu)")
    add("--recipe", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    add("--calibration", type=Path, metavar="PATH", help=".npy, .npz, pictures or recorded requests, or a folder of "
        "them (default: calibration.npz or calibration/ beside the model)")  # fmt: skip
    add("--held-out", type=Path, metavar="PATH", help="the same, to judge by (default: held_out.npz or held_out/ "
        "beside the model; with only one of the two it is divided)")  # fmt: skip
    add("--calibration-rows", type=_count, default=128, metavar="N", help="use at most so many (default: 128)")
    add("--held-out-rows", type=_count, default=1000, metavar="N", help="use at most so many (default: 1000)")
    add("--modelopt-python", type=Path, metavar="FILE", help="the interpreter of an environment with nvidia-modelopt")
    add("--prove", action="store_true", help="make nothing: judge a build's files on the devices of this machine")
    add("--build", type=_count, metavar="N", help="which to prove (default: the newest) or to compile (the served one)")
    add("--plan", action="store_true", help="make nothing: compile TensorRT plans of what the version is served from")
    add("--file", default="", metavar="NAME", help="compile only this file of the version")
    add("--gpu", type=int, default=0, metavar="N", help="the GPU to compile for (default: 0)")
    add("--sm", default="", metavar="NN", help="with TensorRT-RTX: the compute capability to compile for, e.g. 89")
    add("--rtx", action="store_true", help="compile with TensorRT-RTX though TensorRT is installed")
    add("--again", action="store_true", help="compile though there is a plan that fits")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
