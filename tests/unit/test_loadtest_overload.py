"""The overload test judges the gateway, so what it judges with is tested first: reading answers, shares, slow-down, counters, bars."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from loadtest import overload, overload_cells, overload_figures, overload_report
from loadtest.overload_client import Attempt, Attempts, Connection, kind_of
from loadtest.overload_figures import PUBLISHED, Figures


def attempts(*rows: tuple[int, int, float, float, str]) -> Attempts:
    found = Attempts()
    for call, attempt, due, answered, kind in rows:
        found.add(Attempt(call, attempt, due, due + 0.001, answered, kind, 10))
    return found


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, b"...12345678", "answered"),
        (200, b"...12345679", "wrong"),
        (429, b"overloaded: the request needs about 250 ms", "overload"),
        (429, b"overloaded: the request was dropped so that others keep their deadline", "shed"),
        (429, b"more urgent requests took its place", "shed"),
        (504, b"deadline below service time: the request needs", "deadline"),
        (504, b"Request timeout expired", "expired"),
        (503, b"Server not ready", "unavailable"),
        (400, b"", "status 400"),
    ],
)
def test_what_an_answer_is(status, body, kind):
    assert kind_of(status, body, b"12345678") == kind


class Seen:
    """Stands for the generator."""

    def __init__(self):
        self.calls = []

    def taken(self, connection, attempt, now):
        self.calls.append("taken")

    def received(self, connection, status, head, body):
        self.calls.append((status, head, body))


def test_answers_are_cut_from_the_bytes_however_they_come():
    seen = Seen()
    connection = Connection(seen)
    connection.attempt = Attempt(0, 0, 0.0, number=b"12345678")
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}12345678"
    connection.data_received(whole)
    refusal = b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\nRetry-After: 1\r\n\r\n{}"
    for byte in refusal:
        connection.data_received(bytes([byte]))
    connection.data_received(refusal + whole)
    heads = [call if call == "taken" else (call[0], call[2]) for call in seen.calls]
    assert heads == ["taken", (429, b"{}"), (429, b"{}"), (200, b"{}12345678")]


def test_a_request_is_in_time_when_one_of_its_attempts_was():
    found = overload_figures.figures(
        attempts(
            (0, 0, 0.5, 0.6, "answered"),  # before the window
            (1, 0, 1.0, 1.1, "answered"),
            (2, 0, 1.0, 1.3, "answered"),  # late
            (3, 0, 1.0, 1.15, "overload"),
            (3, 1, 1.15, 1.3, "answered"),  # in time, though not counted from the first
            (4, 0, 1.0, 1.2, "expired"),
            (5, 0, 1.0, 1.05, "shed"),
            (6, 0, 1.0, math.nan, "unanswered"),
        ),
        (1.0, 2.0),
    )
    assert (found.offered, found.attempts, found.accepted, found.broken) == (6, 7, 5, 1)
    assert found.goodput == pytest.approx(2 / 6)
    assert found.at_once == pytest.approx(1 / 6)
    assert found.late == pytest.approx(2 / 5)
    assert found.shed == pytest.approx(1 / 5)
    assert found.refusal_p99_ms == pytest.approx(150)
    assert found.statuses == {"200": 3, "504": 1, "429": 2, "unanswered": 1}


def test_a_simulation_gets_the_arrivals_that_are_sent():
    made = overload_figures.scenario(1.5, 0.5)
    record = overload_figures.simulated(made, 7)
    assert overload_figures.attempts_of(record).due == overload_figures.arrivals(made, 7)
    assert pytest.approx(800) == PUBLISHED.capacity


def test_a_slower_pace_has_the_same_proportions():
    slow = PUBLISHED.slower(4)
    assert slow.capacity == pytest.approx(PUBLISHED.capacity / 4)
    assert slow.latency(32) / slow.deadline == pytest.approx(PUBLISHED.latency(32) / PUBLISHED.deadline)
    usual, slowed = (
        overload_figures.scenario(1.5, seconds, pace=pace) for seconds, pace in ((2, PUBLISHED), (8, slow))
    )
    simulated = [overload_figures.attempts_of(overload_figures.simulated(made, 7)) for made in (usual, slowed)]
    found = [
        overload_figures.figures(each, (0, 8), pace.deadline)
        for each, pace in zip(simulated, (PUBLISHED, slow), strict=True)
    ]
    assert found[1].goodput == pytest.approx(found[0].goodput, abs=0.05)


def test_a_slow_down_is_settled_after_twenty_batches_and_over_when_goodput_is_back():
    late = [(call, 0, 1 + call / 10, 2 + call / 10, "answered") for call in range(20, 30)]
    right = [(call, 0, 1 + call / 10, 1.1 + call / 10, "answered") for call in (*range(20), *range(30, 60))]
    batches = [3.0 + n / 20 for n in range(30)]
    found = overload_figures.slow_down(attempts(*right, *late), (3.0, 4.5), (1.0, 7.0), batches)
    assert (found.before.goodput, found.batches, found.settled_after) == (1.0, 30, pytest.approx(0.95))
    assert found.first_batches.late > 0.7
    assert found.settled.late == pytest.approx(0.0, abs=0.2)
    assert found.recovered_after == 0.0


def test_counters_are_read_and_compared():
    text = """nv_inference_request_success{model="overload",version="1"} 3
