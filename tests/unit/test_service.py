"""The service: which lane a request goes to, what is refused and how it is counted. The test is its worker."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

import orjson
import pytest

from gateway import errors
from gateway.queues.base import Lane, PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Service
from gateway.service.reports import WorkerReports
from gateway.service.service import IndexEntry, ServiceOptions
from gateway.statistics import Statistics
from gateway.types import Place, Places, Timings
from tests.support import answer, background, model_config, refusal, request, settle, tensor

UNKNOWN_ID = "[request id: <id_unknown>] "


class Rig:
    """A service over a queue with one ready model `m`, and a consumer at the worker's end."""

    def __init__(self, **options):
        self.queue = MemoryQueue()
        self.statistics = Statistics()
        self.service = Service(self.queue, self.statistics, self._names, ServiceOptions(**options))
        self.names = ["m"]
        self.publish(ready("1"))

    async def _names(self):
        return self.names

    def publish(self, *states, model="m", reason=""):
        self.queue.publish(PoolState(model, states, reason))

    async def infer(self, asked):
        async with aclosing(self.service.infer(asked)) as responses:
            return [response async for response in responses]

    async def job(self, version="1"):
        (job,) = await self.queue.consumer([Lane("m", version)]).take(1)
        return job

    def counted(self, version="1"):
        """Every counter of the version that is not zero; times left out."""
        of = self.statistics.of("m", version)
        counts = {
            "success": of.success_count,
            "rows": of.inference_count,
            "executions": of.execution_count,
            "pending": of.pending,
            **of.failures,
        }
        return {name: count for name, count in counts.items() if count}


def ready(version, **more):
    return VersionState(version, "READY", config=model_config(**more))


@pytest.fixture
def rig():
    return Rig()


# --- resolution


@pytest.mark.parametrize(
    ("name", "version", "kind", "text"),
    [
        ("foo", "", errors.NotFound, "Request for unknown model: 'foo' is not found"),
        ("foo", "1", errors.NotFound, "Request for unknown model: 'foo' is not found"),
        ("m", "99", errors.NotFound, "Request for unknown model: 'm' version 99 is not found"),
        ("m", "3", errors.Unavailable, "Request for unknown model: 'm' version 3 is not at ready state"),
        ("m", "4", errors.Unavailable, "Request for unknown model: 'm' version 4 is not at ready state"),
        ("none", "", errors.NotFound, "Request for unknown model: 'none' has no available versions"),
        ("none", "1", errors.NotFound, "Request for unknown model: 'none' version 1 is not found"),
    ],
)
async def test_what_cannot_be_served_is_refused_in_tritons_words(rig, name, version, kind, text):
    rig.publish(ready("1"), VersionState("3", "LOADING"), VersionState("4", "UNAVAILABLE", "broken"))
    rig.publish(model="none", reason="its config does not parse")
    asked = request(model_name=name, model_version=version)
    found = [await refusal(rig.infer(asked))]
    for call in (rig.service.model_config, rig.service.model_ready):
        with pytest.raises(errors.GatewayError) as caught:
            call(name, version)
        found.append(caught.value)
    assert [(type(error), error.message) for error in found] == [(kind, text)] * 3


async def test_without_a_version_the_highest_ready_number_answers(rig):
    rig.publish(ready("2"), ready("10"), VersionState("11", "LOADING"))
    async with background(rig.infer(request())) as (caller,):
        job = await rig.job("10")
        job.reply(answer(job.request))
        assert len(await caller) == 1


async def test_a_request_for_a_version_goes_to_that_version(rig):
    rig.publish(ready("1"), ready("2"))
    async with background(rig.infer(request(model_version="1"))) as (caller,):
        job = await rig.job("1")
        job.reply(answer(job.request))
        await caller


async def test_a_change_of_the_pool_is_seen_by_the_next_request(rig):
    assert rig.service.model_config("m").max_batch_size == 8
    rig.publish(ready("1", max_batch_size=2))
    assert rig.service.model_config("m").max_batch_size == 2
    error = await refusal(rig.infer(request(rows=3)))
    assert error.message == UNKNOWN_ID + "inference request batch-size must be <= 2 for 'm'"
    rig.publish(VersionState("1", "UNLOADING"))
    assert isinstance(await refusal(rig.infer(request())), errors.NotFound)


# --- parameters


async def test_a_timeout_in_microseconds_becomes_the_deadline(rig):
    before = time.monotonic()
    async with background(rig.infer(request(parameters={"timeout": 60_000_000}))):
        job = await rig.job()
        assert before + 60 <= job.request.deadline <= time.monotonic() + 60


