"""The simulator: every request has one outcome, a seed repeats itself, and faults of a scheduler are found out."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.scheduling.base import Refusal, Run
from gateway.scheduling.simulator import GRID, POLICIES, WORKLOADS, Fault, Setup, measure, simulate
from gateway.scheduling.simulator.bound import fluid_bound
from gateway.scheduling.simulator.fifo import Fifo
from gateway.scheduling.simulator.scenario import Arrival, Clients, Device, Latency, Model, Retry, Scenario
from gateway.scheduling.simulator.simulation import warm_up_sizes
from gateway.scheduling.simulator.workloads import build, capacity

pytestmark = pytest.mark.slow  # whole simulations: `make test` has them, `make quick` has not

SHORT = Setup(Latency(0.016, 0.001), deadline=0.2, seconds=0.3)
MODEL = Model("m", Latency(0.004, 0.00025))
OPEN = sorted(set(WORKLOADS) - {"closed-loop"})


def scenario(*arrivals, **changes):
    """Given arrivals on one device without noise."""
    plain = Scenario("test", 1.0, 1.0, (MODEL,), (Device("gpu:0"),), lambda _: arrivals, noise=0.0)
    return replace(plain, **changes)


def at(*times, deadline=0.05, **properties):
    return [Arrival(time, "m", deadline, **properties) for time in times]


def outcomes(record):
    return [job.outcome for job in record.jobs]


def trace(record):
    return [(job.call, job.outcome, job.reason, job.enqueued, job.answered) for job in record.jobs]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_request_has_one_outcome(workload, policy):
    there = build(workload, SHORT, 1.3)
    record = simulate(there, POLICIES[policy](there), seed=3)
    figures = measure(record)
    assert len(record.jobs) == figures.attempts > 50
    assert all(job.answered >= job.enqueued for job in record.jobs)
    ran = sum(run.rows for run in record.runs if not run.failed)
    assert ran == sum(job.request.rows for job in record.jobs if job.outcome in ("in_time", "late"))
    if workload in OPEN:
        assert figures.offered == len(list(there.arrivals(random.Random("3 arrivals"))))


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        time=st.floats(0, 0.3),
        model=st.sampled_from(["a", "b"]),
        deadline=st.one_of(st.none(), st.floats(0.001, 0.5)),
        rows=st.integers(1, 8),
        priority=st.integers(0, 3),
        tenant=st.sampled_from(["", "x", "y"]),
        patience=st.one_of(st.none(), st.floats(0.0, 0.1)),
    ),
    max_size=60,
).map(lambda found: sorted(found, key=lambda arrival: arrival.time))


@settings(max_examples=30, deadline=None)
@given(
    arrivals=ARRIVALS,
    policy=st.sampled_from([*POLICIES, next(iter(GRID))]),
    slots=st.integers(1, 2),
    lost=st.one_of(st.none(), st.tuples(st.floats(0, 0.2), st.floats(0.2, 0.4))),
    retry=st.one_of(st.none(), st.builds(Retry, attempts=st.integers(0, 5), obeys=st.booleans())),
)
def test_any_workload_keeps_the_books(arrivals, policy, slots, lost, retry):
    """`simulate` itself raises a fault for a lost request, a second outcome, or a run that may not be."""
    models = tuple(Model(name, Latency(0.004, 0.001), max_rows=8) for name in "ab")
    devices = (Device("gpu:0", slots, lost=lost), Device("gpu:1", speed=0.5))
    there = scenario(*arrivals, models=models, devices=devices, retry=retry, noise=0.1)
    record = simulate(there, POLICIES.get(policy, GRID.get(policy))(there))
    assert len({job.call for job in record.jobs}) == len(arrivals)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_repeats_itself_and_another_does_not(policy):
    there = build("bursty", SHORT, 1.1)
    first, again, other = (trace(simulate(there, POLICIES[policy](there), seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_two_policies_meet_the_same_arrivals():
    there = build("zipf-4", SHORT, 1.1)
    sent = [
        [(job.enqueued, job.lane) for job in simulate(there, POLICIES[policy](there), 5).jobs]
        for policy in ("triton", "clockwork")
    ]
    assert sent[0] == sent[1]


def test_a_lone_request_takes_the_time_of_its_batch():
    record = simulate(scenario(*at(0.1)), Fifo())
    assert record.jobs[0].answered == pytest.approx(0.1 + 0.00425)


def test_what_comes_during_a_run_shares_the_next():
    record = simulate(scenario(*at(0.1, 0.101, 0.102, 0.103)), Fifo())
    assert [run.rows for run in record.runs] == [1, 3]
    assert [job.answered for job in record.jobs[1:]] == pytest.approx([0.1 + 0.00425 + 0.00475] * 3)


def test_a_request_is_late_by_its_own_deadline():
    record = simulate(scenario(*at(0.1, deadline=0.004), *at(0.2, deadline=0.005), *at(0.3, deadline=None)), Fifo())
    assert outcomes(record) == ["late", "in_time", "in_time"]


def test_fifo_without_batches_waits_as_a_queue_of_its_kind_does():
    """M/D/1: the mean wait of Poisson arrivals for a server of constant time s at load p is p*s / 2(1-p)."""
    service, load = 0.005, 0.7
    model = Model("model-1", Latency(service, 0.0), max_rows=1)
    plain = build("poisson", Setup(seconds=60.0), load / service / 3200)
    record = simulate(replace(plain, models=(model,), noise=0.0), Fifo())
    waits = [job.answered - job.enqueued - service for job in record.jobs]
    assert sum(waits) / len(waits) == pytest.approx(load * service / 2 / (1 - load), rel=0.07)


def test_a_caller_who_hangs_up_is_not_served():
    arrivals = [*at(0.1, rows=64), *at(0.101, patience=0.002), *at(0.102)]
    record = simulate(scenario(*arrivals), Fifo())
    assert outcomes(record) == ["in_time", "cancelled", "in_time"]
    assert [run.rows for run in record.runs] == [64, 1]


def test_a_caller_who_hangs_up_during_the_run_is_cancelled_once():
    record = simulate(scenario(*at(0.1, patience=0.001)), Fifo())
    assert outcomes(record) == ["cancelled"]
    assert [run.rows for run in record.runs] == [1]


class Refusing(Fifo):
    """Refuses the first so many."""

    def __init__(self, count, retry_after=None):
        super().__init__()
        self.left, self.retry_after = count, retry_after

    def admit(self, lane, request, now):
        self.left -= 1
        return Refusal("overload", "no", self.retry_after) if self.left >= 0 else None


@pytest.mark.parametrize(("obeys", "sent"), [(False, [0.1, 0.101, 0.102]), (True, [0.1, 0.35, 0.6])])
def test_a_refused_caller_asks_again(obeys, sent):
    record = simulate(scenario(*at(0.1), retry=Retry(obeys=obeys)), Refusing(2, retry_after=0.25))
    assert [job.enqueued for job in record.jobs] == pytest.approx(sent)
    assert outcomes(record) == ["refused", "refused", "in_time"]
    assert measure(record).in_time == 1.0
    assert measure(record).offered == 1


def test_a_refused_caller_gives_up_after_its_attempts():
    record = simulate(scenario(*at(0.1), retry=Retry(attempts=5)), Refusing(100))
    assert outcomes(record) == ["refused"] * 6
    assert measure(record).in_time == 0.0
    assert measure(record).refused == {"overload": 6}


def test_clients_of_a_closed_loop_wait_for_their_answer():
    there = scenario(clients=Clients(3, think=0.01), arrivals=lambda _: iter(lambda: at(0.0)[0], None))
    record = simulate(there, Fifo())
    assert len(record.jobs) > 50
    for job in record.jobs:
        assert sum(other.enqueued <= job.enqueued < other.answered for other in record.jobs) <= 3


def test_a_slow_device_takes_longer():
    device = Device("gpu:0", speed=0.5, slow=(0.2, 0.3), slow_factor=10.0)
    record = simulate(scenario(*at(0.1, 0.25, 0.4, deadline=1), devices=(device,)), Fifo())
    assert [run.ended - run.started for run in record.runs] == pytest.approx([0.0085, 0.085, 0.0085])


def test_what_runs_on_a_device_that_is_lost_runs_elsewhere():
    devices = (Device("gpu:0", lost=(0.102, 0.5)), Device("gpu:1", speed=0.1))
    record = simulate(scenario(*at(0.1, 0.2, 0.6), devices=devices), Fifo())
    assert [(run.device, run.failed) for run in record.runs] == [
        ("gpu:0", True),
        ("gpu:1", False),
        ("gpu:1", False),
        ("gpu:0", False),
    ]
    assert outcomes(record) == ["in_time"] * 3


class Warmed(Fifo):
    """Notes its warm-up."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def warmed(self, lane, device, rows, seconds):
        self.seen.append((lane, device, rows, seconds))


