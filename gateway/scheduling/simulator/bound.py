"""The oracle that no scheduler can beat by more than chance: what a fluid server would answer in time.

For one model and a constant rate it is `min(rate, max_b b / l(b) such that l(b) <= deadline)` (SCHEDULING.md, "How to
prove it"). Here the same is done bin by bin of time over the requests that really came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gateway.scheduling.simulator.scenario import Device, Model
from gateway.scheduling.simulator.simulation import Job, Record

_BIN = 0.1  # seconds


def fluid_bound(record: Record) -> float:
    """The share of the calls of a simulation that a fluid server answers in time, at most 1.

    Each request costs its rows' part of the best batch that its deadline allows, cheap requests go first, and what
    does not fit into one bin of time waits for the next while its deadline allows. Retries ask for nothing more.
    """
    scenario = record.scenario
    models = {model.name: model for model in scenario.models}
    fastest = max(device.speed for device in scenario.devices)
    calls = [job for job in record.jobs if job.attempt == 0]
    costs = {id(job): _cost(job, models[str(job.lane)], fastest) for job in calls}
    waiting: list[Job] = []
    answered = 0
    coming = iter([*calls, None])
    following = next(coming)
    start = 0.0
    while following is not None or waiting:
        while following is not None and following.enqueued < start + _BIN:
            waiting.append(following)
            following = next(coming)
        waiting.sort(key=lambda job: costs[id(job)])
        budget = supply(scenario.devices, start, fastest)
        served = _affordable([costs[id(job)] for job in waiting], budget)
        answered += served
        start += _BIN
        waiting = [job for job in waiting[served:] if _deadline(job) > start and math.isfinite(costs[id(job)])]
    return answered / len(calls) if calls else 1.0


def supply(devices: Sequence[Device], start: float, fastest: float) -> float:
    """Seconds of the fastest device that all devices together give in the bin that starts then."""
    steps = 10
    moments = [start + (step + 0.5) * _BIN / steps for step in range(steps)]
    work = sum(
        device.slots / (device.stretch(moment) * fastest)
        for device in devices
        for moment in moments
        if device.there(moment)
    )
    return work * _BIN / steps


def _cost(job: Job, model: Model, fastest: float) -> float:
    """Seconds of the fastest device; infinite for a request that not even an idle one answers in time."""
    patience = None if job.arrival.deadline is None else job.arrival.deadline * fastest
    rate = model.latency.rate(model.max_rows, patience)
    return job.request.rows / rate / fastest if rate else math.inf


def _deadline(job: Job) -> float:
    return math.inf if job.request.deadline is None else job.request.deadline


def _affordable(costs: Sequence[float], budget: float) -> int:
    for count, cost in enumerate(costs):
        budget -= cost
        if budget < -1e-9:
            return count
    return len(costs)
