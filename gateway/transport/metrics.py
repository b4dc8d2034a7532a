"""`/metrics`: the statistics under Triton's metric names and our own, as an RSGI app for a port of its own.

Maps counters to metric families and answers GET. What is of models and of the queue is the sum over the whole fleet,
whichever process answers: in queries over several scraped gateways, take `max`, not `sum`. `process_*` are of the
process that answers, which a fleet adds as the label `process`; `nv_gpu_*` and `nv_cpu_*` are of its machine.

The counters are read on the event loop, whose they are; reading /proc and writing the text happen on a thread, so a
scrape of many models delays no inference.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeAlias

from gateway import __version__
from gateway.errors import Unauthenticated
from gateway.queues.base import PoolState
from gateway.statistics import Histogram, Statistics, VersionStatistics
from gateway.telemetry import METRICS_CONTENT_TYPE, Buckets, Family, process_metrics, write_metrics
from gateway.transport.auth import Tokens
from gateway.transport.device_metrics import DeviceMetrics
from gateway.transport.fleet import FleetMetrics, ReadFigures
from gateway.transport.http.replies import Reply, error_reply
from gateway.transport.instances import instance_metrics

_PROBES = {"/v2/health/live": "live", "/v2/health/ready": "ready"}

Scope: TypeAlias = Any  # granian.rsgi.Scope
Protocol: TypeAlias = Any  # granian.rsgi.HTTPProtocol
_Versions: TypeAlias = Sequence[tuple[Mapping[str, str], VersionStatistics]]

_COUNTS = (
    ("success_count", "nv_inference_request_success", "Number of successful inference requests, all batch sizes"),
    ("inference_count", "nv_inference_count", "Number of inferences performed (does not include cached requests)"),
    (
        "execution_count",
        "nv_inference_exec_count",
        "Number of model executions performed (does not include cached requests)",
    ),
    ("cache_hit_count", "nv_cache_num_hits_per_model", "Number of cache hits per model"),
    ("cache_miss_count", "nv_cache_num_misses_per_model", "Number of cache misses per model"),
    ("late", "gateway_requests_late_total", "Number of accepted requests that were not answered by their deadline"),
    ("restarts", "gateway_engine_restarts_total", "Number of times that an engine's process was started again"),
)

_DURATIONS = (
    (
        "success_ns",
        "nv_inference_request_duration_us",
        "Cumulative inference request duration in microseconds (includes cached requests)",
    ),
    (
        "queue_ns",
        "nv_inference_queue_duration_us",
        "Cumulative inference queuing duration in microseconds (includes cached requests)",
    ),
    (
        "compute_input_ns",
        "nv_inference_compute_input_duration_us",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
    ),
    (
        "compute_infer_ns",
        "nv_inference_compute_infer_duration_us",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
    ),
    (
        "compute_output_ns",
        "nv_inference_compute_output_duration_us",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
    ),
    ("cache_hit_ns", "nv_cache_hit_duration_per_model", "Total cache hit duration per model, in microseconds"),
    (
        "cache_miss_ns",
        "nv_cache_miss_duration_per_model",
        "Total cache miss (insert+lookup) duration per model, in microseconds",
    ),
)

# Attribute, name, help, and how many of the attribute's units make one of the metric's.
_HISTOGRAMS = (
    ("queue_times", "gateway_queue_seconds", "Time an answered request waited for a batch", 1e9),
    ("compute_times", "gateway_compute_seconds", "Time the batch of an answered request took", 1e9),
    ("request_times", "gateway_request_seconds", "Time from accepting a request to its answer", 1e9),
    ("row_sizes", "gateway_batch_rows", "Rows of the batches that ran", 1),
)


def model_metrics(statistics: Statistics) -> list[Family]:
    """Every model version's counters and histograms. Call it on the event loop."""
    versions = [({"model": each.model, "version": each.version}, each) for each in statistics]

    def total(name: str, text: str, read: Callable[[VersionStatistics], int]) -> Family:
        return Family(name, "counter", text, [(labels, read(each)) for labels, each in versions])

    families = [total(name, text, attrgetter(attribute)) for attribute, name, text in _COUNTS]
    families += [total(name, text, _microseconds(attribute)) for attribute, name, text in _DURATIONS]
    for attribute, name, text, scale in _HISTOGRAMS:
        read = attrgetter(attribute)
        families.append(
            Family(name, "histogram", text, [(labels, _buckets(read(each), scale)) for labels, each in versions])
        )
    failed = "Number of failed inference requests, all batch sizes"
    closed = "Number of batches by why they were closed"
    refused = "Number of good requests that were not served, by why; see the table of refusals"
    links = "Number of requests of a chain of engines, by the link that answered them"
    fallbacks = "Number of requests that another link of the chain answered than the first, by why that did not"
    crashed = "Number of times that an engine's process ended or could not be started, by cause"
    ended = (
        "Number of sequences that are over, by how they ended: as their client said, idle for too long, or by a failure"
    )
    waiting = "Instantaneous number of pending requests awaiting execution per-model."
    families += [
        Family("nv_inference_request_failure", "counter", failed, _by_reason(versions, "failures")),
        Family("gateway_batches_closed_total", "counter", closed, _by_reason(versions, "closed")),
        Family("gateway_requests_refused_total", "counter", refused, _by_reason(versions, "refused")),
        Family("gateway_link_requests_total", "counter", links, _by_reason(versions, "links", "link")),
        Family("gateway_fallbacks_total", "counter", fallbacks, _by_reason(versions, "fallbacks")),
        Family("gateway_engine_crashes_total", "counter", crashed, _by_reason(versions, "crashes")),
        Family("gateway_sequences_ended_total", "counter", ended, _by_reason(versions, "sequences")),
        Family(
            "nv_inference_pending_request_count",
            "gauge",
            waiting,
            # A cancelled request leaves `pending` at once and `executing` only with its batch.
            [(labels, max(0, each.pending - each.executing)) for labels, each in versions],
        ),
    ]
    return families + _predictions(versions)


