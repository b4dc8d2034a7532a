"""Triton's counters of each model version, and histograms of its times and batches.

Owns what the statistics extension and `/metrics` report, counted as Triton counts (core `infer_stats.cc`):
requests and rows by the gateway when a request ends, executions by the worker when a batch ends. Promises
that recording is a few integer additions and never fails. Everything here belongs to the event-loop thread;
nothing is locked. It knows neither wire format nor Prometheus.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import TypedDict

from gateway.types import Timings

TIME_BOUNDS_NS = tuple(
    int(ms * 1_000_000) for ms in (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)
)
ROW_BOUNDS = tuple(2**power for power in range(11))
FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Triton's values of the label `reason` of `nv_inference_request_failure`."""


class Duration(TypedDict):
    """How often something happened and how long it took in all."""

    count: int
    ns: int


class BatchEntry(TypedDict):
    """One batch size in `batch_stats`."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(TypedDict):
    """One entry of Triton's `model_stats`, with the field names of both its JSON and its protobuf form."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: dict[str, Duration]
    response_stats: dict[str, object]
    batch_stats: list[BatchEntry]
    memory_usage: list[object]


class Histogram:
    """Counts of integers in fixed buckets: `counts[i]` is of values <= `bounds[i]`, the last of all larger ones."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def observe(self, value: int) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class BatchStatistics:
    """The batches of one size: how many, and their steps in nanoseconds."""

    __slots__ = ("compute_infer_ns", "compute_input_ns", "compute_output_ns", "count")

    def __init__(self) -> None:
        self.count = 0
        self.compute_input_ns = 0
        self.compute_infer_ns = 0
        self.compute_output_ns = 0


class VersionStatistics:
    """The counters of one model version; plain integers, read freely, written by the methods below.

    Two gauges are the callers' own to step up and down: `pending` counts accepted requests not yet answered
    (the gateway's), `executing` those among them that are in a running batch (the worker's). The cache
    fields are the response cache's.
    """

    __slots__ = (
        "_now_ms", "batches", "cache_hit_count", "cache_hit_ns", "cache_miss_count", "cache_miss_ns", "closed",
        "compute_count", "compute_infer_ns", "compute_input_ns", "compute_output_ns", "compute_times", "executing",
        "execution_count", "failure_ns", "failures", "inference_count", "last_inference_ms", "model", "pending",
        "queue_ns", "queue_times", "refused", "request_times", "row_sizes", "success_count", "success_ns", "version",
    )  # fmt: skip

    def __init__(self, model: str, version: str, now_ms: Callable[[], int]) -> None:
        self.model = model
        self.version = version
        self._now_ms = now_ms
        self.last_inference_ms = 0
        self.inference_count = 0
        self.execution_count = 0
        self.success_count = self.success_ns = 0
        self.failure_ns = 0
        self.failures = dict.fromkeys(FAILURE_REASONS, 0)
        self.queue_ns = 0
        self.compute_count = self.compute_input_ns = self.compute_infer_ns = self.compute_output_ns = 0
        self.cache_hit_count = self.cache_hit_ns = self.cache_miss_count = self.cache_miss_ns = 0
        self.pending = self.executing = 0
        self.batches: dict[int, BatchStatistics] = {}
        self.closed: dict[str, int] = {}
        self.refused: dict[str, int] = {}  # requests by `GatewayError.reason`
        self.request_times = Histogram(TIME_BOUNDS_NS)
        self.queue_times = Histogram(TIME_BOUNDS_NS)
        self.compute_times = Histogram(TIME_BOUNDS_NS)
        self.row_sizes = Histogram(ROW_BOUNDS)

    def record_success(self, total_ns: int, timings: Timings | None, rows: int) -> None:
        """Count a request of `rows` rows answered after `total_ns`; `timings` is None when no model ran for it."""
        self.success_count += 1
        self.success_ns += total_ns
        self.request_times.counts[bisect_left(TIME_BOUNDS_NS, total_ns)] += 1  # a call to observe costs as much again
        self.request_times.total += total_ns
        if timings is None:
            # An answer out of a cache counts as a success and in no compute figure, the rows included.
            return
        queue, infer = timings.queue_ns, timings.compute_infer_ns
        stack, split = timings.compute_input_ns, timings.compute_output_ns
        self.inference_count += rows
        self.compute_count += 1
        self.queue_ns += queue
        self.compute_input_ns += stack
        self.compute_infer_ns += infer
        self.compute_output_ns += split
        compute = stack + infer + split
        self.queue_times.counts[bisect_left(TIME_BOUNDS_NS, queue)] += 1
        self.queue_times.total += queue
        self.compute_times.counts[bisect_left(TIME_BOUNDS_NS, compute)] += 1
        self.compute_times.total += compute

    def record_failure(self, reason: str, total_ns: int) -> None:
        """Count a request that ended without an answer after `total_ns`; `reason` is one of FAILURE_REASONS."""
        self.failures[reason if reason in self.failures else "OTHER"] += 1
        self.failure_ns += total_ns

    def record_batch(
        self, rows: int, compute_input_ns: int, compute_infer_ns: int, compute_output_ns: int, reason: str
    ) -> None:
        """Count one execution of `rows` rows; `reason` is a short fixed word for why the batch closed."""
        self.last_inference_ms = max(self.last_inference_ms, self._now_ms())
        self.execution_count += 1
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = BatchStatistics()
        batch.count += 1
        batch.compute_input_ns += compute_input_ns
        batch.compute_infer_ns += compute_infer_ns
        batch.compute_output_ns += compute_output_ns
        self.closed[reason] = self.closed.get(reason, 0) + 1
        self.row_sizes.observe(rows)

    def to_triton(self) -> ModelStatistics:
        """This version's `model_stats` entry, in Triton's order; HTTP sends it as it is, gRPC parses it as a dict."""
        return {
            "name": self.model,
            "version": self.version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": _duration(self.success_count, self.success_ns),
                "fail": _duration(sum(self.failures.values()), self.failure_ns),
                "queue": _duration(self.success_count, self.queue_ns),
                "compute_input": _duration(self.compute_count, self.compute_input_ns),
                "compute_infer": _duration(self.compute_count, self.compute_infer_ns),
                "compute_output": _duration(self.compute_count, self.compute_output_ns),
                "cache_hit": _duration(self.cache_hit_count, self.cache_hit_ns),
                "cache_miss": _duration(self.cache_miss_count, self.cache_miss_ns),
            },
            "response_stats": {},
            "batch_stats": [_batch_entry(size, self.batches[size]) for size in sorted(self.batches)],
            "memory_usage": [],
        }


def _duration(count: int, ns: int) -> Duration:
    return {"count": count, "ns": ns}


def _batch_entry(size: int, batch: BatchStatistics) -> BatchEntry:
    return {
        "batch_size": size,
        "compute_input": _duration(batch.count, batch.compute_input_ns),
        "compute_infer": _duration(batch.count, batch.compute_infer_ns),
        "compute_output": _duration(batch.count, batch.compute_output_ns),
    }


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Statistics:
    """The statistics of every model version that was asked for.

    `now_ms` is the wall clock in milliseconds since 1970, for `last_inference` alone.
    """

    def __init__(self, now_ms: Callable[[], int] = _wall_clock_ms) -> None:
        self._now_ms = now_ms
        self._versions: dict[tuple[str, str], VersionStatistics] = {}

    def of(self, model: str, version: str) -> VersionStatistics:
        """The counters of one version, all zero when it is new. Keep the object on a hot path."""
        statistics = self._versions.get((model, version))
        if statistics is None:
            statistics = self._versions[model, version] = VersionStatistics(model, version, self._now_ms)
        return statistics

    def forget(self, model: str, version: str) -> None:
        """Drop the counters of an unloaded version, so that a later load starts from zero."""
        self._versions.pop((model, version), None)

    def __iter__(self) -> Iterator[VersionStatistics]:
        """Every version's live counters, by model name and then version number."""
        return iter(sorted(self._versions.values(), key=lambda each: (each.model, int(each.version))))
