"""A good run of one row, kept to try an engine with that has failed, and what its answer must be like.

The answer must have the outputs, types and shapes of the one that was kept, no NaN or infinity where that had none, and
not one value all over where that had several. It is not compared number by number: links differ in precision, and
some models draw lots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from gateway import errors
from gateway.engines.base import Engine
from gateway.types import Array, Batch, BatchResult

_MOST = 16 << 20  # bytes


class Sample:
    """The first run that ended well and can be repeated."""

    def __init__(self, *, batched: bool) -> None:
        """`batched`: the first dimension of every array is the rows'."""
        self.wanted = True  # no run is kept yet, and one can be
        self._batched = batched
        self._kept: tuple[dict[str, Array], dict[str, Array], tuple[str, ...]] | None = None

    def __bool__(self) -> bool:
        return self._kept is not None

    def watch(self, batch: Batch) -> tuple[Batch, Callable[[BatchResult], bool]]:
        """The batch to run in its place, and what to tell of its result; that says whether the run was kept."""
        inputs: dict[str, Array] = {}

        def stack() -> dict[str, Array]:
            arrays = batch.stack()
            inputs.update(self._rows(arrays))
            return arrays

        def ended(result: BatchResult) -> bool:
            # An engine that answers request by request takes no batch that is of no request.
            if self.wanted and inputs and result.answers is None:
                self._kept = inputs, self._rows(result.outputs), batch.outputs
            first, self.wanted = self.wanted, False
            return first and self._kept is not None

        return replace(batch, stack=stack, gather=None), ended

    def _rows(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        rows = {name: array[:1] if self._batched else array for name, array in arrays.items()}
        if sum(array.nbytes for array in rows.values()) > _MOST:
            return {}
        return {name: array.copy() for name, array in rows.items()}

    async def try_on(self, engine: Engine) -> None:
        """Run it, if there is one. Raises what the engine does, and `Internal` for an answer that cannot be right."""
        if self._kept is None:
            return
        inputs, expected, names = self._kept
        batch = Batch(1, lambda: {name: array.copy() for name, array in inputs.items()}, names, engine.widest)
        outputs: Mapping[str, Array] = {}
        async with aclosing(engine.run(batch)) as results:
            async for result in results:
                outputs = result.outputs
        for name, array in expected.items():
            if why := _wrong(outputs.get(name), array):
                raise errors.Internal(f"it answers a request that was answered before with an output '{name}' {why}")


def _wrong(got: Array | None, expected: Array) -> str:
    if got is None:
        return "missing"
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return f"of {got.dtype} {list(got.shape)}, where it was {expected.dtype} {list(expected.shape)}"
    if got.dtype.kind != "f":
        return ""
    if not np.isfinite(got).all() and np.isfinite(expected).all():
        return "that is not finite"
    return "of one value all over" if got.size > 1 and np.ptp(got) == 0 and np.ptp(expected) > 0 else ""