def _predictions(versions: _Versions) -> list[Family]:
    """Of the worker where they are worst."""
    told = [(labels, each.predictions) for labels, each in versions if each.predictions is not None]
    error = "How far the predicted times of batches are off, as a part of them, on average lately"
    trusted = "1 while the predicted times of batches are relied on, 0 while they are too wrong"
    return [
        Family("gateway_prediction_error_ratio", "gauge", error, [(labels, each[0]) for labels, each in told]),
        Family("gateway_predictions_trusted", "gauge", trusted, [(labels, int(each[1])) for labels, each in told]),
    ]


def _microseconds(attribute: str) -> Callable[[VersionStatistics], int]:
    read = attrgetter(attribute)
    return lambda each: read(each) // 1000


def _buckets(histogram: Histogram, scale: float) -> Buckets:
    return Buckets(tuple(bound / scale for bound in histogram.bounds), tuple(histogram.counts), histogram.total / scale)


def _by_reason(
    versions: _Versions, attribute: str, label: str = "reason"
) -> list[tuple[Mapping[str, str], float | Buckets]]:
    return [
        ({**labels, label: reason}, count)
        for labels, each in versions
        for reason, count in getattr(each, attribute).items()
    ]


@dataclass(frozen=True, slots=True)
class Own:
    """What a process tells beside the sums over the fleet: its machine's devices, the models as its queue has them, and
    `more`, which may take a look at files; and what the code of models keeps, in the whole fleet.
    """

    devices: DeviceMetrics = field(default_factory=DeviceMetrics)
    pools: Callable[[], Iterable[PoolState]] = tuple
    more: Callable[[], list[Family]] = list
    measures: Callable[[], Awaitable[list[Family]]] | None = None


class MetricsApp:
    """The RSGI application of the metrics port: GET /metrics. With `tokens`, a scraper must show one too.

    Health is here as well, without a token: for probes of processes that have no other port.
    """

    def __init__(
        self,
        fleet: Callable[[], Awaitable[Statistics]],
        tokens: Tokens | None = None,
        *,
        process: str = "",
        figures: ReadFigures | None = None,
        health: Callable[[str], Reply] | None = None,
        own: Own | None = None,
    ) -> None:
        """`fleet` gives the sums over all processes. Where there are others, `process` is the name of this one and
        `figures` tells of the queue. `health` answers for "live" and "ready".
        """
        self._health = health
        self._own = own or Own()
        self._fleet = fleet
        self._queue = FleetMetrics(figures)
        self._tokens = tokens
        self._labels = {"process": process} if process else {}
        # A thread of its own: scrapes queue up behind each other, and need none of the threads that serve requests.
        self._thread = ThreadPoolExecutor(1, "metrics")

    async def __rsgi__(self, scope: Scope, protocol: Protocol) -> None:
        """Answer one request: 200 with the metrics, 401 without a token, 404 for another path, 405 for another method."""
        if self._health is not None and scope.method == "GET" and (word := _PROBES.get(scope.path)):
            protocol.response_bytes(*self._health(word))
            return
        try:
            if self._tokens is not None:
                self._tokens.tenant(scope.headers.get("authorization"))
        except Unauthenticated as refused:
            protocol.response_bytes(*error_reply(refused))
            return
        if scope.path != "/metrics":
            protocol.response_str(404, [("content-type", "application/json")], '{"error":"Not Found"}')
        elif scope.method != "GET":
            headers = [("content-type", "application/json"), ("allow", "GET")]
            protocol.response_str(405, headers, '{"error":"Method Not Allowed"}')
        else:
            statistics = await self._fleet()
            tasks = "Tasks on the event loop of this process, the one that answers this included"
            families = [
                *model_metrics(statistics),
                *instance_metrics(self._own.pools()),
                *await self._queue.collect(statistics),
                Family("gateway_tasks", "gauge", tasks, [(self._labels, len(asyncio.all_tasks()))]),
                *self._own.devices.gpus(),
                *(await self._own.measures() if self._own.measures is not None else ()),
            ]
            body = await asyncio.get_running_loop().run_in_executor(self._thread, self._write, families)
            protocol.response_bytes(200, [("content-type", METRICS_CONTENT_TYPE)], body)

    def _write(self, families: list[Family]) -> bytes:
        python = platform.python_version()
        build = Family(
            "gateway_build_info",
            "gauge",
            "Always 1; the labels say what is running",
            [({"version": __version__, "python": python, **self._labels}, 1)],
        )
        more = [
            Family(
                each.name, each.kind, each.help, [({**labels, **self._labels}, value) for labels, value in each.samples]
            )
            for each in self._own.more()
        ]
        cpu = self._own.devices.cpu()
        return write_metrics([*families, *cpu, *more, *process_metrics(self._labels), build])
