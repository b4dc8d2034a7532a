"""The rows of a batch of sequences: what the model is told of each, and the states from one run to the next.

Stands between the requests of a batch and the engine. In the direct strategy a sequence keeps its row, and rows that have
nothing to do repeat another and are not READY. States live with their sequence, never in a row, so that no sequence sees
those of another; they are exchanged only when all of a run has gone well (`commit`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from gateway import errors
from gateway.config.model import ModelConfig, SequenceBatching, SequenceControl, SequenceState
from gateway.engines.base import Engine
from gateway.queues.base import Job
from gateway.scheduling.sequences import Placed, Sequence
from gateway.types import Answer, Array, Batch, BatchResult, DataType, InferRequest, Tensor

States: TypeAlias = Mapping[str, Array]  # by the name of the input, without a batch dimension

_NOBODY = -1


def initial_states(sequences: SequenceBatching, folder: Path) -> States:
    """What a sequence begins with; `folder` is the model's. Blocking. Raises `InvalidArgument` for a file that does not fit."""
    return {state.input: _initial(state, folder / "initial_state") for state in sequences.states}


def _initial(state: SequenceState, folder: Path) -> Array:
    if not state.initial:
        if state.datatype is DataType.BYTES:
            return np.full(state.initial_dims, b"", dtype=object)
        return np.zeros(state.initial_dims, state.datatype.dtype)
    try:
        wire = (folder / state.initial).read_bytes()
        return Tensor(state.datatype, state.initial_dims, wire).array
    except OSError as problem:
        raise errors.InvalidArgument(
            f"initial_state '{state.initial}' of state '{state.input}' cannot be read ({problem.strerror}); put it in the "
            "model's folder initial_state"
        ) from None
    except ValueError as problem:
        raise errors.InvalidArgument(
            f"initial_state '{state.initial}' of state '{state.input}' does not hold {list(state.initial_dims)}: {problem}"
        ) from None


