"""How far the event loop is behind, by a clock that the test turns."""

import pytest

from gateway.transport.lag import Lag


def test_a_loop_that_was_handed_nothing_is_not_behind():
    assert Lag().behind(100.0) == (0.0, 0)


def test_what_is_on_its_way_waits_already():
    lag = Lag()
    lag.handed(100.0)
    lag.handed(100.2)
    assert lag.behind(100.3) == (pytest.approx(0.3), 2)


def test_the_loop_is_behind_by_what_the_last_waited():
    lag = Lag()
    lag.handed(100.0)
    lag.handed(100.1)
    lag.taken(100.0, 100.3)
    assert lag.behind(100.3) == (pytest.approx(0.3), 1)
    lag.taken(100.1, 100.31)
    assert lag.behind(100.32) == (pytest.approx(0.21), 0)


def test_what_was_measured_long_ago_tells_nothing():
    lag = Lag()
    lag.handed(100.0)
    lag.taken(100.0, 100.3)
    assert lag.behind(100.6).seconds == pytest.approx(0.3)
    assert lag.behind(100.7).seconds == 0.0
    lag.handed(100.7)
    assert lag.behind(100.75).seconds == pytest.approx(0.05)


def test_many_that_are_taken_at_once_wait_no_more():
    lag = Lag()
    for _ in range(5):
        lag.handed(100.0)
    assert lag.behind(100.1).requests == 5
    lag.taken(100.0, 100.1, 4)
    assert lag.behind(100.1).requests == 1
