"""What a model's configuration says of its child process, in `parameters`:

- `isolation`: `process` or `thread`, instead of what the setting `--isolation` says.
- `memory_limit_mb`: the memory that its process may take beyond what it starts with; beyond it allocation fails.
- `cpu_affinity`: the cores that it may run on, e.g. `0,2-3`.
- `watchdog_ms`: a run is never taken for hung before so many milliseconds; 5000 if not given.

A model with a limit is alone in its process.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Literal, TypeAlias

from gateway import errors
from gateway.config.model import ModelConfig

Isolation: TypeAlias = Literal["auto", "thread", "process"]

_MIB = 1 << 20
_PATIENCE_MS = 5000


def isolation(config: ModelConfig) -> Isolation:
    """What the model asks for. Raises `InvalidArgument`."""
    kinds: dict[str, Isolation] = {"process": "process", "thread": "thread", "auto": "auto"}
    found = kinds.get(config.parameters.get("isolation", "auto"))
    if found is None:
        raise _wrong(config, "isolation", "process or thread")
    return found


def patience(config: ModelConfig) -> float:
    """Seconds that a run may always take. Raises `InvalidArgument`."""
    return (_whole(config, "watchdog_ms") or _PATIENCE_MS) / 1000


def limited(config: ModelConfig) -> bool:
    """Whether the process must be the model's own. Raises `InvalidArgument` for a limit that is none."""
    return bool(_whole(config, "memory_limit_mb") or _cores(config))


def apply(config: ModelConfig) -> None:
    """Limit this process, before its model has threads. Raises `InvalidArgument`."""
    if cores := _cores(config):
        try:
            for thread in (os.getpid(), 0):  # the main one, and this one whose threads the model's will be
                os.sched_setaffinity(thread, cores)
        except OSError:
            raise _wrong(config, "cpu_affinity", "cores that this process may use") from None
    if mib := _whole(config, "memory_limit_mb"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + mib * _MIB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _whole(config: ModelConfig, key: str) -> int:
    text = config.parameters.get(key, "0")
    if not text.isdecimal():
        raise _wrong(config, key, "a whole number")
    return int(text)


def _cores(config: ModelConfig) -> set[int]:
    text = config.parameters.get("cpu_affinity", "")
    cores: set[int] = set()
    try:
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise _wrong(config, "cpu_affinity", "cores such as 0,2-3") from None
    return cores


def _wrong(config: ModelConfig, key: str, expected: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"parameter '{key}' of model '{config.name}' must be {expected}, got '{config.parameters[key]}'; correct it in "
        "config.pbtxt"
    )
