"""The deadline-aware scheduler by example: batches, drops, fairness, priorities, devices."""

import random
from collections import Counter

import pytest

from gateway.scheduling.base import Limits, Place, QueuePolicy
from tests.unit.scheduling_bench import Bench, affine, share


def rows(bench):
    return [run.rows for run in bench.batches]


def closed(bench):
    return [run.reason for run in bench.batches]


def occupied(**more):
    """A bench whose device has just begun a run of one row."""
    bench = Bench(**more)
    bench.ask(1.0, next(iter(bench.lanes)))
    bench.batches.clear()
    return bench


# --- one lane


def test_an_idle_engine_takes_what_waits():
    bench = Bench()
    bench.ask()
    assert (rows(bench), closed(bench)) == ([1], ["drained"])


def test_what_came_during_a_run_is_the_next_batch():
    bench = occupied()
    for _ in range(5):
        bench.ask()
    bench.advance(1.0)
    assert rows(bench) == [5]


def test_a_batch_is_as_large_as_its_head_allows():
    bench = occupied()
    jobs = [bench.ask(0.0135) for _ in range(21)]  # 4.25 ms of it are gone at dispatch, and 21 rows take 9.25
    bench.advance(1.0)
    assert rows(bench) == [21]
    assert share(jobs) == 1.0


def test_who_cannot_be_served_in_time_any_more_is_told_so():
    bench = occupied()
    job = bench.ask(0.006, admit=False)
    bench.advance(1.0)
    assert job.outcome == "expired"
    assert rows(bench) == []


def test_a_lone_request_is_tried_if_it_can_just_make_it():
    bench = Bench()
    for _ in range(64):
        for _ in range(2):
            bench.scheduler.warmed("m", "gpu", 1, affine(1) * 1.3)
        bench.scheduler.warmed("m", "gpu", 1, affine(1) * 0.9)
    model = bench.scheduler.latency("m", "gpu")
    assert model.tail > 1.05
    job = bench.ask(model.mean(1) * 1.01)
    assert not job.outcome
    assert rows(bench) == [1]


def test_without_a_deadline_nobody_is_dropped_and_batches_are_full():
    bench = occupied()
    jobs = [bench.ask(None) for _ in range(640)]
    bench.advance(5.0)
    assert len(rows(bench)) <= 11
    assert share(jobs) == 1.0


def test_who_has_no_deadline_is_not_starved_by_those_who_have():
    bench = Bench(true=lambda rows: 4 * affine(rows))  # as in an overload at 4800 requests/s, with a quarter of them
    patient = [bench.ask(None) for _ in range(3)]
    bench.drive(random.Random(1), 1200, 12.0, deadline=0.2)
    assert share(patient) == 1.0
    assert max(job.answered for job in patient) < 10.5


def test_shapes_are_never_mixed_and_the_earlier_goes_first():
    bench = occupied()
    for number in range(6):
        bench.ask(0.05, signature="ab"[number % 2])
    bench.advance(1.0)
    assert rows(bench) == [3, 3]
    assert [{job.request.signature for job in run.jobs} for run in bench.batches] == [{"a"}, {"b"}]


def test_a_cancelled_job_is_passed_over_and_not_counted():
    bench = occupied()
    jobs = [bench.ask(run=False) for _ in range(3)]
    bench.answer(jobs[1], "cancelled")
    bench.advance(1.0)
    assert [run.jobs for run in bench.batches] == [[jobs[0], jobs[2]]]


def test_a_failed_run_teaches_nothing_and_its_jobs_may_come_back():
    bench = Bench()
    job = bench.ask()
    before = bench.scheduler.latency("m", "gpu").to_prior()
    run = bench.runs.pop()
    bench.scheduler.finished(run, 9.0, bench.now, failed=True)
    assert bench.scheduler.latency("m", "gpu").to_prior() == before
    bench.scheduler.add("m", job, bench.now)
    bench.dispatch()
    bench.advance(1.0)
    assert job.outcome == "in_time"
    assert bench.scheduler.report("m").failed == 1


