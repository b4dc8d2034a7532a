"""From a scheduler's refusal to the answer a client gets: every reason has one."""

from typing import get_args

import pytest

from gateway import errors
from gateway.scheduling.base import Refusal, RefusalReason
from gateway.scheduling.refusals import refused


@pytest.mark.parametrize("reason", get_args(RefusalReason))
def test_the_answer_tells_the_reason_and_when_to_try_again(reason: RefusalReason) -> None:
    error = refused(Refusal(reason, "why", 2.5), "r")
    assert error.reason == reason
    assert error.retry_after == 2.5
    assert refused(Refusal(reason, "why")).retry_after is None


def test_an_estimate_without_end_is_an_hour() -> None:
    assert refused(Refusal("overload", "why", float("inf"))).retry_after == 3600


@pytest.mark.parametrize(
    ("reason", "kind", "text"),
    [
        ("overload", errors.Overloaded, "why"),
        ("shed", errors.Shed, "why"),
        ("deadline", errors.DeadlineTooShort, "why"),
        ("expired", errors.DeadlineExceeded, "why"),
        ("queue_full", errors.QueueFull, "[request id: r] Exceeds maximum queue size"),
        ("queue_timeout", errors.QueueTimeout, "Request timeout expired"),
    ],
)
def test_the_text_is_the_schedulers_or_tritons(
    reason: RefusalReason, kind: type[errors.GatewayError], text: str
) -> None:
    error = refused(Refusal(reason, "why"), "r")
    assert type(error) is kind
    assert error.message == text
