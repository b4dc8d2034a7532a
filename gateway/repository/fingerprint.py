"""Notices changed files by name, size and modification time, per version and for what versions share; and says what a
version computes, by the content of its files.

Of a version's artefacts those count that are promoted, so that a build under way changes nothing.
Only a `digest` reads content. A file that is still being copied changes its fingerprint again and is simply seen
as changed twice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from gateway.artefacts import FOLDER, served_files
from gateway.repository.layout import names


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A model's files at one moment; equal when nothing has changed."""

    shared: str
    versions: Mapping[int, str]

    def of(self, version: int) -> str:
        """The fingerprint of all that one version is served from."""
        return f"{self.shared}/{self.versions[version]}"


@dataclass(frozen=True, slots=True)
class Changes:
    """Model names by what happened to them since `previous`, and the fingerprints to compare with next time."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    now: Mapping[str, Fingerprint]


def fingerprint(model: Path, versions: Mapping[int, Path], override: str = "") -> Fingerprint:
    """Take the fingerprint of a model folder with all its version folders; `override` is configuration text used in
    place of its file.

    Raises `Unavailable` when the folder cannot be read.
    """
    own = set(map(str, versions.values()))
    entries = [f"{model}/{name}" for name in names(model) if name[0] not in "._"]
    shared = [line for entry in entries if entry not in own for line in _lines(entry)]
    return Fingerprint(
        _digest([override, *shared]),
        {
            number: _digest([*_lines(str(folder), skip=FOLDER), *map(_line, served_files(folder))])
            for number, folder in versions.items()
        },
    )


def digest(folder: Path, config: Any) -> str:
    """What a version computes: equal for equal files and configuration (a protobuf message), wherever they lie.

    Its artefacts are left out: which of them is run is known once it is loaded, where. Empty when a file cannot be read.
    """
    state = hashlib.sha256(config.SerializeToString(deterministic=True))
    try:
        for path in sorted(_files(folder, skip=FOLDER)):
            state.update(f"\0{path.relative_to(folder)}\0".encode(errors="surrogateescape"))
            if not path.is_file():
                return ""  # a pipe would be read for ever
            with path.open("rb") as file:
                state.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return ""
    return state.hexdigest()


def diff(previous: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> Changes:
    """Compare two scans of a repository."""
    return Changes(
        added=tuple(name for name in now if name not in previous),
        changed=tuple(name for name in now if name in previous and now[name] != previous[name]),
        removed=tuple(name for name in previous if name not in now),
        now=now,
    )


def _files(path: Path, skip: str = "") -> Iterator[Path]:
    """The visible files of a folder, but for those in the folder `skip` of it."""
    if not path.is_dir():
        yield path
    for folder, folders, files in os.walk(path):
        skipped = skip if folder == str(path) else ""
        # Python writes __pycache__ beside a model while serving it. Linked folders are not followed: no loops.
        folders[:] = sorted(name for name in folders if name[0] not in "._" and name != skipped)
        yield from (Path(folder, name) for name in sorted(files) if name[0] not in "._")


def _lines(path: str, skip: str = "") -> Iterator[str]:
    """A line for each of `_files`, in plain text: a repository may have tens of thousands, and is looked at often."""
    try:
        with os.scandir(path) as found:
            entries = sorted((entry for entry in found if entry.name[0] not in "._"), key=attrgetter("name"))
    except NotADirectoryError:
        yield _line(path)
        return
    except OSError:
        yield f"{path}\0gone"  # deleted since it was listed, or a dangling link
        return
    yield from (_line(entry) for entry in entries if not entry.is_dir())
    for entry in entries:
        if entry.is_dir() and entry.name != skip and not entry.is_symlink():
            yield from _lines(entry.path)


def _line(file: str | Path | os.DirEntry[str]) -> str:
    try:
        status = os.stat(file)  # noqa: PTH116 - a Path for each file is half of the work
    except OSError:
        return f"{os.fspath(file)}\0gone"
    return f"{os.fspath(file)}\0{status.st_mtime_ns}\0{status.st_size}"


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
