"""The commands `gateway models`, `gateway models lint`, `config` and `new`. Errors become a line and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway import engines, errors, placement
from gateway.config.arguments import parse_args
from gateway.config.fit import check_fit
from gateway.config.locations import folders
from gateway.config.settings import Settings
from gateway.models import new
from gateway.models.lint import Linter
from gateway.models.source import open_repository
from gateway.repository import ModelSource
from gateway.repository.promotion import listing

_COMMANDS = {
    "lint": "everything that is wrong with models, with line, column and what to write instead; all models unless named",
    "config": "the configuration of a model as config.pbtxt, with all that was filled in",
    "new": "make the folder of a model from its ONNX file",
}


def run(argv: Sequence[str]) -> int:
    """Run the command. Status 0 when all is well, 1 when a model has a problem, 2 for wrong usage."""
    command = argv[0] if argv and argv[0] in _COMMANDS else ""
    try:
        if command:
            return {"lint": _lint, "config": _config, "new": _new}[command](argv[1:])
        return _list(parse_args(argv, prog="gateway models"))
    except errors.GatewayError as problem:
        print(f"gateway models {command}".rstrip() + f": {problem.message}", file=sys.stderr)
    except OSError as problem:
        print(f"gateway models {command}: {problem.strerror}: {problem.filename}", file=sys.stderr)
    return 1


def _parser(command: str, usage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"gateway models {command}",
        description=_COMMANDS[command][0].upper() + _COMMANDS[command][1:] + ".",
        usage=f"gateway models {command} {usage}",
        epilog="The other options are those of gateway serve.",
        allow_abbrev=False,
    )
    parser.add_argument("--model-repository", "--model-store", action="append", metavar="DIR", help="folder of models")
    return parser


def _settings(parser: argparse.ArgumentParser, options: argparse.Namespace, rest: Sequence[str]) -> Settings:
    folders = [word for folder in options.model_repository or () for word in ("--model-repository", folder)]
    return parse_args([*folders, *rest], prog=parser.prog)


# --- lint


def _lint(argv: Sequence[str]) -> int:
    parser = _parser("lint", "[MODEL ...] --model-repository DIR")
    parser.add_argument("models", nargs="*", metavar="MODEL")
    options, rest = parser.parse_known_args(argv)
    settings = _settings(parser, options, rest)
    folders(settings.model_repository)  # raises where they are none
    gpus = engines.gpus()
    repository = open_repository(settings, gpus)
    linter = Linter(
        repository,
        engines.describe,
        repository.backends,
        tuple(int(name.removeprefix("gpu:")) for name in gpus),
        settings.model_config_name,
        settings.default_max_batch_size,
    )
    found = repository.scan()
    if unknown := [name for name in options.models if name not in found]:
        raise errors.NotFound(f"model '{unknown[0]}' is in no model repository")
    problems = {name: [*linter.problems(repository.folder(name))] for name in options.models or found}
    for name, texts in problems.items():
        for text in texts:
            print(text if text.startswith(f"{name}/") else f"{name}: {text}")
    count = sum(map(len, problems.values()))
    print(f"{len(problems)} model(s), {count} problem(s)", file=sys.stderr)
    return 1 if count else 0


# --- config


def _config(argv: Sequence[str]) -> int:
    parser = _parser("config", "MODEL --model-repository DIR")
    parser.add_argument("model", metavar="MODEL")
    options, rest = parser.parse_known_args(argv)
    settings = _settings(parser, options, rest)
    config = open_repository(settings, engines.gpus()).read(options.model).config
    for given, group in zip(config.instance_groups, config.proto.instance_group, strict=True):
        if not given.count:
            group.ClearField("count")  # how many is this machine's business
    print(new.text(config.proto), end="")
    return 0


# --- new


def _new(argv: Sequence[str]) -> int:
    parser = _parser("new", "FILE.onnx [--name NAME] [--model-repository DIR]")
    parser.add_argument("file", metavar="FILE.onnx", type=Path)
    parser.add_argument("--name", metavar="NAME", help="of the model (default: the file's)")
    options, rest = parser.parse_known_args(argv)
    options.model_repository = options.model_repository or ["."]
    settings = _settings(parser, options, rest)
    repository = folders(settings.model_repository)[0]
    name = options.file.stem if options.name is None else options.name
    folder = new.create(options.file, name, repository, engines.describe, settings.default_max_batch_size)
    print(f"{folder}: serve it with gateway serve --model-repository {repository}")
    return 0


# --- what a repository would serve


def _list(settings: Settings) -> int:
    """Read every model without loading it; status 1 when any has a problem."""
    gpus = engines.gpus()
    repository = open_repository(settings, gpus)
    names = list(repository.scan())
    status = 0
    for name in names:
        try:
            source = repository.read(name)
            _open_files(source)
            instances = sum(place.count for place in placement.plan(source.config, placement.devices(0, gpus)))
        except errors.GatewayError as problem:
            status = 1
            print(f"{name}: UNAVAILABLE: {problem.message}")
            continue
        _print_model(name, source, instances)
    return status


def _print_model(name: str, source: ModelSource, instances: int) -> None:
    config = source.config
    versions = ", ".join(str(number) for number in source.versions)
    print(
        f"{name}: version {versions}, backend {config.backend}, max_batch_size {config.max_batch_size}, "
        f"{instances} instance(s)"
    )
    for tensor in (*config.inputs, *config.outputs):
        kind = "input " if tensor in config.inputs else "output"
        print(f"    {kind} {tensor.name} {tensor.datatype.name} {list(tensor.dims)}")
    for path in source.versions.values():
        for line in listing(path, config.default_model_filename):
            print(f"    version {path.name}: {line}")
    for warning in source.warnings:
        print(f"    warning: {warning}")


def _open_files(source: ModelSource) -> None:
    """Read every ONNX file that would be served. Raises `GatewayError` for one that is no model, or another's."""
    for path in source.versions.values():
        file = path / source.config.default_model_filename
        if file.suffix == ".onnx":
            check_fit(source.config, engines.describe(file))
