"""What a worker promises, with the real queue, service, repository and slots, and the shipped fake engine."""

import asyncio
import os
import shutil
import tempfile
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from gateway import engines, errors
from gateway.app import running
from gateway.config.settings import Settings
from gateway.engines.fake import Gate
from gateway.placement import Device
from gateway.queues.base import InstanceState, Load, Unload
from gateway.queues.memory import MemoryQueue
from gateway.repository import Repository
from gateway.scheduling.base import Place
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.worker import Worker
from gateway.worker.attempt import Runner
from gateway.worker.instance import Instance
from gateway.worker.lane import limits
from gateway.worker.priors import NAME, Priors
from gateway.worker.slots import Slots
from tests.support import Callers, ask, background, model_config, refusal, request, settle, soon, until

CONFIG = """
backend: "fake"
max_batch_size: 8
input {{ name: "IN" data_type: TYPE_FP32 dims: 2 }}
output {{ name: "OUT" data_type: TYPE_FP32 dims: 2 }}
instance_group {{ kind: KIND_CPU count: {instances} }}
dynamic_batching {{ {batching} }}
{parameters}
{more}
"""
WARMUP = """model_warmup {
  name: "w" batch_size: 3
  inputs { key: "IN" value { data_type: TYPE_FP32 dims: 2 zero_data: true } }
}"""


class Rig:
    """A worker with a model repository, and the service that clients would use."""

    def __init__(self, folder, queue=None, **more):
        self.folder = folder
        self.queue = queue or MemoryQueue()
        self.statistics = Statistics()
        self.repository = Repository([folder], engines.describe)
        self.worker = Worker(self.queue, self.repository.read, [Device("cpu", "cpu", 2)], self.statistics, **more)
        self.service = Service(self.queue, self.statistics, self._names, ServiceOptions())
        self._writes = 0

    async def _names(self):
        return list(self.repository.scan())

    def write(self, name="m", *, versions=(1,), instances=1, batching="", more="", **parameters):
        """Put a model of the fake backend into the repository, or change it."""
        entries = "\n".join(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()
        )
        for version in versions:
            (self.folder / name / str(version)).mkdir(parents=True, exist_ok=True)
        path = self.folder / name / "config.pbtxt"
        path.write_text(CONFIG.format(instances=instances, batching=batching, parameters=entries, more=more))
        self._writes += 1  # a change within the clock's resolution is a change all the same
        os.utime(path, ns=(self._writes * 10**9, self._writes * 10**9))

    async def load(self, name="m", parameters=None):
        await self.queue.send(Load(name, parameters or {}))

    async def unload(self, name="m"):
        await self.queue.send(Unload(name))

    def states(self, name="m"):
        return {state.version: (state.state, state.reason) for state in self.queue.pool(name).versions}

    async def infer(self, value=1.0, **more):
        """Send a request filled with `value`; return the value that came back."""
        asked = request(value, **more)
        async with aclosing(self.service.infer(asked)) as responses:
            (response,) = [response async for response in responses]
        assert response.final
        array = response.outputs["OUT"].array
        assert array.shape == (asked.rows, 2)
        (answer,) = np.unique(array)
        return answer.item()


@pytest.fixture
def folder():
    # Not tmp_path: the gate's socket needs a short path.
    with tempfile.TemporaryDirectory(prefix="gw") as path:
        (Path(path) / "repository").mkdir()
        yield Path(path)


@pytest.fixture
async def rig(folder):
    rig = Rig(folder / "repository")
    async with background(rig.worker.run()):
        yield rig


@asynccontextmanager
async def held(rig, folder, **more):
    """A loaded model `m` whose one instance is held at a gate by a request of value 0.

    It has four rows, because batches may only double from one to the next.
    """
    path = folder / "gate"
    rig.write(gate=path, **more)
    await rig.load()
    async with Gate(path) as gate, background(rig.infer(0.0, rows=4)) as (first,):
        yield gate, await gate.arrival()
        await first


async def queued(rig, *calls):
    await settle()
    assert rig.statistics.of("m", "1").pending == 1 + len(calls)


# --- life


async def test_a_loaded_model_answers_and_says_what_it_runs_on(rig):
    rig.write()
    await rig.load()
    assert rig.states() == {"1": ("READY", "")}
    (state,) = rig.queue.pool("m").versions
    assert state.instances == (InstanceState("cpu", "Fake"),)
    assert await rig.infer(7.0, rows=3) == 7.0


