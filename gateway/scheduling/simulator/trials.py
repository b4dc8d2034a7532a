"""Simulations repeated over seeds, their summaries, and the search for the best queue timeout of a workload."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gateway.scheduling.simulator.bound import fluid_bound
from gateway.scheduling.simulator.metrics import Measures, measure
from gateway.scheduling.simulator.policies import BEST, GRID, POLICIES, Policy
from gateway.scheduling.simulator.scenario import Scenario
from gateway.scheduling.simulator.simulation import Fault, Record, Simulation

_SEARCH_SEEDS = 2  # the grid is searched with fewer seeds than its best is measured with


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several seeds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Trials:
    """One policy on one workload at one load: the figures of every seed and the fluid bound of each."""

    workload: str
    load: float
    policy: str
    measures: tuple[Measures, ...]
    bounds: tuple[float, ...]  # shares of the calls
    best: float | None = None  # the median goodput of the best queue timeout, where it was searched for

    def spread(self, figure: Callable[[Measures], float]) -> Spread:
        """Median and range of a figure over the seeds."""
        values = [figure(each) for each in self.measures]
        return Spread(statistics.median(values), min(values), max(values))

    @property
    def of_bound(self) -> float:
        """The median ratio of what was answered in time to the fluid bound."""
        return statistics.median(
            each.in_time / bound if bound else 1.0 for each, bound in zip(self.measures, self.bounds, strict=True)
        )

    @property
    def of_best(self) -> float | None:
        """The ratio of goodputs to the best queue timeout; None when it was not searched for."""
        return self.spread(_goodput).median / self.best if self.best else None

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "workload": self.workload,
            "load": self.load,
            "policy": self.policy,
            "of_bound": self.of_bound,
            "of_best": self.of_best,
            "bounds": self.bounds,
            "seeds": [asdict(each) for each in self.measures],
        }


def trials(scenario: Scenario, name: str, policy: Policy, seeds: Sequence[int]) -> Trials:
    """Simulate a scenario once for each seed. Raises `Fault`, saying which, when the scheduler breaks its contract."""
    records: list[Record] = []
    for seed in seeds:
        try:
            records.append(Simulation(scenario, policy(scenario), seed).run())
        except Fault as fault:
            raise Fault(f"{name} on {scenario.name} at {scenario.load:g}, seed {seed}: {fault}") from fault
    bounds = tuple(fluid_bound(record) for record in records)
    return Trials(scenario.name, scenario.load, name, tuple(map(measure, records)), bounds)


def best_timeout(scenario: Scenario, seeds: Sequence[int]) -> Trials:
    """The queue timeout and delay of the grid that answer most in time, as a tuner who knows the load finds them."""

    def attained(name: str) -> float:
        found = [Simulation(scenario, GRID[name](scenario), seed).run() for seed in seeds[:_SEARCH_SEEDS]]
        return statistics.mean(measure(record).goodput for record in found)

    name = max(GRID, key=attained)
    return trials(scenario, f"{BEST} ({name.removeprefix('timeout-')})", GRID[name], seeds)


def _goodput(measures: Measures) -> float:
    return measures.goodput


def compare(scenario: Scenario, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Trials]:
    """Each policy on a scenario, in the order of the names. With `timeout-best` among them all know how it did."""
    found = best_timeout(scenario, seeds) if BEST in names else None
    best = found.spread(_goodput).median if found else None
    for name in names:
        each = found if name == BEST and found else trials(scenario, name, POLICIES[name], seeds)
        yield Trials(each.workload, each.load, each.policy, each.measures, each.bounds, best)
