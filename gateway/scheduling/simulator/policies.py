"""The policies that can be simulated, by name, and the grid of queue timeouts that a tuner would search."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

from gateway.scheduling.base import LaneKey, Scheduler
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.scheduling.simulator.fifo import Aimd, Fifo, Greedy
from gateway.scheduling.simulator.predictive import Bento, Clockwork
from gateway.scheduling.simulator.scenario import Scenario
from gateway.scheduling.simulator.simulation import Job

Policy: TypeAlias = Callable[[Scenario], Scheduler[Job]]

OURS = "deadline"
BEST = "timeout-best"  # the best of GRID, found for each workload and load
_TIMEOUTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the deadline
_DELAYS = (0.0, 0.1)  # of the deadline


def target(scenario: Scenario) -> float:
    """The deadline that a policy with one knob for it is set to: the tightest default of the models."""
    return min(model.deadline for model in scenario.models)


def queue_timeout(timeout: float, delay: float = 0.0) -> Policy:
    """First in, first out with a queue timeout and delay, both as shares of the deadline."""
    return lambda scenario: Fifo(timeout * target(scenario), delay * target(scenario))


def clockwork(scenario: Scenario) -> Scheduler[Job]:
    """Clockwork with the true latencies of healthy devices."""
    models = {model.name: model for model in scenario.models}
    speeds = {device.name: device.speed for device in scenario.devices}

    def profile(lane: LaneKey, device: str, rows: int) -> float:
        return models[str(lane)].latency(rows) / speeds[device]

    return Clockwork(profile)


def ours(scenario: Scenario) -> Scheduler[Job]:
    """The gateway's own scheduler, as the server makes it; its jitter repeats itself."""
    slots = {device.name: device.slots for device in scenario.devices}
    return DeadlineScheduler(slots, jitter=random.Random(0).random)


POLICIES: dict[str, Policy] = {
    OURS: ours,
    "greedy": lambda _: Greedy(),
    "triton": lambda _: Fifo(),
    "fixed-delay": lambda scenario: Fifo(delay=0.2 * target(scenario)),
    "timeout-0.5": queue_timeout(0.5),
    "timeout-0.8": queue_timeout(0.8),
    "aimd": lambda scenario: Aimd(target(scenario)),
    "bento": lambda scenario: Bento(target(scenario)),
    "clockwork": clockwork,
}

GRID: dict[str, Policy] = {
    f"timeout-{timeout}+{delay}": queue_timeout(timeout, delay) for timeout in _TIMEOUTS for delay in _DELAYS
}