async def test_a_version_is_ready_only_when_it_is_warm(rig, folder):
    rig.write(gate=folder / "gate", more=WARMUP)
    async with Gate(folder / "gate") as gate, background(rig.load()) as (loading,):
        warming = await gate.arrival()
        assert warming.rows == 3
        assert rig.states() == {"1": ("LOADING", "")}
        error = await refusal(rig.infer(model_version="1"))
        assert error.message == "Request for unknown model: 'm' version 1 is not at ready state"
        assert not loading.done()
        warming.release()
        await loading
        assert rig.states() == {"1": ("READY", "")}
    assert await rig.infer(2.0) == 2.0


async def test_an_unload_answers_what_was_accepted_and_refuses_the_rest(rig, folder):
    async with held(rig, folder) as (gate, run), background(rig.infer(5.0), rig.unload()) as (accepted, unloading):
        await queued(rig, accepted)
        assert rig.states() == {"1": ("UNLOADING", "")}
        assert isinstance(await refusal(rig.infer()), errors.NotFound)
        assert not unloading.done()
        run.release()
        (await gate.arrival()).release()
        assert await accepted == 5.0
        await unloading
    assert rig.states() == {"1": ("UNAVAILABLE", "unloaded")}
    await rig.load()
    assert await rig.infer(6.0) == 6.0


async def test_a_reload_after_an_unload_counts_from_zero_and_a_plain_reload_goes_on(rig):
    rig.write()
    await rig.load()
    await rig.infer()
    rig.write()
    await rig.load()
    await rig.infer()
    assert (rig.statistics.of("m", "1").success_count, rig.queue.pool("m").versions[0].epoch) == (2, 0)
    await rig.unload()
    await rig.load()
    await rig.infer()
    assert rig.statistics.of("m", "1").success_count == 1
    assert rig.queue.pool("m").versions[0].epoch == rig.statistics.epoch("m", "1") > 0


async def test_unloading_what_is_not_loaded_does_nothing(rig):
    await rig.unload("never")
    assert rig.queue.pool("never") is None


async def test_a_load_with_what_is_no_configuration_fails_in_tritons_words_and_changes_nothing(rig):
    rig.write()
    await rig.load()
    error = await refusal(rig.load("m", {"config": "max_batch_size: 1"}))
    assert type(error) is errors.Internal
    assert error.message.startswith("failed to load 'm', failed to poll from model repository: model configuration: ")
    await rig.infer()


async def test_a_load_of_an_unknown_model_fails_in_tritons_words(rig):
    for _ in range(2):
        error = await refusal(rig.load("x"))
        assert type(error) is errors.Internal
        assert error.message == "failed to load 'x', failed to poll from model repository"
    assert rig.queue.pool("x") is None
    rig.write("x")
    await rig.load("x")
    assert await rig.infer(3.0, model_name="x") == 3.0


async def test_two_loads_of_an_unknown_model_at_once_leave_it_whole(rig):
    await asyncio.gather(*(refusal(rig.load("x")) for _ in range(3)))
    rig.write("x")
    await asyncio.gather(*(rig.load("x") for _ in range(3)))
    assert await rig.infer(3.0, model_name="x") == 3.0
    await rig.unload("x")
    assert rig.states("x") == {"1": ("UNAVAILABLE", "unloaded")}


# --- broken models


async def test_a_broken_model_is_unavailable_with_its_reason_while_others_serve(rig):
    rig.write("good")
    rig.write("bad", a_us="soon")
    rig.write("unreadable", more="max_batch_sise: 4")
    loads = [rig.load("good"), refusal(rig.load("bad")), refusal(rig.load("unreadable"))]
    _, bad, unreadable = await asyncio.gather(*loads)
    reason = "parameter 'a_us' of model 'bad' must be a number, got 'soon'; correct it in config.pbtxt"
    assert type(bad) is errors.InvalidArgument
    assert bad.message == f"load failed for model 'bad': version 1 is at UNAVAILABLE state: {reason};"
    assert rig.states("bad") == {"1": ("UNAVAILABLE", reason)}
    assert type(unreadable) is errors.InvalidArgument
    assert "config.pbtxt" in rig.queue.pool("unreadable").reason
    assert "max_batch_sise" in rig.queue.pool("unreadable").reason
    assert str(rig.folder) not in bad.message + unreadable.message
    assert await rig.infer(4.0, model_name="good") == 4.0


async def test_a_broken_model_serves_once_it_is_mended(rig):
    rig.write(a_us="soon")
    await refusal(rig.load())
    rig.write()
    await rig.load()
    assert rig.states() == {"1": ("READY", "")}
    assert await rig.infer(4.0) == 4.0


async def test_a_warm_up_that_fails_leaves_the_version_unavailable(rig):
    rig.write(poison="0", more=WARMUP)
    error = await refusal(rig.load())
    assert "model_warmup sample 'w' failed" in error.message
    assert rig.states()["1"][0] == "UNAVAILABLE"


