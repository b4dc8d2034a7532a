"""What a queue between processes tells operators and autoscalers of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.queues.base import Lane


@dataclass(frozen=True, slots=True)
class LaneFigures:
    """One lane: requests that no worker has read, requests in workers' hands, and its live workers.

    `rows_per_second` is what these answer together in batches of their best size; 0 while nothing is learned.
    """

    lag: int = 0
    pending: int = 0
    workers: int = 0
    rows_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """The queue as one process sees it. `connected` is whether that process reaches the queue at all."""

    connected: bool
    lanes: Mapping[Lane, LaneFigures] = field(default_factory=dict)
