"""The `artefacts` folder of a version: its builds, their reports, and which of them is promoted.

Safe against crashes, since files are replaced by rename, and against two commands at once, which wait for each other
at a lock. Readers need no lock. Names that begin with a dot or underscore are nobody's business but this folder's:
work in progress may lie there. Blocking throughout.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from gateway import errors
from gateway.artefacts.hashes import sha256
from gateway.artefacts.report import Artefact, Report

FOLDER = "artefacts"
_PROMOTED = "promoted"
_REPORT = "report.json"
_LOCK = ".lock"
_BYTES = 4 << 20  # a longer report is not ours


class Step(NamedTuple):
    """One line of the history: what was done when (Unix seconds), and which build was served then; 0 is none."""

    at: int
    done: str  # "promote", "rollback"
    build: int


def build_folder(version: Path, build: int) -> Path:
    """Where a build of a version lies."""
    return version / FOLDER / str(build)


def builds(version: Path) -> list[int]:
    """The builds that have a report, oldest first."""
    return [number for number in _numbers(version) if (build_folder(version, number) / _REPORT).is_file()]


def next_build(version: Path) -> int:
    """The number of a build that begins now: no folder has it."""
    return max(_numbers(version), default=0) + 1


def read(version: Path, build: int | None = None) -> Report | None:
    """The report of the promoted build, None when there is none; or that of `build`.

    Raises `Unavailable` for a report that is missing or is not one.
    """
    number = promoted(version) if build is None else build
    if not number:
        return None
    label = f"the report of build {number} of {_label(version)}"
    try:
        return msgspec.json.decode(_bounded(build_folder(version, number) / _REPORT), type=Report)
    except FileNotFoundError:
        raise errors.Unavailable(
            f"{label} is not there; there are builds: {_listed(builds(version))}. Build again, or roll back"
        ) from None
    except (OSError, ValueError, RecursionError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise errors.Unavailable(f"{label} cannot be read: {reason}. Build again, or roll back") from None


def write(version: Path, build: int, report: Report) -> None:
    """Put a report in place of the build's last one, if any. The files it names must be there."""
    folder = build_folder(version, build)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / _REPORT, msgspec.json.format(msgspec.json.encode(report)))


def promoted(version: Path) -> int:
    """The number of the build that is served; 0 when it is the model itself."""
    steps = history(version)
    return steps[-1].build if steps else 0


