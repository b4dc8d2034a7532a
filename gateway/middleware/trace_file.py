"""Triton's trace files: a JSON array of activities, written off the event loop.

With a log frequency of N each N traces become a file `PATH.0`, `PATH.1` and so on. Without one all go to PATH. A file is
a complete array once it is full or the gateway has stopped. The path is the operator's; no client can name another, and
whatever a client sends only its own trace says less.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from gateway.errors import GatewayError
from gateway.middleware.tracing import Sampling, Trace
from gateway.telemetry import log_event
from gateway.types import DataType, Tensor

_MANY = 256  # traces that are written at once, however many a file is to have
_BATCHES = 64  # that wait for a slow disk; more are lost
Batch: TypeAlias = list[tuple[Trace, tuple[str, ...]]]


class TraceFile:
    """Where traces are written; an async context manager that writes the last of them when it is left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: Batch = []
        self._index = 0
        self._in_file = 0  # traces of the file that is being filled
        self._begun: set[Path] = set()  # files whose arrays have no end yet; the writer's
        self._frequency = 0
        self._queue: asyncio.Queue[tuple[Batch, Path, bool] | None] = asyncio.Queue(_BATCHES)
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._group.create_task(self._write_all(), name="trace file")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hand_over(full=True)
        await self._queue.put(None)
        await self._group.__aexit__(None, None, None)

    def keep(self, trace: Trace, sampling: Sampling) -> None:
        """Have a trace written."""
        if sampling.log_frequency != self._frequency:
            self._hand_over(full=True)
            self._frequency = sampling.log_frequency
        self._waiting.append((trace, sampling.level))
        full = 0 < self._frequency <= self._in_file + len(self._waiting)
        if full or len(self._waiting) >= _MANY:
            self._hand_over(full=full)

    def _hand_over(self, *, full: bool) -> None:
        path = self._path
        batch, self._waiting = self._waiting, []
        if self._frequency:
            path = path.with_name(f"{path.name}.{self._index}")
            self._in_file += len(batch)
            if full and self._in_file:
                self._index, self._in_file = self._index + 1, 0
        try:
            self._queue.put_nowait((batch, path, full and path != self._path))
        except asyncio.QueueFull:
            self._lost(batch, "the disk is too slow for so many; raise trace_rate")

    async def _write_all(self) -> None:
        while (batch := await self._queue.get()) is not None:
            await self._attempt(*batch)
        for path in sorted(self._begun):
            await self._attempt([], path, full=True)

    async def _attempt(self, batch: Batch, path: Path, full: bool) -> None:
        try:
            await asyncio.to_thread(self._write, batch, path, full=full)
        except OSError as problem:
            self._lost(batch, problem.strerror or "")

    def _lost(self, batch: Batch, reason: str) -> None:
        log_event("traces_lost", logging.ERROR, traces=len(batch), file=self._path.name, reason=reason)

    def _write(self, batch: Batch, path: Path, *, full: bool) -> None:
        text = ",\n".join(
            json.dumps(each) for trace, level in batch for part in trace.family for each in activities(part, level)
        )
        begun = path in self._begun
        if not (batch or begun):
            return
        with path.open("a" if begun else "w", encoding="utf-8") as file:
            file.write(f"{',' if begun else '['}\n{text}" if batch else "")
            file.write("\n]\n" if full else "")
        (self._begun.discard if full else self._begun.add)(path)


def activities(trace: Trace, level: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A trace as Triton writes it: whose it is, its timestamps, its tensors."""
    request = trace.request
    head = {"id": trace.number, "model_name": request.model_name, "model_version": -1}
    with suppress(ValueError):  # a client may ask for a version that is no number
        head["model_version"] = int(trace.version)
    if request.id:
        head["request_id"] = request.id
    if trace.parent:
        head["parent_id"] = trace.parent
    yield head
    for name, ns in trace.timestamps(wanted="TIMESTAMPS" in level):
        yield {"id": trace.number, "timestamps": [{"name": name, "ns": ns}]}
    seen = [("TENSOR_QUEUE_INPUT", trace.inputs), *(("TENSOR_BACKEND_OUTPUT", each) for each in trace.outputs)]
    for activity, tensors in seen:
        for name, tensor in tensors.items():
            yield {"id": trace.number, "activity": activity, "tensor": {"name": name, **_told(tensor)}}


def _told(tensor: Tensor) -> dict[str, str]:
    told = {"shape": ",".join(map(str, tensor.shape)), "dtype": tensor.datatype.value}
    with suppress(ValueError, GatewayError):  # bytes that are not what the client says have been refused
        told = {"data": ",".join(map(_text(tensor.datatype), tensor.array.reshape(-1).tolist())), **told}
    return told


def _text(datatype: DataType) -> Any:
    return _quoted if datatype is DataType.BYTES else str


def _quoted(element: bytes | str) -> str:
    text = element if isinstance(element, str) else bytes(element).decode(errors="replace")
    return json.dumps(text, ensure_ascii=False)