nv_inference_request_success{model="other",version="1"} 9
gateway_requests_refused_total{model="overload",version="1",reason="overload"} 2
gateway_requests_refused_total{model="overload",version="1",reason="shed"} 1
"""
    counts = overload_cells.read_counts(text)
    assert counts == {"nv_inference_request_success": 3, "overload": 2, "shed": 1}
    seen = attempts(
        *((n, 0, 0.0, 0.1, "answered") for n in range(3)),
        *((n, 0, 0.0, 0.1, "overload") for n in range(3, 6)),
        (6, 0, 0.0, 0.1, "shed"),
    )
    assert overload_cells.disagreements(Counter(counts), seen) == {"overload": (2, 3)}


FIGURES = Figures(
    seconds=10, offered=100, attempts=100, goodput=0.9, at_once=0.9, per_second=720, late=0.0, shed=0.0, accepted=90,
    p50_ms=100, p99_ms=180, kinds={"answered": 90}, statuses={"200": 90}, refusal_p99_ms=3.0, lag_p99_ms=1.0,
)  # fmt: skip


def cell(name="poisson", load=1.1, seed=1, **changes):
    spec = overload_cells.Spec(name, load, 2.0, 10.0, retries=name == "storm")
    real = replace(FIGURES, **changes)
    return overload_cells.Cell(spec, seed, real, FIGURES, 64, 64, 0.99, 0.0, 200.0, 50.0, 0.0)


def test_bars_are_judged_by_the_median_round():
    rounds = [cell(seed=n, goodput=share) for n, share in enumerate((0.91, 0.87, 0.5), start=1)]
    verdicts = {bar.name: bar.passed for bar in overload_report.bars([*rounds, cell("storm", per_second=600)])}
    assert verdicts["poisson at 1.1: points to the simulation"]
    assert verdicts["poisson at 1.1: p99 of refusals, ms"]
    assert not verdicts["storm at 1.1: % of the goodput without retries"]
    assert not all(bar.passed for bar in overload_report.bars([cell(lag_p99_ms=6.0)]))
    assert not all(bar.passed for bar in overload_report.bars([cell(without_retry_after=1)]))
    assert not all(bar.passed for bar in overload_report.bars([cell("storm")])), "nothing to compare a storm with"
    assert "87.0 (50.0-91.0)" in overload_report.table(rounds)
    assert overload_report.slow_down_text(rounds) == ""


def test_a_round_holds_every_scenario():
    made = list(overload.specs(overload.SCENARIOS, (0.9, 1.1), quick=True))
    assert [(spec.name, spec.load) for spec in made] == [
        ("poisson", 0.9), ("poisson", 1.1), ("storm", 1.1), ("slow-down", 0.9),
    ]  # fmt: skip
    assert made[-1].scenario().devices[0].slow == made[-1].slow
