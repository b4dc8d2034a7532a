"""What is simulated: devices that take a known time for a batch, models on them, and the requests that arrive.

All times are seconds; a moment is counted from the start of the simulation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.scheduling.base import Limits, Place

Interval = tuple[float, float]  # from, to


@dataclass(frozen=True, slots=True)
class Latency:
    """The true time of a batch, `base + per_row * rows`: what a learned model has to find out."""

    base: float
    per_row: float

    def __call__(self, rows: int) -> float:
        """Seconds for a batch of so many rows on a healthy device of speed 1."""
        return self.base + self.per_row * rows

    def rate(self, max_rows: int, deadline: float | None = None) -> float:
        """The most rows per second: of the largest batch that ends within the deadline; 0 when none does."""
        fitting = max_rows
        if deadline is not None and self.per_row > 0:
            fitting = min(max_rows, int((deadline - self.base) / self.per_row + 1e-9))
        return fitting / self(fitting) if fitting > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Device:
    """What runs batches, `slots` at once. `speed` divides durations.

    From `slow[0]` to `slow[1]` a run that starts takes `slow_factor` times as long. During `lost` the device is
    not there: what runs on it when it goes fails, and its jobs wait again.
    """

    name: str
    slots: int = 1
    speed: float = 1.0
    slow: Interval | None = None
    slow_factor: float = 1.0
    lost: Interval | None = None

    def stretch(self, now: float) -> float:
        """What the latency of a run that starts now is multiplied by."""
        slowed = self.slow is not None and self.slow[0] <= now < self.slow[1]
        return (self.slow_factor if slowed else 1.0) / self.speed

    def there(self, now: float) -> bool:
        """False while the device is lost."""
        return self.lost is None or not self.lost[0] <= now < self.lost[1]


@dataclass(frozen=True, slots=True)
class Model:
    """A lane: its true latency, largest batch, and `share` of the requests; `deadline` is its default one."""

    name: str
    latency: Latency
    max_rows: int = 64
    deadline: float = 0.05
    share: float = 1.0

    def limits(self) -> Limits:
        """The limits that the scheduler is told: joins requests, no knob of Triton's set."""
        return Limits(max_rows=self.max_rows, joins=self.max_rows > 1)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is sent at `time`. `deadline` and `patience`, after which its caller hangs up, count from then."""

    time: float
    model: str
    deadline: float | None
    rows: int = 1
    size: int = 1024  # bytes
    priority: int = 0
    tenant: str = ""
    patience: float | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """What a refused caller does: asks again up to `attempts` times, each with a fresh deadline.

    It waits for `delay`, the way there and back, or as long as the refusal says when it `obeys` Retry-After.
    """

    attempts: int = 5
    delay: float = 0.001
    obeys: bool = False


@dataclass(frozen=True, slots=True)
class Clients:
    """Closed loop: `count` callers who send, wait for the outcome, think (exponential, `think` on average), and again."""

    count: int
    think: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing to simulate. `arrivals` draws the open-loop requests, in order of time, from a seeded generator.

    With `clients`, `arrivals` instead gives each of their requests its properties; times and order are theirs.
    `noise` is the sigma of the log-normal factor on every run. A `cold` scenario has no warm-up.
    """

    name: str
    load: float  # offered, as a multiple of the capacity
    seconds: float
    models: tuple[Model, ...]
    devices: tuple[Device, ...]
    arrivals: Callable[[random.Random], Iterable[Arrival]]
    retry: Retry | None = None
    clients: Clients | None = None
    noise: float = 0.02
    cold: bool = False
    judged: tuple[str, ...] = ()  # the models of which the worst is told; all when empty

    def places(self, now: float) -> list[Place]:
        """Where every model runs at this moment."""
        return [Place(device.name, device.slots) for device in self.devices if device.there(now)]
