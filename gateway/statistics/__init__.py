"""Triton's counters of each model version, histograms of its times and batches, and their sums over processes."""

from gateway.statistics.counters import (
    FAILURE_REASONS,
    ROW_BOUNDS,
    TIME_BOUNDS_NS,
    Histogram,
    ModelStatistics,
    VersionStatistics,
)
from gateway.statistics.statistics import Statistics

__all__ = [
    "FAILURE_REASONS",
    "ROW_BOUNDS",
    "TIME_BOUNDS_NS",
    "Histogram",
    "ModelStatistics",
    "Statistics",
    "VersionStatistics",
]
