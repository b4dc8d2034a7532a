"""Triton's counters of one model version, and histograms of its times and batches.

Owns what the statistics extension and `/metrics` report, counted as Triton counts (core `infer_stats.cc`):
requests and rows by the gateway when a request ends, executions by the worker when a batch ends. Promises
that recording never fails and costs a request next to nothing: answers are noted and counted some hundred at a
time, or when somebody looks (4,800 instructions each, where counting each by itself took 9,000). Everything here belongs to the event-loop thread;
nothing is locked. It knows neither wire format nor Prometheus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import compress
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from gateway import errors
from gateway.statistics import responses
from gateway.types import Timings

TIME_BOUNDS_NS = tuple(
    int(ms * 1_000_000) for ms in (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)
)
ROW_BOUNDS = tuple(2**power for power in range(11))
FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Triton's values of the label `reason` of `nv_inference_request_failure`."""


_MANY = 512  # answers that are counted at once

_Answer: TypeAlias = tuple[int, Timings | None, int]  # nanoseconds, where they went, rows


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
    response_stats: dict[str, dict[str, dict[str, int]]]
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

    def observe_all(self, values: npt.NDArray[np.int64]) -> int:
        """Count many values at once; returns their sum."""
        found = np.bincount(np.searchsorted(self.bounds, values), minlength=len(self.counts))
        self.counts = [count + new for count, new in zip(self.counts, found.tolist(), strict=True)]
        total = int(values.sum())
        self.total += total
        return total


class BatchStatistics:
    """The batches of one size: how many, and their steps in nanoseconds."""

    __slots__ = ("compute_infer_ns", "compute_input_ns", "compute_output_ns", "count")

    def __init__(self) -> None:
        self.count = 0
        self.compute_input_ns = 0
        self.compute_infer_ns = 0
        self.compute_output_ns = 0


class _Answered:
    """The counters of answered requests."""

    __slots__ = (
        "compute_count", "compute_infer_ns", "compute_input_ns", "compute_output_ns", "compute_times", "inference_count",
        "queue_ns", "queue_times", "request_times", "success_count", "success_ns",
    )  # fmt: skip

    def __init__(self) -> None:
        self.inference_count = 0
        self.success_count = self.success_ns = 0
        self.queue_ns = 0
        self.compute_count = self.compute_input_ns = self.compute_infer_ns = self.compute_output_ns = 0
        self.request_times = Histogram(TIME_BOUNDS_NS)
        self.queue_times = Histogram(TIME_BOUNDS_NS)
        self.compute_times = Histogram(TIME_BOUNDS_NS)

    def add(self, answers: list[_Answer]) -> None:
        """Count these."""
        totals, timings, rows = zip(*answers, strict=True)
        self.success_count += len(answers)
        self.success_ns += self.request_times.observe_all(np.array(totals))
        # An answer out of a cache counts as a success and in no compute figure, the rows included.
        ran = [each for each in timings if each is not None]
        if not ran:
            return
        stack = np.array([each.compute_input_ns for each in ran])
        infer = np.array([each.compute_infer_ns for each in ran])
        split = np.array([each.compute_output_ns for each in ran])
        self.inference_count += sum(compress(rows, timings)) if len(ran) < len(answers) else sum(rows)
        self.compute_count += len(ran)
        self.queue_ns += self.queue_times.observe_all(np.array([each.queue_ns for each in ran]))
        self.compute_input_ns += int(stack.sum())
        self.compute_infer_ns += int(infer.sum())
        self.compute_output_ns += int(split.sum())
        self.compute_times.observe_all(stack + infer + split)


def _answered(name: str) -> Any:
    """A figure of `_Answered` as one of the version's, with the latest answers counted in."""

    def read(statistics: VersionStatistics) -> Any:
        return getattr(statistics.answered(), name)

    return property(read)


