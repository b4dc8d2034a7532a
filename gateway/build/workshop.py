"""The folder that a build works in, and what of earlier builds it need not make again.

    artefacts/.building/    the files made so far, each with the key of what it was made from, in `build.json`
    artefacts/<build>/      the same, renamed when every file is made and judged

A file is made again only when its key, which covers model, recipe, calibration rows and package versions, has changed,
or its bytes. So a build that was killed goes on where it was. One build of a version at a time.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from gateway import artefacts, errors
from gateway.build.layers import Layers

_RECORD = "build.json"
_WORK = ".building"
_LOCK = ".building.lock"


class Made(msgspec.Struct, frozen=True):
    """One file: what it was made from, what it is, and its worst layers."""

    key: str
    sha256: str
    layers: Layers = ()


class Record(msgspec.Struct):
    """What a build knows of its files beyond the report: by file name, and by recipe why it was left out."""

    made: dict[str, Made] = {}
    skipped: dict[str, str] = {}
    kind: str = ""
    notes: list[str] = []


class Workshop:
    """The work folder of one version, held from entering `workshop` to leaving it."""

    def __init__(self, version: Path) -> None:
        self._version = version
        self.folder = version / artefacts.FOLDER / _WORK
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = Record(made=_record(self.folder).made)

    def reuse(self, name: str, key: str) -> bool:
        """Have a file of this name here, of this key, made before; False when it must be made."""
        for folder in (self.folder, *self._earlier()):
            made = _record(folder).made.get(name)
            if made is None or made.key != key or not _intact(folder / name, made.sha256):
                continue
            if folder != self.folder:
                shutil.copyfile(folder / name, self.folder / name)
                self._note(name, made)
            return True
        return False

    def keep(self, name: str, key: str, unfinished: Path) -> Path:
        """Take over a file that is complete, under its name."""
        kept = unfinished.replace(self.folder / name)
        self._note(name, Made(key, artefacts.sha256(kept)))
        return kept

    def layers(self, name: str, layers: Layers) -> None:
        """Keep what was found of a file's layers."""
        self._note(name, msgspec.structs.replace(self.record.made[name], layers=layers))

    def finish(self, names: list[str]) -> int:
        """Make the work a build of these files, and return its number."""
        self.record.made = {name: self.record.made[name] for name in names}
        write_record(self.folder, self.record)
        for path in self.folder.iterdir():
            if path.is_dir():  # what a killed build left
                shutil.rmtree(path)
            elif path.name not in (*names, _RECORD):
                path.unlink()
        number = artefacts.next_build(self._version)
        self.folder.rename(artefacts.build_folder(self._version, number))
        return number

    def _note(self, name: str, made: Made) -> None:
        self.record.made[name] = made
        write_record(self.folder, self.record)

    def _earlier(self) -> Iterator[Path]:
        for number in reversed(artefacts.builds(self._version)):
            yield artefacts.build_folder(self._version, number)


@contextmanager
def workshop(version: Path) -> Iterator[Workshop]:
    """Hold a version's work folder. Raises `Unavailable` while another build holds it, or where it cannot be written."""
    import fcntl  # not on every system that can serve models

    try:
        (version / artefacts.FOLDER).mkdir(exist_ok=True)
        with (version / artefacts.FOLDER / _LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise errors.Unavailable(
                    f"version {version.name} of model '{version.parent.name}' is being built already; wait for that"
                ) from None
            yield Workshop(version)
    except PermissionError as problem:
        raise errors.Unavailable(
            f"the folder '{artefacts.FOLDER}' of version {version.name} cannot be written: {problem.strerror}"
        ) from None


def key(*parts: str) -> str:
    """What a file was made from, in one word."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_record(folder: Path) -> Record:
    """What a finished build knows of its files."""
    return _record(folder)


def write_record(folder: Path, record: Record) -> None:
    """Put the record in place of the one that was there."""
    unfinished = folder / f".{_RECORD}"
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    unfinished.replace(folder / _RECORD)


def _record(folder: Path) -> Record:
    try:
        return msgspec.json.decode((folder / _RECORD).read_bytes(), type=Record)
    except (OSError, ValueError):  # none, or a half: then every file is made
        return Record()


def _intact(file: Path, sha256: str) -> bool:
    return file.is_file() and artefacts.sha256(file) == sha256