def test_the_warm_up_shows_every_size_unless_the_start_is_cold():
    warm, cold = Warmed(), Warmed()
    simulate(scenario(), warm)
    simulate(scenario(cold=True), cold)
    assert [rows for *_, rows, _ in warm.seen] == [size for size in (1, 2, 4, 8, 16, 32, 64) for _ in range(3)]
    assert warm.seen[-1] == ("m", "gpu:0", 64, pytest.approx(0.02))
    assert cold.seen == []
    assert warm_up_sizes(1) == [1]
    assert warm_up_sizes(12) == [1, 2, 4, 8, 12]


class Forgetful(Fifo):
    """Loses its second job."""

    def add(self, lane, job, now):
        if job.call != 2:
            super().add(lane, job, now)


class Repeating(Fifo):
    """Runs its last batch again."""

    last = None

    def dispatch(self, device, now):
        answer = super().dispatch(device, now)
        if answer.run is None and self.last is not None:
            answer.run = Run("m", device, self.last.jobs, self.last.rows, 1, "again", now)
        self.last = answer.run
        return answer


class Overfilling(Fifo):
    """Makes batches of any size."""

    def most_rows(self, lane, line, device, now):
        return 1000


class Impatient(Fifo):
    """Wants to be asked again at once, for ever."""

    def dispatch(self, device, now):
        answer = super().dispatch(device, now)
        answer.ask_at = now
        return answer


