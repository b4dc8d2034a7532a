"""Child processes for tests: one nursery for many tests, and models of the fake backend in its children."""

import asyncio
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gateway import engines
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines.base import Engine, EngineSpec
from gateway.engines.isolated.children import Children
from gateway.statistics import Statistics
from gateway.types import Array, Batch, BatchResult


@asynccontextmanager
async def kept(children: Children):
    """The children, entered and left by one task, though a fixture may be set up and torn down by two."""
    there, over = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with children:
            there.set()
            await over.wait()

    task = asyncio.create_task(hold())
    await there.wait()
    try:
        yield children
    finally:
        over.set()
        await task


def children(**more: Any) -> Children:
    return Children(Statistics(), "process", **more)


def fake_spec(home: Children, folder: Path, *, dims: str = "2", kind: str = "FP32", **parameters: str) -> EngineSpec:
    """A model of the fake backend with one input IN and output OUT."""
    text = "backend: 'fake' max_batch_size: 64"
    text += f" input {{ name: 'IN' data_type: TYPE_{kind} dims: [{dims}] }}"
    text += f" output {{ name: 'OUT' data_type: TYPE_{kind} dims: [{dims}] }}"
    for key, value in parameters.items():
        text += f" parameters {{ key: '{key}' value {{ string_value: '{value}' }} }}"
    source = Source("m/config.pbtxt", text)
    proto = parse_text(source)
    proto.name = "m"
    return EngineSpec(build(proto, source), "1", folder, "cpu", children=home)


@asynccontextmanager
async def opened(spec: EngineSpec, count: int = 1):
    """Its engines, closed in the end."""
    created = await engines.create(spec, count)
    try:
        yield created
    finally:
        for engine in created:
            await engine.close()


async def run(engine: Engine, *values: float, predicted: float | None = None, **more: Any) -> BatchResult:
    """One run of a row for each value, its one result."""
    rows = np.repeat(np.array(values, "<f4")[:, np.newaxis], 2, axis=1)
    return await run_arrays(engine, {"IN": rows}, predicted=predicted, **more)


async def run_arrays(engine: Engine, inputs: dict[str, Array], **more: Any) -> BatchResult:
    return await result_of(engine, Batch(len(next(iter(inputs.values()))), lambda: inputs, **more))


async def result_of(engine: Engine, batch: Batch) -> BatchResult:
    """The one result of this batch."""
    async with aclosing(engine.run(batch)) as results:
        given = [result async for result in results]
    assert len(given) == 1
    return given[0]
