"""What the fake model does wrong when its input asks for it: each way in which an engine fails, by a value.

Each parameter of this name is a value, and a run with it anywhere in the first input
- `poison`: raises `Internal`; `oom`: asks for memory that no machine has;
- `crash`: raises SystemError, or with `allow_crash` "true" does as `kill`;
- `kill`, `segfault`, `abort`, `exit`: ends the process, by a signal or with status 3;
- `hang`: waits until its engine closes; `hang_gil`: the same for good, and keeps the interpreter to itself;
- `lost`: raises `EngineCrashed`, as an engine in a process of its own does when that has died;
- `sticky`: does so too, and so does every later run of this process, as with a GPU after an illegal access;
- `nan`: gives NaN in its own row of every output of floats; `short`: gives one row too few.

Two go by no value:
- `fault_file`: the path of a file with a word, read at the load and as each run begins; without a file all is well.
  load: it does not load; unavailable, error, memory: a run raises `Unavailable`, `Internal`, `DeviceOutOfMemory`;
  lost: as a GPU that is gone, every run raises `EngineCrashed` until the model is loaded again.
- `memory_rows`: a run of more rows raises `DeviceOutOfMemory`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.engines.base import DeviceOutOfMemory, EngineCrashed
from gateway.types import Array

_FOR_EVER = 1 << 30  # seconds
_TOO_MUCH = 1 << 46  # bytes


class Faults:
    """The faults of one model. `closing` is set when its engine closes."""

    def __init__(self, config: ModelConfig, closing: threading.Event) -> None:
        self._config = config
        self._closing = closing
        self._broken = False  # for the rest of this process
        known: dict[str, Callable[[], None]] = {
            "hang": self._hang,
            "hang_gil": _keep_the_interpreter,
            "crash": self._crash,
            "kill": _kill,
            "segfault": _read_nowhere,
            "exit": lambda: os._exit(3),
            "abort": os.abort,
            "lost": _lose,
            "sticky": self._break,
            "oom": _allocate,
            "poison": self._fail,
        }
        self._before = {name: strike for name, strike in known.items() if name in config.parameters}
        self._memory_rows = int(config.parameters.get("memory_rows", "0"))
        self._lost = False  # until it is loaded again
        self.any = bool(self._before or {"nan", "short", "fault_file", "memory_rows"} & config.parameters.keys())

    def before(self, first: Array) -> None:
        """What goes wrong with these rows instead of a run. Raises that, if it comes back at all."""
        if self._broken:
            _lose()
        self._device(len(first))
        for name, strike in self._before.items():
            if self._rows(name, first).any():
                strike()

    def after(self, first: Array, outputs: dict[str, Array]) -> dict[str, Array]:
        """The outputs as they come out of a run of these rows."""
        if "nan" in self._config.parameters and (rows := self._rows("nan", first)).any():
            for name, output in outputs.items():
                if output.dtype.kind == "f":
                    outputs[name] = output.copy()
                    outputs[name][rows] = np.nan
        if "short" in self._config.parameters and self._rows("short", first).any():
            outputs = {name: output[:-1] for name, output in outputs.items()}
        return outputs

    def _rows(self, parameter: str, first: Array) -> Array:
        """Which rows have the value of the parameter."""
        text = self._config.parameters[parameter]
        value = text.encode() if first.dtype == object else float(text)
        found: Array = np.any((first == value).reshape(len(first), -1), axis=1)
        return found

    def _device(self, rows: int) -> None:
        name, word = self._config.name, fault(self._config)
        self._lost = self._lost or word == "lost"
        if self._lost:
            raise EngineCrashed(f"the device of the fake model '{name}' is lost, as its fault_file says", sure=False)
        if word == "memory" or 0 < self._memory_rows < rows:
            raise DeviceOutOfMemory(f"the fake model '{name}' has no memory for {rows} rows")
        if word == "unavailable":
            raise errors.Unavailable(f"the fake model '{name}' is not to be reached, as its fault_file says")
        if word == "error":
            raise errors.Internal(f"the fake model '{name}' failed, as its fault_file says")

    def _fail(self) -> None:
        raise errors.Internal(f"the fake model '{self._config.name}' failed on its poison value")

    def _hang(self) -> None:
        self._closing.wait()
        raise errors.Unavailable("the fake model hung until its engine was closed")

    def _crash(self) -> None:
        if self._config.parameters.get("allow_crash") == "true":
            _kill()
        raise SystemError("the fake model crashed, as its input asked")

    def _break(self) -> None:
        self._broken = True
        _lose()


def fault(config: ModelConfig) -> str:
    """What the model's `fault_file` says now."""
    try:
        return Path(config.parameters["fault_file"]).read_text().strip()
    except (KeyError, OSError):
        return ""


def _lose() -> None:
    raise EngineCrashed("the fake model's device was lost, as its input asked")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _read_nowhere() -> None:
    ctypes.string_at(0)


def _keep_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(_FOR_EVER)


def _allocate() -> None:
    np.empty(_TOO_MUCH, np.uint8)