@pytest.mark.parametrize("broken", [{"a_us": "soon"}, {"more": "max_batch_sise: 4"}])
async def test_a_reload_that_fails_keeps_the_old_version_serving(rig, broken):
    rig.write()
    await rig.load()
    rig.write(**broken)
    error = await refusal(rig.load())
    assert error.message.startswith("load failed for model 'm': ")
    assert rig.states() == {"1": ("READY", "")}
    assert await rig.infer(4.0) == 4.0
    rig.write(poison="9")
    await rig.load()
    assert isinstance(await refusal(rig.infer(9.0)), errors.Internal)


async def test_a_new_version_that_does_not_load_does_not_cost_the_old_one(rig):
    rig.write()
    await rig.load()
    rig.write(versions=(2,), a_us="soon")
    error = await refusal(rig.load())
    assert "version 2 is at UNAVAILABLE state" in error.message
    assert await rig.infer(4.0) == 4.0
    rig.write(versions=(2,))
    await rig.load()
    assert rig.states()["2"][0] == "READY"
    assert rig.states()["1"] == ("UNAVAILABLE", "unloaded")


async def test_a_broken_version_that_is_gone_is_forgotten(rig):
    rig.write(versions=(1, 2), more="version_policy { all { } }", a_us="soon")
    await refusal(rig.load())
    assert set(rig.states()) == {"1", "2"}
    shutil.rmtree(rig.folder / "m" / "2")
    rig.write(more="version_policy { all { } }")
    await rig.load()
    assert rig.states() == {"1": ("READY", "")}


async def test_a_fault_of_ours_in_one_version_costs_no_other(rig, folder, monkeypatch):
    """What it had accepted is answered, it says why it is gone, and it can be loaded again."""
    rig.write("good")
    await rig.load("good")
    calls = [refusal(rig.infer(value)) for value in (1.0, 2.0)]
    async with held(rig, folder) as (_, run), background(*calls) as callers:
        await queued(rig, *callers)
        (state,) = rig.queue.pool("m").versions
        with monkeypatch.context() as patch:
            _break(patch, "take", lambda seat: seat.place[0] is state.admission)
            run.release()  # and its instance asks for the next
            told = await asyncio.gather(*callers)
    assert {type(error) for error in told} == {errors.Unavailable}
    assert "model 'm' version 1: it stopped serving by a fault of the gateway" in told[0].message
    ((name, reason),) = rig.states().values()
    assert name == "UNAVAILABLE"
    assert "by a fault of the gateway" in reason
    assert await rig.infer(4.0, model_name="good") == 4.0
    rig.write()
    await rig.load()
    assert await rig.infer(5.0) == 5.0


async def test_a_fault_of_ours_while_requests_are_taken_in_tells_every_caller(rig, monkeypatch):
    rig.write()
    await rig.load()
    (state,) = rig.queue.pool("m").versions
    _break(monkeypatch, "add", lambda lane: lane is state.admission)
    told = await asyncio.gather(*(refusal(rig.infer()) for _ in range(3)))
    assert {type(error) for error in told} <= {errors.Internal, errors.Unavailable}
    await until(lambda: rig.states()["1"][0] == "UNAVAILABLE")
    await rig.load()
    assert await rig.infer(5.0) == 5.0


def _break(patch, method, where):
    """Have a method of `Slots` raise where its first argument is such."""
    real = getattr(Slots, method)

    def faulty(slots, *arguments):
        if where(arguments[0]):
            raise ZeroDivisionError
        return real(slots, *arguments)

    patch.setattr(Slots, method, faulty)


# --- reload


async def test_a_reload_of_an_unchanged_model_changes_nothing(rig):
    rig.write()
    await rig.load()
    before = rig.queue.pool("m").versions[0].config
    await rig.load()
    assert rig.queue.pool("m").versions[0].config is before


async def test_a_new_version_takes_over_and_the_old_one_leaves(rig):
    rig.write()
    await rig.load()
    rig.write(versions=(1, 2))
    await rig.load()
    assert rig.states() == {"1": ("UNAVAILABLE", "unloaded"), "2": ("READY", "")}
    assert await rig.infer(4.0) == 4.0
    assert rig.statistics.of("m", "2").success_count == 1


async def test_reloads_never_drop_a_request(rig):
    rig.write(instances=2)
    await rig.load()
    stop = asyncio.Event()
    answers: list[tuple[float, float]] = []

    async def client(number):
        while not stop.is_set():
            value = float(number * 1_000_000 + len(answers))
            answers.append((value, await rig.infer(value)))

    async with background(*(client(number) for number in range(16))) as clients:
        for generation in range(8):
            rig.write(instances=2, b_us=generation)
            before = len(answers)
            await rig.load()
            await until(lambda count=before + 50: len(answers) >= count)
        stop.set()
        await asyncio.gather(*clients)
    assert all(sent == got for sent, got in answers)
    statistics = rig.statistics.of("m", "1")
    assert statistics.success_count == len(answers)
    assert sum(statistics.failures.values()) == 0


