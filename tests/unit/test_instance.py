"""How an instance hands out what its engine says, and what it does when the engine fails or is not there."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from gateway import errors
from gateway.engines.base import EngineCrashed
from gateway.queues.base import Lane
from gateway.scheduling.base import Place
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.statistics import Statistics
from gateway.types import Answer, BatchResult
from gateway.worker import instance as module
from gateway.worker.instance import Instance
from gateway.worker.lane import limits
from gateway.worker.siblings import Siblings
from gateway.worker.slots import Slots
from tests.support import LANE, Callers, background, model_config, request, settle, until

CRASHED = "this request crashed model 'm', which was started again"


class Script:
    """An engine that does with each batch what `act(batch)` says: yields results, or raises."""

    concurrency = 1
    ahead = False

    def __init__(self, act):
        self.act = act
        self.batches = []

    async def run(self, batch):
        self.batches.append([each.inputs["IN"].array[0, 0].item() for each in batch.requests])
        for result in self.act(batch):
            yield result

    async def close(self):
        pass


def result(outputs=None, **more):
    return BatchResult(outputs or {}, 1, 2, 3, **more)


def echo(batch):
    yield result({"OUT": batch.stack()["IN"]})


def crashes_on(value, *, sure=True):
    def act(batch):
        if (batch.stack()["IN"] == value).any():
            raise EngineCrashed("died", sure=sure)
        yield from echo(batch)

    return act


@asynccontextmanager
async def serving(*engines, **config):
    """Callers of instances with these engines, each on a device of its own."""
    made = model_config(**config)
    devices = [f"d{number}" for number in range(len(engines))]
    statistics = Statistics().of("m", "1")
    slots = Slots(DeadlineScheduler(dict.fromkeys(devices, 1)))
    everywhere = [Place(device, 1) for device in devices]
    slots.open(LANE, limits(made), everywhere)

    def changed(working):
        there = [everywhere[each.number] for each in working]
        slots.open(LANE, limits(made), there)

    siblings = Siblings(changed)
    instances = [Instance(engine, made, "1", statistics, siblings=siblings) for engine in engines]
    for number, each in enumerate(instances):
        each.number = number
    serve = [each.serve(slots.seat(LANE, device)) for each, device in zip(instances, devices, strict=True)]
    async with Callers() as callers, background(*serve, _read(callers, slots)):
        callers.slots, callers.statistics, callers.siblings = slots, statistics, siblings
        yield callers


async def _read(callers, slots):
    while jobs := await callers.consumer.take(100):
        slots.add(LANE, jobs)


async def ask(callers, *values, **more):
    """What comes of requests with these values that reach the worker together."""
    tasks = [callers.ask(request(value, **more)) for value in values]
    return [told(each) for each in await asyncio.gather(*tasks)]


def told(answer):
    if isinstance(answer, errors.GatewayError):
        return answer
    return answer.outputs["OUT"].array[0, 0].item()


# --- crashes


async def test_a_crash_is_blamed_on_one_request_and_its_neighbours_are_answered():
    engine = Script(crashes_on(13.0))
    async with serving(engine) as callers:
        answers = await ask(callers, 1.0, 13.0, 3.0, 4.0)
    assert [each for each in answers if isinstance(each, float)] == [1.0, 3.0, 4.0]
    assert type(answers[1]) is errors.Crashed
    assert answers[1].message.startswith(CRASHED)


async def test_the_same_request_again_does_not_reach_the_engine():
    engine = Script(crashes_on(13.0))
    async with serving(engine) as callers:
        await ask(callers, 13.0)
        runs = len(engine.batches)
        (again,) = await ask(callers, 13.0, id="another")
        assert type(again) is errors.Quarantined
        assert "crashed model 'm'; it is not tried again for 600 s" in again.message
        assert len(engine.batches) == runs
        answers = await ask(callers, 1.0, 13.0)
        assert answers[0] == 1.0
        assert type(answers[1]) is errors.Quarantined
        assert engine.batches[runs:] == [[1.0]]


async def test_of_equal_requests_in_a_batch_one_crashes_the_engine_by_itself():
    engine = Script(crashes_on(13.0))
    async with serving(engine) as callers:
        answers = await ask(callers, 13.0, 13.0, 13.0, 13.0)
    assert sorted(type(each).__name__ for each in answers) == ["Crashed", *["Quarantined"] * 3]
    assert engine.batches.count([13.0]) <= 2


async def test_it_is_logged_once(monkeypatch):
    events = []
    monkeypatch.setattr(module, "log_event", lambda event, *_, **fields: events.append((event, fields)))
    async with serving(Script(crashes_on(13.0))) as callers:
        await ask(callers, 13.0)
        await ask(callers, 13.0)
        await ask(callers, 13.0)
    ((event, fields),) = events
    assert event == "request_quarantined"
    assert (fields["model"], fields["seconds"], len(fields["digest"])) == ("m", 600.0, 32)


async def test_a_kill_from_outside_costs_no_answer():
    kills = iter([True, True, False])

    def act(batch):
        if next(kills, False):
            raise EngineCrashed("killed by signal 9", sure=False)
        yield from echo(batch)

    async with serving(Script(act)) as callers:
        assert await ask(callers, 1.0) == [1.0]
        assert not callers.siblings.quarantine


async def test_memory_that_runs_out_takes_a_smaller_batch_and_no_quarantine():
    def act(batch):
        if batch.rows > 1:
            raise MemoryError
        yield from echo(batch)

    async with serving(Script(act)) as callers:
        assert await ask(callers, 1.0, 2.0, 3.0) == [1.0, 2.0, 3.0]
        (large,) = await ask(callers, 4.0, rows=2)
        assert type(large) is errors.Internal
        assert "(MemoryError)" in large.message
        assert not callers.siblings.quarantine


async def test_who_expires_while_the_engine_starts_again_is_not_run_again():
    restarted = asyncio.Event()

    class Slow(Script):
        async def run(self, batch):
            if len(self.batches) == 1:
                await restarted.wait()
            async for each in super().run(batch):
                yield each

    first = iter([True])

    def act(batch):
        if next(first, False):
            raise EngineCrashed("died")
        yield from echo(batch)

    engine = Slow(act)
    async with serving(engine) as callers:
        tasks = [callers.ask(request(value)) for value in (1.0, 2.0, 3.0, 4.0)]
        await until(lambda: len(engine.batches) == 1)
        await settle()
        await callers.leave(3)  # of the second half
        restarted.set()
        assert [told(await each) for each in tasks[:3]] == [1.0, 2.0, 3.0]
    assert engine.batches == [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0], [3.0]]


async def test_another_type_than_the_configuration_says_is_tried_alone():
    def act(batch):
        inputs = batch.stack()["IN"]
        yield result({"OUT": inputs.astype("<f8") if (inputs == 13).any() else inputs})

    async with serving(Script(act)) as callers:
        one, bad = await ask(callers, 1.0, 13.0)
    assert one == 1.0
    assert "gave output 'OUT' as float64" in bad.message


# --- engines that are not there


def gone(_):
    raise errors.Unavailable("the model's process does not start", 0.01)


async def test_a_lone_instance_tells_its_callers_that_its_engine_is_not_there():
    engine = Script(gone)
    async with serving(engine) as callers:
        answers = await ask(callers, *map(float, range(8)))
        assert {type(each) for each in answers} == {errors.Unavailable}
        assert len(engine.batches) == 1
        engine.act = echo
        assert await ask(callers, 1.0) == [1.0]


async def test_others_do_the_work_of_an_instance_whose_engine_is_not_there():
    dead, live = Script(gone), Script(echo)
    async with serving(dead, live) as callers:
        for _ in range(10):
            assert await ask(callers, 1.0, 2.0, 3.0) == [1.0, 2.0, 3.0]
        dead.act = echo
        tried = len(dead.batches)
        while len(dead.batches) == tried:  # it comes back by itself
            assert await ask(callers, 1.0, 2.0) == [1.0, 2.0]


async def test_when_all_are_gone_the_last_one_tells_the_callers():
    engines = [Script(gone), Script(gone)]
    async with serving(*engines) as callers:
        for _ in range(5):
            assert {type(each) for each in await ask(callers, 1.0, 2.0)} == {errors.Unavailable}


async def test_who_was_given_an_answer_is_not_handed_to_a_sibling():
    def act(batch):
        yield result(answers=[Answer(0, {"OUT": batch.stack()["IN"][:1]}, final=False)])
        raise errors.Unavailable("gone", 60.0)

    async with serving(Script(act), Script(act)) as callers:
        assert type(await stream_end(callers)) is errors.Unavailable


# --- answers one by one


async def stream(callers, value=1.0, **more):
    """Every response to a request, and the error that ended them, if one did."""
    job = callers.queue.submit(LANE, request(value, **more))
    got = []
    try:
        async for response in job:
            got.append(response)
    except errors.GatewayError as error:
        got.append(error)
    finally:
        await job.aclose()
    return got


async def stream_end(callers):
    return (await stream(callers))[-1]


async def test_a_decoupled_model_gives_each_request_its_own_answers():
    def act(batch):
        inputs = batch.stack()["IN"]
        for step in range(2):
            yield result(
                answers=[
                    Answer(place, {"OUT": inputs[place : place + 1] + step}, final=False)
                    for place in range(len(batch.requests))
                ]
            )
        yield result(answers=[Answer(place, final=True) for place in range(len(batch.requests))])

    async with serving(Script(act), decoupled=True) as callers:
        ones, tens = await asyncio.gather(stream(callers, 1.0), stream(callers, 10.0))
    for responses, first in ((ones, 1.0), (tens, 10.0)):
        assert [told(each) for each in responses[:2]] == [first, first + 1]
        assert [each.final for each in responses] == [False, False, True]
        assert responses[2].outputs == {}


async def test_an_error_of_one_answer_is_that_requests_alone():
    def act(batch):
        inputs = batch.stack()["IN"]
        yield result(
            answers=[
                Answer(1, error=errors.InvalidArgument("not this")),
                Answer(2, {"OUT": inputs[2:3]}),
                Answer(0, {"OUT": inputs[0:1]}),
            ]
        )

    engine = Script(act)
    async with serving(engine) as callers:
        one, two, three = await ask(callers, 1.0, 2.0, 3.0)
        assert callers.statistics.execution_count == 1
    assert (one, three) == (1.0, 3.0)
    assert (type(two), two.message) == (errors.InvalidArgument, "not this")
    assert len(engine.batches) == 1


async def test_an_answer_with_other_rows_than_its_request_is_that_requests_error():
    def act(batch):
        inputs = batch.stack()["IN"]
        yield result(answers=[Answer(0, {"OUT": inputs}), Answer(1, {"OUT": inputs[1:]})])

    async with serving(Script(act)) as callers:
        bad, good = await ask(callers, 1.0, 2.0)
    assert "gave 2 rows in output 'OUT' for a batch of 1" in bad.message
    assert good == 2.0


async def test_a_request_without_a_last_answer_is_told_so():
    def act(batch):
        inputs = batch.stack()["IN"]
        yield result(answers=[Answer(0, {"OUT": inputs[:1]}, final=False), Answer(2, {"OUT": inputs[2:]})])

    async with serving(Script(act)) as callers:
        (first, broken), (none,), (whole,) = await asyncio.gather(*(stream(callers, v) for v in (1.0, 2.0, 3.0)))
    assert told(first) == 1.0
    assert broken.message == "model 'm' stopped in the middle of its answers"
    assert none.message == "model 'm' ran and gave no answer"
    assert told(whole) == 3.0
    assert {type(broken), type(none)} == {errors.Internal}


async def test_a_crash_in_the_middle_of_answers_repeats_none_of_them():
    crash = iter([True])

    def act(batch):
        inputs = batch.stack()["IN"]
        yield result(answers=[Answer(0, {"OUT": inputs[:1]}, final=len(inputs) == 1)])
        if next(crash, False):
            raise EngineCrashed("died")
        for place in range(1, len(inputs)):
            yield result(answers=[Answer(place, {"OUT": inputs[place : place + 1]})])

    engine = Script(act)
    async with serving(engine) as callers:
        (one, error), (two,) = await asyncio.gather(stream(callers, 1.0), stream(callers, 2.0))
    assert (told(one), told(two)) == (1.0, 2.0)
    assert "failed to run this request (EngineCrashed)" in error.message
    assert engine.batches == [[1.0, 2.0], [2.0]]


@pytest.mark.parametrize("one_by_one", [False, True])
async def test_what_an_engine_tells_all_clients_is_in_every_response(one_by_one):
    def act(batch):
        outputs = {"OUT": batch.stack()["IN"]}
        if one_by_one:
            parts = [{"OUT": outputs["OUT"][place : place + 1]} for place in range(batch.rows)]
            answers = [Answer(place, part, parameters={"place": place}) for place, part in enumerate(parts)]
            yield result(answers=answers, parameters={"engine": "fallback"})
        else:
            yield result(outputs, parameters={"engine": "fallback"})

    async with serving(Script(act)) as callers:
        responses = await asyncio.gather(callers.ask(request(1.0)), callers.ask(request(2.0)))
    told_them = [dict(each.parameters) for each in responses]
    assert told_them == [{"engine": "fallback"} | ({"place": place} if one_by_one else {}) for place in range(2)]


async def test_nan_is_nobodys_but_its_own_callers():
    def act(batch):
        inputs = batch.stack()["IN"].copy()
        inputs[inputs == 13] = np.nan
        yield result({"OUT": inputs})

    async with serving(Script(act)) as callers:
        one, nan, three = await ask(callers, 1.0, 13.0, 3.0)
    assert (one, three) == (1.0, 3.0)
    assert np.isnan(nan)


# --- runs that wait for others


async def test_a_run_that_waits_for_another_models_lends_it_its_slot():
    slots = Slots(DeadlineScheduler({"cpu": 1}))
    config, statistics = model_config(), Statistics().of("m", "1")
    inner, ended = Lane("inner", "1"), asyncio.Event()

    class Caller(Script):
        async def run(self, batch):
            batch.waits()
            batch.waits()
            await ended.wait()
            async for each in super().run(batch):
                yield each

    outer = Caller(echo)
    for lane in (LANE, inner):
        slots.open(lane, limits(config), [Place("cpu", 1)])
    serve = [
        Instance(outer, config, "1", statistics).serve(slots.seat(LANE, "cpu")),
        Instance(Script(echo), config, "1", statistics).serve(slots.seat(inner, "cpu")),
    ]
    async with Callers() as callers, background(*serve):
        one = callers.ask(request(1.0))
        await settle()
        slots.add(LANE, await callers.consumer.take(1))
        await settle()
        two = callers.ask(request(2.0))
        await settle()
        slots.add(inner, await callers.consumer.take(1))
        assert told(await two) == 2.0
        assert not one.done()
        ended.set()
        assert told(await one) == 1.0
        assert slots.scheduler._devices["cpu"].free == 1


# --- the next batch, laid out before the last one has ended


class Pipeline(Script):
    """Takes a batch more than it runs; each run waits for `go_on`."""

    ahead = True

    def __init__(self):
        super().__init__(echo)
        self.go_on = asyncio.Semaphore(0)
        self.turn = asyncio.Lock()
        self.fails = set()

    async def run(self, batch):
        self.batches.append([each.inputs["IN"].array[0, 0].item() for each in batch.requests])
        async with self.turn:
            await self.go_on.acquire()
            if self.fails & set(batch.stack()["IN"].reshape(-1)):
                raise ValueError("it does not work")
            for each in echo(batch):
                yield each


@pytest.fixture
def every_run_is_long(monkeypatch):
    """And about to end as soon as it has begun."""
    monkeypatch.setattr(module, "_LONG", 0.0)


async def learned(callers, engine):
    """Have the scheduler know how long runs take."""
    engine.go_on.release()
    assert await ask(callers, 0.0) == [0.0]
    engine.batches.clear()


@pytest.mark.usefixtures("every_run_is_long")
async def test_the_next_batch_is_given_to_an_engine_before_the_last_one_has_ended():
    engine = Pipeline()
    async with serving(engine, max_batch_size=1) as callers:
        await learned(callers, engine)
        async with background(ask(callers, 1.0, 2.0, 3.0)) as (answers,):
            await until(lambda: len(engine.batches) == 2)
            await settle()
            assert engine.batches == [[1.0], [2.0]], "one more than runs, and no third"
            for _ in range(3):
                engine.go_on.release()
            assert await answers == [1.0, 2.0, 3.0]
        assert callers.statistics.executing == 0


async def test_a_short_run_ends_before_the_next_batch_is_given():
    engine = Pipeline()
    async with serving(engine, max_batch_size=1) as callers:
        await learned(callers, engine)
        async with background(ask(callers, 1.0, 2.0)) as (answers,):
            await until(lambda: bool(engine.batches))
            await settle()
            assert engine.batches == [[1.0]]
            for _ in range(2):
                engine.go_on.release()
            assert await answers == [1.0, 2.0]


@pytest.mark.usefixtures("every_run_is_long")
async def test_batches_one_after_the_other_are_each_given_ahead_and_none_is_lost():
    engine = Pipeline()
    async with serving(engine, max_batch_size=2) as callers:
        await learned(callers, engine)
        values = [float(number) for number in range(1, 40)]
        async with background(ask(callers, *values)) as (answers,):
            for _ in range(len(values)):
                engine.go_on.release()
            assert await answers == values
        assert callers.statistics.executing == 0


@pytest.mark.usefixtures("every_run_is_long")
async def test_a_batch_that_fails_is_run_in_parts_behind_the_one_that_was_given_ahead():
    engine = Pipeline()
    engine.fails = {2.0}
    async with serving(engine, max_batch_size=2) as callers:
        await learned(callers, engine)
        async with background(ask(callers, 1.0, 2.0, 3.0)) as (answers,):
            await until(lambda: engine.batches == [[1.0, 2.0], [3.0]])
            for _ in range(6):
                engine.go_on.release()
            one, two, three = await answers
    assert (one, three) == (1.0, 3.0)
    assert isinstance(two, errors.Internal)
    assert engine.batches[1:] == [[3.0], [1.0], [2.0]]


async def test_a_run_that_is_being_stopped_is_not_relieved(monkeypatch):
    class Lingers(Pipeline):
        async def run(self, batch):
            try:
                async for each in super().run(batch):
                    yield each
            finally:
                await lets_go.wait()

    lets_go, alarms = asyncio.Event(), []
    monkeypatch.setattr(Instance, "_before_the_end", lambda _self, _run, relieve: alarms.append(relieve))
    engine, made = Lingers(), model_config(max_batch_size=1)
    slots = Slots(DeadlineScheduler({"cpu": 1}))
    slots.open(LANE, limits(made), [Place("cpu", 1)])
    slots.scheduler.warmed(LANE, "cpu", 1, 0.1)
    instance = Instance(engine, made, "1", Statistics().of("m", "1"))
    async with (
        Callers() as callers,
        background(instance.serve(slots.seat(LANE, "cpu")), _read(callers, slots)) as (serves, _),
        background(ask(callers, 1.0, 2.0)) as (answers,),
    ):
        await until(lambda: bool(engine.batches))
        serves.cancel()
        await settle()
        (relieve,) = alarms
        relieve()
        lets_go.set()
        await asyncio.wait([serves])
        assert engine.batches == [[1.0]]
        answers.cancel()


@pytest.mark.usefixtures("every_run_is_long")
async def test_a_forced_stop_tells_the_callers_of_what_runs_and_of_what_was_given_ahead():
    engine = Pipeline()
    made = model_config(max_batch_size=1)
    slots = Slots(DeadlineScheduler({"cpu": 1}))
    slots.open(LANE, limits(made), [Place("cpu", 1)])
    instance = Instance(engine, made, "1", Statistics().of("m", "1"))
    async with (
        Callers() as callers,
        background(instance.serve(slots.seat(LANE, "cpu")), _read(callers, slots)) as (serves, _),
    ):
        await learned(callers, engine)
        async with background(ask(callers, 1.0, 2.0)) as (answers,):
            await until(lambda: len(engine.batches) == 2)
            serves.cancel()
            assert [type(each) for each in await answers] == [errors.Unavailable] * 2
