"""The batch decision: each reason by example, and what must hold for any waiting line."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.scheduling.latency import LatencyModel
from gateway.scheduling.policy import Decision, Limits, Outlook, on_free
from gateway.types import InferRequest

NOW = 100.0
ALL = 1 << 30  # a share that leaves nothing to others


@dataclass(eq=False)
class Waiting:
    """A job as the policy sees it."""

    request: InferRequest
    enqueued: float
    done: bool = False


def job(rows=1, *, signature=None, age=0.0, left=None, done=False):
    """A job enqueued `age` seconds before NOW, whose deadline is in `left` seconds."""
    deadline = None if left is None else NOW + left
    return Waiting(InferRequest("m", {}, rows=rows, signature=signature, deadline=deadline), NOW - age, done)


def jobs(*rows):
    return [job(each) for each in rows]


def chosen(decision, waiting):
    return [waiting.index(each) for each in decision.jobs]


@dataclass
class Case:
    waiting: list[Waiting]
    picks: list[int]
    reason: str
    limits: Limits = field(default_factory=lambda: Limits(max_rows=8, joins=True))
    share: int = ALL


CASES = {
    "all that waits": Case(jobs(1, 2, 3), [0, 1, 2], "drained"),
    "a lone request": Case(jobs(1), [0], "drained"),
    "exactly full": Case(jobs(4, 4, 1), [0, 1], "full"),
    "the next does not fit": Case(jobs(4, 3, 2), [0, 1], "full"),
    "a head larger than its share goes alone": Case(jobs(6, 1), [0], "share", share=2),
    "a full head": Case(jobs(8, 1), [0], "full"),
    "the share is left to others": Case(jobs(1, 1, 1, 1), [0, 1], "share", share=2),
    "exactly the share and nothing else": Case(jobs(2, 2), [0, 1], "drained", share=4),
    "the next does not fit the share": Case(jobs(1, 2, 1), [0], "share", share=2),
    "the share is more than the model takes": Case(jobs(4, 4, 4), [0, 1], "full", share=9),
    "no share still runs the head": Case(jobs(1, 1), [0], "share", share=0),
    "requests are not joined": Case(jobs(2, 2), [0], "single", Limits(max_rows=8, joins=False)),
    "not joined, larger than a share": Case(jobs(3), [0], "single", Limits(max_rows=8, joins=False), share=1),
    "another shape is passed over": Case([job(), job(signature="b"), job()], [0, 2], "shape"),
    "filled past another shape": Case([job(4), job(signature="b"), job(4)], [0, 2], "full"),
    "nobody waits for the head": Case([job(done=True), job(), job(done=True), job()], [1, 3], "drained"),
    "nobody waits for the other shape": Case([job(), job(signature="b", done=True)], [0], "drained"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_runs_when_nothing_is_waited_for(case):
    decision = on_free(case.waiting, case.limits, case.share, NOW)
    assert (chosen(decision, case.waiting), decision.reason) == (case.picks, case.reason)
    assert decision.rows == sum(case.waiting[index].request.rows for index in case.picks)
    assert decision.ask_at is None


def test_nothing_runs_and_nothing_is_asked_when_nothing_waits():
    for waiting in ([], [job(done=True)]):
        for limits in (Limits(8, joins=True), Limits(8, joins=True, delay=1.0), Limits(8, joins=True, preferred=(4,))):
            decision = on_free(waiting, limits, ALL, NOW)
            assert (decision.jobs, decision.rows, decision.ask_at) == ([], 0, None)


# --- Triton's knobs

DELAY = Limits(max_rows=8, joins=True, delay=1.0)
PREFERRED = Limits(max_rows=8, joins=True, delay=1.0, preferred=(4,))

KNOBS = {
    "the delay is over": Case([job(age=1.0), job(age=0.2)], [0, 1], "delay", DELAY),
    "full before the delay": Case(jobs(4, 4, 1), [0, 1], "full", DELAY),
    "the next does not fit": Case(jobs(5, 4), [0], "full", DELAY),
    "another shape ends the wait": Case([job(), job(signature="b")], [0], "shape", DELAY),
    "the share does not count": Case([job(age=1.0), job()], [0, 1], "delay", DELAY, share=1),
    "half of a deadline is over": Case([job(age=0.4, left=0.4), job()], [0, 1], "delay", DELAY),
    "half of a later job's deadline is over": Case([job(age=0.5), job(age=0.1, left=0.05)], [0, 1], "delay", DELAY),
    "a preferred size": Case(jobs(2, 2), [0, 1], "preferred", PREFERRED),
    "the largest preferred size": Case(
        jobs(2, 2, 2), [0, 1, 2], "preferred", Limits(8, joins=True, delay=1.0, preferred=(2, 4, 6))
    ),
    "a preferred size, and more for the next batch": Case(jobs(1, 1, 1, 1, 1), [0, 1, 2, 3], "preferred", PREFERRED),
    "a preferred size would be passed": Case(jobs(3, 2), [0], "preferred", PREFERRED),
    "a head above every preferred size": Case(jobs(6), [0], "preferred", PREFERRED),
    "preferred without a delay never waits": Case(jobs(3), [0], "delay", Limits(8, joins=True, preferred=(4,))),
    "not joined, not waited for": Case(jobs(1, 1), [0], "single", Limits(8, joins=False, delay=1.0)),
}


@pytest.mark.parametrize("case", KNOBS.values(), ids=KNOBS.keys())
def test_what_runs_under_tritons_knobs(case):
    test_what_runs_when_nothing_is_waited_for(case)


@pytest.mark.parametrize(
    ("waiting", "limits", "ask_in"),
    [
        pytest.param([job()], DELAY, 1.0, id="the whole delay"),
        pytest.param([job(age=0.75), job()], DELAY, 0.25, id="from the oldest"),
        pytest.param([job(), job(age=0.75)], DELAY, 0.25, id="from the oldest, released behind a younger"),
        pytest.param([job(left=0.5)], DELAY, 0.25, id="half of the deadline"),
        pytest.param([job(age=0.25), job(left=0.5)], DELAY, 0.25, id="half of the tightest deadline"),
        pytest.param([job(left=60.0)], DELAY, 1.0, id="a far deadline changes nothing"),
        pytest.param([job(age=0.5), job(age=0.5)], PREFERRED, 0.5, id="below the preferred size"),
        pytest.param([job(age=0.75, done=True), job()], DELAY, 1.0, id="nobody waits for the oldest"),
    ],
)
def test_how_long_to_wait(waiting, limits, ask_in):
    decision = on_free(waiting, limits, ALL, NOW)
    assert (decision.jobs, decision.reason) == ([], "wait")
    assert decision.ask_at == pytest.approx(NOW + ask_in)


# --- with an outlook: 4 ms a batch and 1 ms a row


def outlook(backlog, *, target=8, most=16, **more):
    model = LatencyModel(most)
    for rows in (1, 2, 4, 8, 16):
        for _ in range(3):
            model.observe(rows, 0.004 + 0.001 * rows)
    return Outlook(model, backlog=backlog, target=lambda: target, **more)


def decided(lefts, *, rows=1, **more):
    """What is run and dropped of a line whose deadlines are in so many milliseconds."""
    waiting = [job(rows, left=None if left is None else left / 1000, age=0.01) for left in lefts]
    decision = on_free(waiting, Limits(16, joins=True), ALL, NOW, outlook(len(lefts) * rows, **more))
    assert decision.rows == rows * len(decision.jobs)
    dropped = [(waiting.index(each), reason) for each, reason in decision.dropped]
    return chosen(decision, waiting), dropped, decision.reason


def test_a_batch_keeps_every_deadline_in_it():
    assert decided([9.5] * 9, target=1) == ([0, 1, 2, 3, 4], [], "deadline")
    assert decided([100, 100, 6.5, 100], target=1) == ([0, 1], [], "deadline")
    assert decided([9.5] * 5) == ([0, 1, 2, 3, 4], [], "drained")


def test_the_head_is_dropped_and_the_batch_kept_when_the_load_needs_it():
    assert decided([6.5, 7.5, *[30] * 9]) == (list(range(2, 11)), [(0, "shed"), (1, "shed")], "drained")
    assert decided([6.5, 7.5, *[30] * 9], target=2) == ([0, 1], [], "deadline")


def test_the_head_is_kept_when_what_is_left_is_no_larger_batch():
    assert decided([6.5, 6.5]) == ([0, 1], [], "drained")


def test_who_cannot_make_it_alone_is_expired():
    assert decided([4.5, 30]) == ([1], [(0, "expired")], "drained")
    assert decided([-1, 4.5]) == ([], [(0, "expired"), (1, "expired")], "drained")


def test_a_lone_late_job_is_tried_if_nothing_else_wants_the_engine_and_its_time_may_be_wrong():
    assert decided([4.5], idle=True, probe=True) == ([0], [], "drained")
    assert decided([4.5], idle=True) == ([], [(0, "expired")], "drained")
    assert decided([4.5], probe=True) == ([], [(0, "expired")], "drained")
    assert decided([-1], idle=True, probe=True) == ([], [(0, "expired")], "drained")


def test_without_a_deadline_nothing_is_dropped_nor_made_smaller():
    assert decided([None] * 20) == (list(range(16)), [], "full")


def test_a_large_request_counts_by_its_rows():
    assert decided([9.5] * 3, rows=4, target=1) == ([0], [], "deadline")


def test_what_was_not_tried_is_explored_by_doubling():
    model = LatencyModel(16)
    model.observe(1, 0.001)
    decision = on_free(jobs(*[1] * 9), Limits(16, joins=True), ALL, NOW, Outlook(model, backlog=9))
    assert (decision.rows, decision.reason) == (2, "explore")
    assert on_free(jobs(8, 1), Limits(16, joins=True), ALL, NOW, Outlook(model, backlog=9)).rows == 8


def test_untrusted_predictions_leave_a_limit_at_half_the_deadline():
    prospect = outlook(3)
    prospect.latency.trusted = False
    waiting = [job(age=0.03, left=0.02), job(age=0.01, left=0.02), job(age=0.0, left=0.001)]
    decision = on_free(waiting, Limits(16, joins=True), ALL, NOW, prospect)
    assert chosen(decision, waiting) == [1, 2]
    assert decision.dropped == [(waiting[0], "shed")]


def test_a_wait_leaves_time_to_run():
    waiting = [job(left=0.02)]
    decision = on_free(waiting, Limits(16, joins=True, delay=1.0), ALL, NOW, outlook(1))
    assert decision.ask_at == pytest.approx(NOW + 0.01)
    waiting = [job(left=0.007)]
    decision = on_free(waiting, Limits(16, joins=True, delay=1.0), ALL, NOW, outlook(1))
    assert decision.ask_at == pytest.approx(NOW + 0.002)


# --- what must hold for any waiting line

LINES = st.lists(
    st.builds(
        job,
        st.integers(1, 12),
        signature=st.sampled_from(["a", "b", "c"]),
        age=st.floats(0, 5),
        left=st.none() | st.floats(0.001, 10),
        done=st.booleans(),
    ),
    max_size=20,
)
GREEDY = st.builds(Limits, st.integers(1, 16), joins=st.booleans())
PATIENT = st.builds(
    lambda most, joins, delay, preferred: Limits(most, joins, delay, tuple(p for p in preferred if p <= most)),
    st.integers(1, 16),
    st.booleans(),
    st.floats(0.001, 5),
    st.lists(st.integers(1, 16), max_size=3, unique=True),
)
SHARES = st.integers(0, 20)


@given(LINES, GREEDY | PATIENT, SHARES)
def test_a_batch_is_of_one_signature_in_order_of_live_jobs_within_the_limit(waiting, limits, share):
    decision = on_free(waiting, limits, share, NOW)
    picks = chosen(decision, waiting)
    assert decision.rows == sum(each.request.rows for each in decision.jobs)
    assert decision.rows <= limits.max_rows or len(picks) == 1
    assert len(picks) <= 1 or limits.joins
    assert not any(each.done for each in decision.jobs)
    assert len({each.request.signature for each in decision.jobs}) <= 1
    assert picks == sorted(picks)
    live = [index for index, each in enumerate(waiting) if not each.done]
    if picks:
        assert picks[0] == live[0]
        alike = [i for i in live if waiting[i].request.signature == waiting[live[0]].request.signature]
        assert picks == alike[: len(picks)]


@given(LINES, GREEDY, SHARES)
def test_without_knobs_nothing_waits_while_an_instance_is_idle(waiting, limits, share):
    decision = on_free(waiting, limits, share, NOW)
    assert bool(decision.jobs) == any(not each.done for each in waiting)
    assert decision.ask_at is None


# Lines that mostly wait: one shape, few rows, young jobs and deadlines still far off.
YOUNG = st.lists(
    st.builds(job, st.integers(1, 3), age=st.floats(0, 0.3), left=st.none() | st.floats(0.5, 10), done=st.booleans()),
    min_size=1,
    max_size=5,
)
WAITING = st.builds(Limits, st.just(64), st.just(True), st.floats(0.2, 5), st.sampled_from([(), (4,), (8, 32)]))


@given(YOUNG, WAITING, SHARES)
def test_a_wait_ends_after_the_delay_of_the_oldest_and_before_any_deadline(waiting, limits, share):
    decision = on_free(waiting, limits, share, NOW)
    live = [each for each in waiting if not each.done]
    if decision.ask_at is None:
        assert bool(decision.jobs) == bool(live)
        return
    assert not decision.jobs
    assert NOW < decision.ask_at <= min(each.enqueued for each in live) + limits.delay
    assert all(decision.ask_at < each.request.deadline for each in live if each.request.deadline is not None)
    then = on_free(waiting, limits, share, decision.ask_at)
    assert then.jobs == live, "what is asked again at the promised time runs"
    assert then.reason == "delay"


@given(LINES, GREEDY | PATIENT, SHARES)
def test_the_same_line_gives_the_same_decision_and_is_left_alone(waiting, limits, share):
    before = list(waiting)
    first = on_free(waiting, limits, share, NOW)
    assert on_free(iter(waiting), limits, share, NOW) == first
    assert waiting == before
    assert isinstance(first, Decision)
