"""`gateway models new`: the folder of a model from its ONNX file, complete and checked before it is there to be served."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from gateway.config.complete import complete, fill_backend
from gateway.config.model import ModelConfigProto
from gateway.config.parse import Source, empty
from gateway.errors import InvalidArgument
from gateway.types import ModelIO

_FILE = "model.onnx"


def create(
    file: Path, name: str, repository: Path, describe: Callable[[Path], ModelIO], default_max_batch_size: int
) -> Path:
    """Make `repository/name` with the model as version 1 and a configuration. Returns the folder; writes all or nothing.

    Raises `GatewayError` for a file that is no model and for a name that is taken or cannot be one, `OSError` when
    something cannot be read or written.
    """
    folder = repository / name
    if not name or name[0] in "._" or Path(name).name != name:
        raise InvalidArgument(f"'{name}' cannot be the name of a model; give another with --name")
    if folder.exists():
        raise InvalidArgument(f"'{name}' is in the repository already; give another name with --name, or remove it")
    if not file.is_file():
        raise InvalidArgument(f"'{file}' is not a file")
    with tempfile.TemporaryDirectory(prefix=".new-", dir=repository) as scratch:
        made = Path(scratch) / name  # hidden, so that nobody serves half a model
        version = made / "1"
        version.mkdir(parents=True)
        shutil.copyfile(file, version / _FILE)
        for weights in _beside(file):
            shutil.copyfile(weights, version / weights.name)
        (made / "config.pbtxt").write_text(
            text(_configuration(name, describe(version / _FILE), default_max_batch_size))
        )
        made.rename(folder)
    return folder


def text(proto: ModelConfigProto) -> str:
    """A configuration as `config.pbtxt` holds it."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(proto))


def _configuration(name: str, io: ModelIO, default_max_batch_size: int) -> ModelConfigProto:
    proto = fill_backend(empty(), name, [_FILE])
    proto = complete(proto, io, default_max_batch_size, Source("model configuration"))
    proto.ClearField("platform")  # the backend says it all
    proto.ClearField("default_model_filename")
    return proto


def _beside(file: Path) -> Iterator[Path]:
    """The files beside an ONNX file that it names: the weights that it keeps outside."""
    if not file.stat().st_size:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for other in sorted(file.parent.iterdir()):
            if other != file and other.is_file() and content.find(other.name.encode()) >= 0:
                yield other