class VersionStatistics:
    """The counters of one model version; plain integers, read freely, written by the methods below.

    Two gauges are the callers' own to step up and down: `pending` counts accepted requests not yet answered
    (the gateway's), `executing` those among them that are in a running batch (the worker's). The cache
    fields are the response cache's. Of the requests that were `admitted` on condition and have ended, `late` were not
    answered by their deadline. `predictions` is how far predicted times of batches are off lately, as a part of them,
    and whether they are relied on; None where nothing runs. `epoch` is when the version was last unloaded, in
    milliseconds since 1970; 0 for never. `crashes` are its engines' by cause, `restarts` how often they came back.
    """

    __slots__ = (
        "_answers", "_counted", "_now_ms", "admitted", "batches", "cache_hit_count", "cache_hit_ns", "cache_miss_count",
        "cache_miss_ns", "closed", "crashes", "epoch", "executing", "execution_count", "failure_ns", "failures",
        "fallbacks", "last_inference_ms", "late", "links", "model", "pending", "predictions", "refused", "responses",
        "restarts", "row_sizes", "sequences", "version",
    )  # fmt: skip

    inference_count = _answered("inference_count")
    success_count = _answered("success_count")
    success_ns = _answered("success_ns")
    queue_ns = _answered("queue_ns")
    compute_count = _answered("compute_count")
    compute_input_ns = _answered("compute_input_ns")
    compute_infer_ns = _answered("compute_infer_ns")
    compute_output_ns = _answered("compute_output_ns")
    request_times = _answered("request_times")
    queue_times = _answered("queue_times")
    compute_times = _answered("compute_times")

    def __init__(self, model: str, version: str, now_ms: Callable[[], int], epoch: int = 0) -> None:
        self.model = model
        self.version = version
        self.epoch = epoch
        self._now_ms = now_ms
        self._answers: list[_Answer] = []  # those that are not counted yet
        self._counted = _Answered()
        self.last_inference_ms = 0
        self.execution_count = 0
        self.failure_ns = 0
        self.failures = dict.fromkeys(FAILURE_REASONS, 0)
        self.cache_hit_count = self.cache_hit_ns = self.cache_miss_count = self.cache_miss_ns = 0
        self.pending = self.executing = 0
        self.admitted = self.late = 0
        self.predictions: tuple[float, bool] | None = None
        self.batches: dict[int, BatchStatistics] = {}
        self.responses: dict[int, list[int]] = {}  # see `responses`
        self.closed: dict[str, int] = {}
        self.refused: dict[str, int] = {}  # requests by `GatewayError.reason`
        self.links: dict[str, int] = {}  # requests of a chain of engines, by the link that answered them
        self.fallbacks: dict[str, int] = {}  # those that not the first link answered, by why it did not
        self.crashes: dict[str, int] = {}
        self.sequences: dict[str, int] = {}  # that are over, by how they ended
        self.restarts = 0
        self.row_sizes = Histogram(ROW_BOUNDS)

    def record_success(self, total_ns: int, timings: Timings | None, rows: int) -> None:
        """Count a request of `rows` rows answered after `total_ns`; `timings` is None when no model ran for it."""
        self._answers.append((total_ns, timings, rows))
        if len(self._answers) >= _MANY:
            self.answered()

    def answered(self) -> _Answered:
        """The counters of answered requests, every one counted."""
        if self._answers:
            self._counted.add(self._answers)
            self._answers = []
        return self._counted

    def record_failure(self, reason: str, total_ns: int, times: int = 1) -> None:
        """Count a request that ended without an answer after `total_ns`, or several after so long in all.

        `reason` is one of FAILURE_REASONS.
        """
        self.failures[reason if reason in self.failures else "OTHER"] += times
        self.failure_ns += total_ns

    def record_refusal(self, error: errors.GatewayError, total_ns: int, times: int = 1) -> None:
        """Count a request that was answered with an error after `total_ns`, or several after so long in all."""
        self.record_failure(failure_reason(error), total_ns, times)
        if error.reason:
            self.refused[error.reason] = self.refused.get(error.reason, 0) + times

    def record_cache_hit(self, total_ns: int, lookup_ns: int, rows: int) -> None:
        """Count a request that was answered out of the response cache; `lookup_ns` of `total_ns` went there."""
        self.cache_hit_count += 1
        self.cache_hit_ns += lookup_ns
        self.record_success(total_ns, None, rows)

    def record_cache_miss(self, cache_ns: int) -> None:
        """Count a request, whose success is counted apart, that the response cache took `cache_ns` of for nothing."""
        self.cache_miss_count += 1
        self.cache_miss_ns += cache_ns
        self._counted.success_ns += cache_ns

    def record_response(self, index: int, outcome: responses.Outcome, ns: int) -> None:
        """Count a response of a decoupled model: its number in its request, and how long after the one before it came."""
        responses.record(self.responses, index, outcome, ns)

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
            "response_stats": responses.to_triton(self.responses),
            "batch_stats": [_batch_entry(size, self.batches[size]) for size in sorted(self.batches)],
            "memory_usage": [],
        }


def failure_reason(error: errors.GatewayError) -> str:
    """Triton's `reason` label of `nv_inference_request_failure`."""
    if isinstance(error, errors.Unavailable | errors.ResourceExhausted | errors.DeadlineExceeded):
        return "REJECTED"
    return "BACKEND" if isinstance(error, errors.Internal) else "OTHER"


def _duration(count: int, ns: int) -> Duration:
    return {"count": count, "ns": ns}


def _batch_entry(size: int, batch: BatchStatistics) -> BatchEntry:
    return {
        "batch_size": size,
        "compute_input": _duration(batch.count, batch.compute_input_ns),
        "compute_infer": _duration(batch.count, batch.compute_infer_ns),
        "compute_output": _duration(batch.count, batch.compute_output_ns),
    }
