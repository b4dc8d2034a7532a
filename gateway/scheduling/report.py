"""What a lane did and why, in counters that can be read at any time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gateway.scheduling.base import Run, W
from gateway.scheduling.latency import LatencyModel


@dataclass(slots=True)
class LaneReport:
    """Counted since the lane was opened first. Seconds are of runs that did not fail and had a prediction."""

    admitted: int = 0
    late: int = 0  # admitted, and not answered by their deadline
    batches: int = 0
    rows: int = 0
    failed: int = 0  # runs
    predicted_seconds: float = 0.0
    actual_seconds: float = 0.0
    error: float = 0.0  # EWMA of |actual / predicted - 1|
    trusted: bool = True  # False while predictions are wrong and the lane is served first in, first out
    closed: Counter[str] = field(default_factory=Counter)  # batches by the reason they closed
    refused: Counter[str] = field(default_factory=Counter)  # requests by `RefusalReason`
    spilled: int = 0  # requests sent to a slower pool because the fastest would have missed their deadline

    def record(self, run: Run[W], seconds: float, model: LatencyModel) -> None:
        """Count a run that ended well."""
        self.batches += 1
        self.rows += run.rows
        self.error = model.error
        self.trusted = model.trusted
        if run.predicted is not None:
            self.predicted_seconds += run.predicted
            self.actual_seconds += seconds