async def test_a_reload_does_not_wait_for_a_request_that_left(rig):
    """The delay holds a job in the old host; its caller leaves; the old host must still be able to retire."""
    rig.write(batching="max_queue_delay_microseconds: 500000")
    await rig.load()
    async with background(rig.infer()) as (caller,):
        await settle()
        rig.write()
        before = rig.queue.pool("m").versions[0].config
        async with background(rig.load()) as (loading,):
            await until(lambda: rig.queue.pool("m").versions[0].config is not before)
            await settle()
            assert not loading.done()
            caller.cancel()
            await loading
    assert await rig.infer(4.0) == 4.0


# --- what was learned


async def test_what_was_learned_is_there_at_the_next_start_of_the_same_files(folder):
    async def seen(rig):
        return (await rig.service.explain("m"))["devices"]["cpu"]["largest_rows_seen"]

    async def started(rig):
        await rig.load()
        return await seen(rig)

    rig = Rig(folder / "repository", persists=True)
    rig.write()
    async with background(rig.worker.run()):
        assert await started(rig) == 0
        for _ in range(4):
            await rig.infer(rows=4)
        assert await seen(rig) == 4
        await rig.worker.drain()
    again, forgetful, changed = (Rig(rig.folder, persists=persists) for persists in (True, False, True))
    async with background(again.worker.run(), forgetful.worker.run(), changed.worker.run()):
        assert await started(again) == 2  # doubling goes on from there
        assert await started(forgetful) == 0
        again.write(b_us=1)
        assert await started(changed) == 0


async def test_what_was_measured_is_kept_at_once(folder):
    rig = Rig(folder / "repository", measures=True, persists=True)
    rig.write()
    async with background(rig.worker.run()):
        await rig.load()
        await until((rig.folder / "m" / "1" / NAME).exists)
        assert await rig.infer(4.0) == 4.0


async def test_a_model_is_unloaded_though_its_folder_is_gone(folder):
    rig = Rig(folder / "repository", persists=True)
    rig.write()
    async with background(rig.worker.run()):
        await rig.load()
        for _ in range(4):
            await rig.infer()
        shutil.rmtree(rig.folder / "m")
        await rig.unload()
    assert rig.states() == {"1": ("UNAVAILABLE", "unloaded")}
    assert list(rig.folder.iterdir()) == []


# --- measured


@asynccontextmanager
async def measuring(folder):
    """A rig that measures what it loads."""
    rig = Rig(folder / "repository", measures=True)
    async with background(rig.worker.run()):
        yield rig


async def test_a_batch_that_no_memory_holds_ends_the_measuring_only(folder, monkeypatch):
    def too_large(config, rows):
        tried.append(rows)
        raise MemoryError

    tried = []
    monkeypatch.setattr("gateway.worker.probe.zeros", too_large)
    async with measuring(folder) as rig:
        rig.write()
        await rig.load()
        await until(lambda: bool(tried))
        await settle()
        assert rig.states() == {"1": ("READY", "")}
        assert await rig.infer(4.0) == 4.0
        assert tried == [1]


async def test_versions_that_are_loaded_together_are_measured_a_few_at_a_time(folder, monkeypatch):
    """Of a thousand each would else have a request in line, and be measured with all others in its way."""

    async def measure(slots, host, *_):
        nonlocal at_once
        at_once += 1
        seen.append(at_once)
        try:
            await goes_on.wait()
        finally:
            at_once -= 1
        return 1

    at_once, seen, goes_on = 0, [], asyncio.Event()
    monkeypatch.setattr("gateway.worker.host.measure", measure)
    async with measuring(folder) as rig:
        for name in "abcdef":
            rig.write(name)
            await rig.load(name)
        await settle()
        assert seen == [1, 2, 3, 4]
        await rig.unload("a")  # makes room, as does the end of a measurement
        await until(lambda: seen == [1, 2, 3, 4, 4])
        await rig.unload("f")  # while it waits for its turn
        goes_on.set()
        await until(lambda: not at_once)


async def test_an_unload_does_not_wait_for_a_measurement_that_has_no_turn(folder):
    async with measuring(folder) as rig, Gate(folder / "gate") as gate:
        rig.write("busy", gate=folder / "gate")
        async with background(rig.load("busy")) as (loading,):
            (await gate.arrival()).release()  # warm-up
            await loading
        await gate.arrival()  # a measurement, which keeps every core
        rig.write()
        await rig.load()
        await settle()
        await rig.unload()
        assert rig.states() == {"1": ("UNAVAILABLE", "unloaded")}