def test_what_an_event_loop_that_is_behind_adds_is_overhead_and_no_part_of_the_run():
    bench = Bench()
    bench.ask(None)
    run = bench.runs.pop()
    seconds = bench.true(1)
    bench.now += seconds + 0.3
    bench.scheduler.finished(run, seconds, bench.now)
    assert bench.scheduler.report("m").actual_seconds == pytest.approx(seconds)
    bench.answer(bench.jobs[0], "in_time")
    assert bench.scheduler._at.overhead == pytest.approx(0.1 * 0.3)


def test_how_long_answers_take_is_not_learned_from_who_leaves_while_his_run_lasts():
    bench = Bench(true=lambda rows: 0.4)
    bench.ask(None)
    jobs = [bench.ask(None) for _ in range(20)]
    bench.advance(0.7)  # 0.3 into the second run
    for job in jobs[:10]:
        bench.answer(job, "cancelled")
    assert bench.scheduler._at.overhead == 0.0


def test_how_long_answers_take_is_not_learned_from_the_end_of_another_run():
    bench = Bench(places=(Place("gpu", 2),), cores={"gpu": 2}, true=lambda rows: 0.1 if rows == 1 else 0.4)
    long, _ = (bench.ask(None, rows=rows) for rows in (8, 1))
    bench.advance(0.35)  # the short one is over
    assert len(bench.runs) == 1
    bench.answer(long, "cancelled")
    assert bench.scheduler._at.overhead == 0.0


def test_how_long_answers_take_is_learned_from_who_waits_for_them():
    bench = Bench()
    job = bench.ask(None)
    run = bench.runs.pop()
    bench.scheduler.finished(run, 0.005, 0.005)
    bench.now = 0.025
    bench.answer(job, "in_time")
    assert bench.scheduler._at.overhead == pytest.approx(0.002)


@pytest.mark.parametrize(("way", "refused"), [(0.0, False), (0.002, True)])
def test_of_its_deadline_a_request_is_on_its_way_for_a_part(way, refused):
    """Answers that leave here in the last moment come to the caller after it."""
    bench = occupied(way=way)
    left = bench.true(1)  # of the run
    soon = bench.ask(left + bench.true(1) + 0.001, run=False)
    assert (soon.outcome == "overload") is refused
    later = bench.ask(left + bench.true(2) + 0.003, run=False)
    assert later.outcome == ""
    bench.advance(1.0)
    assert later.outcome == "in_time"
    assert bench.scheduler._at.overhead == pytest.approx(way)


def test_earlier_deadlines_go_first_whatever_came_first():
    bench = occupied(lanes={"m": Limits(2, joins=True)})
    jobs = [bench.ask(deadline) for deadline in (0.9, 0.5, 0.7, 0.3)]
    bench.advance(1.0)
    assert [[jobs.index(job) for job in run.jobs] for run in bench.batches] == [[3, 1], [2, 0]]


def test_closing_hands_back_what_waits_and_opening_again_keeps_it():
    bench = occupied()
    jobs = [bench.ask() for _ in range(3)]
    bench.scheduler.open("m", Limits(2, joins=True), bench.places)
    bench.answer(jobs[1], "cancelled")
    assert bench.scheduler.close("m") == [jobs[0], jobs[2]]
    for job in (jobs[0], jobs[2]):
        bench.answer(job, "released")
    bench.finish(bench.runs[0])
    assert bench.scheduler.dispatch("gpu", bench.now).run is None


# --- load: what is measured against in issue 3


@pytest.mark.parametrize(("load", "least"), [(0.9, 0.975), (1.1, 0.88), (1.5, 0.65)])
def test_goodput_with_default_settings(load, least):
    bench = Bench()
    jobs = bench.drive(random.Random(1), 3200 * load, 2.0)
    assert share(jobs) >= least
    if load > 1:
        assert share(jobs) * load >= 0.98
    assert share(jobs, "late") <= 0.001


