"""The workloads of `gateway simulate`, by name. Each builds a `Scenario` of some load from a `Setup`.

A load of 1 is the capacity: of one model, its largest rate within the deadline; of several that take turns on a
device, see `capacity`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from gateway.scheduling.simulator.scenario import Arrival, Clients, Device, Latency, Model, Retry, Scenario

Make: TypeAlias = Callable[[random.Random, float], Arrival]
Arrivals: TypeAlias = Callable[[random.Random], Iterable[Arrival]]

REFERENCE = Latency(0.004, 0.00025)  # the affine device that DESIGN.md section 5 reports on
DEVICE = Device("gpu:0")
_MIX = (0.4, 2.0, 20.0)  # of the deadline: 20, 100 and 1000 ms for 50
_TAIL = 1.5  # shape of the Pareto distribution of rows: a finite mean, no variance
_THINK = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Setup:
    """What all workloads of one simulation share: device, largest batch, deadline and length, in seconds."""

    latency: Latency = REFERENCE
    max_rows: int = 64
    deadline: float = 0.05
    seconds: float = 5.0
    noise: float = 0.02

    def models(self, shares: Sequence[float] = (1.0,)) -> tuple[Model, ...]:
        """Models that take the setup's latency and deadline, named by their rank."""
        total = sum(shares)
        return tuple(
            Model(f"model-{rank}", self.latency, self.max_rows, self.deadline, share / total)
            for rank, share in enumerate(shares, start=1)
        )


def capacity(models: Sequence[Model]) -> float:
    """Rows per second that models of one latency and deadline, by their shares, can be answered on one device.

    Each model is visited once in a period, if it has anything, or as often as its batches fill. A request that just
    missed its visit waits a period and the length of the longest batch. The largest rate whose visits fit into the
    device's time is found by bisection; for one model it is that of the largest batch.
    """
    first = models[0]
    base, per_row = first.latency.base, first.latency.per_row
    most = max(model.share for model in models)

    def visits(rate: float, share: float) -> float:
        longest = (first.deadline - base) / (1 + per_row * most * rate)
        period = min(longest, first.max_rows / (share * rate))
        # One model alone is visited whatever has come; of many, those for which nothing came are left out.
        return (1 - math.exp(-share * rate * period) if len(models) > 1 else 1.0) / period

    def utilisation(rate: float) -> float:
        return base * sum(visits(rate, model.share) for model in models) + per_row * rate

    low, high = 0.0, first.latency.rate(first.max_rows, first.deadline)
    if not high:
        raise ValueError("the deadline is shorter than the time of a single row")
    if len(models) == 1:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if utilisation(middle) <= 1 else (low, middle)
    return low


def poisson(rate: Callable[[float], float], peak: float, seconds: float, make: Make) -> Arrivals:
    """A Poisson process of `rate(t)` requests per second, at most `peak`, by thinning (Lewis and Shedler, 1979)."""

    def draw(chance: random.Random) -> Iterator[Arrival]:
        now = chance.expovariate(peak)
        while now < seconds:
            if chance.random() * peak < rate(now):
                yield make(chance, now)
            now += chance.expovariate(peak)

    return draw


def _one_of(models: Sequence[Model]) -> Make:
    shares = [model.share for model in models]

    def make(chance: random.Random, now: float) -> Arrival:
        model = chance.choices(models, shares)[0] if len(models) > 1 else models[0]
        return Arrival(now, model.name, model.deadline)

    return make


def steady(setup: Setup, load: float, shares: Sequence[float] = (1.0,)) -> Scenario:
    """Poisson arrivals for one model, or several by their shares."""
    models = setup.models(shares)
    rate = load * capacity(models)
    arrivals = poisson(lambda _: rate, rate, setup.seconds, _one_of(models))
    return Scenario("poisson", load, setup.seconds, models, (DEVICE,), arrivals, noise=setup.noise)


def varying(setup: Setup, load: float, shape: Callable[[float], float]) -> Scenario:
    """One model whose rate at a share `x` of the time is `shape(x)`, at most 1, of the load."""
    plain = steady(setup, load)
    rate = load * capacity(plain.models)
    curve = poisson(lambda now: rate * shape(now / setup.seconds), rate, setup.seconds, _one_of(plain.models))
    return replace(plain, arrivals=curve)


def bursty(setup: Setup, load: float) -> Scenario:
    """A Markov-modulated Poisson process: twice the load for a quarter of the time, two thirds of it otherwise."""
    plain = steady(setup, load)
    rate = load * capacity(plain.models)

    def draw(chance: random.Random) -> Iterator[Arrival]:
        now, busy = 0.0, False
        while now < setup.seconds:
            length = chance.expovariate(1 / (0.25 if busy else 0.75))
            part = poisson(lambda _: math.inf, rate * (2 if busy else 2 / 3), length, _one_of(plain.models))
            for arrival in part(chance):
                if now + arrival.time < setup.seconds:
                    yield replace(arrival, time=now + arrival.time)
            now, busy = now + length, not busy

    return replace(plain, arrivals=draw)


