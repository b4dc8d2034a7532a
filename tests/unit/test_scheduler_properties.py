"""What must hold for the scheduler whatever is asked of it: random arrivals, cancellations, failures and devices."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.scheduling.base import Limits, Place, QueuePolicy
from tests.unit.scheduling_bench import Bench, affine

REASONS = {"overload", "deadline", "shed", "expired", "queue_full", "queue_timeout"}
PLACES = [
    (Place("gpu", 1),),
    (Place("gpu", 2, threads=1, widest=4),),
    (Place("gpu", 1, threads=2), Place("cpu", 2)),
]
POLICIES = st.builds(
    QueuePolicy,
    st.integers(0, 4),
    st.sampled_from([0.0, 0.003, 0.05]),
    delays=st.booleans(),
    allow_override=st.booleans(),
)
LIMITS = st.builds(
    Limits,
    st.sampled_from([1, 4, 8, 64]),
    joins=st.booleans(),
    delay=st.sampled_from([0.0, 0.0, 0.002, 0.1]),
    preferred=st.sampled_from([(), (), (4,)]),
    queue=st.just(QueuePolicy()) | POLICIES,
    priority_levels=st.sampled_from([0, 0, 3]),
    priority_queues=st.dictionaries(st.integers(1, 3), POLICIES, max_size=1),
)
ASKED = st.fixed_dictionaries(
    {
        "deadline": st.none() | st.sampled_from([0.001, 0.006, 0.02, 0.05, 1.0]),
        "lane": st.sampled_from("ab"),
        "rows": st.sampled_from([1, 1, 1, 2, 5]),
        "priority": st.integers(0, 4),
        "tenant": st.sampled_from(["", "x", "y"]),
        "signature": st.sampled_from("st"),
        "size": st.sampled_from([0, 100]),
        "parameters": st.sampled_from([{}, {"timeout": 2000}, {"timeout": "soon"}]),
    }
)
STEPS = st.lists(
    st.tuples(st.just("ask"), ASKED)
    | st.tuples(st.just("burst"), ASKED)
    | st.tuples(st.just("advance"), st.floats(0.0001, 0.03))
    | st.tuples(st.sampled_from(["cancel", "fail", "reopen", "slow"]), st.integers(0, 50)),
    max_size=40,
)


class Checked(Bench):
    """A bench that looks at every batch as it starts."""

    def start(self, run):
        limits = self.lanes[run.lane]
        assert run.rows <= limits.max_rows or len(run.jobs) == 1
        assert limits.joins or len(run.jobs) == 1
        assert len({job.request.signature for job in run.jobs}) == 1
        assert {job.lane for job in run.jobs} == {run.lane}
        super().start(run)
        used = Counter()
        for each in self.runs:
            used[each.device] += each.cores
        assert all(used[device] <= self.cores[device] for device in used)


def asked(bench, more):
    more = {**more, "rows": min(more["rows"], bench.lanes[more["lane"]].max_rows)}
    return bench.ask(**more)


def step(bench, action, value):
    """One thing that happens to a worker."""
    if action == "ask":
        asked(bench, value)
    elif action == "burst":
        for _ in range(20):
            asked(bench, value)
    elif action == "advance":
        bench.advance(value)
    elif action == "cancel":
        waiting = [job for job in bench.jobs if not job.done]
        if waiting:
            bench.answer(waiting[value % len(waiting)], "cancelled")
    elif action == "fail" and bench.runs:
        run = bench.runs.pop(value % len(bench.runs))
        bench.scheduler.finished(run, bench.now - run.started, bench.now, failed=True)
        for job in run.jobs:
            if not job.done:
                bench.scheduler.add(job.lane, job, bench.now)
        bench.dispatch()
    elif action == "reopen":
        places = bench.places[value % len(bench.places) :]
        for lane, limits in bench.lanes.items():
            bench.scheduler.open(lane, limits, places)
        bench.dispatch()
    elif action == "slow":
        bench.speed[bench.places[0].device] = 1.0 + value % 10


@settings(max_examples=150, deadline=None)
@given(LIMITS, LIMITS, st.sampled_from(PLACES), STEPS, st.booleans())
def test_every_request_is_answered_once_and_every_batch_is_lawful(first, second, places, steps, warm):
    bench = Checked({"a": first, "b": second}, places, {"gpu": 4, "cpu": 2}, warm=warm)
    for action, value in steps:
        step(bench, action, value)
    for lane, limits in bench.lanes.items():
        bench.scheduler.open(lane, limits, places)
    bench.dispatch()
    bench.advance(1000.0)
    assert [job for job in bench.jobs if not job.outcome] == []
    assert {refusal.reason for refusal in bench.refusals} <= REASONS
    assert all(refusal.text for refusal in bench.refusals)
    assert all(refusal.retry_after is None or refusal.retry_after > 0 for refusal in bench.refusals)
    for lane in bench.lanes:
        state = bench.scheduler._lanes[lane]
        assert (state.rows, state.waiting, state.requests, state.running, state.tenants) == (0, 0, 0, 0, {})
        assert bench.scheduler.close(lane) == []
    assert not bench.scheduler._admitted
    assert bench.scheduler._at.bytes_left == bench.max_bytes
    assert all(device.free == device.cores for device in bench.scheduler._devices.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_a_queue_limit_is_exact_at_every_moment(most, steps):
    bench = Bench({"m": Limits(4, joins=True, queue=QueuePolicy(max_size=most))})
    for action in steps:
        waiting = [job for job in bench.jobs if not job.done and not any(job in run.jobs for run in bench.runs)]
        if action == 0:
            bench.advance(0.003)
        elif action == 1 and waiting:
            bench.answer(waiting[0], "cancelled")
        else:
            assert (bench.ask(None).outcome == "queue_full") == (len(waiting) >= most)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0001, 0.01), st.floats(0.005, 0.2), st.integers(1, 4)), min_size=1, max_size=80))
def test_no_batch_is_predicted_late_while_a_smaller_one_is_in_time(arrivals):
    """The device keeps exactly to what was learned, so an admitted request that runs with others is never late."""
    bench = Bench()
    jobs = []
    for gap, deadline, rows in arrivals:
        bench.advance(gap)
        jobs.append(bench.ask(deadline, rows=rows))
    bench.advance(10.0)
    assert not any(job.outcome == "late" for job in jobs)
    for run in bench.batches:
        due = min(job.request.deadline for job in run.jobs)
        assert run.started + run.predicted <= due + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.01, 100),
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 1.0)), max_size=100),
    st.floats(1.0001, 50),
)
def test_admission_never_closes_on_an_idle_pool(scale, history, slack):
    """Whatever was learned, a lone request that can make it is admitted and run; one that seemingly cannot is tried."""
    bench = Bench(true=lambda rows: scale * affine(rows))
    for rows, seconds in history:
        bench.scheduler.warmed("m", "gpu", rows, seconds)
    service = bench.scheduler.latency("m", "gpu").mean(1)
    assert bench.ask(service * slack).outcome == ""
    assert len(bench.batches) == 1
    bench.advance(1000.0)
    assert bench.ask(1e-4).outcome == ""
    assert len(bench.batches) == 2


@pytest.mark.parametrize("seed", range(3))
def test_nobody_starves_while_feasible(seed):
    """At nine tenths of what two lanes, three shapes and three tenants can carry, everybody is served."""
    chance = random.Random(seed)
    bench = Bench({lane: Limits(64, joins=True) for lane in "ab"})
    jobs = bench.drive(
        chance,
        500,
        2.0,
        deadline=0.2,
        lane=lambda: chance.choice("aab"),
        tenant=lambda: chance.choice("xyz"),
        signature=lambda: chance.choice("stu"),
    )
    groups = Counter((job.lane, job.request.tenant, job.request.signature) for job in jobs)
    good = Counter((job.lane, job.request.tenant, job.request.signature) for job in jobs if job.outcome == "in_time")
    assert min(good[group] / groups[group] for group in groups) > 0.95
