"""Counters of several processes add up to what one process would have counted."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.statistics import Statistics
from gateway.statistics.snapshot import FORMAT
from gateway.types import Timings

NOW = 1_700_000_000_000


def counted(statistics: Statistics, model: str = "m", version: str = "1", times: int = 1) -> None:
    """Everything that can be counted of a version, `times` times."""
    of = statistics.of(model, version)
    for number in range(times):
        of.record_success(1_000_000 + number, Timings(400_000, 10_000, 200_000, 30_000, 5), 4)
        of.record_success(50, None, 2)
        of.record_failure("REJECTED", 90)
        of.record_batch(4, 10, 200, 30, "full")
        of.record_batch(2, 1, 2, 3, "drained")
        of.record_response(0, "success", 11)
        of.record_response(1, "empty_response", 3)
        of.refused["shed"] = of.refused.get("shed", 0) + 1
        of.cache_hit_count += 1
        of.cache_hit_ns += 7
        of.cache_miss_count += 2
        of.cache_miss_ns += 9
        of.admitted += 3
        of.late += 1
        of.pending += 2
        of.executing += 1
    statistics.totals["resubmitted"] = statistics.totals.get("resubmitted", 0) + times


def everything(statistics: Statistics) -> object:
    """All that anybody reads of them."""
    read = [
        (
            of.to_triton(), of.closed, of.refused, of.failures, of.admitted, of.late, of.pending, of.executing,
            [(h.counts, h.total) for h in (of.request_times, of.queue_times, of.compute_times, of.row_sizes)],
        )
        for of in statistics
    ]  # fmt: skip
    return read, statistics.totals, statistics.skipped


def stat(now_ms: int = NOW) -> Statistics:
    return Statistics(lambda: now_ms)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_the_sum_is_what_one_process_would_have_counted(times: list[int]) -> None:
    one, several = stat(), [stat() for _ in times]
    for each, part in zip(times, several, strict=True):
        for version in ("1", "2"):
            counted(part, version=version, times=each)
            counted(one, version=version, times=each)
    assert everything(Statistics.merge([part.snapshot() for part in several])) == everything(one)


def test_a_process_may_know_what_the_others_do_not() -> None:
    first, second = stat(), stat(NOW + 5)
    counted(first, "a")
    counted(second, "b")
    merged = Statistics.merge([first.snapshot(), second.snapshot()])
    assert [each.model for each in merged] == ["a", "b"]
    assert merged.of("b", "1").last_inference_ms == NOW + 5


def test_the_last_inference_is_the_latest_of_all() -> None:
    parts = [stat(NOW + 9), stat(NOW)]
    for part in parts:
        counted(part)
    assert Statistics.merge(part.snapshot() for part in parts).of("m", "1").last_inference_ms == NOW + 9


def test_a_version_that_nobody_asked_yet_is_there_with_zeros() -> None:
    part = stat()
    part.of("m", "1")
    (only,) = Statistics.merge([part.snapshot()])
    assert only.to_triton() == stat().of("m", "1").to_triton()


def test_the_dead_hold_no_requests() -> None:
    live, dead = stat(), stat()
    counted(live)
    counted(dead)
    dead.of("m", "1").predictions = (0.9, False)
    merged = Statistics.merge([live.snapshot()], [dead.snapshot()]).of("m", "1")
    assert (merged.pending, merged.executing, merged.predictions) == (2, 1, None)
    assert merged.success_count == 4


def test_predictions_are_those_of_the_worker_where_they_are_worst() -> None:
    parts = [stat(), stat(), stat()]
    for part, predictions in zip(parts, ((0.1, False), (0.4, True), None), strict=True):
        part.of("m", "1").predictions = predictions
    assert Statistics.merge(part.snapshot() for part in parts).of("m", "1").predictions == (0.4, False)


@pytest.mark.parametrize(
    "strange",
    [
        b"",
        b"\x93",
        b"nonsense",
        msgspec.msgpack.encode({"format": 1}),
        msgspec.msgpack.encode([FORMAT + 1, {}, []]),
        msgspec.msgpack.encode([FORMAT, {}, [["m", "1", "epoch"]]]),
        msgspec.msgpack.encode([FORMAT, {}, [["m", "1", 0, True, 0, 0, 0, None, {"success_count": "many"}]]]),
    ],
)
def test_what_cannot_be_read_is_left_out_and_counted(strange: bytes) -> None:
    part = stat()
    counted(part)
    merged = Statistics.merge([strange, part.snapshot(), strange])
    assert merged.skipped == 2
    assert merged.of("m", "1").success_count == 2


def test_a_histogram_of_other_buckets_is_left_out() -> None:
    part = stat()
    counted(part)
    body = msgspec.msgpack.decode(part.snapshot())
    body[2][0][9]["queue_times"] = [7, 1]
    merged = Statistics.merge([msgspec.msgpack.encode(body)]).of("m", "1")
    assert (sum(merged.queue_times.counts), merged.queue_times.total) == (0, 0)
    assert merged.success_count == 2


def test_names_of_a_later_version_of_the_code_are_passed_over() -> None:
    part = stat()
    counted(part)
    body = msgspec.msgpack.decode(part.snapshot())
    counts, histograms, tables, batches, _ = body[2][0][8:]
    counts["teleported"] = 3
    histograms["distances"] = [1, 2]
    tables["planets"] = {"Mars": 1}
    batches[4].append(9)
    body[2][0].append("a field at the end")
    assert everything(Statistics.merge([msgspec.msgpack.encode(body)])) == everything(part)


# --- unloaded


def test_what_was_counted_before_an_unload_is_in_no_sum() -> None:
    worker, gateway, dead = stat(), stat(), stat()
    for part in (worker, gateway, dead):
        counted(part)
    worker.forget("m", "1", NOW + 1)
    merged = Statistics.merge([gateway.snapshot(), worker.snapshot()], [dead.snapshot()])
    assert list(merged) == []
    gateway.catch_up(merged)
    assert list(gateway) == []
    assert gateway.epoch("m", "1") == NOW + 1


def test_after_a_reload_the_sum_starts_from_zero() -> None:
    worker, gateway, dead = stat(), stat(), stat()
    for part in (worker, gateway, dead):
        counted(part)
    worker.forget("m", "1", NOW + 1)
    worker.of("m", "1").record_batch(1, 1, 1, 1, "full")
    gateway.of("m", "1", NOW + 1).record_success(1, None, 1)  # the pool that the worker published said so
    merged = Statistics.merge([gateway.snapshot(), worker.snapshot()], [dead.snapshot()]).of("m", "1")
    assert (merged.success_count, merged.execution_count, merged.pending) == (1, 1, 0)


def test_workers_that_carry_out_one_command_count_together() -> None:
    workers = [stat(NOW), stat(NOW + 77)]
    for worker in workers:
        counted(worker)
        worker.forget("m", "1", NOW + 1)
        worker.of("m", "1").record_batch(1, 1, 1, 1, "full")
    assert Statistics.merge(worker.snapshot() for worker in workers).of("m", "1").execution_count == 2


def test_an_older_epoch_changes_nothing_and_a_newer_one_begins_anew() -> None:
    statistics = stat()
    statistics.forget("m", "1", 5)
    counted(statistics)
    assert statistics.of("m", "1", 5) is statistics.of("m", "1", 4) is statistics.of("m", "1")
    assert statistics.of("m", "1").success_count == 2
    assert statistics.of("m", "1", 6).success_count == 0


def test_an_unload_of_this_process_alone_is_dated_by_its_clock() -> None:
    statistics = stat()
    counted(statistics)
    statistics.forget("m", "1")
    assert (list(statistics), statistics.epoch("m", "1")) == ([], NOW)


def test_who_reads_sees_what_is_only_known_when_asked() -> None:
    statistics = stat()
    statistics.refreshers.append(lambda: statistics.totals.update(resubmitted=1))
    assert Statistics.merge([statistics.snapshot()]).totals["resubmitted"] == 1
