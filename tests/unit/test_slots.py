"""The slots of a device: who runs next, on how many cores, and that no job is ever lost."""

import asyncio
import time

import pytest

from gateway.config.model import Batching
from gateway.queues.base import Lane
from gateway.worker.slots import Slots
from gateway.worker.stage import Stage
from tests.support import Callers, background, model_config, request, settle, soon, until

GREEDY = Batching()


class Model:
    """A model with callers, a stage and seats: one for each entry of `threads`."""

    def __init__(self, slots, callers, *threads, batching=GREEDY):
        self.callers = callers
        self.stage = Stage(model_config(batching=batching), len(threads))
        self.seats = [slots.seat(self.stage, each) for each in threads]
        self._slots = slots

    async def add(self, *requests):
        self.stage.extend(await self.callers.jobs(*requests))
        self._slots.wake()


@pytest.fixture
async def new_model():
    """Makes models, each with a lane of its own in one queue."""
    async with (
        Callers() as first,
        Callers(first.queue, Lane("n", "1")) as second,
        Callers(first.queue, Lane("o", "1")) as third,
    ):
        free = [third, second, first]
        yield lambda slots, *threads, **more: Model(slots, free.pop(), *threads, **more)


def ids(assignment):
    return [job.request.id for job in assignment.jobs]


async def test_a_seat_waits_for_a_batch(new_model):
    slots = Slots(2)
    model = new_model(slots, 1)
    async with background(model.seats[0].next()) as (waiting,):
        await settle()
        assert not waiting.done()
        await model.add(request(id="a"), request(id="b"))
        assignment = await waiting
        assert (ids(assignment), assignment.rows, assignment.reason) == (["a", "b"], 2, "drained")


async def test_a_batch_waits_for_a_seat(new_model):
    slots = Slots(2)
    model = new_model(slots, 1)
    await model.add(request(id="a"))
    await settle()
    assert ids(await model.seats[0].next()) == ["a"]


@pytest.mark.parametrize(("widest", "cores"), [(None, 4), (4, 4), (2, 2), (1, 1), (9, 4)])
async def test_a_lone_run_takes_no_more_cores_than_its_engine_can_use(new_model, widest, cores):
    slots = Slots(4)
    model = new_model(slots, 1)
    await model.add(request())
    assert (await slots.seat(model.stage, 1, widest).next()).cores == cores