def mixed_deadlines(setup: Setup, load: float) -> Scenario:
    """One model; 0.4, 2 or 20 times the deadline, a third each: 20, 100 and 1000 ms for 50."""
    plain = steady(setup, load)
    rate = load * capacity(plain.models)

    def make(chance: random.Random, now: float) -> Arrival:
        return Arrival(now, plain.models[0].name, setup.deadline * chance.choice(_MIX))

    return replace(plain, arrivals=poisson(lambda _: rate, rate, setup.seconds, make))


def heavy_tailed(setup: Setup, load: float) -> Scenario:
    """One model; requests of 1 row mostly and of up to the largest batch, by a Pareto distribution of 1.5."""
    plain = steady(setup, load)
    mean = sum(rows**-_TAIL for rows in range(1, setup.max_rows + 1))  # the sum of P(rows >= n)
    rate = load * capacity(plain.models) / mean

    def make(chance: random.Random, now: float) -> Arrival:
        rows = min(setup.max_rows, int(chance.paretovariate(_TAIL)))
        return Arrival(now, plain.models[0].name, setup.deadline, rows=rows)

    return replace(plain, arrivals=poisson(lambda _: rate, rate, setup.seconds, make))


def zipf(setup: Setup, load: float, count: int) -> Scenario:
    """So many models on one device, the k-th most popular asked for in proportion to 1/k."""
    return steady(setup, load, [1 / rank for rank in range(1, count + 1)])


def hot_model(setup: Setup, load: float) -> Scenario:
    """Eight equal models at a load; but the first is asked for twice the capacity of the device, all by itself.

    The other seven are judged.
    """
    even = setup.models([1.0] * 8)
    whole = capacity(even)
    rates = [2 * whole, *[load * whole / 8] * 7]
    models = setup.models(rates)
    rate = sum(rates)
    arrivals = poisson(lambda _: rate, rate, setup.seconds, _one_of(models))
    others = tuple(model.name for model in models[1:])
    return replace(steady(setup, load), models=models, arrivals=arrivals, judged=others)


def closed_loop(setup: Setup, load: float) -> Scenario:
    """Callers who think for half a second, as many as ask at the load when answered; the refused obey Retry-After."""
    plain = steady(setup, load)
    count = max(1, round(load * capacity(plain.models) * (_THINK + setup.deadline / 2)))

    def endless(_: random.Random) -> Iterator[Arrival]:
        while True:
            yield Arrival(0.0, plain.models[0].name, setup.deadline)

    return replace(plain, arrivals=endless, clients=Clients(count, _THINK), retry=Retry(obeys=True))


def retry_storm(setup: Setup, load: float) -> Scenario:
    """Poisson arrivals; who is refused asks again, up to five times, at once."""
    return replace(steady(setup, load), retry=Retry())


def slowing(setup: Setup, load: float, factor: float) -> Scenario:
    """Poisson arrivals; the device takes `factor` times as long for the third quarter of the time."""
    quarter = setup.seconds / 4
    device = replace(DEVICE, slow=(2 * quarter, 3 * quarter), slow_factor=factor)
    return replace(steady(setup, load), devices=(device,))


def device_loss(setup: Setup, load: float) -> Scenario:
    """The device is lost for the third quarter of the time; a second one of a quarter of its speed is always there."""
    quarter = setup.seconds / 4
    lossy = replace(DEVICE, lost=(2 * quarter, 3 * quarter))
    return replace(steady(setup, load), devices=(lossy, Device("gpu:1", speed=0.25)))


def cold_start(setup: Setup, load: float) -> Scenario:
    """Poisson arrivals from the first moment, and nothing learned before."""
    return replace(steady(setup, load), cold=True)


WORKLOADS: dict[str, Callable[[Setup, float], Scenario]] = {
    "poisson": steady,
    "bursty": bursty,
    "step": partial(varying, shape=lambda x: 1.0 if 1 / 3 <= x < 2 / 3 else 0.1),
    "diurnal": partial(varying, shape=lambda x: 0.55 - 0.45 * math.cos(2 * math.pi * x)),
    "closed-loop": closed_loop,
    "retry-storm": retry_storm,
    "mixed-deadlines": mixed_deadlines,
    "zipf-4": partial(zipf, count=4),
    "zipf-8": partial(zipf, count=8),
    "zipf-16": partial(zipf, count=16),
    "hot-model": hot_model,
    "slow-down": partial(slowing, factor=10.0),
    "throttled": partial(slowing, factor=2.0),
    "device-loss": device_loss,
    "heavy-tailed": heavy_tailed,
    "cold-start": cold_start,
}


def build(name: str, setup: Setup, load: float) -> Scenario:
    """The scenario of a workload by its name. Raises `KeyError` for an unknown one."""
    return replace(WORKLOADS[name](setup, load), name=name)
