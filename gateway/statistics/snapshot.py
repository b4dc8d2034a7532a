"""Counters as bytes that another process can add up, and back.

A snapshot is msgpack: a format number, counters of the whole process, and of each model version its epoch, its gauges
and its counters by name. A name that the reader does not know is passed over, so processes of neighbouring versions
of the code add up what they share. FORMAT changes when a name gets another meaning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from operator import add, attrgetter
from typing import TypeVar

import msgspec

from gateway.statistics.counters import BatchStatistics, Histogram, VersionStatistics

FORMAT = 1

_ANSWERED = (
    "inference_count", "success_count", "success_ns", "queue_ns", "compute_count", "compute_input_ns",
    "compute_infer_ns", "compute_output_ns",
)  # fmt: skip
_OWN = (
    "execution_count", "failure_ns", "cache_hit_count", "cache_hit_ns", "cache_miss_count", "cache_miss_ns",
    "admitted", "late", "restarts",
)  # fmt: skip
_HISTOGRAMS = ("request_times", "queue_times", "compute_times", "row_sizes")
_TABLES = ("failures", "closed", "refused", "crashes", "links", "fallbacks", "sequences")
_BATCH = ("count", "compute_input_ns", "compute_infer_ns", "compute_output_ns")

_Key = TypeVar("_Key")

_read_answered = attrgetter(*_ANSWERED)
_read_own = attrgetter(*_OWN)
_read_batch = attrgetter(*_BATCH)


class VersionSnapshot(msgspec.Struct, array_like=True, gc=False):
    """The counters of one version since `epoch`; if not `loaded`, all it says is that the version was unloaded then.

    A histogram is its total and then its buckets; `batches` has by rows what `BatchStatistics` has, `responses` by
    number what the module of that name counts.
    """

    model: str
    version: str
    epoch: int
    loaded: bool = True
    last_inference_ms: int = 0
    pending: int = 0
    executing: int = 0
    predictions: tuple[float, bool] | None = None
    counts: dict[str, int] = {}
    histograms: dict[str, list[int]] = {}
    tables: dict[str, dict[str, int]] = {}
    batches: dict[int, list[int]] = {}
    responses: dict[int, list[int]] = {}

    def add(self, other: VersionSnapshot) -> VersionSnapshot:
        """The sum of both, made of this one. What was counted before the version was unloaded is left out."""
        if self.epoch != other.epoch:
            return max(self, other, key=lambda each: each.epoch)
        self.loaded |= other.loaded
        self.last_inference_ms = max(self.last_inference_ms, other.last_inference_ms)
        self.pending += other.pending
        self.executing += other.executing
        self.predictions = _worse(self.predictions, other.predictions)
        _add_counts(self.counts, other.counts)
        for name, table in other.tables.items():
            _add_counts(self.tables.setdefault(name, {}), table)
        _add_lists(self.histograms, other.histograms)
        _add_lists(self.batches, other.batches)
        _add_lists(self.responses, other.responses)
        return self


class Snapshot(msgspec.Struct, array_like=True, gc=False):
    """What one process has counted, or several. `totals` belong to no model."""

    format: int = FORMAT
    totals: dict[str, int] = {}
    versions: list[VersionSnapshot] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Snapshot).decode


def pack(totals: dict[str, int], versions: Iterable[VersionSnapshot]) -> bytes:
    """These as bytes."""
    return _encode(Snapshot(FORMAT, totals, list(versions)))


def unpack(data: bytes) -> Snapshot | None:
    """The snapshot, or None for one that this version of the code cannot read."""
    try:
        snapshot = _decode(data)
    except (msgspec.DecodeError, ValueError):
        return None
    return snapshot if snapshot.format == FORMAT else None


def sum_up(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum of these, which are used up."""
    totals: Counter[str] = Counter()
    versions: dict[tuple[str, str], VersionSnapshot] = {}
    for snapshot in snapshots:
        totals.update(snapshot.totals)
        for each in snapshot.versions:
            key = each.model, each.version
            before = versions.get(key)
            versions[key] = each if before is None else before.add(each)
    return Snapshot(FORMAT, dict(totals), list(versions.values()))


def take(statistics: VersionStatistics) -> VersionSnapshot:
    """The version's counters as they are now."""
    histograms = [(name, getattr(statistics, name)) for name in _HISTOGRAMS]
    return VersionSnapshot(
        statistics.model,
        statistics.version,
        statistics.epoch,
        True,
        statistics.last_inference_ms,
        statistics.pending,
        statistics.executing,
        statistics.predictions,
        dict(zip(_ANSWERED + _OWN, _read_answered(statistics.answered()) + _read_own(statistics), strict=True)),
        {name: [histogram.total, *histogram.counts] for name, histogram in histograms},
        {name: getattr(statistics, name) for name in _TABLES},
        {rows: list(_read_batch(batch)) for rows, batch in statistics.batches.items()},
        {index: list(figures) for index, figures in statistics.responses.items()},
    )


def restore(snapshot: VersionSnapshot, now_ms: Callable[[], int]) -> VersionStatistics:
    """The object that `take` was given, with the same counters."""
    statistics = VersionStatistics(snapshot.model, snapshot.version, now_ms, snapshot.epoch)
    statistics.last_inference_ms = snapshot.last_inference_ms
    statistics.pending, statistics.executing = snapshot.pending, snapshot.executing
    statistics.predictions = snapshot.predictions
    answered = statistics.answered()
    for name, count in snapshot.counts.items():
        if name in _ANSWERED or name in _OWN:
            setattr(answered if name in _ANSWERED else statistics, name, count)
    for name in _HISTOGRAMS:
        _fill(getattr(statistics, name), snapshot.histograms.get(name, []))
    for name in _TABLES:
        getattr(statistics, name).update(snapshot.tables.get(name, {}))
    for rows, figures in snapshot.batches.items():
        batch = statistics.batches[rows] = BatchStatistics()
        for name, figure in zip(_BATCH, figures, strict=False):
            setattr(batch, name, figure)
    statistics.responses = snapshot.responses
    return statistics


def _fill(histogram: Histogram, figures: list[int]) -> None:
    if len(figures) == len(histogram.counts) + 1:  # else it has other buckets, which nobody here can read
        histogram.total, *histogram.counts = figures


def _worse(one: tuple[float, bool] | None, other: tuple[float, bool] | None) -> tuple[float, bool] | None:
    if one is None or other is None:
        return one or other
    return max(one[0], other[0]), one[1] and other[1]


def _add_counts(counts: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def _add_lists(lists: dict[_Key, list[int]], more: dict[_Key, list[int]]) -> None:
    for key, figures in more.items():
        known = lists.get(key)
        if known is None:
            lists[key] = figures
        elif len(known) == len(figures):
            lists[key] = list(map(add, known, figures))