async def test_a_model_with_a_bound_on_its_queue_is_not_measured(folder):
    """A measurement that waits would count, and a client would be refused for it."""
    async with measuring(folder) as rig, Gate(folder / "gate") as gate:
        rig.write(gate=folder / "gate", batching="default_queue_policy { max_queue_size: 1 }")
        async with background(rig.load()) as (loading,):
            (await gate.arrival()).release()  # warm-up
            await loading
        async with background(rig.infer(2.0, rows=2)) as (first,):
            assert (await gate.arrival()).rows == 2
            async with background(rig.infer(3.0, rows=2)) as (second,):
                await queued(rig, second)
                first.cancel()
                second.cancel()


# --- batches


async def test_what_waits_while_an_instance_runs_becomes_one_batch(rig, folder):
    async with (
        held(rig, folder) as (gate, run),
        background(*(rig.infer(float(n), rows=n) for n in (1, 2, 3))) as callers,
    ):
        await queued(rig, *callers)
        run.release()
        batch = await gate.arrival()
        assert batch.rows == 6
        batch.release()
        assert await asyncio.gather(*callers) == [1.0, 2.0, 3.0]


async def test_executions_and_rows_are_counted_exactly(rig, folder):
    async with (
        held(rig, folder) as (gate, run),
        background(*(rig.infer(float(n), rows=n) for n in (1, 2, 3))) as callers,
    ):
        statistics = rig.statistics.of("m", "1")
        await queued(rig, *callers)
        assert statistics.executing == 1
        run.release()
        batch = await gate.arrival()
        assert statistics.executing == 3
        batch.release()
        await asyncio.gather(*callers)
    assert (statistics.success_count, statistics.inference_count, statistics.execution_count) == (4, 10, 2)
    assert {rows: batch.count for rows, batch in statistics.batches.items()} == {4: 1, 6: 1}
    assert statistics.closed == {"drained": 2}
    assert (statistics.pending, statistics.executing) == (0, 0)
    assert all(step > 0 for step in (statistics.queue_ns, statistics.compute_infer_ns, statistics.compute_output_ns))


async def test_a_poison_request_fails_alone(rig, folder):
    async with (
        held(rig, folder, poison="13") as (gate, run),
        background(*(refusal_or(rig.infer(value)) for value in (1.0, 13.0, 3.0))) as callers,
    ):
        await queued(rig, *callers)
        run.release()
        batch = await gate.arrival()
        assert batch.rows == 3
        batch.release()
        for rows in (2, 1, 1, 1):  # the halves, then those of the one that failed again
            retried = await gate.arrival()
            assert retried.rows == rows
            retried.release()
        first, poison, third = await asyncio.gather(*callers)
    assert (first, third) == (1.0, 3.0)
    assert type(poison) is errors.Internal
    assert poison.message == "the fake model 'm' failed on its poison value"
    assert rig.statistics.of("m", "1").failures["BACKEND"] == 1


async def refusal_or(call):
    """What the call returns, or the error it raises."""
    try:
        return await call
    except errors.GatewayError as error:
        return error


async def test_a_crash_inside_an_engine_is_explained_without_its_details(rig):
    rig.write(crash="13")
    await rig.load()
    error = await refusal(rig.infer(13.0))
    assert type(error) is errors.Internal
    assert error.message == "model 'm' failed to run this request (SystemError); the server's log has the details"
    assert await rig.infer(4.0) == 4.0


@pytest.mark.parametrize(("delta", "got"), [("-1", 1), ("1", 3)])
async def test_other_rows_than_were_asked_for_are_never_handed_out(rig, delta, got):
    rig.write(rows_delta=delta)
    await rig.load()
    error = await refusal(rig.infer(rows=2))
    assert type(error) is errors.Internal
    assert error.message == (
        f"model 'm' gave {got} rows in output 'OUT' for a batch of 2; "
        "a model must give one row for each row it is given"
    )


@pytest.mark.parametrize("cancelled", [0, 1, 2])
async def test_a_cancelled_request_never_reaches_the_engine(rig, folder, cancelled):
    values = (1.0, 2.0, 3.0)
    async with held(rig, folder) as (gate, run), background(*map(rig.infer, values)) as callers:
        await queued(rig, *callers)
        callers[cancelled].cancel()
        await asyncio.wait([callers[cancelled]])
        run.release()
        batch = await gate.arrival()
        assert batch.rows == 2
        batch.release()
        for number, caller in enumerate(callers):
            if number != cancelled:
                assert await caller == values[number]
    assert rig.statistics.of("m", "1").failures["CANCELED"] == 1


