"""The metrics of the queue between processes, and how many workers it needs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from gateway.queues.base import Lane
from gateway.queues.figures import FleetFigures, LaneFigures
from gateway.scheduling.replicas import Demand, desired
from gateway.statistics import Statistics, VersionStatistics
from gateway.telemetry import Family

ReadFigures: TypeAlias = Callable[[], Awaitable[FleetFigures | None]]

_TOTALS = {
    "resubmitted": "Number of requests that were sent again because the queue had lost them",
    "dead_letters": "Number of requests that were put aside because no worker could answer them",
    "recovered": "Number of requests that were taken over from a worker that died",
    "orphans": "Number of requests and answers that nobody waited for any more",
    "duplicates": "Number of requests and answers that came a second time and were dropped",
    "damaged": "Number of messages that could not be read or bore the wrong signature",
}
"""What processes count and no model does, where there is a queue between them."""

_GAUGES: tuple[tuple[str, str, Callable[[LaneFigures], float]], ...] = (
    ("gateway_queue_lag", "Number of requests that no worker has read yet", lambda lane: lane.lag),
    ("gateway_queue_pending", "Number of requests that workers have read and not finished", lambda lane: lane.pending),
    ("gateway_workers", "Number of live workers that serve the version", lambda lane: lane.workers),
)
_DESIRED = (
    "Number of workers that the load would keep busy for 80 % of their time, to be rounded up; models that share "
    "workers add up"
)


class FleetMetrics:
    """Keeps what the last scrapes saw, because a rate takes two looks."""

    def __init__(self, figures: ReadFigures | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`figures` tells of the queue; None where there is none between processes."""
        self._figures = figures
        self._clock = clock
        self._demand = Demand()

    async def collect(self, statistics: Statistics) -> list[Family]:
        """The families, with the sums over the fleet in `statistics`."""
        families = [
            Family(f"gateway_{name}_total", "counter", text, [({}, statistics.totals[name])])
            for name, text in _TOTALS.items()
            if name in statistics.totals
        ]
        skipped = "Number of processes of another version of the code, whose statistics are missing in the sums"
        families.append(Family("gateway_statistics_skipped", "gauge", skipped, [({}, statistics.skipped)]))
        figures = None if self._figures is None else await self._figures()
        return families if figures is None else families + self._queue(figures, statistics)

    def _queue(self, figures: FleetFigures, statistics: Statistics) -> list[Family]:
        lanes = [({"model": lane.model, "version": lane.version}, of) for lane, of in sorted(figures.lanes.items())]
        connected = "1 while this process reaches the queue's Redis"
        counted = {Lane(of.model, of.version): of for of in statistics}
        rates = self._demand.look({lane: _asked(of) for lane, of in counted.items()}, self._clock())
        needed = [
            desired(
                None if rates is None else rates.get(lane, 0.0),
                of.lag * _rows(counted.get(lane)),
                of.workers,
                of.rows_per_second,
            )
            for lane, of in sorted(figures.lanes.items())
        ]
        return [
            *(
                Family(name, "gauge", text, [(labels, read(of)) for labels, of in lanes])
                for name, text, read in _GAUGES
            ),
            Family(
                "gateway_desired_replicas",
                "gauge",
                _DESIRED,
                [(labels, round(workers, 3)) for (labels, _), workers in zip(lanes, needed, strict=True)],
            ),
            Family("gateway_redis_connected", "gauge", connected, [({}, int(figures.connected))]),
        ]


def _rows(of: VersionStatistics | None) -> float:
    """The rows of a request, on average."""
    return float(of.inference_count / of.compute_count) if of is not None and of.compute_count else 1.0


def _asked(of: VersionStatistics) -> float:
    """Rows that were asked for since the version was loaded, and that a model had to run for.

    Those that more workers could not have answered either, the `deadline` is too short for any, are left out.
    """
    refused = sum(count for reason, count in of.refused.items() if reason != "deadline")
    return float(of.inference_count + refused * _rows(of))