@pytest.mark.parametrize(("deadline", "micros", "expected"), [(30, 60_000_000, 30), (60, 30_000_000, 30)])
async def test_the_sooner_of_deadline_and_timeout_counts(rig, deadline, micros, expected):
    now = time.monotonic()
    asked = request(deadline=now + deadline, parameters={"timeout": micros})
    async with background(rig.infer(asked)):
        job = await rig.job()
        assert now + expected <= job.request.deadline <= time.monotonic() + expected


async def test_a_timeout_that_passes_is_an_error(rig):
    error = await refusal(rig.infer(request(parameters={"timeout": 10_000})))
    assert (type(error), error.message) == (errors.DeadlineExceeded, "Request timeout expired")


@pytest.mark.parametrize("micros", [0, -5, "soon", True])
async def test_a_timeout_that_says_nothing_is_ignored(rig, micros):
    async with background(rig.infer(request(parameters={"timeout": micros}))):
        assert (await rig.job()).request.deadline is None


async def test_a_timeout_beyond_all_measure_is_a_long_time(rig):
    async with background(rig.infer(request(parameters={"timeout": 10**400}))):
        assert (await rig.job()).request.deadline > time.monotonic() + 1e9


async def test_other_parameters_and_priority_pass_through(rig):
    async with background(rig.infer(request(parameters={"priority": 2, "mine": "x"}))):
        asked = (await rig.job()).request
        assert (asked.priority, asked.parameters["mine"]) == (2, "x")


async def test_a_priority_beyond_all_measure_can_be_written_down(rig):
    async with background(rig.infer(request(parameters={"priority": 10**30}))):
        asked = (await rig.job()).request
        assert orjson.loads(orjson.dumps(asked.priority)) == asked.priority > 1 << 60


async def test_parameters_of_tritons_name_space_are_refused(rig):
    error = await refusal(rig.infer(request(parameters={"triton_x": 1})))
    assert type(error) is errors.InvalidArgument
    assert error.message == (
        "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."
    )
    async with background(rig.infer(request(parameters={"triton_enable_empty_final_response": True}))):
        await rig.job()


# --- counting


async def test_a_success_counts_its_request_and_its_rows(rig):
    async with background(rig.infer(request(rows=3))) as (caller,):
        job = await rig.job()
        assert rig.counted() == {"pending": 1}
        response = answer(job.request)
        response.timings = Timings(queue_ns=5, compute_infer_ns=7, batch_rows=3)
        job.reply(response)
        await caller
    assert rig.counted() == {"success": 1, "rows": 3}
    statistics = rig.statistics.of("m", "1")
    assert (statistics.queue_ns, statistics.compute_infer_ns) == (5, 7)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.Internal("x"), "BACKEND"),
        (errors.Unavailable("x"), "REJECTED"),
        (errors.ResourceExhausted("x"), "REJECTED"),
        (errors.DeadlineExceeded("x"), "REJECTED"),
        (errors.InvalidArgument("x"), "OTHER"),
    ],
)
async def test_a_failure_counts_by_its_reason(rig, error, reason):
    async with background(refusal(rig.infer(request()))) as (caller,):
        (await rig.job()).fail(error)
        assert await caller is error
    assert rig.counted() == {reason: 1}


async def test_a_cancelled_request_counts_as_cancelled(rig):
    async with background(rig.infer(request())) as (caller,):
        job = await rig.job()
        caller.cancel()
        await asyncio.wait([caller])
        assert job.done
    assert rig.counted() == {"CANCELED": 1}


async def test_a_stream_counts_once_when_its_last_response_is_out(rig):
    responses = rig.service.infer(request())
    async with background(rig.job(), anext(responses)) as (working, first):
        job = await working
        job.reply(answer(job.request, final=False))
        await first
        assert rig.counted() == {"pending": 1}
        job.reply(answer(job.request))
        assert (await anext(responses)).final
        await responses.aclose()
    assert rig.counted() == {"success": 1}


async def test_a_stream_left_half_way_counts_as_cancelled(rig):
    responses = rig.service.infer(request())
    async with background(rig.job(), anext(responses)) as (working, first):
        job = await working
        job.reply(answer(job.request, final=False))
        await first
        await responses.aclose()
        assert job.done
    assert rig.counted() == {"CANCELED": 1}


async def test_a_refused_request_counts_and_one_for_no_model_does_not(rig):
    await refusal(rig.infer(request(inputs={"Z": tensor([[1, 2]])})))
    await refusal(rig.infer(request(parameters={"triton_x": 1})))
    await refusal(rig.infer(request(model_name="foo")))
    assert rig.counted() == {"OTHER": 2}
    assert [each.model for each in rig.statistics] == ["m"]