async def test_an_expired_request_never_reaches_the_engine(rig, folder):
    async with held(rig, folder) as (gate, run):
        # Not by the service, whose admission would see that the deadline cannot be kept.
        calls = [refusal(ask(rig.queue, request(1.0, deadline=soon()))), rig.infer(2.0)]
        async with background(*calls) as (late, patient):
            assert isinstance(await late, errors.DeadlineExceeded)
            run.release()
            batch = await gate.arrival()
            assert batch.rows == 1
            batch.release()
            assert await patient == 2.0


async def test_a_request_cancelled_while_it_runs_leaves_its_mates_untouched(rig, folder):
    async with held(rig, folder) as (gate, run), background(*map(rig.infer, (1.0, 2.0, 3.0))) as callers:
        await queued(rig, *callers)
        run.release()
        batch = await gate.arrival()
        callers[0].cancel()
        await asyncio.wait([callers[0]])
        batch.release()
        assert await asyncio.gather(*callers[1:]) == [2.0, 3.0]


async def test_a_lone_request_is_accepted_however_large(rig):
    rig.write()
    await rig.load()
    (state,) = rig.queue.pool("m").versions
    large = request(size=(1 << 30) + 1, deadline=soon(60.0))
    state.admission.admit(large)
    state.admission.settle(large)


async def test_a_deadline_is_kept_while_the_model_hangs(rig):
    rig.write(hang="13")
    await rig.load()
    error = await refusal(rig.infer(13.0, deadline=soon(0.05)))
    assert isinstance(error, errors.DeadlineExceeded)


@pytest.mark.slow
async def test_an_instance_whose_engine_is_not_there_leaves_the_work_to_the_other(rig):
    rig.write(instances=2)
    await rig.load()
    host = rig.worker._models["m"].hosts["1"]
    engine, tried = host._engines[0][0], []

    async def gone(batch):
        tried.append(batch.rows)
        raise errors.Unavailable("its process does not start", 1.0)
        yield

    engine.run = gone
    capacity = host.capacity
    while not tried:
        assert await asyncio.gather(*(rig.infer(float(n)) for n in range(8))) == [float(n) for n in range(8)]
    assert host._places[0].count == 1
    assert capacity() is None or capacity().places == 1
    del engine.run
    runs = len(engine.loaded.runs)
    while len(engine.loaded.runs) == runs:  # it is asked again by itself
        assert await asyncio.gather(*(rig.infer(float(n)) for n in range(8))) == [float(n) for n in range(8)]
    assert host._places[0].count == 2
    assert sum(rig.statistics.of("m", "1").failures.values()) == 0


async def test_a_model_can_be_unloaded_while_an_instance_is_away(rig):
    rig.write(instances=2)
    await rig.load()
    host = rig.worker._models["m"].hosts["1"]

    async def gone(_):
        raise errors.Unavailable("its process does not start", 60.0)
        yield

    host._engines[0][0].run = gone
    while host._places[0].count == 2:  # one at a time would all go to the other
        assert await asyncio.gather(*(rig.infer(4.0) for _ in range(8))) == [4.0] * 8
    await rig.unload()
    assert rig.states() == {"1": ("UNAVAILABLE", "unloaded")}
    await rig.load()
    assert await rig.infer(5.0) == 5.0


async def test_a_request_that_crashes_its_engine_is_told_so_and_counted(rig):
    rig.write(lost="13")
    await rig.load()
    first, again, other = [await refusal_or(rig.infer(value)) for value in (13.0, 13.0, 4.0)]
    assert (type(first), type(again), other) == (errors.Crashed, errors.Quarantined, 4.0)
    assert rig.statistics.of("m", "1").refused == {"crashed": 1, "quarantined": 1}


async def test_a_model_that_is_loaded_again_may_try_what_crashed_it(rig):
    rig.write(lost="13")
    await rig.load()
    assert type(await refusal_or(rig.infer(13.0))) is errors.Crashed
    rig.write()
    await rig.load()
    assert await rig.infer(13.0) == 13.0


# --- order


IN_ORDER = {"instances": 2, "batching": "preserve_ordering: true"}


@asynccontextmanager
async def second_first(rig, folder, **first):
    """Two requests, each in a run of its own; the first is held at a gate and the second has run."""
    rig.write(gate=folder / "gate", poison="13", **IN_ORDER)
    await rig.load()
    async with Gate(folder / "gate") as gate, background(refusal_or(rig.infer(**first))) as (one,):
        held = await gate.arrival()
        async with background(rig.infer(2.0)) as (two,):
            (await gate.arrival()).release()
            await until(lambda: rig.statistics.of("m", "1").execution_count == 1)
            await settle()
            yield held, one, two


