"""What a request says of its sequence, and what is wrong with that: in Triton's words, where it has any.

Triton's texts are those of core `sequence_batch_scheduler.cc`.
"""

from __future__ import annotations

from typing import TypeAlias

from gateway.errors import InvalidArgument, SequenceLost
from gateway.types import InferRequest

SequenceId: TypeAlias = int | str


def id_of(request: InferRequest) -> SequenceId:
    """The id of a request's sequence; 0 or empty for a request of none. Raises `InvalidArgument`."""
    given = request.parameters.get("sequence_id", 0)
    if isinstance(given, int) and not isinstance(given, bool):
        return given & ((1 << 64) - 1)
    if isinstance(given, str):
        return given
    raise InvalidArgument("Unable to parse 'sequence_id': it must be a number or a string")


def flag(request: InferRequest, key: str) -> bool:
    """Whether a request is marked as `sequence_start` or `sequence_end`. Raises `InvalidArgument`."""
    given = request.parameters.get(key, False)
    if not isinstance(given, bool):
        raise InvalidArgument(f"Unable to parse '{key}': it must be true or false")
    return given


def of_one_row(model: str) -> InvalidArgument:
    """A request of several rows to a model of sequences."""
    return InvalidArgument(
        f"inference request to model '{model}' must specify batch-size 1 due to requirements of sequence batcher"
    )


def no_id(model: str) -> InvalidArgument:
    """A request of no sequence to a model of sequences."""
    return InvalidArgument(f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID")


def not_started(sequence: SequenceId, model: str) -> InvalidArgument:
    """A request that goes on with a sequence nobody began, or that has ended."""
    return InvalidArgument(
        f"inference request for sequence {sequence} to model '{model}' must specify the START flag on the first request "
        "of the sequence"
    )


def broken(sequence: SequenceId, model: str) -> InvalidArgument:
    """A request that waited for an earlier one of its sequence, which was not run to its end."""
    return InvalidArgument(
        f"sequence {sequence} of model '{model}' has ended: an earlier request of it failed, timed out or was cancelled. "
        "Begin it again with the START flag"
    )


def lost(sequence: SequenceId, model: str) -> SequenceLost:
    """A request of a sequence whose worker died or stops, or which may have run without an answer."""
    return SequenceLost(
        f"sequence {sequence} of model '{model}' was lost with the worker that ran it, or on the way to it. "
        "Begin it again with the START flag"
    )


def wrong_id(model: str, control: str, given: str, expected: str) -> InvalidArgument:
    """A sequence id of a type that `control`, the model's input for it, cannot hold."""
    return InvalidArgument(
        f"sequence batching control '{control}' data-type is '{given}', but model '{model}' expects '{expected}'"
    )