async def test_a_request_with_tensors_in_shared_memory_cannot_be_run_later(rig):
    asked = request(places=Places({}, {"OUT": Place("r", 0, 8)}))
    with pytest.raises(errors.Unsupported, match="shared memory cannot be an async job"):
        rig.service.check(asked)
    asked.places = None
    rig.service.check(asked)


async def test_statistics_are_tritons_entries_of_ready_versions(rig):
    rig.publish(ready("2"), ready("10"), VersionState("11", "LOADING"))
    rig.publish(ready("1"), model="a")
    service = rig.service
    assert [(e["name"], e["version"]) for e in await service.statistics()] == [("a", "1"), ("m", "2"), ("m", "10")]
    assert [(e["name"], e["version"]) for e in await service.statistics("m")] == [("m", "2"), ("m", "10")]
    assert [(e["name"], e["version"]) for e in await service.statistics("m", "10")] == [("m", "10")]


@pytest.mark.parametrize(
    ("name", "version", "text"),
    [
        ("foo", "", "requested model 'foo' is not available"),
        ("m", "7", "requested model 'm' version 7 is not available"),
    ],
)
async def test_statistics_of_what_is_not_there(rig, name, version, text):
    with pytest.raises(errors.InvalidArgument) as caught:
        await rig.service.statistics(name, version)
    assert caught.value.message == text


async def test_statistics_are_those_of_the_whole_fleet(rig):
    others = Statistics()
    others.of("m", "1").record_batch(3, 1, 2, 3, "full")

    async def fleet():
        return Statistics.merge([rig.statistics.snapshot(), others.snapshot()])

    service = Service(rig.queue, rig.statistics, rig._names, ServiceOptions(), fleet=fleet)
    async with background(rig.infer(request(rows=3))) as (caller,):
        job = await rig.job()
        job.reply(answer(job.request))
        await caller
    (entry,) = await service.statistics("m")
    assert (entry["inference_stats"]["success"]["count"], entry["execution_count"]) == (1, 1)


async def test_a_version_that_was_unloaded_elsewhere_counts_from_zero(rig):
    await refusal(rig.infer(request(parameters={"triton_x": 1})))
    rig.publish(replace(ready("1"), epoch=5))
    await refusal(rig.infer(request(parameters={"triton_x": 1})))
    assert rig.counted() == {"OTHER": 1}
    assert rig.statistics.epoch("m", "1") == 5
    rig.publish(replace(ready("1", max_batch_size=2), epoch=5))
    await refusal(rig.infer(request(parameters={"triton_x": 1})))
    assert rig.counted() == {"OTHER": 2}


# --- explain


async def test_each_worker_of_a_fleet_reports_of_itself(rig):
    questions = []

    async def ask(question):
        questions.append(question)
        return [b'{"worker":"worker-2"}', b"?"]

    def own(target):
        questions.append(target)
        return b'{"worker":"all-1"}'

    service = Service(rig.queue, rig.statistics, rig._names, ServiceOptions(), reports=WorkerReports(ask, own))
    told = await service.explain("m")
    assert questions == ["m:1", "explain:m:1"]
    assert [each["worker"] for each in told["workers"]] == ["all-1", "worker-2"]
    assert (told["version"], told["answered"], told["late_share"]) == ("1", 0, 0.0)


async def test_a_fleet_that_cannot_be_asked_reports_nothing(rig):
    async def ask(_):
        raise errors.Unavailable("Redis is away")

    def own(_):
        raise KeyError

    assert await WorkerReports(ask, own)("m", "1") == []


# --- default deadlines


@pytest.mark.parametrize(
    ("gateways", "models", "seconds"), [(0, None, None), (60_000, None, 60), (60_000, 30_000, 30), (60_000, 0, None)]
)
async def test_a_request_without_a_deadline_gets_the_models_or_the_gateways(gateways, models, seconds):
    rig = Rig(default_deadline_ms=gateways)
    rig.publish(VersionState("1", "READY", config=replace(model_config(), default_deadline_ms=models)))
    before = time.monotonic()
    async with background(rig.infer(request())):
        deadline = (await rig.job()).request.deadline
        if seconds is None:
            assert deadline is None
        else:
            assert before + seconds <= deadline <= time.monotonic() + seconds


@pytest.mark.parametrize("more", [{"deadline": 90.0}, {"parameters": {"timeout": 90_000_000}}])
async def test_a_requests_own_deadline_goes_before_the_default_even_if_it_is_later(more):
    rig = Rig(default_deadline_ms=60_000)
    now = time.monotonic()
    if "deadline" in more:
        more = {"deadline": now + more["deadline"]}
    async with background(rig.infer(request(**more))):
        assert (await rig.job()).request.deadline >= now + 90


