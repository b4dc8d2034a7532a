"""Admission by example: who is accepted, and what the refused are told."""

import math

import pytest

from gateway.scheduling.admission import expiry, level_of
from gateway.scheduling.base import Limits, Place, QueuePolicy
from gateway.types import InferRequest
from tests.unit.scheduling_bench import Bench, affine


def busy(rows=64, **more):
    """A bench whose device has just begun a run of so many rows."""
    bench = Bench(**more)
    bench.ask(10.0, next(iter(bench.lanes)), rows=rows)
    assert len(bench.runs) == 1
    return bench


@pytest.mark.parametrize(
    ("levels", "default", "priority", "level"),
    [(0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 2, 1), (0, 0, 3, 2), (0, 0, 9, 2), (4, 3, 1, 1), (4, 3, 0, 3), (4, 3, 5, 3)],
)
def test_the_level_of_a_priority(levels, default, priority, level):
    limits = Limits(priority_levels=levels, default_priority=default)
    assert level_of(limits, InferRequest("m", {}, priority=priority)) == level


@pytest.mark.parametrize(
    ("policy", "parameters", "seconds"),
    [
        (QueuePolicy(), {}, math.inf),
        (QueuePolicy(timeout=2.0), {"timeout": 10**6}, 2.0),
        (QueuePolicy(timeout=2.0, allow_override=True), {"timeout": 10**6}, 1.0),
        (QueuePolicy(timeout=2.0, allow_override=True), {"timeout": 3 * 10**6}, 2.0),
        (QueuePolicy(timeout=2.0, allow_override=True), {"timeout": 0}, 2.0),
        (QueuePolicy(allow_override=True), {"timeout": 1000000}, 1.0),
        (QueuePolicy(allow_override=True), {"timeout": "soon"}, math.inf),
        (QueuePolicy(allow_override=True), {"timeout": True}, math.inf),
        (QueuePolicy(timeout=2.0, allow_override=True), {"timeout": 10**400}, 2.0),
        (QueuePolicy(timeout=2.0, allow_override=True), {"timeout": -(10**400)}, 2.0),
    ],
)
def test_when_a_queue_policy_times_out(policy, parameters, seconds):
    assert expiry(policy, InferRequest("m", {}, parameters=parameters), 100.0) == 100.0 + seconds


def test_who_would_be_late_is_refused_and_told_when_to_come_back():
    bench = busy()  # 20 ms
    for _ in range(64):
        assert bench.ask(0.041).outcome == ""  # 20 ms more
    refused = bench.ask(0.041)
    assert refused.outcome == "overload"
    (refusal,) = bench.refusals
    assert refusal.retry_after == pytest.approx(affine(64) * 1.25)
    assert "its deadline is in 41 ms" in refusal.text
    assert bench.ask(0.05).outcome == ""


def test_a_deadline_below_the_service_time_is_said_to_be_one():
    bench = busy()
    assert bench.ask(0.003).outcome == "deadline"
    (refusal,) = bench.refusals
    assert refusal.retry_after is None
    assert "deadline below service time" in refusal.text


def test_without_a_deadline_everything_is_admitted():
    bench = busy()
    assert not any(bench.ask(None).outcome for _ in range(10_000))


def test_nothing_is_refused_before_anything_is_known():
    bench = Bench(warm=False)
    assert not any(bench.ask(0.001, run=False).outcome for _ in range(100))


@pytest.mark.parametrize("places", [1, 2])
def test_nothing_is_refused_by_predictions_that_are_too_wrong(places):
    bench = busy(places=tuple(Place(f"gpu{number}", 1) for number in range(places)))
    for number in range(places):
        bench.scheduler.latency("m", f"gpu{number}").trusted = False
    assert not any(bench.ask(0.001, run=False).outcome for _ in range(100))


def test_waiting_bytes_are_bounded_and_come_free_again():
    bench = busy(rows=1, max_bytes=1000)
    jobs = [bench.ask(size=400) for _ in range(3)]
    assert [job.outcome for job in jobs] == ["", "", "overload"]
    assert "bytes" in bench.refusals[0].text
    bench.answer(jobs[0], "cancelled")
    assert bench.ask(size=400).outcome == ""


def test_an_urgent_request_waits_only_for_the_more_urgent():
    bench = busy(rows=1)
    for _ in range(640):
        bench.ask(1.0)
    assert bench.ask(0.02).outcome == ""


def test_of_another_model_only_as_much_counts_as_of_ones_own():
    lanes = {"hot": Limits(64, joins=True), "cold": Limits(64, joins=True)}
    bench = busy(lanes=lanes)
    while bench.ask(0.05, "hot").outcome == "":
        pass
    assert bench.ask(0.05, "cold").outcome == ""


def test_of_another_tenant_only_as_much_counts_as_of_ones_own():
    bench = busy()
    while bench.ask(0.06, tenant="hot").outcome == "":
        pass
    assert bench.ask(0.06, tenant="cold").outcome == ""


def test_a_run_that_is_overdue_is_not_taken_for_an_idle_engine():
    bench = busy()
    bench.speed["gpu"] = 1000.0
    bench.now = 1.0
    assert bench.ask(0.5).outcome == "overload"


# --- turned away unread


def overloaded(**more):
    """A bench whose queue is so long that a request with half a second is refused."""
    bench = Bench(**more)
    while not bench.ask(0.5, run=False).outcome:
        pass
    return bench


def test_what_is_like_a_refused_request_is_refused_unread():
    bench = overloaded()
    again = bench.scheduler.turn_away("m", bench.now + 0.5)
    assert again >= bench.true(64), "not before the next batch has gone"
    assert bench.scheduler.report("m").refused["overload"] == 1, "to ask is not to be refused"
    bench.scheduler.turned_away("m", 3, bench.now)
    bench.scheduler.turned_away("gone", 3, bench.now)
    assert bench.scheduler.report("m").refused["overload"] == 4


def test_a_later_deadline_is_looked_at():
    bench = overloaded()
    assert bench.scheduler.turn_away("m", bench.now + 5.0) is None


@pytest.mark.parametrize("priority", [1, 3])
def test_where_priorities_met_once_requests_are_refused_unread_again(priority):
    bench = Bench()
    for each in (priority, 0):
        bench.ask(5.0, priority=each)
        bench.advance(1.0)
    while not bench.ask(0.5, run=False).outcome:
        pass
    assert bench.scheduler.turn_away("m", bench.now + 0.5) > 0


def test_nothing_is_turned_away_before_the_first_refusal_nor_after_a_change():
    assert Bench().scheduler.turn_away("m", 0.5) is None
    bench = overloaded()
    bench.dispatch()
    bench.advance(0.1)  # a run ends
    assert bench.scheduler.turn_away("m", bench.now + 0.4) is None
    bench = overloaded()
    bench.answer(bench.jobs[0], "left")
    assert bench.scheduler.turn_away("m", bench.now + 0.5) is None


def test_where_priorities_or_tenants_meet_every_request_is_looked_at():
    bench = Bench()
    bench.ask(5.0, run=False, priority=1)
    while not bench.ask(0.5, run=False).outcome:
        pass
    assert bench.scheduler.turn_away("m", bench.now + 0.5) is None
    bench = Bench()
    bench.ask(5.0, run=False, tenant="other")
    while not bench.ask(0.5, run=False).outcome:
        pass
    assert bench.scheduler.turn_away("m", bench.now + 0.5) is None


def test_an_unknown_lane_turns_nobody_away():
    assert Bench().scheduler.turn_away("nobody", 0.0) is None
