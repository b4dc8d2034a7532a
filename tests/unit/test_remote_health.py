"""When a server is worth a request."""

from __future__ import annotations

import pytest

from gateway.engines.remote.health import Attempt, Health


def admitted(health: Health, now: float) -> Attempt:
    attempt = health.admit(now)
    assert attempt is not None
    return attempt


def lose(health: Health, now: float, times: int = 2) -> None:
    """Fail so often, each time a trial is let through."""
    for _ in range(times):
        while (attempt := health.admit(now)) is None:
            now += 0.01
        health.failed(attempt, now)


def test_a_good_server_gets_everything() -> None:
    health = Health()
    attempts = [admitted(health, 1.0) for _ in range(100)]
    assert not any(attempt.trial for attempt in attempts)


def test_after_one_break_the_next_may_try_at_once_alone() -> None:
    health = Health()
    health.failed(admitted(health, 1.0), 1.01)
    trial = admitted(health, 1.01)
    assert trial.trial
    assert health.admit(5.0) is None  # while it is on its way
    health.answered(trial, 5.0)
    assert not admitted(health, 5.0).trial


def test_pauses_double_up_to_a_second() -> None:
    health, now, pauses = Health(), 0.0, []
    for _ in range(8):
        failed = now
        while (attempt := health.admit(now)) is None:
            now += 0.001
        pauses.append(round(now - failed, 2))
        health.failed(attempt, now)
    assert pauses == [0, 0, 0.13, 0.25, 0.5, 1.0, 1.0, 1.0]


def test_many_that_break_together_are_one_break() -> None:
    health = Health()
    attempts = [admitted(health, 1.0) for _ in range(32)]
    for attempt in attempts:
        health.failed(attempt, 1.5)
    assert admitted(health, 1.5).trial


def test_any_answer_brings_it_back() -> None:
    health = Health()
    late = admitted(health, 1.0)
    lose(health, 1.0, 5)
    health.declined(late, 3.0)
    assert not health.lost
    assert not admitted(health, 3.0).trial


def test_a_trial_that_was_never_sent_lets_the_next_one_try() -> None:
    health = Health()
    health.failed(admitted(health, 1.0), 1.0)
    health.abandoned(admitted(health, 1.0))
    assert admitted(health, 1.0).trial


def test_three_silent_requests_in_a_row_are_enough() -> None:
    health = Health()
    for now in (1.0, 2.0):
        health.gave_up(admitted(health, now), now + 0.5)
        assert not health.lost
    health.gave_up(admitted(health, 3.0), 3.5)
    assert health.lost


def test_a_server_that_is_slow_for_one_and_answers_others_is_not_silent() -> None:
    health = Health()
    for now in range(1, 20):
        slow, quick = admitted(health, now), admitted(health, now)
        health.answered(quick, now + 0.1)
        health.gave_up(slow, now + 0.5)
    assert not health.lost


@pytest.mark.parametrize(("asked", "given"), [(0.5, 0.5), (60.0, 5.0)])
def test_it_is_left_alone_for_as_long_as_it_asks_within_reason(asked: float, given: float) -> None:
    health = Health()
    health.declined(admitted(health, 1.0), 1.0, asked)
    assert health.admit(1.0 + given - 0.01) is None
    assert health.again_in(1.0) == pytest.approx(given)
    assert not admitted(health, 1.0 + given).trial


def test_patience_follows_what_answers_take() -> None:
    health = Health()
    assert health.patience == 1.0
    for number in range(100):
        health.answered(Attempt(0.0), 0.1 if number % 10 else 0.11)
    assert health.patience == pytest.approx(0.44)
    for _ in range(32):
        health.answered(Attempt(0.0), 0.001)
    assert health.patience == 0.25
    for _ in range(32):
        health.answered(Attempt(0.0), 3.0)
    assert health.patience == 1.0


def answered(health: Health, seconds: float, times: int = 32) -> None:
    for _ in range(times):
        health.answered(Attempt(0.0), seconds)


@pytest.mark.parametrize(
    ("usual", "remaining", "given"),
    [
        (0.005, 0.150, 0.0375),  # a quarter of the time, where four times the usual is less
        (0.012, 0.150, 0.048),
        (0.060, 0.150, 0.075),  # half of it at most
        (0.100, 0.150, 0.0),  # and none to one that usually takes longer
        (0.100, 1.0, 0.4),
    ],
)
def test_where_another_engine_stands_by_it_gets_a_part_of_the_time(
    usual: float, remaining: float, given: float
) -> None:
    health = Health()
    answered(health, usual)
    assert health.spare(remaining) == pytest.approx(given)


def test_after_it_was_too_slow_for_somebody_the_next_answer_says_how_slow_it_is() -> None:
    health = Health()
    answered(health, 0.2)
    assert not health.spare(0.15)
    answered(health, 0.005, 1)
    assert health.spare(0.15)


def test_one_slow_answer_among_many_does_not_make_it_slow() -> None:
    health = Health()
    answered(health, 0.005)
    answered(health, 0.2, 1)
    assert health.spare(0.15)
    answered(health, 0.2, 2)
    assert not health.spare(0.15)


def test_a_silent_server_gets_no_second_trial_at_once() -> None:
    health = Health()
    for now in (1.0, 2.0, 3.0):
        health.gave_up(admitted(health, now), now + 0.5)
    assert health.admit(3.5) is None
    assert admitted(health, 3.5 + 0.125).trial