async def test_arrivals_of_one_turn_are_one_batch(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    async with background(model.seats[0].next()) as (waiting,):
        await settle()
        for job in await model.callers.jobs(*(request(id=str(n)) for n in range(5))):
            model.stage.extend([job])
            slots.wake()
        assert ids(await waiting) == ["0", "1", "2", "3", "4"]


async def test_a_lone_run_gets_every_core_and_a_loaded_device_shares_them(new_model):
    slots = Slots(2)
    model = new_model(slots, 1, 1)
    first, second = model.seats
    async with background(first.next(), second.next()) as waiting:
        await model.add(request(rows=8))
        assignment = await waiting[0]
        assert assignment.cores == 2
        await model.add(request(rows=8), request(rows=8))
        await settle()
        assert not waiting[1].done(), "every core is taken"
        first.release(assignment)
        async with background(first.next()) as (again,):
            runs = [await waiting[1], await again]
            assert [run.cores for run in runs] == [1, 1]


async def test_a_run_beside_another_model_keeps_to_its_cores(new_model):
    slots = Slots(4)
    one, other = new_model(slots, 2), new_model(slots, 2)
    await one.add(request())
    await other.add(request())
    runs = await asyncio.gather(one.seats[0].next(), other.seats[0].next())
    assert [run.cores for run in runs] == [2, 2]


async def test_cancelled_jobs_do_not_make_a_device_loaded(new_model):
    slots = Slots(2)
    one, other = new_model(slots, 1), new_model(slots, 1)
    await other.add(request())
    await other.callers.leave(0)
    async with background(other.seats[0].next()):
        await settle()
        await one.add(request())
        assert (await one.seats[0].next()).cores == 2


async def test_more_threads_than_the_device_has_cores_still_run(new_model):
    slots = Slots(2)
    model = new_model(slots, 16)
    await model.add(request(id="a"))
    assignment = await model.seats[0].next()
    assert assignment.cores == 2
    model.seats[0].release(assignment)
    await model.add(request(id="b"))
    assert ids(await model.seats[0].next()) == ["b"]


async def test_the_earliest_deadline_runs_first(new_model):
    slots = Slots(1)
    models = [new_model(slots, 1) for _ in range(3)]
    now = time.monotonic()
    await models[0].add(request(deadline=now + 500))  # behind the one without, which is ranked as if it had one
    await models[1].add(request())
    await models[2].add(request(deadline=now + 5))
    async with background(*(model.seats[0].next() for model in models)) as waiting:
        order = []
        for _ in models:
            await settle()
            (running,) = [n for n, task in enumerate(waiting) if task.done() and n not in order]
            order.append(running)
            models[running].seats[0].release(waiting[running].result())
        assert order == [2, 1, 0]


async def test_a_wide_run_is_not_starved_by_narrow_ones(new_model):
    slots = Slots(2)
    narrow, wide = new_model(slots, 1, 1), new_model(slots, 2)
    await narrow.add(request(rows=8), request(rows=8))
    held = [await seat.next() for seat in narrow.seats]
    assert sum(each.cores for each in held) == 2
    async with background(wide.seats[0].next(), narrow.seats[0].next()) as (wide_next, narrow_next):
        await wide.add(request())
        await narrow.add(request())
        narrow.seats[0].release(held[0])
        await settle()
        assert not narrow_next.done(), "the free core is kept for the wide run, which waits longer"
        narrow.seats[1].release(held[1])
        assert (await wide_next).cores == 2
        wide.seats[0].release(wide_next.result())
        await narrow_next


async def test_a_delay_is_waited_for_and_then_over(new_model):
    slots = Slots(1)
    model = new_model(slots, 1, batching=Batching(20_000))
    await model.add(request(id="a"))
    assignment = await model.seats[0].next()
    assert (ids(assignment), assignment.reason) == (["a"], "delay")


async def test_a_delay_of_one_model_does_not_hold_up_another(new_model):
    slots = Slots(1)
    patient, other = new_model(slots, 1, batching=Batching(60_000_000)), new_model(slots, 1)
    async with background(patient.seats[0].next(), other.seats[0].next()) as (waits, runs):
        await patient.add(request(deadline=soon(30)))
        await other.add(request(id="b"))
        assert ids(await runs) == ["b"]
        assert not waits.done()


async def test_a_delay_ends_when_the_batch_is_full(new_model):
    slots = Slots(1)
    model = new_model(slots, 1, batching=Batching(60_000_000))
    async with background(model.seats[0].next()) as (waiting,):
        await model.add(request(rows=5))
        await settle()
        assert not waiting.done()
        await model.add(request(rows=3))
        assert (await waiting).reason == "full"


async def test_waiting_rows_are_split_between_idle_instances(new_model):
    slots = Slots(2)
    model = new_model(slots, 1, 1)
    async with background(*(seat.next() for seat in model.seats)) as waiting:
        await settle()
        await model.add(*(request(id=str(n)) for n in range(6)))
        assert [ids(await each) for each in waiting] == [["0", "1", "2"], ["3", "4", "5"]]


async def test_a_seat_cancelled_before_its_batch_loses_none(new_model):
    slots = Slots(1)
    model = new_model(slots, 1, 1)
    async with background(model.seats[0].next(), model.seats[1].next()) as (gone, stays):
        await settle()
        gone.cancel()
        await model.add(request(id="a"))
        assert ids(await stays) == ["a"]


async def test_a_seat_cancelled_in_the_turn_of_the_decision_hands_the_jobs_back(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    async with background(model.seats[0].next()) as (gone,):
        await settle()
        await model.add(request(id="a"), request(id="b"))
        gone.cancel()  # the decision is scheduled and finds a seat that has not left yet
        await settle()
    await _staged_again(model, slots)


async def test_a_seat_cancelled_with_its_batch_in_hand_hands_the_jobs_back(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    async with background(model.seats[0].next()) as (gone,):
        await settle()
        await model.add(request(id="a"), request(id="b"))
        await until(model.seats[0].waiter.done)
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
    await _staged_again(model, slots)


async def _staged_again(model, slots):
    """The jobs are at the front of their lane, in order, and the device is free for them."""
    jobs = await model.callers.consumer.take(2)
    assert [job.request.id for job in jobs] == ["a", "b"]
    model.stage.extend(jobs)
    slots.wake()
    assignment = await model.seats[0].next()
    assert (ids(assignment), assignment.cores) == (["a", "b"], 1)
    model.seats[0].release(assignment)
    await model.stage.settled()