@pytest.mark.parametrize("value", [1.0, 13.0])
async def test_answers_leave_in_the_order_of_their_requests_where_the_model_asks_for_it(rig, folder, value):
    async with second_first(rig, folder, value=value) as (held, one, two):
        assert not two.done()
        two.add_done_callback(lambda _: ended.append(one.done()))
        ended = []
        held.release()
        assert await two == 2.0
        assert ended == [True]
        assert one.result() == 1.0 if value == 1.0 else isinstance(one.result(), errors.Internal)


async def test_a_caller_who_leaves_lets_those_behind_him_go(rig, folder):
    async with second_first(rig, folder) as (_, one, two):
        assert not two.done()
        one.cancel()
        assert await two == 2.0


async def test_a_request_that_expires_lets_those_behind_it_go(rig, folder):
    async with second_first(rig, folder, deadline=soon(0.5)) as (_, one, two):
        assert not two.done()
        assert await two == 2.0
        assert isinstance(one.result(), errors.DeadlineExceeded)


async def test_other_models_answer_as_they_end(rig, folder):
    rig.write(gate=folder / "gate", instances=2)
    await rig.load()
    async with Gate(folder / "gate") as gate, background(rig.infer(1.0)):
        await gate.arrival()
        async with background(rig.infer(2.0)) as (two,):
            (await gate.arrival()).release()
            assert await two == 2.0


# --- stopping


async def test_a_drain_answers_all_that_was_accepted(rig, folder):
    async with held(rig, folder) as (gate, run), background(*map(rig.infer, (1.0, 2.0))) as callers:
        await queued(rig, *callers)
        rig.service.drain()
        async with background(rig.worker.drain()) as (draining,):
            await settle()
            assert not draining.done()
            assert isinstance(await refusal(rig.infer()), errors.Unavailable)
            run.release()
            (await gate.arrival()).release()
            assert await asyncio.gather(*callers) == [1.0, 2.0]
            await draining


async def test_a_drain_waits_for_a_model_that_is_being_unloaded(rig, folder):
    async with held(rig, folder) as (_, run), background(rig.unload()) as (unloading,):
        await settle()
        async with background(rig.worker.drain()) as (draining,):
            await settle()
            assert not draining.done()
            run.release()
            await draining
            await unloading


async def test_a_drain_while_an_unload_keeps_what_was_learned(folder, monkeypatch):
    writing, written, writes = asyncio.Event(), asyncio.Event(), []

    async def keep(_, learned):
        writes.append(learned)
        writing.set()
        await written.wait()

    monkeypatch.setattr(Priors, "keep", keep)
    rig = Rig(folder / "repository", persists=True)
    async with background(rig.worker.run()):
        rig.write()
        await rig.load()
        await rig.infer()
        async with background(rig.unload()) as (unloading,):
            await writing.wait()
            await settle()  # the lane is closed
            await rig.worker.drain()
            written.set()
            await unloading
    assert len(writes) == 1


async def test_a_forced_stop_tells_every_caller(folder):
    rig = Rig(folder / "repository")
    rig.write(gate=folder / "gate")
    async with background(rig.worker.run()) as (working,):
        await rig.load()
        async with Gate(folder / "gate") as gate, background(refusal(rig.infer())) as (running,):
            run = await gate.arrival()
            async with background(*(refusal(rig.infer()) for _ in range(2))) as waiting:
                await queued(rig, *waiting)
                working.cancel()
                await settle()  # or the run could end before the worker hears of it
                run.release()
                await asyncio.wait([working])
                rig.queue.close()
                told = await asyncio.gather(running, *waiting)
    assert [(type(error), error.message) for error in told] == [(errors.Unavailable, "Server not ready")] * 3


async def test_a_drain_that_fails_tells_every_caller(folder, monkeypatch):
    async def fail(_):
        raise ZeroDivisionError

    async def ask_and_stop():
        async with running(settings) as gateway:
            (await gate.arrival()).release()  # warm-up
            await gateway.loaded.wait()
            told.append(tasks.create_task(refused(gateway.service)))
            run = await gate.arrival()
            told.append(tasks.create_task(refused(gateway.service)))  # waits for that run
            told[1].add_done_callback(lambda _: run.release())
            await settle()

    async def refused(service):
        async with aclosing(service.infer(request())) as responses:
            return await refusal(anext(responses))

    told = []
    monkeypatch.setattr(Worker, "drain", fail)
    rig = Rig(folder / "repository")
    rig.write(gate=folder / "gate", batching="default_queue_policy { max_queue_size: 9 }")  # not measured
    settings = Settings(model_repository=(rig.folder,), http_port=0, allow_grpc=False, allow_metrics=False)
    async with Gate(folder / "gate") as gate, asyncio.TaskGroup() as tasks:
        with pytest.raises(ExceptionGroup) as problem:
            await ask_and_stop()
        assert problem.group_contains(ZeroDivisionError)
        assert {(await each).message for each in told} == {"Server not ready"}


