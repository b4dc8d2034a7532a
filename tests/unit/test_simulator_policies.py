"""What each baseline is known for; and the figures that the gateway's own scheduler is built to reach."""

from dataclasses import replace

import pytest

from gateway.scheduling.base import Limits, Place, Run
from gateway.scheduling.simulator import GRID, POLICIES, Setup, measure, simulate
from gateway.scheduling.simulator.bound import fluid_bound
from gateway.scheduling.simulator.fifo import Aimd, Fifo
from gateway.scheduling.simulator.predictive import Bento
from gateway.scheduling.simulator.scenario import Arrival, Device, Latency, Model, Scenario
from gateway.scheduling.simulator.trials import best_timeout, compare
from gateway.scheduling.simulator.workloads import build

pytestmark = pytest.mark.slow  # whole simulations: `make test` has them, `make quick` has not

SETUP = Setup(seconds=1.2)
SMALL = Setup(Latency(0.016, 0.001), deadline=0.2, seconds=0.8)  # a quarter of the requests


def figures(policy, workload="poisson", load=1.2, setup=SETUP):
    there = build(workload, setup, load)
    return measure(simulate(there, POLICIES[policy](there), seed=1))


def runs(policy, *arrivals):
    model = Model("m", Latency(0.004, 0.00025))
    there = Scenario("test", 1.0, 1.0, (model,), (Device("gpu:0"),), lambda _: arrivals, noise=0.0)
    return simulate(there, policy)


def at(*times, deadline=0.05):
    return [Arrival(time, "m", deadline) for time in times]


@pytest.mark.parametrize("policy", ["greedy", "triton", "fixed-delay", "timeout-0.5", "bento", "clockwork", "deadline"])
def test_below_capacity_everyone_answers_in_time(policy):
    assert figures(policy, load=0.7).in_time > 0.99


@pytest.mark.parametrize("policy", ["triton", "fixed-delay", "aimd"])
def test_a_line_without_bounds_collapses_above_capacity(policy):
    overloaded = figures(policy)
    assert overloaded.in_time < 0.2
    assert overloaded.late > 0.8
    assert overloaded.refused == {}


def test_a_queue_timeout_that_fits_keeps_the_goodput_and_one_that_does_not_loses_it():
    fits, too_long = figures("timeout-0.5"), figures("timeout-0.8")
    assert fits.in_time > 0.8
    assert too_long.in_time < 0.5
    assert set(fits.refused) == {"queue_timeout"}


def test_a_timeout_that_fits_one_model_does_not_fit_four():
    assert figures("timeout-0.5", "zipf-4", 0.9).in_time < figures("timeout-0.8", "zipf-4", 0.9).in_time - 0.05


def test_clockwork_serves_heads_that_are_almost_late_and_loses_its_batches():
    overloaded = figures("clockwork")
    assert overloaded.mean_batch < 10
    assert overloaded.in_time < 0.5
    assert overloaded.late < 0.05


def test_clockwork_with_a_profile_that_is_no_longer_true_is_late():
    assert figures("clockwork", "throttled", 0.6).in_time < figures("bento", "throttled", 0.6).in_time - 0.03


def test_bento_sheds_what_would_be_late():
    overloaded = figures("bento")
    assert overloaded.in_time > 0.8
    assert overloaded.late < 0.01
    assert set(overloaded.refused) == {"shed"}


def test_bento_learns_base_and_rows_of_its_runs():
    bento = Bento(deadline=0.05)
    there = build("poisson", replace(SETUP, noise=0.0), 0.5)
    simulate(there, bento)
    fit = bento._fit("model-1")
    assert fit.base == pytest.approx(0.004, rel=0.01)
    assert fit.per_row == pytest.approx(0.00025, rel=0.01)


def test_greedy_does_not_run_what_is_late_already():
    first, second = runs(POLICIES["greedy"](None), *at(0.1), *at(0.1001, deadline=0.002)).jobs
    assert (first.outcome, second.outcome, second.reason) == ("in_time", "refused", "expired")


def test_a_fixed_delay_waits_for_company_and_not_when_full():
    delayed = runs(Fifo(delay=0.01), *at(0.1, 0.105, *([0.2] * 64)))
    assert [(run.rows, run.started) for run in delayed.runs] == [(2, pytest.approx(0.11)), (64, pytest.approx(0.2))]


