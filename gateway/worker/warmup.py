"""Runs an instance before it is ready, so that no client pays for first-run allocation and kernel choice.

The samples are the configuration's `model_warmup`. Without any, one row of zeros is run where every shape
is fixed; whether that succeeds says nothing about the model, so its failure is only logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path

import numpy as np

from gateway import errors
from gateway.config.model import ModelConfig, Warmup, WarmupInput
from gateway.engines.base import Engine
from gateway.types import Array, Batch, DataType, Tensor, element_count

_log = logging.getLogger("gateway.worker")


async def warm_up(engine: Engine, config: ModelConfig, folder: Path, cores: tuple[int, ...]) -> None:
    """Run every warm-up sample at each of these numbers of cores.

    `folder` is the model's; sample files live in its `warmup/`. Raises `InvalidArgument` for a sample that
    cannot be made and `Internal` for one that fails.
    """
    for sample in config.warmup:
        inputs = {name: _data(sample, name, spec, config, folder) for name, spec in sample.inputs.items()}
        try:
            for _ in range(max(sample.count, 1)):
                await _run(engine, inputs, max(sample.batch_size, 1), cores)
        except Exception as problem:
            raise errors.Internal(f"model_warmup sample '{sample.name}' failed: {problem}") from problem
    if not config.warmup and not any(-1 in tensor.dims for tensor in config.inputs):
        try:
            await _run(engine, _zeros(config), 1, cores)
        except Exception as problem:  # noqa: BLE001 - zeros may be input that this model rightly refuses
            _log.info("model '%s' does not run on zeros, so it is not warmed up: %s", config.name, problem)


async def _run(engine: Engine, inputs: Mapping[str, Array], rows: int, cores: tuple[int, ...]) -> None:
    for number in cores:
        async with aclosing(engine.run(Batch(rows, lambda: dict(inputs), (), number))) as results:
            async for _ in results:
                pass


def _zeros(config: ModelConfig) -> dict[str, Array]:
    lead = (1,) if config.max_batch_size else ()
    return {
        tensor.name: _fill(tensor.datatype, (*lead, *(tensor.dims if tensor.reshape is None else tensor.reshape)))
        for tensor in config.inputs
        if not tensor.optional
    }


def _fill(datatype: DataType, shape: tuple[int, ...]) -> Array:
    if datatype is DataType.BYTES:
        return np.full(shape, b"", dtype=object)
    return np.zeros(shape, datatype.dtype)


def _data(sample: Warmup, name: str, spec: WarmupInput, config: ModelConfig, folder: Path) -> Array:
    """One input of a sample, the same rows `batch_size` times over."""
    if spec.source == "zero":
        row = _fill(spec.datatype, spec.dims)
    elif spec.source == "random":
        row = _random(spec.datatype, spec.dims)
    else:
        row = _from_file(sample, name, spec, folder)
    return np.stack([row] * max(sample.batch_size, 1)) if config.max_batch_size else row


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
    if spec.datatype is not DataType.BYTES and len(wire) != expected:
        raise errors.InvalidArgument(f"{where} holds {len(wire)} bytes, its dims {list(spec.dims)} need {expected}")
    try:
        return Tensor(spec.datatype, spec.dims, wire=wire).array
    except ValueError as problem:
        raise errors.InvalidArgument(f"{where}: {problem}") from None
