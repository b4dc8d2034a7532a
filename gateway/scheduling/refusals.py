"""What a scheduler's `Refusal` is to the client: a row of the error table."""

from __future__ import annotations

from gateway import errors
from gateway.scheduling.base import Refusal, RefusalReason

_ROWS: dict[RefusalReason, type[errors.GatewayError]] = {
    "overload": errors.Overloaded,
    "deadline": errors.DeadlineTooShort,
    "shed": errors.Shed,
    "expired": errors.DeadlineExceeded,
}

_LONGEST = 3600.0  # seconds; a longer estimate is no better than this one, and the wires have numbers too large


def refused(refusal: Refusal, request_id: str = "") -> errors.GatewayError:
    """The error to answer the request of this id with.

    It says what the scheduler says, but where the model's own queue policy refused: Triton's clients know those texts.
    """
    retry_after = None if refusal.retry_after is None else min(refusal.retry_after, _LONGEST)
    if refusal.reason == "queue_full":
        return errors.queue_full(request_id, retry_after)
    if refusal.reason == "queue_timeout":
        return errors.queue_timeout(retry_after)
    return _ROWS[refusal.reason](refusal.text, retry_after)