class Rows:
    """The batches of one engine."""

    def __init__(self, engine: Engine, config: ModelConfig, initial: States) -> None:
        assert config.sequences is not None
        self._engine = engine
        self._name = config.name
        self._sequences = config.sequences
        self._fixed = not config.sequences.candidates  # a slot is a row
        self._batched = config.max_batch_size > 0
        self._initial = initial
        self._placed: dict[int, Placed[Job]] = {}  # by the identity of the request
        self._states: list[tuple[Sequence[Job], States]] = []

    def place(self, batch: Iterable[Placed[Job]]) -> None:
        """The requests of the next runs."""
        self._placed = {id(placed.item.job.request): placed for placed in batch}

    def shapes(self, placed: Placed[Job]) -> tuple[tuple[int, ...], ...]:
        """What must be equal of two requests for their sequences' states to share a batch."""
        states = self._begin(placed)
        return tuple(states[state.input].shape for state in self._sequences.states)

    def commit(self) -> None:
        """The run has gone well: its states are those to go on with."""
        for sequence, states in self._states:
            sequence.state = states
        self._states = []

    async def run(self, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        """Run a batch of requests that were placed; see `Engine.run`."""
        self._states = []
        placed = [self._placed[id(request)] for request in batch.requests]
        rows = self._rows(placed)
        outputs = tuple(dict.fromkeys((*batch.outputs, *(state.output for state in self._sequences.states))))
        nobody = InferRequest(self._name, {})
        whole = replace(
            batch,
            rows=len(rows),
            stack=lambda: self._stack(batch.stack(), placed, rows),
            gather=None,
            outputs=outputs if batch.outputs else (),
            requests=[nobody if index == _NOBODY else batch.requests[index] for index in rows],
            wanted=lambda row: rows[row] != _NOBODY and batch.wanted(rows[row]),
        )
        async with aclosing(self._engine.run(whole)) as results:
            async for result in results:
                yield self._result(result, placed, rows)

    def _rows(self, placed: list[Placed[Job]]) -> list[int]:
        """For each row of the model's batch the place of its request."""
        if not self._fixed or not self._batched:
            return list(range(len(placed)))
        rows = [_NOBODY] * (1 + max(each.sequence.slot for each in placed))
        for index, each in enumerate(placed):
            rows[each.sequence.slot] = index
        return rows

    # --- what goes in

    def _stack(self, inputs: dict[str, Array], placed: list[Placed[Job]], rows: list[int]) -> dict[str, Array]:
        if rows != list(range(len(placed))):
            inputs = {name: array[[max(index, 0) for index in rows]] for name, array in inputs.items()}
        for control in self._sequences.controls:
            values = [_value(control, None if index == _NOBODY else placed[index]) for index in rows]
            array = np.array(values, control.datatype.dtype)
            inputs[control.name] = array.reshape(-1, 1) if self._batched else array
        states = [self._begin(placed[max(index, 0)]) for index in rows]
        for state in self._sequences.states:
            parts = [each[state.input] for each in states]
            inputs[state.input] = np.stack(parts) if self._batched else parts[0]
        return inputs

    def _begin(self, placed: Placed[Job]) -> States:
        if placed.item.start or placed.sequence.state is None:
            return self._initial
        return cast("States", placed.sequence.state)

    # --- what comes out

    def _result(self, result: BatchResult, placed: list[Placed[Job]], rows: list[int]) -> BatchResult:
        if result.answers is not None:
            answers = [_moved(answer, rows) for answer in result.answers if rows[answer.request] != _NOBODY]
            return replace(result, answers=answers)
        outputs = result.outputs
        at = {index: row for row, index in enumerate(rows) if index != _NOBODY}
        order = [at[index] for index in range(len(placed))]
        for index, each in enumerate(placed):
            states = {
                state.input: self._state(outputs, state, order[index], len(rows)) for state in self._sequences.states
            }
            self._states.append((each.sequence, states))
        if order != list(range(len(rows))):
            outputs = {name: self._picked(name, array, order, len(rows)) for name, array in outputs.items()}
        return replace(result, outputs=outputs)

    def _picked(self, name: str, array: Array, order: list[int], rows: int) -> Array:
        self._check_rows(name, array, rows)
        return array[order]

    def _state(self, outputs: Mapping[str, Array], state: SequenceState, row: int, rows: int) -> Array:
        array = outputs.get(state.output)
        if array is None or array.dtype != state.datatype.dtype:
            got = "nothing" if array is None else str(array.dtype)
            raise errors.Internal(
                f"model '{self._name}' gave {got} as state '{state.output}', its configuration says {state.datatype.name}"
            )
        if not self._batched:
            return array.copy()
        self._check_rows(state.output, array, rows)
        return array[row : row + 1].reshape(array.shape[1:]).copy()

    def _check_rows(self, name: str, array: Array, rows: int) -> None:
        if not array.shape or array.shape[0] != rows:
            raise errors.Internal(
                f"model '{self._name}' gave {array.shape[0] if array.shape else 'no'} rows in output '{name}' for a batch "
                f"of {rows}; a model must give one row for each row it is given"
            )


def _moved(answer: Answer, rows: list[int]) -> Answer:
    return replace(answer, request=rows[answer.request])


def _value(control: SequenceControl, placed: Placed[Job] | None) -> Any:
    """The element of a row, None for one that is not ready."""
    if control.kind == "corrid":
        text = control.datatype is DataType.BYTES
        if placed is None:
            return b"" if text else 0
        id_ = placed.sequence.id
        return id_.encode() if isinstance(id_, str) else _narrow(id_, control.datatype)
    if placed is None:
        return control.off
    true = {"start": placed.item.start, "end": placed.item.end, "ready": True}[control.kind]
    return control.on if true else control.off


def _narrow(number: int, datatype: DataType) -> Any:
    """The number's lowest bits, as Triton copies them."""
    size = datatype.itemsize
    return np.frombuffer((number & ((1 << 64) - 1)).to_bytes(8, "little")[:size], datatype.dtype)[0]
