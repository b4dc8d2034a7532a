"""What the scheduler tells beforehand, and what it may be told: the next verdict, and what an earlier process learned."""

import pytest

from gateway.scheduling.base import Limits, QueuePolicy
from gateway.types import InferRequest
from tests.unit.scheduling_bench import Bench, affine


def foresee(bench, deadline=None):
    due = None if deadline is None else bench.now + deadline
    return bench.scheduler.foresee("m", InferRequest("m", {}, deadline=due), bench.now)


def test_an_idle_device_answers_after_one_run():
    refusal, seconds = foresee(Bench(), 0.05)
    assert refusal is None
    assert seconds == pytest.approx(affine(1), rel=0.01)


def test_what_would_be_refused_is_refused():
    bench = Bench()
    bench.ask()
    bench.advance(0.1)
    assert foresee(bench, 0.001)[0].reason == "deadline"
    while bench.ask().outcome != "overload":
        pass
    foreseen, seconds = foresee(bench, 0.05)
    assert foreseen.reason == "overload"
    assert seconds > 0.05
    assert foresee(bench, 1.0) == (None, pytest.approx(seconds, rel=0.1))


def test_a_full_queue_is_foreseen():
    bench = Bench(lanes={"m": Limits(4, joins=True, queue=QueuePolicy(max_size=1))})
    bench.ask(None)
    assert foresee(bench)[0] is None
    bench.ask(None)
    assert foresee(bench)[0].reason == "queue_full"


def test_asking_counts_nothing():
    bench = Bench()
    foresee(bench)
    foresee(bench, 0.001)
    report = bench.scheduler.report("m")
    assert (report.admitted, dict(report.refused)) == (0, {})
    assert bench.scheduler.is_quiet("m")


# --- priors


def test_a_new_lane_starts_from_what_an_earlier_process_learned():
    prior = Bench().scheduler.latency("m", "gpu").to_prior()
    bench = Bench(warm=False)
    bench.scheduler.seed("m", "gpu", prior)
    assert bench.scheduler.latency("m", "gpu").mean(8) == pytest.approx(affine(8), rel=0.01)
    assert foresee(bench) == (None, pytest.approx(affine(1), rel=0.01))


def test_what_was_measured_is_not_replaced():
    bench = Bench()
    bench.scheduler.seed("m", "gpu", {"a": 1.0, "b": 1.0, "tail": 1.0, "largest": 8})
    assert bench.scheduler.latency("m", "gpu").mean(8) == pytest.approx(affine(8), rel=0.01)


@pytest.mark.parametrize("prior", [{}, {"a": 0.1, "b": -1.0, "tail": 1.0, "largest": 8}])
def test_what_is_no_prior_is_refused_and_changes_nothing(prior):
    bench = Bench(warm=False)
    with pytest.raises((KeyError, ValueError)):
        bench.scheduler.seed("m", "gpu", prior)
    assert not bench.scheduler.latency("m", "gpu").known
