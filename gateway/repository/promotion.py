"""The commands `gateway promote` and `gateway rollback`, and what `gateway models` says of a version's artefacts.

They change a file in the version's folder and no server: one in poll mode sees the change, another is told to load the
model again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gateway import artefacts, errors
from gateway.artefacts import Candidate
from gateway.config.arguments import parse_args
from gateway.config.locations import folders
from gateway.config.parse import empty, parse_text
from gateway.config.settings import Settings
from gateway.devices.nvml import gpus
from gateway.repository import layout

_FOLLOWS = (
    "a server in poll mode follows by itself; in explicit mode load the model again, in mode none restart the server"
)


def promote(argv: Sequence[str]) -> int:
    """Serve a build of a model from now on. Returns the exit status and prints, as all commands do."""
    parser = _parser("promote", "Serve a build of a model, its newest unless told, wherever its artefacts passed.")
    parser.add_argument("--build", type=int, metavar="N", help="the build to serve (default: the newest)")

    def change(folder: Path, file: str, options: argparse.Namespace) -> int:
        return artefacts.promote(folder, options.build, model_file=file)

    return _run(parser, argv, change)


def rollback(argv: Sequence[str]) -> int:
    """Serve what was served before the last promotion. Returns the exit status."""
    parser = _parser("rollback", "Serve what was served before the last promotion: a build, or the model's own file.")
    return _run(parser, argv, lambda folder, _, __: artefacts.rollback(folder))


def listing(folder: Path, file: str) -> Iterator[str]:
    """What a version can be run from on this machine, a line each; nothing where nothing was ever built."""
    known = artefacts.builds(folder)
    if not known:
        return
    try:
        served = artefacts.promoted(folder)
        which = f"{served} is promoted" if served else "none is promoted; the newest has"
        yield f"builds {', '.join(map(str, known))}; {which}:"
        kinds = dict.fromkeys(map(artefacts.device_kind, ["cpu", *(gpu.name for gpu in gpus())]))
        found = [artefacts.candidates(folder, kind, file, served or known[-1]) for kind in kinds]
    except errors.GatewayError as problem:
        yield f"warning: {problem.message}"
        return
    for on_each in zip(*found, strict=True):
        yield f"artefact {_line(next((each for each in on_each if not each.reason), on_each[0]))}"


def _line(candidate: Candidate) -> str:
    artefact = candidate.artefact
    times = f", {speedup:.2f}x the speed of FP32" if (speedup := artefacts.speedup(artefact)) else ""
    what = f"{artefact.name} ({artefact.precision}, {artefact.bytes / 1e6:.1f} MB{times})"
    return f"{what}: {candidate.reason or f'passed on {artefact.device}, which is here'}"


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"gateway {name}",
        description=text,
        epilog="The folder of models is given as to gateway serve, --model-repository DIR or its variable.",
        usage=f"gateway {name} MODEL --model-repository DIR [options]",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--version", type=int, metavar="N", help="of the model (default: the newest)")
    return parser


def _run(
    parser: argparse.ArgumentParser, argv: Sequence[str], change: Callable[[Path, str, argparse.Namespace], int]
) -> int:
    options, rest = parser.parse_known_args(argv)
    settings = parse_args(rest, prog=parser.prog)
    try:
        folder, file = _version(settings, options.model, options.version)
        build = change(folder, file, options)
        lines = [f"{options.model} version {folder.name}: {_from(build, file)} is served now; {_FOLLOWS}"]
        lines += [f"    {line}" for line in listing(folder, file)]
    except errors.GatewayError as problem:
        sys.stderr.write(f"{parser.prog}: {problem.message}\n")
        return 1
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


def _from(build: int, file: str) -> str:
    return f"build {build}" if build else f"its own file '{file}'"


def _version(settings: Settings, model: str, version: int | None) -> tuple[Path, str]:
    """The folder of a version and the name of its model file. Raises `GatewayError`."""
    found = [
        folder for path in folders(settings.model_repository) for folder in layout.models(path) if folder.name == model
    ]
    if not found:
        raise errors.NotFound(f"model '{model}' is in no model repository")
    folder = found[0]
    numbered, _ = layout.versions(folder)
    number = version if version is not None else max(numbered, default=0)
    if number not in numbered:
        raise errors.NotFound(
            f"model '{model}' has no version {number or 'folder'}; there are: {', '.join(map(str, numbered)) or 'none'}"
        )
    source = layout.config_source(folder, settings.model_config_name)
    proto = parse_text(source) if source is not None and source.text else empty()
    return numbered[number], proto.default_model_filename or "model.onnx"