def test_a_device_that_slows_down_ten_times_keeps_deadlines_within_twenty_batches_and_recovers():
    chance = random.Random(1)
    bench = Bench()
    bench.drive(chance, 2000, 0.5)
    bench.speed["gpu"] = 10.0
    seen = len(bench.batches)
    slow = bench.drive(chance, 2000, 3.0)
    late = [job for job in slow if job.outcome == "late"]
    after = bench.batches[seen + 20].started
    assert all(job.enqueued < after for job in late)
    assert share([job for job in slow if job.enqueued > after]) > 0.02
    bench.speed["gpu"] = 1.0
    bench.drive(chance, 2000, 0.2)
    assert share(bench.drive(chance, 2000, 1.0)) > 0.97


def test_a_device_too_slow_for_any_deadline_is_tried_again_when_it_may_have_recovered():
    bench = Bench()
    bench.speed["gpu"] = 100.0
    for _ in range(20):
        bench.ask()
        bench.advance(2.0)
    assert bench.ask().outcome == ""  # nothing ran for over a second
    bench.advance(0.5)
    assert bench.ask().outcome == "deadline"
    bench.speed["gpu"] = 1.0
    for _ in range(6):  # each is a try that teaches
        bench.advance(2.0)
        bench.ask()
    bench.advance(2.0)
    assert share(bench.drive(random.Random(1), 1000, 0.5)) == 1.0


# --- fairness


def eight(**more):
    return Bench(lanes={str(n): Limits(64, joins=True) for n in range(8)}, **more)


def test_one_hot_model_leaves_the_others_their_share():
    bench = eight()
    chance = random.Random(1)
    jobs = bench.drive(
        chance, 2650, 3.0, lane=lambda: "0" if chance.random() < 1900 / 2650 else str(chance.randint(1, 7))
    )
    for lane in map(str, range(1, 8)):
        assert share([job for job in jobs if job.lane == lane]) >= 0.85
    assert share([job for job in jobs if job.lane == "0"]) > 0.05


def test_one_hot_tenant_leaves_the_others_their_share():
    bench = Bench()
    chance = random.Random(1)
    jobs = bench.drive(chance, 6400, 2.0, tenant=lambda: "hot" if chance.random() < 0.9 else chance.choice("ab"))
    for tenant in "ab":
        assert share([job for job in jobs if job.request.tenant == tenant]) >= 0.9
    assert share([job for job in jobs if job.request.tenant == "hot"]) >= 0.35


def test_two_tenants_who_always_have_work_get_as_much():
    bench = Bench(lanes={"m": Limits(8, joins=True)})
    jobs = [bench.ask(None, tenant=tenant, run=False) for tenant in "ab" for _ in range(400)]
    bench.dispatch()
    bench.advance(0.006 * 40)
    ran = Counter(job.request.tenant for job in jobs if job.outcome)
    assert ran.total() >= 300
    assert abs(ran["a"] - ran["b"]) <= 8  # a batch


# --- priorities


def test_critical_work_goes_first_and_is_answered_in_overload():
    bench = Bench()
    chance = random.Random(1)
    jobs = bench.drive(chance, 4800, 2.0, priority=lambda: 1 if chance.random() < 0.2 else 0)
    assert share([job for job in jobs if job.request.priority == 1]) >= 0.98
    assert share([job for job in jobs if job.request.priority == 0]) >= 0.5


@pytest.mark.parametrize(("load", "least", "most"), [(0.3, 0.99, 1.0), (1.3, 0.0, 0.1)])
def test_sheddable_work_is_admitted_while_there_is_room_only(load, least, most):
    bench = Bench()
    chance = random.Random(1)
    jobs = bench.drive(chance, 3200 * load, 2.0, priority=lambda: 3 if chance.random() < 0.3 else 2)
    assert least <= share([job for job in jobs if job.request.priority == 3]) <= most


def test_work_that_gives_way_is_never_refused_by_an_idle_engine():
    bench = Bench(lanes={"m": Limits(1)}, true=lambda rows: 0.01)
    jobs = []
    for _ in range(2000):  # at twice what it can do
        bench.advance(0.005)
        idle = not bench.runs
        jobs.append(bench.ask(None, priority=3))
        assert not (idle and jobs[-1].outcome)
    bench.advance(1.0)
    assert share(jobs) >= 0.45


