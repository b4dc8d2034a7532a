"""The fake backend, for tests and for measuring the gateway without a model. Shipped; needs no model file.

Output i is made from input i (the last one if there are fewer). Where type and shape agree it is that input;
otherwise every element of a row is that row's first element, converted: numbers to BYTES as text, BYTES to
numbers as their length. So row i of an answer shows whether it belongs to row i of the request.

Parameters in `config.pbtxt`, all optional:
- `a_us`, `b_us`: a run takes a + b * rows microseconds, asleep, without the GIL.
- `slow_file`: the path of a file with a number, read as each run begins, that the run's time is multiplied by: a
  device that slows down and recovers. Replace the file in one step (rename). Without a file, or a number, it is 1.
- `poison`, `hang`, `crash` and the other faults of `faults.py`: a value; what a run does that has it in its first input.
- `fault_file`, `memory_rows`: what goes wrong whatever the input, see `faults.py`.
- `drift_file`: the path of a file; a model loaded while there is one answers numbers that are 1 too large.
- `rows_delta`: answer with so many rows too many (or, negative, too few).
- `gate`: the path of a `Gate`; every run waits there until released, or passes if nobody holds the gate.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import numpy as np

from gateway import errors
from gateway.config.model import ModelConfig, TensorConfig
from gateway.engines.base import EngineSpec
from gateway.engines.faults import Faults, fault
from gateway.types import Array, Batch, DataType


def load(spec: EngineSpec, count: int) -> list[FakeModel]:
    """Make one model for each of `count` engines. Raises `InvalidArgument` for a parameter that is no number,
    `Unavailable` where `fault_file` says so.
    """
    if fault(spec.config) == "load":
        raise errors.Unavailable(f"the fake model '{spec.config.name}' does not load, as its fault_file says")
    return [FakeModel(spec.config) for _ in range(count)]


class FakeModel:
    """Computes as the module says. `runs` holds the row counts of its last 1,000 runs, counted as they begin."""

    provider = "Fake"
    warnings: tuple[str, ...] = ()
    widest = 1

    def __init__(self, config: ModelConfig) -> None:
        self.runs: deque[int] = deque(maxlen=1000)
        self._config = config
        self._base = _number(config, "a_us") / 1e6
        self._per_row = _number(config, "b_us") / 1e6
        self._rows_delta = int(_number(config, "rows_delta"))
        self._slow_file = config.parameters.get("slow_file", "")
        self._gate = config.parameters.get("gate", "")
        self._closing = threading.Event()
        self._faults = Faults(config, self._closing)
        drift_file = config.parameters.get("drift_file", "")
        self._drift = int(bool(drift_file) and Path(drift_file).exists())

    def compute(self, inputs: dict[str, Array], batch: Batch) -> dict[str, Array]:
        """See `Loaded.compute`."""
        self.runs.append(batch.rows)
        if self._gate:
            _wait_at(self._gate, batch.rows)
        arrays = [inputs[tensor.name] for tensor in self._config.inputs if tensor.name in inputs]
        if self._faults.any:
            self._faults.before(arrays[0])
        slowness = _slowness(self._slow_file) if self._slow_file else 1.0
        time.sleep((self._base + self._per_row * batch.rows) * slowness)
        outputs = {
            tensor.name: self._output(tensor, arrays[min(index, len(arrays) - 1)])
            for index, tensor in enumerate(self._config.outputs)
            if not batch.outputs or tensor.name in batch.outputs
        }
        return self._faults.after(arrays[0], outputs) if self._faults.any else outputs

    def interrupt(self) -> None:
        """Let a hung run end."""
        self._closing.set()

    def _output(self, tensor: TensorConfig, source: Array) -> Array:
        batched = self._config.max_batch_size > 0
        rows = source if batched else source[np.newaxis]
        dims = tensor.dims if tensor.reshape is None else tensor.reshape
        result = _rows_of(tensor.datatype, dims, rows)
        if self._drift and tensor.datatype is not DataType.BYTES:
            result = result + self._drift
        if not batched:
            return cast("Array", result[0])
        return np.resize(result, (len(rows) + self._rows_delta, *result.shape[1:])) if self._rows_delta else result


def _rows_of(datatype: DataType, dims: tuple[int, ...], source: Array) -> Array:
    given = source.shape[1:]
    alike = len(given) == len(dims)
    if (
        source.dtype == datatype.dtype
        and alike
        and all(want in (-1, got) for want, got in zip(dims, given, strict=True))
    ):
        return source
    shape = tuple((given[axis] if alike else 1) if dim == -1 else dim for axis, dim in enumerate(dims))
    result = np.empty((len(source), *shape), datatype.dtype)
    for target, row in zip(result, source, strict=True):
        target[...] = _convert(row.flat[0], datatype) if row.size else _convert(0, datatype)
    return result


def _convert(value: object, datatype: DataType) -> object:
    if isinstance(value, bytes):
        return value if datatype is DataType.BYTES else len(value)
    return str(value).encode() if datatype is DataType.BYTES else value


def _number(config: ModelConfig, key: str) -> float:
    text = config.parameters.get(key, "0")
    try:
        return float(text)
    except ValueError:
        raise errors.InvalidArgument(
            f"parameter '{key}' of model '{config.name}' must be a number, got '{text}'; correct it in config.pbtxt"
        ) from None


def _slowness(path: str) -> float:
    try:
        return max(0.0, float(Path(path).read_bytes()))
    except (OSError, ValueError):
        return 1.0


def _wait_at(path: str, rows: int) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(path)
            line.sendall(str(rows).encode())
            line.recv(1)
        except (FileNotFoundError, ConnectionError):
            return  # nobody holds the gate


class Gate:
    """Holds every run of the fake models whose parameter `gate` is its path, in this process or another.

    For tests that need to know that a run has begun and to say when it ends, without clocks. A context
    manager: leaving it releases all. The path must be short (a Unix socket's, about 100 bytes).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._arrived: asyncio.Queue[HeldRun] = asyncio.Queue()
        self._held: list[HeldRun] = []

    async def __aenter__(self) -> Self:
        # Not asyncio's server: what that has accepted as it is closed, it neither tells of nor closes.
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(str(self._path))
        self._listener.listen()
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        for run in self._held:
            run.release()
        self._path.unlink(missing_ok=True)

    async def arrival(self) -> HeldRun:
        """The next run at the gate, in order of arrival."""
        return await self._arrived.get()

    def _accept(self) -> None:
        self._held.append(HeldRun(self._listener.accept()[0], self._arrived))


class HeldRun:
    """One run that waits at a gate; `rows` is its batch's."""

    def __init__(self, line: socket.socket, arrived: asyncio.Queue[HeldRun]) -> None:
        self.rows = 0
        self._line = line
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(line, self._read)

    def _read(self) -> None:
        self._loop.remove_reader(self._line)
        if data := self._line.recv(32):
            self.rows = int(data)
            self._arrived.put_nowait(self)

    def release(self) -> None:
        """Let the run go on. Harmless when it has."""
        if self._line.fileno() >= 0:
            self._loop.remove_reader(self._line)
            self._line.close()