async def test_a_forced_stop_in_the_middle_of_a_retry_tells_every_caller(folder):
    rig = Rig(folder / "repository")
    async with background(rig.worker.run()) as (working,), held(rig, folder, poison="13") as (gate, run):
        calls = [refusal(rig.infer(value)) for value in (13.0, 2.0, 3.0)]
        async with background(*calls) as callers:
            await queued(rig, *callers)
            run.release()
            (await gate.arrival()).release()
            retried = await gate.arrival()
            working.cancel()
            await settle()
            retried.release()
            told = await asyncio.gather(*callers)
        await asyncio.wait([working])
    assert [(type(error), error.message) for error in told] == [(errors.Unavailable, "Server not ready")] * 3


async def test_a_forced_stop_reports_a_load_that_was_under_way(folder):
    rig = Rig(folder / "repository")
    rig.write(gate=folder / "gate", more=WARMUP)
    async with background(rig.worker.run()) as (working,), Gate(folder / "gate") as gate:
        async with background(refusal(rig.load())) as (loading,):
            warming = await gate.arrival()
            working.cancel()
            await settle()
            warming.release()
            assert (await loading).message == "Server not ready"
        await asyncio.wait([working])


class Silent:
    """An engine that ends its runs without an answer."""

    concurrency = 1
    ahead = False

    async def run(self, batch):
        return
        yield

    async def close(self):
        pass


async def test_an_engine_that_gives_no_answer_is_an_error_not_a_hang():
    config, slots = model_config(), Slots(DeadlineScheduler({"cpu": 1}))
    slots.open("lane", limits(config), [Place("cpu", 1)])
    instance = Instance(Silent(), config, "1", Statistics().of("m", "1"))
    async with Callers() as callers, background(instance.serve(slots.seat("lane", "cpu"))):
        told = [callers.ask(request()) for _ in range(2)]
        await settle()
        slots.add("lane", await callers.consumer.take(2))
        assert [(await each).message for each in told] == ["model 'm' ran and gave no answer"] * 2


async def test_only_batches_that_failed_count_as_failed(rig):
    rig.write(poison="13")
    await rig.load()
    assert await rig.infer(1.0) == 1.0
    assert isinstance(await refusal_or(rig.infer(13.0)), errors.Internal)
    (version,) = rig.queue.pool("m").versions
    assert version.admission.explain(0.0)["failed_batches"] == 1


async def test_a_measurement_is_no_failed_batch(folder):
    rig = Rig(folder / "repository", measures=True)
    async with background(rig.worker.run()):
        rig.write()
        await rig.load()
        # Perhaps not of all sizes: on a busy machine larger ones may seem to gain nothing.
        await until(_place(rig)[0]._measuring.done)
        (version,) = rig.queue.pool("m").versions
        assert version.admission.explain(0.0)["failed_batches"] == 0


async def test_a_size_is_measured_again_after_the_others(folder, monkeypatch):
    """What kept the machine busy at first, as a start does, kept it so for all runs of the first size."""

    async def size(slots, lane, config, rows, instances, *, times):
        asked.append(rows)
        return {_place(rig)[1]: 0.009 if len(asked) == 1 else 0.001 * rows**0.5}

    asked = []
    monkeypatch.setattr("gateway.worker.probe._measure_size", size)
    async with measuring(folder) as rig:
        rig.write()
        await rig.load()
        await until(lambda: asked == [1, 2, 4, 8] * 2)
        await settle()
        assert rig.worker._slots.scheduler.latency(*_place(rig)).mean(1) == pytest.approx(0.001)


async def test_a_measurement_counts_what_the_engine_took_not_an_event_loop_that_is_behind(folder, monkeypatch):
    note = Runner._note

    def behind(runner, part, rows, first, last):
        # As if the engine had begun a moment before it ended, and the event loop had heard of it late.
        first.started_ns = last.finished_ns - 1000
        return note(runner, part, rows, first, last)

    monkeypatch.setattr(Runner, "_note", behind)
    async with measuring(folder) as rig:
        rig.write(a_us=20_000)
        await rig.load()
        await until(lambda: rig.worker._slots.scheduler.latency(*_place(rig)).largest == 8)
        # It heard of 20 ms from the warm-up, once; all that was measured took a microsecond and its way of 2 ms.
        assert rig.worker._slots.scheduler.latency(*_place(rig)).mean(8) < 0.015


def _place(rig):
    host = rig.worker._models["m"].hosts["1"]
    return host, host._places[0].device
