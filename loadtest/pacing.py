"""When a locust user sends: closed loop, or at a constant arrival rate with intended send times.

Closed loop: each user sends its next request when it has the last answer, so a slow server is asked less often, and its
percentiles flatter it (coordinated omission). Constant arrival: arrivals are due at fixed times whatever the server does; users are
only hands that carry them, and a response time counts from the moment the request was DUE, so waiting for a free hand is in it.

Limits of the second here: the schedule belongs to one locust process (`--processes` would multiply the rate); a greenlet wakes up
to a millisecond late, and a Python client saturates at one to three thousand requests a second, which shows as `late` arrivals;
arrivals that no hand had taken when the level ended were never sent: `unsent`, to be read as failures.
"""

from __future__ import annotations

import threading
import time
from array import array
from dataclasses import dataclass, field

from loadtest.bench.statistics import percentile

LATE_SECONDS = 0.005


@dataclass(slots=True)
class Level:
    """What happened while the load was at one level: users in a closed loop, arrivals a second otherwise."""

    name: str
    value: float
    arrival: bool
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    claimed: int = 0
    sent: int = 0
    late: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    latencies: array[float] = field(default_factory=lambda: array("d"))

    def due(self, now: float) -> int:
        """How many arrivals were due by then."""
        return int((now - self.started) * self.value) + 1

    def claim(self) -> float | None:
        """The time the next request is due; None: at once. The caller sends it then, unless the level is over by then."""
        self.claimed += 1
        return self.started + (self.claimed - 1) / self.value if self.arrival else None

    def fail(self, reason: str) -> None:
        """File a request without a right answer."""
        self.failures[reason] = self.failures.get(reason, 0) + 1

    def report(self) -> dict[str, object]:
        """The figures of this level."""
        end = self.ended or time.perf_counter()
        ordered = sorted(self.latencies)
        failed = sum(self.failures.values())
        figures: dict[str, object] = {
            "level": self.name,
            "seconds": round(end - self.started, 3),
            "answered": len(ordered),
            "failed": failed,
            "failures": self.failures,
            "rps": round(len(ordered) / max(end - self.started, 1e-9), 1),
            **{f"p{rank:g}_ms": _ms(percentile(ordered, rank)) for rank in (50, 90, 95, 99, 99.9) if ordered},
        }
        if self.arrival:
            due = self.due(end)
            figures |= {"due": due, "sent": self.sent, "unsent": max(0, due - self.sent), "late": self.late}
        return figures


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


class Levels:
    """The levels of a run, in order; the shape moves on, the users ask for the present one."""

    def __init__(self) -> None:
        self.all: list[Level] = []
        self._lock = threading.Lock()

    @property
    def now(self) -> Level:
        """The level the load is at."""
        return self.all[-1]

    @property
    def started(self) -> bool:
        """Whether there is a level yet."""
        return bool(self.all)

    def enter(self, name: str, value: float, *, arrival: bool) -> None:
        """Close the present level and start the next, unless it is this one already."""
        with self._lock:
            if self.all and self.all[-1].name == name:
                return
            self.close()
            self.all.append(Level(name, value, arrival))

    def close(self) -> None:
        """End the present level."""
        if self.all and not self.all[-1].ended:
            self.all[-1].ended = time.perf_counter()