def history(version: Path) -> list[Step]:
    """What was promoted and rolled back, oldest first. Raises `Unavailable` when the record cannot be read."""
    try:
        lines = (version / FOLDER / _PROMOTED).read_text("utf-8").splitlines()
        return [_step(line) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise errors.Unavailable(
            f"the file '{FOLDER}/{_PROMOTED}' of {_label(version)} cannot be read: {reason}. Remove it, then promote again"
        ) from None


def promote(version: Path, build: int | None = None, *, model_file: str = "model.onnx") -> int:
    """Serve a build, the newest one unless told, from now on; returns its number. Does nothing when it is served already.

    Raises `InvalidArgument` when there is no such build, it is of another model file, all of its artefacts failed, or
    one that did not is no longer the file that was measured.
    """
    with _locked(version):
        known = builds(version)
        number = build if build is not None else max(known, default=0)
        if number not in known:
            raise errors.InvalidArgument(
                f"{_label(version)} has no build {number or 'yet'}; there are: {_listed(known)}. Run `gateway build` first"
            )
        _check(version, number, model_file)
        steps = history(version)
        if not steps or steps[-1].build != number:
            _record(version, [*steps, Step(int(time.time()), "promote", number)])
        return number


def rollback(version: Path) -> int:
    """Serve what was served before the build that is served now was promoted; returns that build, 0 for the model itself.

    Raises `InvalidArgument` when no build is served.
    """
    with _locked(version):
        steps = history(version)
        served = _served(steps)
        if not served:
            raise errors.InvalidArgument(
                f"{_label(version)} is served from its own model file; there is nothing to roll back"
            )
        before = served[-2] if len(served) > 1 else 0
        _record(version, [*steps, Step(int(time.time()), "rollback", before)])
        return before


def served_files(version: Path) -> list[Path]:
    """The files under `artefacts` that what is served depends on: of the promoted build, and that it is promoted."""
    marker = version / FOLDER / _PROMOTED
    if not marker.is_file():
        return []
    try:
        number = promoted(version)
    except errors.Unavailable:
        number = 0
    folder = build_folder(version, number)
    try:
        files = sorted(path for path in folder.iterdir() if path.name[0] not in "._") if number else []
    except OSError:
        files = []
    return [marker, *files]


def inside(version: Path, file: str) -> Path | None:
    """Where an artefact's file is; None when its name leads out of the version's folder, by its text or by a link."""
    path = version / file
    return path if file and path.resolve().is_relative_to(version.resolve()) else None


def altered(version: Path, artefact: Artefact) -> str:
    """Why an artefact's file is not the one that the gate saw; empty when it is."""
    path = inside(version, artefact.file)
    if path is None:
        return "its file leads out of the version's folder; build it again"
    try:
        found = sha256(path)
    except OSError as problem:
        return f"its file cannot be read ({problem.strerror}); build it again"
    if found != artefact.sha256:
        return (
            f"its file was changed after the gate saw it (SHA-256 {found[:12]}, the report says "
            f"{artefact.sha256[:12] or 'nothing'}); build it again"
        )
    return ""


def stale(version: Path, report: Report, model_file: str) -> str:
    """Why a report is of another model than the version has now; empty when it is not."""
    try:
        found = sha256(version / model_file)
    except OSError as problem:
        return f"the model file it was built from cannot be read ({problem.strerror})"
    if found != report.source_sha256:
        return (
            f"it was built from another model file (SHA-256 {report.source_sha256[:12]}, '{model_file}' is "
            f"{found[:12]}); run `gateway build` again"
        )
    return ""


def _bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        text = file.read(_BYTES + 1)
    if len(text) > _BYTES:
        raise ValueError("it is too long")
    return text


def _check(version: Path, build: int, model_file: str) -> None:
    """Raise `InvalidArgument` for a build that must not be promoted."""
    label = f"build {build} of {_label(version)} is not promoted"
    report = read(version, build)
    assert report is not None
    if reason := stale(version, report, model_file):
        raise errors.InvalidArgument(f"{label}: {reason}")
    usable = [artefact for artefact in report.artefacts if artefact.verdict != "failed"]
    if not usable:
        why = "; ".join(f"{each.name}: {', '.join(each.reasons) or 'no reason given'}" for each in report.artefacts)
        raise errors.InvalidArgument(f"{label}: the gate passed none of its artefacts ({why or 'it has none'})")
    for artefact in usable:
        if reason := altered(version, artefact):
            raise errors.InvalidArgument(f"{label}: artefact '{artefact.name}': {reason}")


def _served(steps: list[Step]) -> list[int]:
    """The builds to go back through, the one that is served last."""
    stack: list[int] = []
    for step in steps:
        if step.done == "promote":
            stack.append(step.build)
        elif stack:
            stack.pop()
    return stack


def _step(line: str) -> Step:
    at, done, build = line.split()
    if done not in ("promote", "rollback"):
        raise ValueError(f"a line says '{done}'")
    return Step(int(at), done, int(build))


def _record(version: Path, steps: list[Step]) -> None:
    text = "".join(f"{step.at} {step.done} {step.build}\n" for step in steps)
    _replace(version / FOLDER / _PROMOTED, text.encode())


def _numbers(version: Path) -> list[int]:
    try:
        entries = list((version / FOLDER).iterdir())
    except FileNotFoundError:
        return []
    return sorted(int(each.name) for each in entries if each.name.isdecimal() and each.name[0] != "0")


@contextmanager
def _locked(version: Path) -> Iterator[None]:
    import fcntl  # not on every system that can serve models

    folder = version / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with (folder / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as problem:
        raise errors.Unavailable(
            f"the folder '{FOLDER}' of {_label(version)} cannot be written: {problem.strerror}. Check its permissions"
        ) from None


def _replace(path: Path, content: bytes) -> None:
    """Have a file with this content or, after a crash, the one from before."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _label(version: Path) -> str:
    return f"model '{version.parent.name}' version {version.name}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
