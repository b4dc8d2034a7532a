"""Percentiles, medians and ratios of interleaved pairs. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the smallest and largest value it was taken from."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """`1.23 (1.10-1.31)`."""
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def percentile(ordered: Sequence[float], rank: float) -> float:
    """The nearest-rank percentile of values already in order; NaN when there are none."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(rank / 100 * len(ordered)) - 1))]


def spread(values: Sequence[float]) -> Spread | None:
    """Median and range, or None when nothing was measured."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    return Spread(statistics.median(finite), min(finite), max(finite), len(finite))


def paired_ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """The ratio within each pair, then the median over pairs: what drifts between pairs cancels.

    The keys are pair numbers. A pair of which only one side was measured does not count.
    """
    shared = sorted(pair for pair in ours if theirs.get(pair, 0) > 0)
    return spread([ours[pair] / theirs[pair] for pair in shared])
