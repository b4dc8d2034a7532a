"""A model whose files came with the load request: `file:1/model.onnx` and so on, in base64, beside its `config`.

They lie in a temporary folder for as long as the model is loaded from it. As in Triton they are all that the model has,
wherever its name is in a repository too, and the next load without files is from the repository again.
"""

from __future__ import annotations

import binascii
import shutil
import tempfile
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from gateway import errors
from gateway.config.check import plain_name
from gateway.repository.roots import LocalFiles, ModelFiles

FILE = "file:"
"""Begins the name of a load parameter that is a file."""


_LONGEST = 255  # bytes of a name, as of most file systems
_LONGEST_PATH = 1024  # characters of a file's path
_PIECE = 1 << 20  # characters that are decoded at once, while no other thread runs; whole groups of four


class _Lease:
    """A temporary folder that is removed when nobody holds this, or when the process ends."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gateway-model-"))
        self.remove = weakref.finalize(self, _remove, self.folder)


def _remove(folder: Path) -> None:
    gone = folder.with_name(f"{folder.name}.gone")
    with suppress(OSError):
        folder.rename(gone)  # what was learned of the model may be about to be written to it, by its name
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def uploaded(model: str, parameters: Mapping[str, str]) -> Generator[ModelFiles | None, None, None]:
    """The files that come with a load request; None when none does. Raises `Internal`, in Triton's words.

    They are removed at once where the block fails, for errors keep what they were about.
    """
    files = {key.removeprefix(FILE): value for key, value in parameters.items() if key.startswith(FILE)}
    if not files:
        yield None
        return
    if "config" not in parameters:
        raise errors.not_polled(model, "Load parameter 'config' must be specified for model file override")
    if not plain_name(model) or "/" in model:
        raise errors.not_polled(model, "model name must not contain path traversal characters")
    if _too_long(model):
        raise errors.not_polled(model, f"model name has more than {_LONGEST} bytes")
    lease = _leased()
    try:
        folder = lease.folder / model
        folder.mkdir()
        for name in sorted(files):
            _write(folder, name, files[name], model)
        yield LocalFiles(folder, lease)
    except BaseException:
        lease.remove()
        raise


def _leased() -> _Lease:
    try:
        return _Lease()
    except OSError as problem:
        raise _unwritten("a folder for the files of the request", problem) from None


def _write(folder: Path, name: str, data: str, model: str) -> None:
    if not plain_name(name):
        raise errors.not_polled(model, f"Invalid file parameter '{FILE}{name}' must stay within model directory.")
    if len(name) > _LONGEST_PATH or any(map(_too_long, name.split("/"))):
        raise errors.not_polled(model, f"Invalid file path '{name[:80]}...': it is too long")
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for begin in range(0, len(data), _PIECE):
                file.write(binascii.a2b_base64(data[begin : begin + _PIECE], strict_mode=True))
    except ValueError:
        raise errors.not_polled(model, f"file parameter '{FILE}{name}' is not base64") from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        problem = f"Invalid file parameter '{FILE}{name}', directory has been created as a file"
        raise errors.not_polled(model, problem) from None
    except OSError as problem:
        raise _unwritten(f"file parameter '{FILE}{name}'", problem) from None


def _too_long(name: str) -> bool:
    return len(name.encode()) > _LONGEST


def _unwritten(what: str, problem: OSError) -> errors.Unavailable:
    """There is no room on this machine, or no folder."""
    return errors.Unavailable(f"{what} cannot be written: {problem.strerror}")
