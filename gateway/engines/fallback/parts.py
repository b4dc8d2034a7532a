"""A batch that does not fit into memory, run in parts: how it is cut, and what the parts' answers make together.

A part has whole requests where the batch has several; a request of many rows alone is cut between rows, and its parts are
of no request. Row i of the joined answer is of row i of the batch, which is checked for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gateway import errors
from gateway.types import Array, Batch, BatchResult


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a batch; `first` is the place of its first request there."""

    batch: Batch
    first: int = 0


class _Stacked:
    """A batch's inputs, stacked once, on the thread of whoever asks first."""

    def __init__(self, stack: Callable[[], dict[str, Array]]) -> None:
        self._stack = stack
        self._arrays: dict[str, Array] | None = None

    def rows(self, start: int, stop: int) -> dict[str, Array]:
        if self._arrays is None:
            self._arrays = self._stack()
        return {name: array[start:stop] for name, array in self._arrays.items()}


def cut(part: Part, limit: int) -> list[Part]:
    """The part as several of at most `limit` rows, or a little more where one request has them.

    A list of one when it cannot be cut.
    """
    batch, stacked = part.batch, _Stacked(part.batch.stack)
    parts = []
    for start, stop, first, last in _cuts(batch, limit):
        rows = replace(
            batch,
            rows=stop - start,
            stack=lambda start=start, stop=stop: stacked.rows(start, stop),  # type: ignore[misc]
            gather=None,
            requests=batch.requests[first:last],
        )
        parts.append(Part(rows, part.first + first))
    return parts if len(parts) > 1 else [part]


def _cuts(batch: Batch, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows from and to, requests from and to."""
    sizes = [request.rows for request in batch.requests]
    if len(sizes) < 2:
        for start in range(0, batch.rows, limit):
            yield start, min(start + limit, batch.rows), 0, 0
        return
    start = stop = first = 0
    for place, size in enumerate(sizes):
        if stop > start and stop + size - start > limit:
            yield start, stop, first, place
            start, first = stop, place
        stop += size
    yield start, stop, first, len(sizes)


def told(part: Part, result: BatchResult) -> BatchResult:
    """An answer request by request, as one of the whole batch."""
    assert result.answers is not None
    answers = [replace(answer, request=answer.request + part.first) for answer in result.answers]
    return replace(result, answers=answers)


def joined(done: Sequence[tuple[Part, BatchResult]]) -> BatchResult:
    """The answers of all parts as one. Raises `Internal` when a part has not as many rows as it was given."""
    for part, result in done:
        for name, array in result.outputs.items():
            if not array.shape or len(array) != part.batch.rows:
                got = len(array) if array.shape else "no"
                raise errors.Internal(f"the model gave {got} rows of '{name}' for {part.batch.rows}")
    results = [result for _, result in done]
    first, last = results[0], results[-1]
    outputs = {name: np.concatenate([result.outputs[name] for result in results]) for name in first.outputs}
    return replace(last, outputs=outputs, started_ns=first.started_ns, stacked_ns=first.stacked_ns)
