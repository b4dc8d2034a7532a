"""A deadline counts from a request's arrival, though the event loop was busy with others then."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from gateway.transport.lag import Lag


async def test_a_loop_with_nothing_to_do_is_not_behind():
    lag = Lag()
    lag.arrived()
    await asyncio.sleep(0)
    assert 0 < lag.seconds() < 0.05


async def test_what_stood_in_line_before_is_counted():
    lag = Lag()
    loop = asyncio.get_running_loop()
    spent = []

    def busy():
        began = time.monotonic()
        while time.monotonic() - began < 0.02:
            pass
        spent.append(time.monotonic() - began)

    loop.call_soon(busy)
    lag.arrived()
    await asyncio.sleep(0)
    assert lag.seconds() >= spent[0]
    before = time.monotonic()
    assert before - lag.arrived() > 0.0


async def test_one_measurement_is_under_way_at_a_time():
    lag = Lag()
    lag.arrived()
    asked = lag._asked
    lag.arrived()
    assert lag._asked == asked
    await asyncio.sleep(0)
    assert lag._asked == 0.0


async def test_what_was_measured_long_ago_is_not_used(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("gateway.transport.lag.time", SimpleNamespace(monotonic=lambda: clock[0]))
    lag = Lag()
    lag.arrived()
    clock[0] += 0.3
    await asyncio.sleep(0)
    assert lag.seconds() == pytest.approx(0.3)
    assert lag.arrived() == pytest.approx(100.0)
    clock[0] += 0.4
    assert lag.seconds() == 0.0
    assert lag.arrived() == clock[0]
