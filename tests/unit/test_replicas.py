"""How many workers an autoscaler is told to run."""

import pytest

from gateway.scheduling.replicas import Demand, desired


@pytest.mark.parametrize(
    ("arrivals", "backlog", "workers", "rows_per_second", "wanted"),
    [
        (160.0, 0, 2, 200.0, 2.0),  # both are busy for 80 % of their time
        (80.0, 0, 2, 200.0, 1.0),
        (240.0, 0, 2, 200.0, 3.0),
        (0.0, 2400, 1, 100.0, 1.0),  # 80 rows a second, to be through in half a minute
        (160.0, 2400, 2, 200.0, 3.0),
        (1.0, 0, 4, 400.0, 0.0125),
        (0.0, 0, 3, 300.0, 0.0),
    ],
)
def test_the_load_over_what_a_worker_should_do(arrivals, backlog, workers, rows_per_second, wanted):
    assert desired(arrivals, backlog, workers, rows_per_second) == pytest.approx(wanted)


def test_what_is_needed_does_not_depend_on_what_is_there():
    assert desired(300.0, 0, 1, 100.0) == desired(300.0, 0, 5, 500.0)


def test_what_is_not_known_changes_nothing():
    assert desired(500.0, 100, 3, 0.0) == 3  # nobody knows how fast they are
    assert desired(None, 0, 3, 300.0) == 3  # a gateway that has just begun to look must not end workers
    assert desired(None, 30_000, 3, 300.0) > 3


def test_the_first_worker_is_started_by_the_first_request():
    assert desired(0.0, 0, 0, 0.0) == 0
    assert desired(None, 0, 0, 0.0) == 0
    assert desired(0.1, 0, 0, 0.0) == 1
    assert desired(None, 1, 0, 0.0) == 1


def test_a_rate_takes_two_looks_some_seconds_apart():
    demand = Demand()
    assert demand.look({"m": 100}, 0.0) is None
    assert demand.look({"m": 900}, 4.9) is None
    assert demand.look({"m": 1100, "new": 50}, 10.0) == {"m": 100.0, "new": 5.0}


def test_a_rate_is_of_the_last_minute():
    demand = Demand()
    for second in range(0, 600, 5):
        rates = demand.look({"m": min(second, 300) * 10}, second)
        if second == 300:
            assert rates == {"m": 10.0}
    assert rates == {"m": 0.0}


def test_looks_in_quick_succession_tell_as_much():
    demand = Demand()
    for tenth in range(6000):
        rates = demand.look({"m": tenth}, tenth / 10)
    assert rates == {"m": pytest.approx(10.0)}
    assert len(demand._looks) < 20


def test_a_counter_that_began_anew_counts_from_zero():
    demand = Demand()
    demand.look({"m": 1000}, 0.0)
    assert demand.look({"m": 20}, 10.0) == {"m": 2.0}