def test_work_that_gives_way_does_not_keep_itself_out_by_being_refused():
    jobs = Bench().drive(random.Random(1), 6400, 2.0, priority=3, deadline=None)
    assert share(jobs) >= 0.35


def test_a_queue_of_cancelled_jobs_does_not_stand_in_the_way():
    bench = Bench(lanes={"a": Limits(1), "b": Limits(1)})
    _, left = (bench.ask(None, "a", run=False) for _ in range(2))
    bench.dispatch()
    bench.answer(left, "cancelled")
    bench.advance(1.0)
    bench.ask(None, "b")
    assert len(bench.runs) == 1
    assert bench.ask(None, "b", priority=3).outcome == ""


def test_default_work_ages_and_gets_some_of_the_time_of_critical_work():
    bench = Bench(lanes={"critical": Limits(8, joins=True), "default": Limits(8, joins=True)})
    jobs = [bench.ask(None, "default") for _ in range(8)]
    for _ in range(200):
        for _ in range(16):
            bench.ask(None, "critical", priority=1, admit=False)
        bench.advance(0.012)
    assert share(jobs) == 1.0


def test_critical_work_displaces_what_waits():
    bench = Bench()
    bench.ask(1.0, rows=64)
    lower = [bench.ask(0.0415) for _ in range(64)]
    assert not any(job.outcome for job in lower)
    critical = [bench.ask(0.05, priority=1) for _ in range(40)]
    assert not any(job.outcome for job in critical)
    assert share(lower, "shed") > 0
    bench.advance(1.0)
    assert share(critical) == 1.0


@pytest.mark.parametrize("left", ["ran", "cancelled"])
def test_critical_work_displaces_what_waits_though_there_was_less_urgent_work_once(left):
    bench = Bench()
    if left == "ran":
        bench.ask(None, priority=3)
        bench.advance(1.0)
    bench.ask(1.0, rows=64)
    if left == "cancelled":
        bench.answer(bench.ask(None, priority=3), "cancelled")
    lower = [bench.ask(0.0415) for _ in range(64)]
    for _ in range(40):
        bench.ask(0.05, priority=1)
    assert share(lower, "shed") > 0


def test_who_is_served_first_in_first_out_displaces_nobody():
    bench = Bench()
    bench.ask(1.0, rows=64)
    bench.scheduler.latency("m", "gpu").trusted = False
    jobs = [bench.ask(deadline) for deadline in (100.0, 0.0415) for _ in range(64)]
    jobs += [bench.ask(0.05, priority=1) for _ in range(40)]
    assert not any(job.outcome for job in jobs)


def test_what_a_policy_put_behind_the_others_is_displaced_by_its_own_deadline():
    bench = Bench(lanes={"m": Limits(64, joins=True, queue=QueuePolicy(timeout=0.001, delays=True))})
    bench.ask(1.0, rows=64)
    lower = [bench.ask(0.0415) for _ in range(32)]
    bench.advance(0.002)
    for _ in range(80):
        bench.ask(0.06, priority=1)
    assert share(lower, "shed") > 0


# --- Triton's knobs


def test_a_delay_is_waited_for_and_asked_at():
    bench = Bench(lanes={"m": Limits(8, joins=True, delay=0.02)})
    bench.ask(1.0)
    answer = bench.scheduler.dispatch("gpu", bench.now)
    assert (answer.run, answer.ask_at) == (None, pytest.approx(0.02))
    bench.advance(0.02)
    assert closed(bench) == ["delay"]


def test_a_delay_does_not_outlast_the_time_that_the_run_needs():
    bench = Bench(lanes={"m": Limits(8, joins=True, delay=5.0)}, true=lambda rows: 0.03)
    job = bench.ask(0.04)
    bench.advance(1.0)
    assert job.outcome == "in_time"


def test_a_delay_ends_when_a_request_of_another_shape_comes():
    bench = Bench(lanes={"m": Limits(8, joins=True, delay=5.0)})
    for signature in "ab":
        assert rows(bench) == []
        bench.ask(10.0, signature=signature)
    assert (rows(bench), closed(bench)) == ([1], ["shape"])