# --- limits


async def test_more_bytes_than_the_limit_are_refused_until_others_are_answered():
    rig = Rig(max_inflight_bytes=20)
    async with background(rig.infer(request(rows=2))) as (first,):  # 16 bytes
        job = await rig.job()
        error = await refusal(rig.infer(request()))
        assert type(error) is errors.ResourceExhausted
        assert error.message == (
            "the gateway holds 16 bytes of requests and its limit is 20; retry later, or raise --max-inflight-bytes"
        )
        assert error.retry_after > 0
        job.reply(answer(job.request))
        await first
        async with background(rig.infer(request())):
            await rig.job()
    assert rig.counted() == {"success": 1, "REJECTED": 1, "CANCELED": 1}


async def test_a_lone_request_above_the_limit_is_served():
    rig = Rig(max_inflight_bytes=20)
    async with background(rig.infer(request(rows=8))) as (caller,):
        job = await rig.job()
        job.reply(answer(job.request))
        await caller


@pytest.mark.parametrize("ending", ["success", "failure", "cancel", "refusal"])
async def test_bytes_are_given_back_however_a_request_ends(ending):
    rig = Rig(max_inflight_bytes=64)
    for _ in range(3):
        async with background(refusal(rig.infer(request(rows=8)))) as (caller,):
            job = await rig.job()
            if ending == "refusal":
                assert isinstance(await refusal(rig.infer(request(rows=9))), errors.InvalidArgument)
            if ending == "failure":
                job.fail(errors.Internal("x"))
                await caller
    async with background(*(rig.infer(request(rows=4)) for _ in range(2))) as callers:
        await settle()
        assert not any(caller.done() for caller in callers)
        assert rig.counted()["pending"] == 2


# --- readiness


READINESS = {
    "ready": ([ready("1")], "", True),
    "loading": ([VersionState("1", "LOADING")], "", False),
    "broken": ([ready("2"), VersionState("1", "UNAVAILABLE", "no such file")], "", False),
    "unloaded on purpose": ([VersionState("1", "UNAVAILABLE", "unloaded")], "", True),
    "a config that does not parse": ([], "line 3: expected a number", False),
}


@pytest.mark.parametrize(("states", "reason", "expected"), READINESS.values(), ids=READINESS.keys())
async def test_a_strict_server_is_ready_when_every_model_is(states, reason, expected):
    strict, relaxed = Rig(), Rig(strict_readiness=False)
    for rig in (strict, relaxed):
        rig.publish(*states, model="x", reason=reason)
        assert not rig.service.ready(), "not before the first loads were carried out"
        rig.service.start()
    assert strict.service.ready() is expected
    assert relaxed.service.ready()


async def test_draining_refuses_new_requests_and_finishes_accepted_ones(rig):
    rig.service.start()
    async with background(rig.infer(request())) as (caller,):
        job = await rig.job()
        rig.service.drain()
        error = await refusal(rig.infer(request()))
        assert (type(error), error.message) == (errors.Unavailable, "Server not ready")
        assert not rig.service.ready()
        assert not rig.service.model_ready("m")
        job.reply(answer(job.request))
        assert len(await caller) == 1


# --- index and model control


async def test_the_index_lists_what_is_loaded_and_what_is_only_there(rig):
    rig.names = ["m", "never"]
    rig.publish(ready("1"), VersionState("2", "UNAVAILABLE", "no such file"))
    rig.publish(model="broken", reason="line 3: expected a number")
    assert await rig.service.index() == [
        IndexEntry("broken", "", "UNAVAILABLE", "line 3: expected a number"),
        IndexEntry("m", "1", "READY"),
        IndexEntry("m", "2", "UNAVAILABLE", "no such file"),
        IndexEntry("never"),
    ]
    assert await rig.service.index(ready=True) == [IndexEntry("m", "1", "READY")]


async def test_models_are_loaded_and_unloaded_on_request_only_in_explicit_mode(rig):
    for call in (rig.service.load("m", {}), rig.service.unload("m")):
        error = await refusal(call)
        assert type(error) is errors.Unavailable
        assert error.message == "explicit model load / unload is not allowed if polling is enabled"


async def test_a_load_is_a_command_to_the_worker_and_reports_back():
    rig = Rig(explicit_control=True)
    orders = rig.queue.commands()
    problem = errors.InvalidArgument("load failed for model 'm': ...")
    for call, report in ((rig.service.load("m", {"config": "{}"}), problem), (rig.service.unload("m"), None)):
        async with background(refusal(call) if report else call) as (caller,):
            order = await anext(orders)
            assert order.command.model == "m"
            order.finish(report)
            assert await caller is report
    await orders.aclose()
