"""`gateway models lint`: everything that is wrong with a model's folder, with line, column and what to write instead.

It asks the same checks that loading asks, one by one, and goes on after each. What loading would still refuse after that
is told too, so that a model without problems loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.config.build import build
from gateway.config.check import checks, tensor_faults
from gateway.config.complete import complete, fill_backend, normalise
from gateway.config.fit import check_fit, misfits
from gateway.config.model import ModelConfig, ModelConfigProto
from gateway.config.parse import Source, empty
from gateway.config.repair import parse_all
from gateway.config.support import unsupported
from gateway.errors import GatewayError, InvalidArgument
from gateway.repository import Repository, layout
from gateway.types import ModelIO

_COLUMN = re.compile(r"( line \d+) column \d+")
_PLACE = re.compile(r" line (\d+)(?: column (\d+))?: ")


class _Pointed(Source):
    """A source whose errors name the column, too."""

    def describe(self, message: str, *words: str) -> str:
        line, column = self.place(words)
        return f"{self.file} line {line} column {column}: {message}" if line else f"{self.file}: {message}"


@dataclass(frozen=True)
class Linter:
    """The checks of a repository as it is to be served."""

    repository: Repository
    describe: Callable[[Path], ModelIO]
    backends: frozenset[str]
    gpus: tuple[int, ...] = ()
    config_name: str = ""
    default_max_batch_size: int = 4

    def problems(self, folder: Path) -> list[str]:
        """Everything wrong with the model in `folder`, in the order of the lines; nothing for one that loads."""
        try:
            found = layout.config_source(folder, self.config_name) or Source("model configuration")
            source = _Pointed(found.file, found.text)
        except GatewayError as problem:
            return [problem.message]
        proto, texts = parse_all(source) if source.text else (empty(), [])
        if proto is not None:
            texts += self._about(proto, folder, source)
        told = [_COLUMN.sub(r"\1", text) for text in texts]
        texts += [text for text in self._left(folder) if not any(each.endswith(text) for each in told)]
        return sorted(dict.fromkeys(texts), key=_place)

    def _about(self, proto: ModelConfigProto, folder: Path, source: Source) -> Iterator[str]:
        """What a configuration that can be read says wrong."""
        if proto.name not in ("", folder.name):
            yield source.describe(layout.misnamed(folder.name, proto.name), "name")
        numbered, _ = layout.versions(folder)
        newest = numbered[max(numbered)] if numbered else folder
        proto = fill_backend(proto, folder.name, layout.names(newest))
        yield from (problem.message for problem in unsupported(proto, self.backends, source))
        io = None
        try:
            io = self._file(proto, newest)
            if io is not None:
                proto = complete(proto, io, self.default_max_batch_size, source)
        except GatewayError as problem:
            yield problem.message
        if io is None and not (proto.input and proto.output):
            return  # nobody knows what the model file would have filled in
        yield from _failures(normalise(proto, self.gpus), self.gpus, source)
        if io is not None:
            yield from _misfits(proto, io, source)

    def _file(self, proto: ModelConfigProto, version: Path) -> ModelIO | None:
        """What the model file says of itself; None where there is none that says it."""
        file = version / proto.default_model_filename
        if file.suffix != ".onnx" or not file.is_file():
            return None
        try:
            return self.describe(file)
        except GatewayError as problem:
            where = file.relative_to(version.parent.parent)
            raise InvalidArgument(f"{where}: {problem.message}") from None

    def _left(self, folder: Path) -> list[str]:
        """The problem that loading would have, beyond all that."""
        try:
            model = self.repository.read(folder.name)
            for path in model.versions.values():
                file = path / model.config.default_model_filename
                if file.suffix == ".onnx":
                    check_fit(model.config, self.describe(file))
        except GatewayError as problem:
            return [problem.message]
        return []


def _place(text: str) -> tuple[int, ...]:
    found = _PLACE.search(text)
    return tuple(int(each or 0) for each in found.groups()) if found else ()


def _failures(proto: ModelConfigProto, gpus: tuple[int, ...], source: Source) -> Iterator[str]:
    for check in checks(proto, gpus, source):
        try:
            check()
        except InvalidArgument as problem:
            yield problem.message


def _built(alone: ModelConfigProto, proto: ModelConfigProto, source: Source) -> ModelConfig:
    """A configuration of these tensors, and of what a batch is given and cut by as far as that makes sense."""
    joining = empty()
    joining.CopyFrom(alone)
    joining.batch_input.extend(proto.batch_input)
    joining.batch_output.extend(proto.batch_output)
    try:
        return build(joining, source)
    except InvalidArgument:
        return build(alone, source)


def _misfits(proto: ModelConfigProto, io: ModelIO, source: Source) -> Iterator[str]:
    """What of the inputs and outputs does not fit the file; of those that can be compared."""
    names = {tensor.name for tensor in proto.input} | {name for each in proto.batch_input for name in each.target_name}
    alone = empty()
    for field in ("name", "backend", "platform", "max_batch_size", "default_model_filename"):
        setattr(alone, field, getattr(proto, field))
    for kind, tensors, given in (("input", alone.input, proto.input), ("output", alone.output, proto.output)):
        tensors.extend(each for each in given if not any(tensor_faults(each, kind, proto.max_batch_size)))
    try:
        config = _built(alone, proto, source)
    except InvalidArgument:
        return  # told already
    for misfit in misfits(config, io):
        # One that is given and cannot be compared is not missing.
        compared = misfit.kind == "batch_input" or misfit.tensor in {
            tensor.name for tensor in (*config.inputs, *config.outputs)
        }
        if compared or misfit.tensor not in names:
            yield source.describe(misfit.text, misfit.kind, misfit.tensor)