def test_aimd_adds_one_and_takes_a_tenth():
    aimd = Aimd(deadline=0.05)
    aimd.open("m", Limits(max_rows=64, joins=True), [Place("gpu:0", 1)])
    sizes = []
    for seconds in (0.01, 0.01, 0.01, 0.06, 0.06):
        most = aimd.most_rows("m", aimd._lines["m"], "gpu:0", 0.0)
        aimd.learn(Run("m", "gpu:0", [], most, 1, "", 0.0), seconds)
        sizes.append(aimd._sizes["m"])
    assert sizes == pytest.approx([2.0, 3.0, 4.0, 3.6, 3.24])


def test_the_grid_search_finds_the_timeout_that_answers_most():
    there = build("poisson", SMALL, 1.3)
    best = best_timeout(there, [1, 2])
    reached = best.spread(lambda each: each.in_time)
    shares = {name: measure(simulate(there, policy(there), 1)).in_time for name, policy in GRID.items()}
    assert min(shares.values()) < max(shares.values()) - 0.1  # it matters which is found
    assert reached.median > max(shares.values()) - 0.03
    named = best.policy.removeprefix("timeout-best (").removesuffix(")")
    assert f"timeout-{named}" in GRID


def test_policies_are_compared_with_the_best_timeout_and_the_bound():
    there = build("poisson", SMALL, 1.3)
    triton, best = compare(there, ["triton", "timeout-best"], [1, 2])
    assert best.of_best == pytest.approx(1.0)
    assert triton.of_best == pytest.approx(triton.spread(lambda each: each.goodput).median / best.best)
    assert triton.of_best < best.of_bound < 1.05
    assert next(compare(there, ["triton"], [1])).of_best is None


# The figures of the issue, less what one short seed differs by.
@pytest.mark.parametrize(("load", "share", "of_bound"), [(0.9, 0.965, 0.965), (1.1, 0.87, 0.96), (1.5, 0.64, 0.96)])
def test_the_deadline_scheduler_reaches_the_issues_figures(load, share, of_bound):
    there = build("poisson", replace(SETUP, seconds=2.0), load)
    record = simulate(there, POLICIES["deadline"](there), seed=1)
    reached = measure(record)
    assert reached.in_time >= share
    assert reached.in_time >= of_bound * fluid_bound(record)
    assert reached.late < 0.01


def test_the_deadline_scheduler_adapts_to_a_device_ten_times_as_slow_and_back():
    there = build("slow-down", replace(SETUP, seconds=6.0), 0.9)
    record = simulate(there, POLICIES["deadline"](there), seed=1)
    slowed, recovered = there.devices[0].slow
    adapted = [run for run in record.runs if run.started >= slowed][20].started
    accepted = [job for job in record.jobs if job.admitted and job.enqueued >= adapted]
    assert sum(job.outcome == "late" for job in accepted) < 0.01 * len(accepted)
    assert [job for job in accepted if job.enqueued < recovered and job.outcome == "in_time"]
    back = [run for run in record.runs if run.started >= recovered][20].ended
    after = [job for job in record.jobs if job.enqueued >= back]
    assert sum(job.outcome == "in_time" for job in after) > 0.98 * len(after) > 1000


def test_a_retry_storm_does_not_cost_the_deadline_scheduler_its_goodput():
    without, storm = (figures("deadline", name, 1.2) for name in ("poisson", "retry-storm"))
    assert storm.attempts > 1.5 * storm.offered
    assert storm.goodput >= 0.95 * without.goodput


def test_mixed_deadlines_are_no_worse_with_the_deadline_scheduler_than_with_the_best_timeout():
    there = build("mixed-deadlines", replace(SMALL, seconds=1.0), 1.1)
    ours, _ = compare(there, ["deadline", "timeout-best"], [1, 2])
    assert ours.of_best > 0.97


def test_eight_models_share_a_device_under_the_deadline_scheduler():
    shared = figures("deadline", "zipf-8", 0.9, replace(SETUP, seconds=2.0))
    assert shared.in_time >= 0.85
    assert shared.worst_model >= 0.8


def test_a_hot_model_leaves_the_others_their_part_under_the_deadline_scheduler():
    assert figures("deadline", "hot-model", 0.9).worst_model >= 0.85
    assert figures("timeout-0.8", "hot-model", 0.9).worst_model < 0.6


def test_who_can_come_along_is_not_refused_for_those_who_come_later():
    there = build("zipf-16", replace(SETUP, seconds=3.0), 1.5)
    ours = measure(simulate(there, POLICIES["deadline"](there), seed=1))
    best = measure(simulate(there, GRID["timeout-0.9+0.0"](there), seed=1))
    assert ours.in_time >= 0.97 * best.in_time