class Fickle(Fifo):
    """Refuses what it runs."""

    def dispatch(self, device, now):
        answer = super().dispatch(device, now)
        if answer.run is None and self._running.get(device):
            answer.refused = [(self.job, Refusal("shed", "no"))]
        elif answer.run is not None:
            self.job = answer.run.jobs[0]
        return answer


@pytest.mark.parametrize(
    ("scheduler", "text"),
    [
        (Forgetful, "1 of 3 requests have no outcome"),
        (Repeating, "no free slot"),
        (Overfilling, "2 jobs and 80 rows"),
        (Impatient, "time stands still"),
        (Fickle, "was refused"),
    ],
)
def test_a_scheduler_that_breaks_its_contract_is_found_out(scheduler, text):
    arrivals = [*at(0.1, rows=64), *at(0.101, 0.102, rows=40)]
    with pytest.raises(Fault, match=text):
        simulate(scenario(*arrivals), scheduler())


def test_the_fluid_bound_is_the_rate_of_the_largest_batch_in_time():
    """Device 4 ms + 0.25 ms a row: 64 rows in 20 ms are 3200 a second; 16 rows in 8 ms, the most in 8 ms, 2000."""
    assert Latency(0.004, 0.00025).rate(64) == pytest.approx(3200)
    assert Latency(0.004, 0.00025).rate(64, 0.05) == pytest.approx(3200)
    assert Latency(0.004, 0.00025).rate(64, 0.008) == pytest.approx(2000)
    assert Latency(0.004, 0.00025).rate(64, 0.004) == 0


@pytest.mark.parametrize(("deadline", "rate", "share"), [(0.05, 6400, 0.5), (0.05, 1600, 1.0), (0.008, 4000, 0.5)])
def test_the_fluid_bound_of_even_arrivals(deadline, rate, share):
    model = replace(MODEL, deadline=deadline)
    arrivals = at(*(number / rate for number in range(2 * rate)), deadline=deadline)
    record = simulate(scenario(*arrivals, seconds=2.0, models=(model,)), Fifo())
    assert fluid_bound(record) == pytest.approx(share, abs=0.03)  # what comes last may be answered after the end


def test_the_fluid_bound_takes_the_cheap_first_and_leaves_the_hopeless():
    # In 0.1 s the device has time for 320 rows: 20 of the large at 64 each would be 1280, so 5; but 320 small come first.
    mixed = [*at(*([0.0] * 20), rows=64, deadline=0.05), *at(*([0.0] * 320))]
    assert fluid_bound(simulate(scenario(*mixed), Fifo())) == pytest.approx(320 / 340)
    assert fluid_bound(simulate(scenario(*at(0.1, deadline=0.004), *at(0.1)), Fifo())) == 0.5
    assert fluid_bound(simulate(scenario(), Fifo())) == 1.0


def test_the_fluid_bound_knows_slow_and_lost_devices():
    crowd = at(*([0.0] * 640))
    assert fluid_bound(simulate(scenario(*crowd), Fifo())) == pytest.approx(0.5)
    slow = (Device("gpu:0", slow=(0.0, 1.0), slow_factor=2.0),)
    assert fluid_bound(simulate(scenario(*crowd, devices=slow), Fifo())) == pytest.approx(0.25)
    two = (Device("gpu:0", lost=(0.05, 1.0)), Device("gpu:1"))
    assert fluid_bound(simulate(scenario(*crowd, devices=two), Fifo())) == pytest.approx(0.75)


def test_capacity_is_that_of_the_largest_batch_and_less_for_many_models():
    assert capacity(Setup().models()) == pytest.approx(3200)
    rates = [capacity(Setup(deadline=deadline).models([1.0] * 8)) for deadline in (0.05, 0.1, 10.0)]
    assert rates == sorted(rates)
    assert 800 < rates[0] < 1400
    assert rates[2] == pytest.approx(3200, rel=0.01)
    with pytest.raises(ValueError, match="shorter"):
        capacity(Setup(deadline=0.004).models())


@pytest.mark.parametrize("workload", sorted(set(WORKLOADS) - {"closed-loop", "hot-model"}))
def test_workloads_offer_at_most_their_load(workload):
    there = build(workload, Setup(seconds=8.0), 0.8)
    rows = sum(arrival.rows for arrival in there.arrivals(random.Random(1)))
    least = {"step": 0.35, "diurnal": 0.5, "bursty": 0.8}.get(workload, 0.9)
    most = 0.8 * capacity(there.models) * 8.0
    assert least < rows / most < (1.2 if workload in ("bursty", "heavy-tailed") else 1.05)


def test_the_hot_model_asks_for_twice_the_device():
    there = build("hot-model", Setup(seconds=5.0), 0.9)
    sent = [arrival.model for arrival in there.arrivals(random.Random(1))]
    whole = capacity(Setup().models([1.0] * 8))
    assert sent.count("model-1") / 5 == pytest.approx(2 * whole, rel=0.04)
    assert sent.count("model-8") / 5 == pytest.approx(0.9 / 8 * whole, rel=0.15)
