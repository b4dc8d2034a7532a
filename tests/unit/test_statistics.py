"""The counters are Triton's: what counts where, and the exact form clients read."""

import pytest
from google.protobuf import json_format
from tritonclient.grpc import service_pb2

from gateway.statistics import Histogram, Statistics, VersionStatistics
from gateway.statistics.responses import MOST
from gateway.types import Timings


class Clock:
    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counters(clock: Clock) -> VersionStatistics:
    return Statistics(clock).of("digits", "3")


def run_batch_of_two_requests(counters: VersionStatistics) -> None:
    """One execution of 5 rows, asked for by requests of 1 and 4 rows."""
    counters.record_batch(5, 10, 200, 30, "idle")
    counters.record_success(1000, Timings(400, 10, 200, 30, 5), 1)
    counters.record_success(1500, Timings(700, 10, 200, 30, 5), 4)


def test_one_batch_of_two_requests_and_a_failure(counters: VersionStatistics, clock: Clock) -> None:
    run_batch_of_two_requests(counters)
    counters.record_failure("BACKEND", 90)
    assert counters.to_triton() == {
        "name": "digits",
        "version": "3",
        "last_inference": clock.ms,
        "inference_count": 5,
        "execution_count": 1,
        "inference_stats": {
            "success": {"count": 2, "ns": 2500},
            "fail": {"count": 1, "ns": 90},
            "queue": {"count": 2, "ns": 1100},
            "compute_input": {"count": 2, "ns": 20},
            "compute_infer": {"count": 2, "ns": 400},
            "compute_output": {"count": 2, "ns": 60},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": 5,
                "compute_input": {"count": 1, "ns": 10},
                "compute_infer": {"count": 1, "ns": 200},
                "compute_output": {"count": 1, "ns": 30},
            }
        ],
        "memory_usage": [],
    }


def test_the_dict_is_also_the_protobuf_message(counters: VersionStatistics) -> None:
    run_batch_of_two_requests(counters)
    message = json_format.ParseDict(counters.to_triton(), service_pb2.ModelStatistics())
    assert message.inference_stats.queue.ns == 1100
    assert message.batch_stats[0].batch_size == 5
    assert message.batch_stats[0].compute_infer.count == 1


def test_a_failed_request_adds_an_execution_but_no_inference(counters: VersionStatistics) -> None:
    counters.record_batch(4, 1, 2, 3, "full")
    counters.record_failure("BACKEND", 6)
    assert (counters.inference_count, counters.execution_count) == (0, 1)


def test_an_answer_without_timings_counts_as_a_cache_hit_does(counters: VersionStatistics) -> None:
    run_batch_of_two_requests(counters)
    counters.record_success(50, None, 8)
    entry = counters.to_triton()
    assert entry["inference_count"] == 5
    assert entry["inference_stats"]["success"] == {"count": 3, "ns": 2550}
    assert entry["inference_stats"]["queue"] == {"count": 3, "ns": 1100}
    assert entry["inference_stats"]["compute_infer"] == {"count": 2, "ns": 400}
    assert sum(counters.compute_times.counts) == 2


def test_batches_are_kept_by_size_in_order_and_by_reason(counters: VersionStatistics) -> None:
    for rows, reason in ((8, "full"), (1, "idle"), (8, "full"), (2, "idle")):
        counters.record_batch(rows, 1, 10, 100, reason)
    entries = counters.to_triton()["batch_stats"]
    assert [(entry["batch_size"], entry["compute_infer"]["count"]) for entry in entries] == [(1, 1), (2, 1), (8, 2)]
    assert entries[2]["compute_output"] == {"count": 2, "ns": 200}
    assert counters.closed == {"full": 2, "idle": 2}


def test_failures_are_told_apart_and_an_unknown_reason_is_other(counters: VersionStatistics) -> None:
    for reason in ("REJECTED", "CANCELED", "REJECTED", "surprise"):
        counters.record_failure(reason, 7)
    assert counters.failures == {"REJECTED": 2, "CANCELED": 1, "BACKEND": 0, "OTHER": 1}
    assert counters.to_triton()["inference_stats"]["fail"] == {"count": 4, "ns": 28}


def test_last_inference_never_goes_back_with_the_wall_clock(counters: VersionStatistics, clock: Clock) -> None:
    counters.record_batch(1, 1, 1, 1, "idle")
    latest = clock.ms
    clock.ms -= 60_000
    counters.record_batch(1, 1, 1, 1, "idle")
    assert counters.to_triton()["last_inference"] == latest


def test_histogram_bounds_are_inclusive_and_the_last_bucket_is_open() -> None:
    histogram = Histogram((10, 20))
    for value in (0, 10, 11, 20, 21, 1_000):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.total == 1062


def test_a_version_keeps_its_counters_until_it_is_forgotten() -> None:
    statistics = Statistics()
    statistics.of("digits", "1").record_failure("OTHER", 1)
    assert statistics.of("digits", "1").failures["OTHER"] == 1
    statistics.forget("digits", "1")
    statistics.forget("digits", "1")
    assert statistics.of("digits", "1").failures["OTHER"] == 0


def test_versions_come_in_number_order() -> None:
    statistics = Statistics()
    for model, version in (("b", "1"), ("a", "10"), ("a", "9")):
        statistics.of(model, version)
    assert [(each.model, each.version) for each in statistics] == [("a", "9"), ("a", "10"), ("b", "1")]


def test_responses_of_decoupled_models_are_counted_by_their_number() -> None:
    counters = Statistics(lambda: 1).of("m", "1")
    counters.record_response(0, "success", 40)
    counters.record_response(0, "success", 2)
    counters.record_response(1, "empty_response", 3)
    counters.record_response(1, "fail", 5)
    counters.record_response(2, "cancel", 7)
    counters.record_response(MOST, "success", 1)
    told = counters.to_triton()["response_stats"]
    assert list(told) == ["0", "1", "2"]
    counts = {
        index: {name: tuple(of.values()) for name, of in figures.items() if of["count"]}
        for index, figures in told.items()
    }
    assert counts == {
        "0": {"compute_infer": (2, 42), "compute_output": (2, 0), "success": (2, 42)},
        "1": {"compute_infer": (2, 8), "compute_output": (1, 0), "fail": (1, 5), "empty_response": (1, 3)},
        "2": {"cancel": (1, 7)},
    }
