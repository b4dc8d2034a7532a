"""Runs an instance before it is ready, so that no client pays for first-run allocation and kernel choice.

The samples are the configuration's `model_warmup`. Without any, one row of zeros is run where every shape
is fixed; whether that succeeds says nothing about the model, so its failure is only logged.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from pathlib import Path

import numpy as np

from gateway import errors
from gateway.config.model import ModelConfig, Warmup, WarmupInput
from gateway.engines.base import Engine
from gateway.scheduling.batch import stack
from gateway.telemetry import log_event
from gateway.types import Array, Batch, DataType, InferRequest, Tensor, element_count


async def warm_up(engine: Engine, config: ModelConfig, folder: Path, cores: tuple[int, ...]) -> float | None:
    """Run every warm-up sample at each of these numbers of cores.

    Returns the seconds that a row of zeros took on the first of them, None without such a run. `folder` is the model's; sample files live in its `warmup/`. Raises `InvalidArgument` for a sample that
    cannot be made and `Internal` for one that fails.
    """
    for sample in config.warmup:
        request = await asyncio.to_thread(_request, sample, config, folder)
        requests = [request] * (max(sample.batch_size, 1) if config.max_batch_size else 1)  # as many as Triton sends
        try:
            for _ in range(max(sample.count, 1)):
                await _run(engine, requests, config, cores)
        except Exception as problem:  # an engine may raise anything, and the operator must know which sample did it
            raise errors.Internal(f"model_warmup sample '{sample.name}' failed: {problem}") from problem
    if not config.warmup and measurable(config):
        try:
            return await _run(engine, [zeros(config)], config, cores)
        except Exception as problem:  # noqa: BLE001 - zeros may be input that this model rightly refuses
            log_event("not_warmed_up", model=config.name, reason=f"it does not run on zeros: {problem}")
    return None


async def _run(engine: Engine, requests: list[InferRequest], config: ModelConfig, cores: tuple[int, ...]) -> float:
    first = 0.0
    for number in cores:
        started = time.monotonic()
        batch = Batch(len(requests), lambda: stack(requests, config), (), number, requests=requests)
        async with aclosing(engine.run(batch)) as results:
            async for result in results:
                for answer in result.answers or ():
                    if answer.error is not None:
                        raise answer.error
        first = first or time.monotonic() - started
    return first


def measurable(config: ModelConfig) -> bool:
    """Whether rows of zeros are typical of the model: open dimensions say nothing of what will come, and zeros are no shape."""
    return not config.is_code and not any(-1 in tensor.dims or tensor.whole for tensor in config.inputs)


def zeros(config: ModelConfig, rows: int = 1) -> InferRequest:
    """A request of rows of zeros and empty strings. Its shapes must be fixed."""
    lead = (rows,) if config.max_batch_size else ()
    return InferRequest(
        config.name,
        {
            tensor.name: Tensor.from_array(tensor.datatype, _fill(tensor.datatype, (*lead, *tensor.dims)))
            for tensor in config.inputs
            if not tensor.optional
        },
    )


def _fill(datatype: DataType, shape: tuple[int, ...]) -> Array:
    if datatype is DataType.BYTES:
        return np.full(shape, b"", dtype=object)
    return np.zeros(shape, datatype.dtype)


def _request(sample: Warmup, config: ModelConfig, folder: Path) -> InferRequest:
    """A sample's one row as a client would send it. Blocking: reads files."""
    whole = {tensor.name for tensor in config.inputs if tensor.whole}
    inputs = {}
    for name, spec in sample.inputs.items():
        row = _data(sample, name, spec, folder)
        array = row[np.newaxis] if config.max_batch_size and name not in whole else row
        inputs[name] = Tensor.from_array(spec.datatype, array)
    return InferRequest(config.name, inputs)


def _data(sample: Warmup, name: str, spec: WarmupInput, folder: Path) -> Array:
    if spec.source == "zero":
        return _fill(spec.datatype, spec.dims)
    if spec.source == "random":
        return _random(spec.datatype, spec.dims)
    return _from_file(sample, name, spec, folder)


def _random(datatype: DataType, dims: tuple[int, ...]) -> Array:
    generator = np.random.default_rng(0)
    if datatype is DataType.BYTES:
        return np.full(dims, b"warmup", dtype=object)
    if datatype.dtype.kind == "f":
        return generator.random(dims).astype(datatype.dtype)
    return generator.integers(0, 2, dims).astype(datatype.dtype)


def _from_file(sample: Warmup, name: str, spec: WarmupInput, folder: Path) -> Array:
    where = f"model_warmup sample '{sample.name}' input '{name}': file 'warmup/{spec.source}'"
    try:
        wire = (folder / "warmup" / spec.source).read_bytes()
    except OSError as problem:
        raise errors.InvalidArgument(
            f"{where} cannot be read ({problem.strerror}); put it in the model's folder"
        ) from None
    expected = element_count(spec.dims) * spec.datatype.itemsize
    if spec.datatype is not DataType.BYTES:
        if len(wire) < expected:
            raise errors.InvalidArgument(f"{where} holds {len(wire)} bytes, its dims {list(spec.dims)} need {expected}")
        wire = wire[:expected]  # a file may hold more, as in Triton
    try:
        return Tensor(spec.datatype, spec.dims, wire).array
    except ValueError as problem:
        raise errors.InvalidArgument(f"{where}: {problem}") from None
