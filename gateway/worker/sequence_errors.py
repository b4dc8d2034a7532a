"""What is wrong with a request of a sequence: in Triton's words (core `sequence_batch_scheduler.cc`), where it has any."""

from __future__ import annotations

from gateway.errors import InvalidArgument


def of_one_row(model: str) -> InvalidArgument:
    """A request of several rows to a model of sequences."""
    return InvalidArgument(
        f"inference request to model '{model}' must specify batch-size 1 due to requirements of sequence batcher"
    )


def no_id(model: str) -> InvalidArgument:
    """A request of no sequence to a model of sequences."""
    return InvalidArgument(f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID")


def not_started(sequence: int | str, model: str) -> InvalidArgument:
    """A request that goes on with a sequence nobody began, or that has ended."""
    return InvalidArgument(
        f"inference request for sequence {sequence} to model '{model}' must specify the START flag on the first request "
        "of the sequence"
    )


def broken(sequence: int | str, model: str) -> InvalidArgument:
    """A request that waited for an earlier one of its sequence, which was not run to its end."""
    return InvalidArgument(
        f"sequence {sequence} of model '{model}' has ended: an earlier request of it failed, timed out or was cancelled. "
        "Begin it again with the START flag"
    )


def wrong_id(model: str, *, expected: str) -> InvalidArgument:
    """A sequence id of a kind that the model's CORRID input cannot hold."""
    return InvalidArgument(f"sequence_id of a request to model '{model}' must be {expected}, as its CORRID input is")
