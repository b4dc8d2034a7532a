"""`Golden`: an input of a version and the answer to it, by which a child that answers otherwise is found out.

The input is a row of zeros where every shape is fixed, and else that of the first batch that went well. A model that
answers the same input otherwise each time cannot be tested so, and is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gateway.config.model import ModelConfig
from gateway.types import Array, Batch, DataType

_RELATIVE = 1e-3  # of the largest value: a wide and a narrow session add up in different orders
_MOST = 1 << 20  # bytes


@dataclass(slots=True)
class Golden:
    """What the instances of one version share; `lock` is held by the one that tests. `varies` says that none can."""

    inputs: Mapping[str, Array] | None = None
    outputs: Mapping[str, Array] | None = None
    varies: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def of(cls, config: ModelConfig) -> Golden:
        """For a version that nobody has run."""
        return cls(_zeros(config))

    @property
    def ready(self) -> bool:
        """Whether there is an answer to compare with."""
        return self.outputs is not None and not self.varies

    def batch(self) -> Batch | None:
        """The test, to be run; None when there is none."""
        inputs = self.inputs
        if inputs is None or self.varies:
            return None
        return Batch(_rows(inputs), lambda: dict(inputs))

    def offer(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> bool:
        """Take a batch that went well, if there is no other input to test with and it is small; whether it was taken."""
        size = sum(array.nbytes for array in (*inputs.values(), *outputs.values()))
        if self.inputs is not None or self.varies or size > _MOST:
            return False
        self.inputs = {name: array.copy() for name, array in inputs.items()}
        self.outputs = outputs
        return True

    def withdraw(self) -> None:
        """Do not test with what was offered."""
        self.inputs = self.outputs = None

    def judge(self, outputs: Mapping[str, Array]) -> bool:
        """Whether this is the answer to the test. The first one is."""
        if self.outputs is None:
            self.outputs = outputs
            return True
        return self.outputs.keys() == outputs.keys() and all(
            alike(self.outputs[name], outputs[name]) for name in outputs
        )


def alike(one: Array, other: Array) -> bool:
    """Whether these are the same answer, but for rounding where they are floating-point numbers."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    finite = np.abs(one[np.isfinite(one)])
    margin = _RELATIVE * float(finite.max()) if finite.size else 0.0
    return bool(np.allclose(one, other, rtol=_RELATIVE, atol=margin, equal_nan=True))


def _zeros(config: ModelConfig) -> dict[str, Array] | None:
    if not config.by_rows:
        return None
    lead = (1,) if config.max_batch_size else ()
    inputs: dict[str, Array] = {}
    for tensor in config.inputs:
        dims = tensor.dims if tensor.reshape is None else tensor.reshape
        if tensor.optional:
            continue
        if -1 in dims:
            return None
        shape = (*lead, *dims)
        inputs[tensor.name] = (
            np.full(shape, b"", dtype=object)
            if tensor.datatype is DataType.BYTES
            else np.zeros(shape, tensor.datatype.dtype)
        )
    return inputs


def _rows(inputs: Mapping[str, Array]) -> int:
    return next((len(array) for array in inputs.values() if array.shape), 1)
