"""The backends by name. Each is imported when the first model asks for it, so what is not used costs nothing.

A backend is a module with `load(spec, count) -> list[Loaded]`, blocking, one per engine; the list may share
what is heavy; one whose engines need no thread has `create(spec, count) -> list[Engine]` instead. Where a package does the work, `RUNTIME` names it and its version. Engines of one call to `create` share a model's weights; each has a thread of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gateway import errors
from gateway.config.model import ModelConfigProto
from gateway.devices import nvml
from gateway.engines.base import Engine, EngineSpec
from gateway.engines.chain import read
from gateway.engines.fallback import open_chain
from gateway.engines.isolated.children import SUPPORTED
from gateway.engines.isolated.limits import isolation
from gateway.engines.threads import EngineThread, Loaded, ThreadEngine
from gateway.types import ModelIO


class _Backend(NamedTuple):
    module: str
    install: str  # what to do when a package the module imports is missing
    isolated: bool = True  # where nobody says otherwise
    shares: bool = False  # small models of it may share a process
    creates: bool = (
        False  # its module has `create(spec, count) -> list[Engine]`, which needs neither process nor thread
    )
    calls: bool = False  # its models may call others; such code never runs in the gateway's own process


_BACKENDS = {
    "onnxruntime": _Backend(
        "gateway.engines.onnxruntime",
        "install it with `pip install 'lockgate[cpu]'`, or 'lockgate[gpu]' for NVIDIA GPUs",
        shares=True,
    ),
    "tensorrt": _Backend("gateway.engines.tensorrt.backend", "reinstall lockgate"),
    "remote": _Backend("gateway.engines.remote", "reinstall lockgate", creates=True),
    "fake": _Backend("gateway.engines.fake", "reinstall lockgate", isolated=False, shares=True),
    "python": _Backend("gateway.engines.python", "reinstall lockgate", calls=True),
}


async def create(spec: EngineSpec, count: int = 1) -> list[Engine]:
    """Load a version, off the event loop, and return `count` engines of it.

    Unless the spec says what to run, an artefact or a provider, they are the chain of engines that the configuration asks
    for, or that there is for the device. Raises `Unsupported` for a backend there is none of, `Unavailable` when nothing can load the model; the message names the
    file relative to the repository, and a remedy.
    """
    if spec.artefact is not None or spec.provider:
        return await _start(spec, count)
    reader = EngineThread(f"{spec.config.name}/{spec.version} artefacts")
    try:
        chain = await reader.call(partial(read, spec, _BACKENDS))
    finally:
        await reader.close()
    if len(chain.links) == 1 and not chain.warnings:
        return await _start(chain.links[0].spec, count)
    return [*await open_chain(chain, count, _start)]


async def _start(spec: EngineSpec, count: int) -> list[Engine]:
    """In child processes, where there are any and the model or its backend wants them; else on threads of this one."""
    backend = _BACKENDS.get(_name(spec))
    if backend is not None and backend.creates:
        return await _module(_name(spec)).create(spec, count)  # type: ignore[no-any-return]
    if _isolates(spec):
        from gateway.engines.isolated.engine import start
        from gateway.engines.isolated.life import Backend

        assert spec.children is not None
        assert backend is not None
        child = Backend(backend.module, backend.install, shares=backend.shares, calls=backend.calls)
        return [*await start(spec, count, spec.children, child)]
    threads = [EngineThread(f"{spec.config.name}/{spec.version}#{index}") for index in range(count)]
    try:
        loaded = await threads[0].call(partial(_load, spec, count))
    except BaseException:
        for thread in threads:
            thread.stop()
        raise
    return [ThreadEngine(model, thread, spec.artefact) for model, thread in zip(loaded, threads, strict=True)]


def _isolates(spec: EngineSpec) -> bool:
    backend = _BACKENDS.get(_name(spec))
    wanted = isolation(spec.config)
    if backend is None or spec.children is None:
        return False
    if backend.calls or wanted == "auto":
        wanted = "process" if backend.calls else spec.children.wanted
    if not SUPPORTED:
        return False
    return backend.isolated if wanted == "auto" else wanted == "process"


def describe(path: Path) -> ModelIO:
    """What a model file says it takes and gives. Blocking: tens of milliseconds, more for big weights.

    Raises `Unsupported` for a file of no known format and `Unavailable` for one that cannot be read.
    """
    if path.suffix != ".onnx":
        raise errors.Unsupported(
            f"'{path.name}' does not say what its inputs and outputs are; list them in config.pbtxt"
        )
    return _module("onnxruntime").describe(path)  # type: ignore[no-any-return]


def remote_configuration(model: str, parameters: Mapping[str, str]) -> ModelConfigProto:
    """What a remote server says of the model that these parameters name. Blocking; see `engines.remote`."""
    return _module("remote").configuration(model, parameters)


def auto_complete(path: Path, config: str) -> str:
    """What the code of a Python model makes of its configuration, both as JSON; in a process of its own. Blocking.

    Raises `InvalidArgument` for code that fails.
    """
    return importlib.import_module("gateway.engines.python.complete").complete(path, config)  # type: ignore[no-any-return]


def runtime(backend: str) -> str:
    """What a backend runs on and its version, e.g. `onnxruntime 1.23.2`; empty for one that needs no package."""
    return getattr(_module(backend), "RUNTIME", "")


def gpus() -> list[str]:
    """The GPUs of this process, by name, where a backend is installed that can use them. Blocking: asks the driver."""
    modules = ("tensorrt", "tensorrt_rtx")
    if not _has("onnxruntime-gpu") and all(importlib.util.find_spec(module) is None for module in modules):
        return []
    return [gpu.name for gpu in nvml.gpus()]


def _has(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _load(spec: EngineSpec, count: int) -> list[Loaded]:
    return _module(_name(spec)).load(spec, count)  # type: ignore[no-any-return]


def _name(spec: EngineSpec) -> str:
    return spec.config.backend if spec.artefact is None else spec.artefact.backend


def _module(name: str) -> Any:
    backend = _BACKENDS.get(name)
    if backend is None:
        raise errors.Unsupported(
            f"there is no backend '{name}'; there are: {', '.join(_BACKENDS)}. Change backend in config.pbtxt"
        )
    try:
        return importlib.import_module(backend.module)
    except ImportError as missing:
        raise errors.Unavailable(
            f"backend '{name}' needs the package '{missing.name}', which is missing or broken; {backend.install}"
        ) from missing