def test_a_preferred_size_is_run_at_once():
    bench = Bench(lanes={"m": Limits(8, joins=True, delay=5.0, preferred=(4,))})
    for _ in range(5):
        bench.ask(1.0)
    assert (rows(bench), closed(bench)) == ([4], ["preferred"])


@pytest.mark.parametrize("size", [1, 3])
def test_a_full_queue_is_exact(size):
    bench = occupied(lanes={"m": Limits(64, joins=True, queue=QueuePolicy(max_size=size))})
    jobs = [bench.ask() for _ in range(6)]
    assert [job.outcome for job in jobs] == [""] * size + ["queue_full"] * (6 - size)
    assert bench.refusals[0].text == "Exceeds maximum queue size"
    bench.answer(jobs[0], "cancelled")
    assert bench.ask().outcome == ""
    assert bench.ask().outcome == "queue_full"


@pytest.mark.parametrize(
    ("policy", "parameters", "outcome"),
    [
        (QueuePolicy(timeout=0.001), {}, "queue_timeout"),
        (QueuePolicy(timeout=1.0), {}, "in_time"),
        (QueuePolicy(timeout=1.0, allow_override=True), {"timeout": 1000}, "queue_timeout"),
        (QueuePolicy(allow_override=True), {"timeout": 1000}, "queue_timeout"),
        (QueuePolicy(timeout=1.0), {"timeout": 1000}, "in_time"),
        (QueuePolicy(timeout=0.001, allow_override=True), {"timeout": 10**6}, "queue_timeout"),
        (QueuePolicy(timeout=0.001, delays=True), {}, "in_time"),
    ],
)
def test_a_queue_timeout(policy, parameters, outcome):
    bench = occupied(lanes={"m": Limits(64, joins=True, queue=policy)})
    job = bench.ask(1.0, parameters=parameters)
    bench.advance(0.003)
    assert job.outcome == (outcome if outcome == "queue_timeout" else "")
    bench.advance(1.0)
    assert job.outcome == outcome
    if outcome == "queue_timeout":
        assert bench.refusals[-1].text == "Request timeout expired"


def test_the_delayed_go_behind_the_others():
    bench = occupied(lanes={"m": Limits(2, joins=True, queue=QueuePolicy(timeout=0.003, delays=True))})
    first = bench.ask(1.0)
    bench.advance(0.002)
    others = [bench.ask(2.0) for _ in range(2)]
    bench.advance(0.003)
    assert bench.batches[0].jobs == others
    bench.advance(1.0)
    assert first.outcome == "in_time"


def test_a_queue_timeout_passes_over_those_who_left_the_middle_of_the_line():
    bench = Bench(lanes={"m": Limits(4, joins=True, queue=QueuePolicy(timeout=0.1))}, true=lambda rows: 0.2)
    jobs = [bench.ask(None, tenant=tenant, run=False) for tenant in "ab" for _ in range(10)]
    bench.dispatch()
    assert sorted(job.request.tenant for job in bench.runs[0].jobs) == ["a", "a", "b", "b"]
    bench.advance(1.0)
    assert (share(jobs), share(jobs, "queue_timeout")) == (0.2, 0.8)


def test_a_cancelled_job_that_would_be_put_behind_the_others_is_not_counted():
    bench = occupied(lanes={"m": Limits(1, queue=QueuePolicy(timeout=0.001, delays=True))})
    job = bench.ask(None, admit=False)
    bench.answer(job, "cancelled")
    bench.advance(1.0)
    lane = bench.scheduler._lanes["m"]
    assert (lane.rows, lane.requests, lane.waiting) == (0, 0, 0)
    assert bench.scheduler.is_quiet("m")


