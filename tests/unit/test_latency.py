"""The learned latency: what it predicts, how fast it follows, and what it does not believe."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.scheduling.latency import LatencyModel

MAX = 64


def affine(rows):
    return 0.004 + 0.00025 * rows


def learned(sizes=(1, 2, 4, 8, 16, 32, 64), times=3, true=affine, max_rows=MAX):
    model = LatencyModel(max_rows)
    for rows in sizes:
        for _ in range(times):
            model.observe(rows, true(rows))
    return model


def test_nothing_observed_predicts_nothing_and_bounds_nothing():
    model = LatencyModel(MAX)
    assert (model.known, model.mean(9), model.bound(9), model.room(0.001), model.cap) == (False, 0.0, 0.0, MAX, MAX)


def test_sizes_that_were_never_run_are_filled_in():
    model = learned()
    for rows in range(1, MAX + 1):
        assert model.mean(rows) == pytest.approx(affine(rows), rel=0.01)


def test_one_size_alone_is_scaled_with_the_rows():
    model = learned(sizes=(4,))
    assert model.mean(4) == pytest.approx(affine(4))
    assert model.mean(8) == pytest.approx(2 * affine(4))


def test_a_step_is_kept_where_the_line_would_miss_it():
    model = learned(sizes=range(1, 33), true=lambda rows: 0.01 if rows <= 16 else 0.02, max_rows=32)
    assert model.mean(16) == pytest.approx(0.01, rel=0.05)
    assert model.mean(17) == pytest.approx(0.02, rel=0.05)


def test_sizes_are_explored_by_doubling():
    model = LatencyModel(MAX)
    model.observe(1, affine(1))
    caps = [model.cap]
    while model.cap < MAX:
        model.observe(model.cap, affine(model.cap))
        caps.append(model.cap)
    assert caps == [2, 4, 8, 16, 32, 64]
    assert learned(sizes=(3,)).room(10.0) == 6


@pytest.mark.parametrize("rows", [1, 7, 33, 64])
def test_room_is_the_largest_batch_within_a_time(rows):
    model = learned()
    assert model.room(affine(rows) * 1.001) == rows
    assert model.room(affine(rows) * 0.99) == rows - 1


def test_there_is_no_room_in_no_time():
    assert [learned().room(seconds) for seconds in (0.004, 0.0, -1.0)] == [0, 0, 0]


@pytest.mark.parametrize("factor", [10, 2, 1 / 10, 1 / 2])
def test_a_device_that_changes_speed_is_followed_within_twenty_batches_for_every_size_and_back(factor):
    model = learned()
    for speed in (factor, 1.0):
        for _ in range(20):
            model.observe(8, speed * affine(8))
        for rows in (1, 8, 64):
            assert model.mean(rows) == pytest.approx(speed * affine(rows), rel=0.2)
    assert model.trusted


@pytest.mark.parametrize("times", [1, 2])
def test_a_size_that_ran_but_once_or_twice_tells_that_the_device_is_slower(times):
    model = learned(times=times)
    for _ in range(10):  # more of others, so that what is said of a young model does not hold
        for rows in (20, 40):
            model.observe(rows, affine(rows))
    for _ in range(3):
        model.observe(64, 10 * affine(64))
    for rows in (1, 20, 64):
        assert model.mean(rows) == pytest.approx(10 * affine(rows), rel=0.1)


def test_what_told_of_another_speed_puts_right_what_was_measured_badly():
    model = LatencyModel(MAX)
    for rows in (1, 2, 4, 8, 16, 32, 64):
        for _ in range(3):
            model.observe(rows, affine(rows) * (1.6 if rows == 1 else 1.0))
    for _ in range(20):
        model.observe(32, affine(32))
    before = model.mean(1)
    for rows in (32, 1, 32):
        model.observe(rows, 10 * affine(rows))
    assert 10 * affine(1) < model.mean(1) < 9.5 * before


def test_a_measurement_counts_instead_of_what_was_known_and_is_sure():
    model = LatencyModel(MAX)
    model.observe(1, 10 * affine(1))
    for rows in (1, 2, 4, 8, 16, 32, 64):
        model.measured(rows, 2 * affine(rows))
    for rows in range(1, MAX + 1):
        assert model.mean(rows) == pytest.approx(2 * affine(rows), rel=0.01)
    for _ in range(3):
        model.measured(1, affine(1))
    assert model.mean(1) == pytest.approx(affine(1))
    assert (model.largest, model.tail, model.error) == (64, 1.0, 0.0)


def test_a_measurement_is_taken_at_the_speed_that_the_device_has_now():
    model = learned()
    for _ in range(20):
        model.observe(8, 10 * affine(8))
    model.measured(1, 10 * affine(1))
    assert model.mean(1) == pytest.approx(10 * affine(1), rel=0.01)


def test_one_odd_run_changes_nothing():
    model = learned()
    model.observe(8, 100 * affine(8))
    for _ in range(2):
        model.observe(8, affine(8))
    assert model.mean(8) == pytest.approx(affine(8), rel=0.02)


def test_the_tail_covers_nineteen_of_twenty():
    chance = random.Random(1)
    model = learned()
    runs = [affine(8) * chance.lognormvariate(0, 0.15) for _ in range(2000)]
    kept = 0
    for seconds in runs:
        kept += seconds <= model.bound(8)
        model.observe(8, seconds)
    assert 0.9 <= kept / len(runs) <= 0.99


def test_the_tail_is_never_below_one_nor_above_four():
    model = learned()
    for number in range(400):
        model.observe(8, affine(8) * (50 if number % 10 == 0 else 1))
    assert model.tail == 4.0
    for _ in range(100):
        model.observe(8, affine(8) * 0.9)
    assert model.tail == pytest.approx(1.0, abs=0.01)
    assert model.tail >= 1.0


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_duration_is_ignored(seconds):
    model = learned()
    before = model.to_prior(), model.error, model.batches
    model.observe(8, seconds)
    model.measured(8, seconds)
    assert (model.to_prior(), model.error, model.batches) == before


def test_wrong_predictions_lose_trust_and_right_ones_win_it_back():
    model = learned()
    chance = random.Random(1)
    while model.trusted:
        model.observe(8, affine(8) * chance.choice([0.05, 1.0, 20.0]))
    assert 20 <= model.batches - 21 < 100
    for _ in range(60):
        model.observe(8, affine(8))
    assert model.trusted


def test_the_efficient_size_is_where_throughput_stops_gaining():
    flat = learned(true=lambda rows: 0.01 * rows)
    assert flat.efficient == 1
    steep = learned(true=affine)
    assert 48 <= steep.efficient <= 64
    rate = steep.efficient / steep.mean(steep.efficient)
    assert rate >= 0.97 * 64 / steep.mean(64)


def test_a_prior_survives_json_and_is_outweighed_by_the_first_runs():
    prior = json.loads(json.dumps(learned().to_prior()))
    model = LatencyModel.from_prior(MAX, prior)
    assert model.known
    assert model.mean(8) == pytest.approx(affine(8), rel=0.02)
    assert model.cap == MAX
    for rows in (1, 8, 32):
        for _ in range(3):
            model.observe(rows, 3 * affine(rows))
    assert model.mean(16) == pytest.approx(3 * affine(16), rel=0.15)


@pytest.mark.parametrize("change", [{"a": -1.0}, {"b": 0.0}, {"b": math.nan}, {"largest": 0}])
def test_a_prior_that_is_none_is_refused(change):
    with pytest.raises(ValueError, match="no latency model"):
        LatencyModel.from_prior(MAX, {**learned().to_prior(), **change})


RUNS = st.lists(st.tuples(st.integers(1, MAX), st.floats(1e-5, 10.0)), min_size=1, max_size=200)


@given(RUNS)
def test_whatever_is_observed_predictions_are_positive_and_monotone_and_agree_with_room(runs):
    model = LatencyModel(MAX)
    for rows, seconds in runs:
        model.observe(rows, seconds)
    bounds = [model.bound(rows) for rows in range(1, MAX + 1)]
    assert bounds[0] > 0
    assert bounds == sorted(bounds)
    assert model.cap == min(MAX, 2 * max(rows for rows, _ in runs))
    assert 1 <= model.efficient <= MAX
    a, b = model.fit
    assert a >= 0
    assert b > 0
    for seconds in (0.0, *bounds):
        room = model.room(seconds)
        assert room <= model.cap
        assert room == 0 or model.bound(room) <= seconds * (1 + 1e-6)
        assert room == model.cap or model.bound(room + 1) > seconds * (1 - 1e-6)
