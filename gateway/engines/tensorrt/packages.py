"""The packages that build and run plans: TensorRT, TensorRT-RTX and a fake, which have one interface.

A plan runs only with the very package and version that built it. What is installed is learned without importing it:
a gigabyte of libraries is loaded by whoever needs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from gateway import errors
from gateway.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Package:
    """One of them. `provider` is what engines that use it say they run on."""

    name: str
    provider: str
    module: str
    runtime: str  # the module of CUDA's runtime
    distributions: tuple[str, ...]
    builtin: str = ""  # the version of what ships with the gateway, and needs no driver

    def version(self) -> str:
        """The version that is installed; empty if none is."""
        for distribution in self.distributions:
            try:
                return metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return self.builtin

    def api(self) -> Any:
        """Its module, imported. Raises `Unavailable` when it is missing or broken."""
        return _import(self.module, self.name)

    def cuda(self) -> Any:
        """CUDA's runtime, imported. Raises `Unavailable` when it is missing."""
        return _import(self.runtime, "cuda-bindings")


_CUDA = "cuda.bindings.runtime"
_FAKES = "gateway.engines.tensorrt.fakes"

TENSORRT = Package(
    "tensorrt",
    "TensorRT",
    "tensorrt",
    _CUDA,
    ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
)
RTX = Package("tensorrt_rtx", "TensorRT-RTX", "tensorrt_rtx", _CUDA, ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"))
FAKE = Package("fake", "TensorRT-fake", f"{_FAKES}.api", f"{_FAKES}.cuda", (), builtin="10.0")

_ALL = {package.name: package for package in (TENSORRT, RTX, FAKE)}


def named(name: str) -> Package:
    """The package of this name. Raises `Unavailable` when there is none."""
    if name not in _ALL:
        raise errors.Unavailable(f"a plan of '{name}' cannot be run here; there are: {', '.join(_ALL)}")
    return _ALL[name]


def chosen(config: ModelConfig) -> Package:
    """The package that builds a model's plans here: `parameters { key: "tensorrt_package" }`, or what is installed.

    Raises `Unavailable` when none is.
    """
    asked = config.parameters.get("tensorrt_package")
    if asked is not None:
        if asked not in _ALL:
            raise errors.InvalidArgument(
                f"parameter 'tensorrt_package' of model '{config.name}' must be one of {', '.join(_ALL)}, got '{asked}'; "
                "correct it in config.pbtxt"
            )
        return _ALL[asked]
    return installed()


def installed(preferred: Sequence[Package] = (TENSORRT, RTX)) -> Package:
    """The first of them that is installed. Raises `Unavailable` with how to install one."""
    for package in preferred:
        if package.version():
            return package
    raise errors.Unavailable(
        "TensorRT is not installed; README.md, \"TensorRT\", has the command. `pip install 'lockgate[trtrtx]'` brings "
        "TensorRT-RTX, which builds without a GPU and runs on GeForce and RTX cards"
    )


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise errors.Unavailable(
            f"the package '{package}' is missing or broken: {str(problem).partition(':')[0]}; README.md, \"TensorRT\", "
            "has the command that installs it"
        ) from problem
