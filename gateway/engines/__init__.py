"""The backends by name. Each is imported when the first model asks for it, so what is not used costs nothing.

A backend is a module with `load(spec, count) -> list[Loaded]`, blocking, one per engine; the list may share
what is heavy; one whose engines need no thread has `create(spec, count) -> list[Engine]` instead. Where a package does the work, `RUNTIME` names it and its version. Engines of one call to `create` share a model's weights; each has a thread of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gateway import errors
from gateway.config.model import ModelConfigProto
from gateway.engines.base import Engine, EngineSpec
from gateway.engines.threads import EngineThread, Loaded, ThreadEngine
from gateway.types import ModelIO


class _Backend(NamedTuple):
    module: str
    install: str  # what to do when a package the module imports is missing


_BACKENDS = {
    "onnxruntime": _Backend(
        "gateway.engines.onnxruntime",
        "install it with `pip install 'lockgate[cpu]'`, or 'lockgate[gpu]' for NVIDIA GPUs",
    ),
    "fake": _Backend("gateway.engines.fake", "reinstall lockgate"),
    "remote": _Backend("gateway.engines.remote", "reinstall lockgate"),
}


async def create(spec: EngineSpec, count: int = 1) -> list[Engine]:
    """Load a version once, off the event loop, and return `count` engines that share it.

    Raises `Unsupported` for a backend there is none of, `Unavailable` when it cannot load the model; the
    message names the file relative to the repository, and a remedy.
    """
    module = _module(spec.config.backend)
    if hasattr(module, "create"):
        return await module.create(spec, count)  # type: ignore[no-any-return]
    threads = [EngineThread(f"{spec.config.name}/{spec.version}#{index}") for index in range(count)]
    try:
        loaded = await threads[0].call(partial(_load, spec, count))
    except BaseException:
        for thread in threads:
            thread.stop()
        raise
    return [ThreadEngine(model, thread) for model, thread in zip(loaded, threads, strict=True)]


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


def runtime(backend: str) -> str:
    """What a backend runs on and its version, e.g. `onnxruntime 1.23.2`; empty for one that needs no package."""
    return getattr(_module(backend), "RUNTIME", "")


def _load(spec: EngineSpec, count: int) -> list[Loaded]:
    return _module(spec.config.backend).load(spec, count)  # type: ignore[no-any-return]


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