def test_strict_priority_levels():
    limits = Limits(2, joins=True, priority_levels=3, default_priority=2, priority_queues={3: QueuePolicy(max_size=1)})
    bench = occupied(lanes={"m": limits})
    jobs = [bench.ask(1.0, priority=priority) for priority in (3, 3, 0, 9, 1, 1)]
    assert [job.outcome for job in jobs] == ["", "queue_full", "", "", "", ""]
    bench.advance(1.0)
    assert [[jobs.index(job) for job in run.jobs] for run in bench.batches] == [[4, 5], [2, 3], [0]]


# --- slots and devices


def test_a_lone_run_gets_every_core_and_a_loaded_device_shares_them():
    bench = Bench(places=(Place("cpu", 2, threads=1, widest=9),), cores={"cpu": 4})
    bench.ask(1.0)
    bench.advance(1.0)
    assert [run.cores for run in bench.batches] == [4]
    bench.batches.clear()
    for _ in range(4):
        bench.ask(1.0, run=False)
    bench.dispatch()
    assert [(run.cores, run.rows) for run in bench.batches] == [(1, 2), (1, 2)]


def test_a_wide_run_is_not_starved_by_narrow_ones():
    bench = Bench(lanes={"narrow": Limits(1), "wide": Limits(1)}, cores={"gpu": 2}, warm=False)
    bench.scheduler.open("narrow", Limits(1), [Place("gpu", 2)])
    bench.scheduler.open("wide", Limits(1), [Place("gpu", 1, threads=2)])
    for _ in range(2):
        bench.ask(1.0, "narrow")
    bench.advance(0.001)
    wide = bench.ask(1.0, "wide")
    for _ in range(20):
        bench.ask(2.0, "narrow")
    bench.advance(affine(1) * 2.1)
    assert wide.outcome == "in_time"


def test_a_batch_does_not_grow_where_nothing_is_gained_unless_it_must():
    bench = occupied(lanes={"m": Limits(8, joins=True)}, true=lambda rows: 0.11 * rows)
    for _ in range(4):
        bench.ask(5.0)
    bench.advance(1.0)
    assert rows(bench) == [1, 1, 1, 1]


def test_short_runs_are_not_taken_apart_whatever_they_gain():
    bench = occupied(lanes={"m": Limits(32, joins=True)}, true=lambda rows: 0.012 * rows)
    for _ in range(24):
        bench.ask(5.0)
    bench.advance(1.0)
    assert rows(bench) == [8] * 3


FAST_AND_SLOW = (Place("gpu", 1), Place("cpu", 1))


def unequal():
    bench = Bench(places=FAST_AND_SLOW, warm=False)
    bench.speed["cpu"] = 4.0
    bench.learn("m")
    return bench


def test_the_slow_pool_gets_only_what_the_fast_one_would_answer_late():
    bench = unequal()
    bench.drive(random.Random(1), 1000, 1.0)
    assert {run.device for run in bench.batches} == {"gpu"}
    bench.batches.clear()
    jobs = bench.drive(random.Random(1), 4000, 1.0)
    assert {run.device for run in bench.batches} == {"gpu", "cpu"}
    assert share(jobs, "late") <= 0.001
    assert bench.scheduler.report("m").spilled > 0


@pytest.mark.parametrize("how", ["lost", "opened"])
def test_the_slow_pool_takes_all_when_the_fast_one_is_lost(how):
    bench = unequal()
    if how == "lost":
        bench.scheduler.lost("gpu")
    else:
        bench.scheduler.open("m", bench.lanes["m"], FAST_AND_SLOW[1:])
    jobs = bench.drive(random.Random(1), 100, 1.0)
    assert {run.device for run in bench.batches} == {"cpu"}
    assert share(jobs) > 0.9


def test_the_report_explains():
    bench = Bench()
    bench.drive(random.Random(1), 4800, 1.0)
    report = bench.scheduler.report("m")
    assert report.batches == len(bench.batches) == sum(report.closed.values())
    assert report.rows == sum(rows(bench))
    assert report.admitted == len(bench.jobs)
    assert report.refused["overload"] == sum(refusal.reason == "overload" for refusal in bench.refusals)
    assert report.actual_seconds == pytest.approx(report.predicted_seconds, rel=0.05)
    assert report.late == 0
    assert report.trusted
