"""`--record`: writes down when which request came, so that `gateway simulate` can play the same load again.

A recording is `arrivals-<utc>-<pid>.jsonl`. Its first line is `{"lockgate_recording": 1, "started", "version",
"sample"}`; each other is one request: `t` (seconds since the start), `model`, `version`, `rows`, `bytes`,
`deadline_ms` (what was left on arrival, or null), `priority`, `tenant` and, where the tensors are kept, `inputs`:
the name of a .npz file beside it. A line is written when its request ends, so they are not in the order of `t`.
Requests that no model could have served are left out. A BYTES tensor is kept as its wire bytes, because an array of
strings would need pickle, and `strings` has its shape; BF16 is kept as its raw 16 bits.

The event loop only hands over: one thread writes, and what it has no time for is dropped and counted.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import queue
import random
import threading
import time
import zipfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
import orjson

from gateway import __version__, errors
from gateway.telemetry import log_event
from gateway.types import DataType, Infer, InferRequest, InferResponse, Tensor

_CLOSE_SECONDS = 10.0
_MAX_WAITING = 4096  # requests that wait for the thread
_MAX_WAITING_BYTES = 64 << 20  # and the bytes of their tensors, which live as long


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """What the operator chose; see the settings of the same names."""

    folder: Path
    inputs: bool = False
    sample: float = 1.0
    max_bytes: int = 256 << 20


class _Arrival(NamedTuple):
    line: dict[str, Any]
    inputs: Mapping[str, Tensor]
    size: int


def recording(inner: Infer, recorder: Recorder) -> Infer:
    """Wrap an endpoint so that an open recorder notes its requests, all or a sample."""

    def endpoint(request: InferRequest) -> Any:
        return recorded(request) if recorder.wants() else inner(request)

    async def recorded(request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        arrived = time.monotonic()
        is_load = True
        try:
            async with aclosing(inner(request)) as responses:
                async for response in responses:
                    yield response
        except errors.GatewayError as error:
            is_load = not _unservable(error)
            raise
        finally:
            if is_load:
                recorder.note(request, arrived)

    return endpoint


def _unservable(error: errors.GatewayError) -> bool:
    kinds = errors.InvalidArgument | errors.NotFound | errors.Unsupported
    return isinstance(error, kinds) or error.reason == errors.Unavailable.reason


class Recorder:
    """A recording, from entering to leaving `async with`; leaving writes what is handed over and closes the file.

    `written` and `dropped` count requests, `dropped` those that were to be recorded and are not. When a write fails or `max_bytes` are reached it says so in the log, once,
    and records no more; it never fails a request.
    """

    def __init__(self, options: RecordOptions) -> None:
        self.written = 0
        self._options = options
        self._stem = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
        self._started = time.monotonic()
        self._waiting: queue.Queue[_Arrival | None] = queue.Queue(_MAX_WAITING)
        # Each is counted by one thread only: bytes and requests by the loop, then by the writer.
        self._handed = self._released = 0
        self._refused = self._lost = 0
        self._bytes = 0
        self._full = False

    async def __aenter__(self) -> Self:
        """Raises `InvalidArgument` when the folder cannot be written to."""
        try:
            self._file = await asyncio.to_thread(self._open)
        except OSError as problem:
            raise errors.InvalidArgument(
                f"--record: {self._options.folder} cannot be written to: {problem.strerror}. Give another folder, or "
                "correct its permissions"
            ) from None
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._close)
        log_event("recording_closed", file=self._name, written=self.written, dropped=self.dropped)

    @property
    def dropped(self) -> int:
        """Requests that were to be recorded and are not."""
        return self._refused + self._lost

    def wants(self) -> bool:
        """Whether to note the next request: the sample's draw, while there is room."""
        if self._options.sample < 1 and random.random() >= self._options.sample:
            return False
        if self._full:
            self._refused += 1
        return not self._full

    def note(self, request: InferRequest, arrived: float) -> None:
        """Hand over a request that came at this `time.monotonic`, if the writer keeps up."""
        inputs = request.inputs if self._options.inputs else {}
        size = request.size if inputs else 0
        waiting = self._handed - self._released
        # A lone request is always let in, however large.
        if waiting and waiting + size > _MAX_WAITING_BYTES:
            self._refused += 1
            return
        try:
            self._waiting.put_nowait(_Arrival(self._line(request, arrived), inputs, size))
        except queue.Full:
            self._refused += 1
        else:
            self._handed += size

    def _line(self, request: InferRequest, arrived: float) -> dict[str, Any]:
        left = None if request.deadline is None else round((request.deadline - arrived) * 1000, 3)
        return {
            "t": round(arrived - self._started, 6),
            "model": request.model_name,
            "version": request.model_version,
            "rows": request.rows,
            "bytes": request.size,
            "deadline_ms": left,
            "priority": request.priority,
            "tenant": request.tenant,
        }

    # --- on other threads

    @property
    def _name(self) -> str:
        return f"arrivals-{self._stem}.jsonl"

    def _open(self) -> IO[bytes]:
        self._options.folder.mkdir(parents=True, exist_ok=True)
        file = self._create(self._name)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        header = {"lockgate_recording": 1, "started": started, "version": __version__}
        self._bytes += file.write(orjson.dumps(header | {"sample": self._options.sample}) + b"\n")
        file.flush()
        return file

    def _create(self, name: str) -> IO[bytes]:
        # What clients send is nobody's but theirs and the operator's.
        return open(self._options.folder / name, "xb", opener=lambda path, flags: os.open(path, flags, 0o600))

    def _close(self) -> None:
        self._waiting.put(None)
        self._thread.join(_CLOSE_SECONDS)  # a disk that hangs must not hold up the stop

    def _write_all(self) -> None:
        with self._file:
            while (arrival := self._waiting.get()) is not None:
                try:
                    self._write(arrival)
                except OSError as problem:
                    self._stop("recording_failed", str(problem))
                except Exception as problem:  # noqa: BLE001 - what one request holds must not end the recording of the others
                    if not self._lost:
                        log_event("arrival_not_recorded", logging.WARNING, problem, file=self._name)
                    self._lost += 1
                self._released += arrival.size

    def _write(self, arrival: _Arrival) -> None:
        if self._full:
            self._lost += 1
            return
        tensors = b""
        name = f"inputs-{self._stem}-{self.written:08d}.npz"
        if arrival.inputs:
            tensors = _npz(arrival.inputs)
            arrival.line.update(inputs=name, strings=_strings(arrival.inputs))
        line = orjson.dumps(arrival.line) + b"\n"
        if self._bytes + len(line) + len(tensors) > self._options.max_bytes:
            self._stop("recording_full", f"--record-max-bytes {self._options.max_bytes} are written")
            return
        if tensors:
            with self._create(name) as file:
                file.write(tensors)
        self._file.write(line)
        self._bytes += len(line) + len(tensors)
        self.written += 1
        if self._waiting.empty():
            self._file.flush()

    def _stop(self, event: str, reason: str) -> None:
        self._full = True
        self._lost += 1
        log_event(event, logging.WARNING, file=self._name, written=self.written, reason=reason)


def _strings(inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in inputs.items() if tensor.datatype is DataType.BYTES}


def _npz(inputs: Mapping[str, Tensor]) -> bytes:
    """Tensors in numpy's own format. Not `np.savez`: it would take a tensor's name for one of its arguments."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, tensor in inputs.items():
            raw = tensor.datatype is DataType.BYTES
            array = np.frombuffer(tensor.wire, np.uint8) if raw else tensor.array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return packed.getvalue()
