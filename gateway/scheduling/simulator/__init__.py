"""A discrete-event simulator of the gateway's scheduling, and the batchers of others to compare it with.

It drives any `gateway.scheduling.base.Scheduler`, so the policy simulated is the policy served:

    from gateway.scheduling.simulator import POLICIES, WORKLOADS, Setup, measure, simulate

    scenario = WORKLOADS["poisson"](Setup(deadline=0.05, seconds=5), 1.1)  # 1.1 times the capacity
    record = simulate(scenario, MyScheduler(), seed=1)  # every request with its outcome; a fault raises `Fault`
    print(measure(record))  # answered in time, per second, refusals by reason, mean batch, ...
    print(measure(simulate(scenario, POLICIES["timeout-0.5"](scenario), seed=1)))

Warm-up is shown to a scheduler that has a method `warmed(lane, device, rows, seconds)`.
`gateway simulate --help` is the same from a shell. All times are seconds.
"""

from __future__ import annotations

from gateway.scheduling.base import Scheduler
from gateway.scheduling.simulator.metrics import Measures, measure
from gateway.scheduling.simulator.policies import GRID, POLICIES
from gateway.scheduling.simulator.scenario import Scenario
from gateway.scheduling.simulator.simulation import Fault, Job, Record, Simulation
from gateway.scheduling.simulator.workloads import WORKLOADS, Setup

__all__ = ["GRID", "POLICIES", "WORKLOADS", "Fault", "Measures", "Record", "Setup", "measure", "simulate"]


def simulate(scenario: Scenario, scheduler: Scheduler[Job], seed: int = 0) -> Record:
    """Run one scenario with one scheduler to its end. Raises `Fault` when the scheduler breaks its contract."""
    return Simulation(scenario, scheduler, seed).run()
