"""Triton's folder layout: `<repository>/<model>/config.pbtxt` and `<model>/<version>/`.

Knows names and folders only; what a configuration says is read in `repository.py`. Errors name folders and
files, never where they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path

from gateway.config.check import plain_name
from gateway.config.parse import Source
from gateway.errors import GatewayError, InvalidArgument, Unavailable

CONFIG = "config.pbtxt"
_NOT_VERSIONS = {"configs", "warmup", "initial_state"}


def models(repository: Path) -> list[Path]:
    """Every model folder in name order. Hidden and underscored folders and plain files are no models.

    Raises `Unavailable` when the repository cannot be read, `InvalidArgument` when it is a model's own folder.
    """
    require_repository(repository)
    return subfolders(repository)


def require_repository(folder: Path) -> None:
    """Raises `InvalidArgument` for a model's own folder."""
    if (folder / CONFIG).exists():
        raise InvalidArgument(
            f"model repository '{folder.name}' is the folder of one model; give the folder that holds it"
        )


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, in name order. Raises `Unavailable` when it cannot be read."""
    return [folder / entry.name for entry in _entries(folder) if entry.name[0] not in "._" and entry.is_dir()]


def names(folder: Path) -> list[str]:
    """What is in a folder, in name order. Raises `Unavailable` when it cannot be read."""
    return [entry.name for entry in _entries(folder)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=attrgetter("name"))
    except OSError as problem:
        raise unreadable(f"folder '{folder.name}'", problem) from None


def versions(model: Path) -> tuple[dict[int, Path], list[str]]:
    """The version folders of a model by number, lowest first, and a warning for each folder that is not one."""
    numbered, warnings = numbers(model.name, [folder.name for folder in subfolders(model)])
    return {number: model / str(number) for number in numbered}, warnings


def numbers(model: str, folders: Iterable[str]) -> tuple[list[int], list[str]]:
    """The versions that a model's folders are, lowest first, and a warning for each folder that is not one."""
    numbered = []
    warnings = []
    for name in folders:
        # Triton's rule: a positive number written the one usual way, of 64 bits.
        if name.isascii() and name.isdigit() and name[0] != "0" and len(name) < 20 and int(name) < 1 << 63:
            numbered.append(int(name))
        elif name not in _NOT_VERSIONS:
            warnings.append(
                f"folder '{model}/{name}' is ignored: a version folder is a positive number without leading zeros"
            )
    return sorted(numbered), warnings


def misnamed(folder: str, name: str) -> str:
    """What to say of a model whose configuration calls it by another name than its folder's."""
    return (
        f"unexpected directory name '{folder}' for model '{name}', directory name must equal model name. Write name: "
        f'"{folder}", or remove it'
    )


def config_source(model: Path, config_name: str) -> Source | None:
    """The configuration file of a model: `configs/<config_name>.pbtxt` if there, else `config.pbtxt`, else None.

    Raises `InvalidArgument` for one that is not UTF-8 text and `Unavailable` for one that cannot be read.
    """
    chosen = model / "configs" / f"{config_name}.pbtxt"
    path = chosen if config_name and chosen.is_file() else model / CONFIG
    if not path.exists():
        return None
    name = str(path.relative_to(model.parent))
    return Source(name, read_text(path, name))


def read_text(path: Path, name: str) -> str:
    """The text of a UTF-8 file, which errors call `name`."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as problem:
        raise unreadable(f"'{name}'", problem) from None
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        raise InvalidArgument(f"{name} line {line}: the file is not UTF-8 text; save it as UTF-8") from None


def below(base: Path, name: str, repository: Path) -> Path | None:
    """`base/name`, or None when that leaves both `base` and `repository`, by its text or by a link."""
    if not plain_name(name):
        return None
    path = base / name
    real = path.resolve()
    return path if any(real.is_relative_to(root.resolve()) for root in (base, repository)) else None


def unreadable(what: str, problem: OSError) -> GatewayError:
    """The error for a file or folder that the system will not read."""
    return Unavailable(f"{what} cannot be read: {problem.strerror}. Check that it exists and its permissions")
