"""Builds TensorRT plans from ONNX files: TensorRT's on the GPU they are for, TensorRT-RTX's anywhere.

A build checks the file, parses it, and compiles it for the shapes that the configuration asks for; precision is the
file's own (networks are strongly typed). Plans and what is written of them are kept in `<version>/artefacts/plans/`
(`engines/tensorrt/plan.py`), and so are the times of kernels, so that the next build is quick. Builders of one version
wait for each other; the second finds the plan there. Nothing is executed: a plan is unproven until it has run.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from gateway import errors
from gateway.build import qdq
from gateway.engines import driver
from gateway.engines.base import EngineSpec
from gateway.engines.providers import TENSORRT as TENSORRT_PROVIDER
from gateway.engines.tensorrt import packages, plan, profiles
from gateway.engines.tensorrt.log import ErrorLog, plain
from gateway.engines.tensorrt.packages import Package
from gateway.engines.tensorrt.plan import Plan, PlanInfo, PlanMissing
from gateway.engines.tensorrt.profiles import Profile, Shape

Progress = Callable[[str, float], None]
"""Told what the builder does and how far that is, from 0 to 1."""

COMMON_SM = "89"
"""What TensorRT-RTX builds for without a GPU and a word: GeForce RTX 40 and L4."""

_STRONGLY_TYPED_BY_FLAG = "10"  # the major version in which a network is strongly typed if asked; later always


@dataclass(frozen=True)
class Target:
    """What a plan is built with, and for: the compute capability of a GPU, e.g. "89". `executes`: such a GPU is here."""

    package: Package
    sm: str
    executes: bool = True


@dataclass(frozen=True)
class Order:
    """What to build of a version: `spec` says from which file; `observed` are shapes of inputs that were seen."""

    spec: EngineSpec
    precision: str = "FP32"
    observed: Mapping[str, Sequence[Shape]] = field(default_factory=dict)
    again: bool = False  # even if there is one that fits


def target(spec: EngineSpec, sm: str = "", *, rtx: bool = False) -> Target:
    """What to build with here: the installed package, TensorRT-RTX with `rtx`; for `sm` or for the GPU that is here.

    TensorRT-RTX needs no GPU, and builds for `COMMON_SM` where nothing else is known. Raises `Unavailable` when nothing
    is installed, or there is no GPU and the package cannot do without, and `InvalidArgument` for an `sm` that it cannot
    build for.
    """
    package = packages.installed([packages.RTX]) if rtx else packages.chosen(spec.config)
    if package.builtin:
        return Target(package, sm)
    if package is not packages.RTX:
        here = driver.probe().gpu(_index(spec.device)).sm
        if sm not in ("", here):
            raise errors.InvalidArgument(
                f"TensorRT builds for the GPU that it runs on, and that has compute capability {here}, not {sm}; build "
                "on such a machine"
            )
        return Target(package, here)
    here = _capability(spec)
    wanted = sm or here or COMMON_SM
    known = [each.removeprefix("SM") for each in vars(package.api().ComputeCapability) if each.startswith("SM")]
    if wanted not in known:
        raise errors.InvalidArgument(
            f"TensorRT-RTX does not build for compute capability {wanted}; it does for: "
            f"{', '.join(sorted(known, key=int))}. Other GPUs need TensorRT, on the GPU itself"
        )
    return Target(package, wanted, executes=wanted == here)


def build(order: Order, given: Target, progress: Progress) -> Plan:
    """Build a plan, unless there is one that fits. Blocking: seconds to minutes.

    Raises `InvalidArgument` for a file that TensorRT does not take, with all that is wrong with it, and `Unavailable`
    when the build fails.
    """
    spec, source = order.spec, plan.source(order.spec)
    file = spec.path / source
    if not file.is_file() or file.suffix != ".onnx":
        raise errors.InvalidArgument(f"'{source}' is no ONNX file of {spec.config.name}/{spec.version}; name one")
    shapes = profiles.profile(spec.config, order.observed or _seen_before(spec, source))
    folder = spec.path / plan.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        found = None if order.again else _found(spec, given.sm)
        if found is not None:
            progress("there is a plan already", 1.0)
            return found
        progress("checking the file", 0.0)
        qdq.require(file)
        times = folder / f"{given.package.name}-{given.package.version()}-sm{given.sm}.timing"
        content = _Work(file, shapes, given, times, _workspace(spec)).compile(progress)
        info = PlanInfo(
            package=given.package.name,
            version=given.package.version(),
            sm=given.sm,
            source=source,
            source_sha256=plan.fingerprint(file),
            precision=order.precision,
            profiles=(dict(shapes),),
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            built=time.time(),
        )
        path = _keep(folder, info, content)
        _drop_stale(spec, info)
    return Plan(path, info.package, info)


def _seen_before(spec: EngineSpec, source: str) -> dict[str, list[Shape]]:
    """The shapes of the last plan of a file, which may have been observed when that was built."""
    for _, info in plan.kept(spec.path):
        if info.source == source and info.profiles:
            last = info.profiles[0].items()
            return {name: [each.least, each.best, each.greatest] for name, each in last}
    return {}


def _found(spec: EngineSpec, sm: str) -> Plan | None:
    try:
        return plan.find(spec, sm)
    except PlanMissing:
        return None


@dataclass(frozen=True)
class _Work:
    """What is compiled, with what, and where kernel times are kept."""

    file: Path
    shapes: Profile
    target: Target
    times: Path
    workspace: int  # bytes; 0: as TensorRT likes

    def compile(self, progress: Progress) -> bytes:
        """The plan."""
        trt = self.target.package.api()
        log = ErrorLog(trt)
        builder = trt.Builder(log.logger)
        network = builder.create_network(_flags(trt, self.target.package))
        progress("parsing", 0.0)
        parser = trt.OnnxParser(network, log.logger)
        if not parser.parse_from_file(str(self.file)):
            found = [_told(parser.get_error(index)) for index in range(parser.num_errors)]
            raise errors.InvalidArgument(f"TensorRT does not take '{self.file.name}': {'; '.join(found) or log}")
        config = self._config(trt, builder)
        monitor = _monitor(trt, progress)  # must outlive the build
        config.progress_monitor = monitor
        content = builder.build_serialized_network(network, config)
        if content is None:
            why = str(log) or "it gave no reason"
            raise errors.Unavailable(f"TensorRT could not build a plan of '{self.file.name}': {why}")
        _replace(self.times, bytes(config.get_timing_cache().serialize()))
        return bytes(content)

    def _config(self, trt: Any, builder: Any) -> Any:
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        for name, each in self.shapes.items():
            profile.set_shape(name, each.least, each.best, each.greatest)
        config.add_optimization_profile(profile)
        if self.workspace:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace)
        if self.target.package is packages.RTX:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{self.target.sm}"), 0)
        kept = self.times.read_bytes() if self.times.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(kept), False):  # of another GPU
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return config


def _flags(trt: Any, package: Package) -> int:
    if package is not packages.RTX and trt.__version__.partition(".")[0] == _STRONGLY_TYPED_BY_FLAG:
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


def _told(error: Any) -> str:
    """An error of the parser, in words."""
    where = f"{error.node_operator()} '{error.node_name()}': " if error.node_name() else ""
    return where + plain(error.desc())


def _workspace(spec: EngineSpec) -> int:
    text = spec.config.accelerators.get(TENSORRT_PROVIDER, {}).get("max_workspace_size_bytes", "0")
    if not text.isdecimal():
        raise errors.InvalidArgument(
            f"max_workspace_size_bytes of model '{spec.config.name}' must be a whole number, got '{text}'; correct it in "
            "config.pbtxt"
        )
    return int(text)


def _capability(spec: EngineSpec) -> str:
    """The compute capability of the GPU that is here; empty for none."""
    try:
        return driver.probe().gpu(_index(spec.device)).sm
    except errors.Unavailable:
        return ""


def _index(device: str) -> int:
    return int(device.removeprefix("gpu:")) if device.startswith("gpu:") else 0


# --- files


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else builds for this version meanwhile, in whatever process."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _keep(folder: Path, info: PlanInfo, content: bytes) -> Path:
    key = hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(info, built=0.0, sha256=""))).hexdigest()[:16]
    path = folder / f"{Path(info.source).stem}-{key}.plan"
    described = plan.described_by(path)
    described.unlink(missing_ok=True)  # what is written of a plan comes after the plan, and goes before it
    _replace(path, content)
    _replace(described, msgspec.json.format(msgspec.json.encode(info)))
    return path


def _drop_stale(spec: EngineSpec, new: PlanInfo) -> None:
    """Remove what this device will never run again; plans for other devices that share the folder stay."""
    for path, info in [*plan.kept(spec.path)]:
        same = (info.source, info.sm, info.package) == (new.source, new.sm, new.package)
        if same and info != new:
            plan.described_by(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _monitor(trt: Any, progress: Progress) -> Any:
    """TensorRT's class must be its base, so it is made when that is there."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells of the outermost phases."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Part of trt.IProgressMonitor."""
            if parent_phase is None:
                self._steps[phase_name] = num_steps
                progress(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Part of trt.IProgressMonitor."""
            if phase_name in self._steps:
                progress(phase_name, (step + 1) / max(self._steps[phase_name], 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            """Part of trt.IProgressMonitor."""
            if self._steps.pop(phase_name, 0):
                progress(phase_name, 1.0)

    return Monitor()
