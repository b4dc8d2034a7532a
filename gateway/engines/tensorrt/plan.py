"""Plan files: what is written down about each, and which one a version is run from on this device.

A plan is either the version's own file (`model.plan`, as Triton has it) or one that `gateway build --target tensorrt`
made from an ONNX file and keeps in `<version>/artefacts/plans/`. Beside it, `<plan>.json` says what it was built from,
with and for, so that one that does not fit any more is known before TensorRT sees it: a damaged plan may crash its
reader. Builds nothing and runs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from gateway import errors
from gateway.engines.base import EngineSpec
from gateway.engines.tensorrt import packages, profiles
from gateway.engines.tensorrt.packages import Package
from gateway.engines.tensorrt.profiles import Range

FOLDER = Path("artefacts/plans")


class PlanInfo(msgspec.Struct, frozen=True):
    """What a plan was built from, with and for. `built` is in Unix seconds; `executed` is False until it has run."""

    package: str
    version: str  # of the package
    sm: str  # the compute capability it was built for; empty for a plan of any
    source: str  # the ONNX file, relative to the version's folder
    source_sha256: str  # of that file, and of the files that hold its weights
    precision: str
    profiles: tuple[dict[str, Range], ...]
    sha256: str  # of the plan
    bytes: int
    built: float
    executed: bool = False


class PlanMissing(errors.Unavailable):
    """There is no plan for this device, or it is stale; one can be built from the version's ONNX file."""


class Plan(msgspec.Struct, frozen=True):
    """A plan to run: its file, the package that must run it, and what is written of it, if anything is."""

    path: Path
    package: str
    info: PlanInfo | None


def find(spec: EngineSpec, sm: str) -> Plan:
    """The plan to run a version from on a device of this compute capability.

    Raises `PlanMissing` when one must be built first and `Unavailable` when nothing can be built. Blocking: reads and
    hashes the files.
    """
    name = source(spec)
    label = f"{spec.config.name}/{spec.version}/{name}"
    file = spec.path / name
    if not file.is_file():
        raise errors.Unavailable(f"{label} is missing; put the model there, or set default_model_filename")
    if file.suffix != ".onnx":
        return _own(spec, file, label, sm)
    package = packages.chosen(spec.config)
    reasons = []
    for path, info in kept(spec.path):
        if info.source == name:
            why = stale(spec, info, package, sm) or _damaged(path, info)
            if not why:
                return Plan(path, info.package, info)
            reasons.append(why)
    raise PlanMissing(f"{label} has no TensorRT plan for this device{_because(reasons)}. {_remedy(spec)}")


def source(spec: EngineSpec) -> str:
    """The file of a version that is run or built from, relative to the version's folder."""
    return spec.artefact.file if spec.artefact else spec.config.default_model_filename or "model.plan"


def stale(spec: EngineSpec, info: PlanInfo, package: Package, sm: str) -> str:
    """Why a plan does not fit what is installed, the device, the model file or the configuration; empty if it does."""
    if info.package != package.name:
        return f"one is of {info.package}, and {package.name} is installed"
    if info.version != package.version():
        return f"one is of {info.package} {info.version}, and {package.version() or 'none'} is installed"
    if info.sm not in ("", sm):
        return f"one is for compute capability {_dotted(info.sm)}, and this GPU has {_dotted(sm)}"
    origin = spec.path / info.source  # a plan may come without the file that it was built from
    if origin.is_file() and info.source_sha256 != fingerprint(origin):
        return "one was built from another model file"
    return profiles.shortfall(spec.config, info.profiles)


def kept(version: Path) -> Iterator[tuple[Path, PlanInfo]]:
    """The plans that were built for a version, the newest first, and what is written of each. Skips unreadable ones."""
    found = [(path.with_suffix(""), read(path)) for path in (version / FOLDER).glob("*.plan.json")]
    yield from sorted(
        ((path, info) for path, info in found if info is not None), key=lambda each: each[1].built, reverse=True
    )


def read(path: Path) -> PlanInfo | None:
    """What a `.json` file says of its plan; None where it is missing or says nothing that makes sense."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=PlanInfo)
    except (OSError, msgspec.DecodeError):
        return None


def described_by(path: Path) -> Path:
    """Where it is written what a plan is."""
    return path.with_name(path.name + ".json")


def fingerprint(file: Path) -> str:
    """The SHA-256 of an ONNX file and, in the order of their names, of the files beside it that may hold its weights."""
    weights = [
        path
        for path in sorted(file.parent.iterdir())
        if path != file and (path.name.startswith(file.name) or path.suffix in (".data", ".weight", ".bin"))
    ]
    parts = [digest(path) for path in (file, *weights)]
    return parts[0] if not weights else hashlib.sha256("".join(parts).encode()).hexdigest()


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; empty for a file that is not there."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _own(spec: EngineSpec, file: Path, label: str, sm: str) -> Plan:
    info = read(described_by(file))
    if info is None:  # Triton's plans say nothing of themselves; TensorRT must judge
        return Plan(file, packages.chosen(spec.config).name, None)
    if why := stale(spec, info, packages.named(info.package), sm) or _damaged(file, info):
        raise errors.Unavailable(f"{label} does not fit: {why}. {_remedy(spec)}")
    return Plan(file, info.package, info)


def _damaged(path: Path, info: PlanInfo) -> str:
    return "" if digest(path) == info.sha256 else "one is damaged"


def _because(reasons: list[str]) -> str:
    return f": {'; '.join(reasons)}" if reasons else ""


def _remedy(spec: EngineSpec) -> str:
    return f"Build one here: gateway build {spec.config.name} --plan"


def _dotted(sm: str) -> str:
    return f"{sm[:-1]}.{sm[-1:]}"
