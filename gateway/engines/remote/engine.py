"""The `Engine` whose model runs on another machine. See the package.

A batch goes out as one request: its rows are stacked here, and split by whoever gave the batch. Requests that differ
in their own parameters are sent apart, at once, because the server may heed them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from gateway import errors
from gateway.artefacts import Artefact
from gateway.config.model import ModelConfig
from gateway.engines.remote.client import LARGE, WAY, Client, Payload, Question
from gateway.engines.remote.options import Options
from gateway.engines.remote.pool import Pool, Target
from gateway.engines.threads import EngineThread
from gateway.types import Array, Batch, BatchResult, InferRequest, Parameter, Tensor

_BACK = 0.002  # seconds of a deadline that are kept for our own answer
_OURS = ("timeout", "binary_data_output")  # parameters that are between the client and us


class RemoteEngine:
    """One instance's way to the servers of a model, which all instances share."""

    warnings: tuple[str, ...]
    artefact: Artefact | None = None
    ahead = False
    contained = True
    widest = 1

    def __init__(self, config: ModelConfig, options: Options, pool: Pool, client: Client, thread: EngineThread) -> None:
        """`client` is any of the pool's: they all encode and decode alike. `thread` is the engine's own from now on."""
        self.provider = "remote:" + ",".join(each.name for each in options.addresses)
        self.warnings = options.warnings
        self.concurrency = options.concurrency * len(options.addresses)
        self._config = config
        self._timeout = options.timeout
        self._followed = len(config.parameters.get("fallback", "").split(",")) > 1
        self._pool = pool
        self._client = client
        self._thread = thread
        pool.join(self)

    async def run(self, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        """Send a batch on and yield its answer. Raises `GatewayError`."""
        started = time.monotonic_ns()
        asked = _Asked(batch, started / 1e9 + self._timeout, followed=self._followed)
        parts = _parts(batch)
        if len(parts) == 1:
            server, outputs = await self._ask(asked, parts[0])
        else:
            try:
                async with asyncio.TaskGroup() as tasks:
                    asking = [tasks.create_task(self._ask(asked, part)) for part in parts]
            except* errors.GatewayError as several:  # rare enough for a ring of references
                raise several.exceptions[0] from None
            answers = [task.result() for task in asking]
            server = answers[0][0]
            outputs = {name: np.concatenate([each[name] for _, each in answers]) for name in answers[0][1]}
        told = {"engine": f"remote:{server.name}"}
        yield BatchResult(outputs, started, asked.stacked or started, time.monotonic_ns(), parameters=told)

    async def close(self) -> None:
        """End the thread, and with the last engine's the connections."""
        await self._pool.leave(self)
        await self._thread.close()

    async def _ask(self, asked: _Asked, part: _Part) -> tuple[Target, dict[str, Array]]:
        if asked.end <= time.monotonic():
            raise errors.deadline_passed()
        ready: Payload | None = None

        async def payload() -> Payload:
            nonlocal ready
            if ready is None:
                ready = await self._thread.call(partial(self._encode, asked, part), hurry=asked.batch.hurry)
            return ready

        target, raw = await self._pool.ask(payload, asked.end, asked.urgent)
        decode = partial(self._decode, raw)
        return target, await self._thread.call(decode) if self._client.size(raw) > LARGE else decode()

    def _encode(self, asked: _Asked, part: _Part) -> Payload:
        arrays = asked.stack()
        rows = slice(part.start, part.start + part.rows) if part.rows < asked.batch.rows else None
        inputs = {}
        for tensor in self._config.inputs:
            if tensor.name in arrays:
                array = arrays[tensor.name] if rows is None else arrays[tensor.name][rows]
                array = _reshaped(array, tensor.reshape, tensor.dims)
                inputs[tensor.name] = Tensor.from_array(tensor.datatype, array)
        seconds = asked.end - WAY - time.monotonic() if asked.deadline else None
        return self._client.encode(Question(inputs, asked.batch.outputs, part.parameters, part.id, seconds))

    def _decode(self, raw: object) -> dict[str, Array]:
        try:
            outputs = self._client.decode(raw)
        except ValueError as problem:
            raise errors.Internal(
                f"the remote server of model '{self._config.name}' gave an answer that cannot be read: {problem}"
            ) from problem
        return {
            tensor.name: _reshaped(outputs[tensor.name], tensor.dims, tensor.reshape)
            for tensor in self._config.outputs
            if tensor.name in outputs
        }


class _Part(NamedTuple):
    """Neighbours of a batch that go out as one request."""

    start: int  # row
    rows: int
    parameters: Mapping[str, Parameter]
    id: str


class _Asked:
    """A batch, and the time it has."""

    def __init__(self, batch: Batch, patience: float, *, followed: bool) -> None:
        """Without a deadline it waits until `patience`; when it is `followed`, another engine stands by."""
        self.batch = batch
        deadlines = [request.deadline for request in batch.requests]
        known = [deadline for deadline in deadlines if deadline is not None]
        # The last of them counts: the others' own waits end by themselves, and must not end this one's.
        self.deadline = max(known) - _BACK if known and len(known) == len(deadlines) else None
        self.end = patience if self.deadline is None else min(self.deadline, patience)
        self.urgent = min(known) if known and followed else None  # another engine can answer by then
        self.stacked = 0  # ns
        self._inputs: dict[str, Array] | None = None

    def stack(self) -> dict[str, Array]:
        """The inputs of all rows; on the engine's thread."""
        if self._inputs is None:
            self._inputs = self.batch.stack()
            self.stacked = time.monotonic_ns()
        return self._inputs


def _parts(batch: Batch) -> list[_Part]:
    if len(batch.requests) < 2:
        request = batch.requests[0] if batch.requests else None
        return [_Part(0, batch.rows, _parameters(request), request.id if request else "")]
    parts, start = [], 0
    for parameters, requests in groupby(batch.requests, _parameters):
        rows = sum(request.rows for request in requests)
        parts.append(_Part(start, rows, parameters, ""))
        start += rows
    return parts


def _parameters(request: InferRequest | None) -> dict[str, Parameter]:
    if request is None or not request.parameters:
        return {}
    return {key: value for key, value in request.parameters.items() if key not in _OURS}


def _reshaped(array: Array, source: Sequence[int] | None, target: Sequence[int] | None) -> Array:
    """A tensor whose last dimensions are `source` with `target` instead: between what clients and what models see."""
    if source is None or target is None:
        return array
    batch = array.shape[: array.ndim - len(source)]
    sizes = iter([size for size, dim in zip(array.shape[len(batch) :], source, strict=True) if dim == -1])
    return array.reshape(*batch, *(next(sizes) if dim == -1 else dim for dim in target))
