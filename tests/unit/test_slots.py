"""The slots of a device: who runs next, on how many cores, and that no job is ever lost."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from gateway import errors
from gateway.config.model import Batching, QueuePolicy
from gateway.queues.base import Lane
from gateway.scheduling.base import Place
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.worker.lane import limits
from gateway.worker.slots import Slots as WorkerSlots
from tests.support import Callers, answer, background, model_config, request, settle, soon, until

GREEDY = Batching()


def Slots(cores):  # noqa: N802 - one device
    return WorkerSlots(DeadlineScheduler({"cpu": cores}))


class Model:
    """A model with callers, a lane and seats: one for each entry of `threads`, which are all the same."""

    def __init__(self, slots, callers, *threads, batching=GREEDY, widest=8):
        self.callers = callers
        self.lane = object()
        place = Place("cpu", len(threads), threads[0], widest)
        slots.open(self.lane, limits(model_config(batching=batching)), [place])
        self.seats = [slots.seat(self.lane, "cpu") for _ in threads]
        self._slots = slots

    async def add(self, *requests):
        self._slots.add(self.lane, await self.callers.jobs(*requests))


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


@pytest.mark.parametrize(("widest", "cores"), [(4, 4), (2, 2), (1, 1), (9, 4)])
async def test_a_lone_run_takes_no_more_cores_than_its_engine_can_use(new_model, widest, cores):
    slots = Slots(4)
    model = new_model(slots, 1, widest=widest)
    await model.add(request())
    assert (await model.seats[0].next()).cores == cores


async def test_arrivals_of_one_turn_are_one_batch(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    async with background(model.seats[0].next()) as (waiting,):
        await settle()
        for job in await model.callers.jobs(*(request(id=str(n)) for n in range(5))):
            slots.add(model.lane, [job])
        assert ids(await waiting) == ["0", "1", "2", "3", "4"]


async def test_a_lone_run_gets_every_core_and_a_loaded_device_shares_them(new_model):
    slots = Slots(2)
    model = new_model(slots, 1, 1)
    first, second = reversed(model.seats)  # the one that sits down last is the first to run
    async with background(second.next(), first.next()) as (*others, ran):
        waiting = [ran, *others]
        await model.add(request(rows=8))
        assignment = await waiting[0]
        assert assignment.cores == 2
        await model.add(request(rows=8), request(rows=8))
        await settle()
        assert not waiting[1].done(), "every core is taken"
        first.release(assignment, learn=True)
        async with background(first.next()) as (again,):
            runs = [await waiting[1], await again]
            assert [run.cores for run in runs] == [1, 1]


async def test_a_run_beside_another_model_keeps_to_its_cores(new_model):
    slots = Slots(4)
    one, other = new_model(slots, 2), new_model(slots, 2)
    jobs = [await model.callers.jobs(request()) for model in (one, other)]
    for model, job in zip((one, other), jobs, strict=True):  # in one turn
        slots.add(model.lane, job)
    runs = await asyncio.gather(one.seats[0].next(), other.seats[0].next())
    assert [run.cores for run in runs] == [2, 2]


async def test_cancelled_jobs_do_not_make_a_device_loaded(new_model):
    slots = Slots(2)
    one, other = new_model(slots, 1), new_model(slots, 1)
    (job,) = await other.callers.jobs(request())
    await other.callers.leave(0)
    slots.add(other.lane, [job])
    async with background(other.seats[0].next(), one.seats[0].next()) as (_, run):
        await settle()
        await one.add(request())
        assert (await run).cores == 2


async def test_more_threads_than_the_device_has_cores_still_run(new_model):
    slots = Slots(2)
    model = new_model(slots, 16)
    await model.add(request(id="a"))
    assignment = await model.seats[0].next()
    assert assignment.cores == 2
    model.seats[0].release(assignment, learn=True)
    await model.add(request(id="b"))
    assert ids(await model.seats[0].next()) == ["b"]


async def test_the_earliest_deadline_runs_first(new_model):
    slots = Slots(1)
    models = [new_model(slots, 1) for _ in range(3)]
    now = time.monotonic()
    async with background(*(model.seats[0].next() for model in models)) as waiting:
        await settle()
        # The first stands behind the one without a deadline, which is ranked as if it had one.
        asked = [request(deadline=now + 500), request(), request(deadline=now + 5)]
        jobs = [await model.callers.jobs(each) for model, each in zip(models, asked, strict=True)]
        for model, job in zip(models, jobs, strict=True):
            slots.add(model.lane, job)
        order = []
        for _ in models:
            await settle()
            (running,) = [n for n, task in enumerate(waiting) if task.done() and n not in order]
            order.append(running)
            models[running].seats[0].release(waiting[running].result(), learn=True)
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
        narrow.seats[0].release(held[0], learn=True)
        await settle()
        assert not narrow_next.done(), "the free core is kept for the wide run, which waits longer"
        narrow.seats[1].release(held[1], learn=True)
        assert (await wide_next).cores == 2
        wide.seats[0].release(wide_next.result(), learn=True)
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
        assert sorted([ids(await each) for each in waiting]) == [["0", "1", "2"], ["3", "4", "5"]]


async def test_the_instance_that_ran_last_runs_next(new_model):
    slots = Slots(2)
    model = new_model(slots, 1, 1, 1)
    seats = list(model.seats)
    async with background(*(seat.next() for seat in seats)) as waiting:
        await settle()
        await model.add(request())
        await settle()
        (ran,) = [place for place, each in enumerate(waiting) if each.done()]
        seats[ran].release(await waiting[ran], learn=True)
        async with background(seats[ran].next()) as (again,):
            await settle()
            await model.add(request(id="next"))
            assert ids(await again) == ["next"]


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
    assert ids_of(await model.callers.consumer.take(2)) == ["a", "b"]


def ids_of(jobs):
    return [job.request.id for job in jobs]


# --- a lane's life


async def test_closing_a_lane_hands_every_waiting_job_back_in_order(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    await model.add(*(request(id=str(n)) for n in range(3)))
    await model.callers.leave(1)
    slots.close(model.lane)
    assert ids_of(await model.callers.consumer.take(3)) == ["0", "2"]


async def test_closing_a_lane_hands_back_a_run_that_no_seat_took(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    await model.add(request(id="a"), request(id="b"))
    await settle()  # decided, and nobody sits
    await model.add(request(id="c"))
    slots.close(model.lane)
    assert ids_of(await model.callers.consumer.take(3)) == ["a", "b", "c"]
    other = new_model(slots, 1)
    await other.add(request(id="d"))
    assert ids(await other.seats[0].next()) == ["d"], "the slot is free again"


async def test_settled_waits_for_what_waits_and_what_runs(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    await slots.settled(model.lane)
    await model.add(request())
    async with background(slots.settled(model.lane)) as (settled,):
        run = await model.seats[0].next()
        await settle()
        assert not settled.done()
        model.seats[0].release(run, learn=True)
        await settled


@pytest.mark.parametrize(("engine", "learned"), [(0.05, 0.055), (0.001, 0.003), (0.4, 0.4), (None, 0.3)])
async def test_a_loop_that_is_behind_teaches_nothing_about_the_engine(new_model, monkeypatch, engine, learned):
    slots = Slots(1)
    model = new_model(slots, 1)
    await model.add(request())
    run = await model.seats[0].next()
    clock = SimpleNamespace(monotonic=lambda: run.started + 0.3)
    monkeypatch.setattr("gateway.worker.slots.time", clock)
    seen = []
    monkeypatch.setattr(slots.scheduler, "finished", lambda *told, **_: seen.append(told))
    model.seats[0].release(run, learn=True, seconds=engine)
    assert seen == [(run, pytest.approx(learned), run.started + 0.3)]


def known(slots, model, seconds=60.0):
    """Have every batch of the model be expected to take so long."""
    for _ in range(3):
        for rows in (1, 2, 4, 8):
            slots.scheduler.warmed(model.lane, "cpu", rows, seconds)


async def test_the_next_batch_is_decided_before_a_long_run_ends(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    known(slots, model)
    await model.add(request(id="a"))
    first = await model.seats[0].next()
    await model.add(request(id="b"), request(id="c"))
    assert model.seats[0].relieve(first)
    assert not model.seats[0].relieve(first), "once is enough"
    second = await model.seats[0].next()
    assert ids(second) == ["b", "c"]
    assert second.started == first.started + first.predicted, "it is decided as of the end of the first"
    await model.add(request(id="d"))
    await settle()
    assert not slots.scheduler.dispatch("cpu", second.started).run, "there is no third run at once"
    model.seats[0].release(first, learn=True)
    model.seats[0].release(second, learn=True)
    last = await model.seats[0].next()
    assert ids(last) == ["d"]
    async with background(slots.settled(model.lane)) as (settled,):
        model.seats[0].release(last, learn=True)
        await settled


async def test_a_run_is_not_relieved_where_nothing_waits(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    known(slots, model)
    await model.add(request(id="a"))
    run = await model.seats[0].next()
    assert not model.seats[0].relieve(run)
    await model.add(request(id="b"))
    await settle()
    assert not slots.scheduler.dispatch("cpu", time.monotonic()).run, "it has its slot to the end"


async def test_a_run_is_not_relieved_for_another_model_that_is_more_urgent(new_model):
    slots = Slots(1)
    model, other = new_model(slots, 1), new_model(slots, 1)
    for each in (model, other):
        known(slots, each, seconds=0.1)
    await model.add(request(id="a"))
    run = await model.seats[0].next()
    await model.add(request(id="b"))
    await other.add(request(id="c", deadline=soon(5)))  # before what has none
    assert not model.seats[0].relieve(run), "it would wait behind a run that is not over, and its instance is idle"
    model.seats[0].release(run, learn=True)
    assert ids(await other.seats[0].next()) == ["c"]


async def test_a_run_is_not_relieved_while_another_instance_is_idle(new_model):
    slots = Slots(2)
    model = new_model(slots, 1, 1, batching=Batching(max_queue_delay_us=60_000_000))
    known(slots, model)
    await model.add(*(request(id=str(number)) for number in range(8)))
    run = await model.seats[0].next()
    await model.add(request(id="waits for others"))
    assert not model.seats[0].relieve(run)


async def test_a_run_is_not_relieved_for_an_idle_instance_that_has_no_core(new_model):
    slots = Slots(1)
    model = new_model(slots, 1, 1)
    known(slots, model)
    await model.add(request(id="a"))
    run = await model.seats[0].next()
    async with background(model.seats[1].next()) as (idle,):
        await settle()
        await model.add(request(id="b"))
        assert not model.seats[0].relieve(run)
        await settle()
        assert not idle.done(), "it would begin at once, on a core that is taken"
        model.seats[0].release(run, learn=True)
        assert ids(await idle) == ["b"]


async def test_the_cores_of_a_relieved_run_are_not_for_another_model(new_model):
    slots = Slots(1)
    model = new_model(slots, 1, batching=Batching(max_queue_delay_us=60_000_000))
    other = new_model(slots, 1)
    for each in (model, other):
        known(slots, each, seconds=0.1)
    await model.add(*(request(id=str(number)) for number in range(8)))
    run = await model.seats[0].next()
    await model.add(request(id="may wait for others", deadline=soon(5)))
    await other.add(request(id="c"))
    async with background(other.seats[0].next()) as (waiting,):
        await settle()
        assert not model.seats[0].relieve(run)
        await settle()
        assert not waiting.done()
        model.seats[0].release(run, learn=True)
        assert ids(await waiting) == ["c"]


async def test_a_run_on_every_core_is_not_relieved(new_model):
    slots = Slots(2)
    model = new_model(slots, 1)
    known(slots, model)
    await model.add(request(id="a"))
    run = await model.seats[0].next()
    await model.add(request(id="b"))
    assert run.cores == 2
    assert not model.seats[0].relieve(run)


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_a_cancelled_job_is_not_run_and_not_waited_for(new_model, gone):
    slots = Slots(1)
    model = new_model(slots, 1)
    jobs = await model.callers.jobs(*(request(id=str(n), rows=2) for n in range(3)))
    await model.callers.leave(gone)
    slots.add(model.lane, jobs)
    run = await model.seats[0].next()
    assert ids(run) == [str(n) for n in range(3) if n != gone]
    model.seats[0].release(run, learn=True)
    await slots.settled(model.lane)


async def test_cancelled_jobs_do_not_pile_up_behind_a_hung_run(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    await model.add(request())
    await model.seats[0].next()
    for _ in range(3000):
        (job,) = await model.callers.jobs(request())
        job.reply(answer(job.request))
        slots.add(model.lane, [job])
    assert sum(1 for _ in slots.scheduler._lanes[model.lane].entries()) < 2048


async def test_jobs_of_another_shape_are_passed_over_and_keep_their_order(new_model):
    slots = Slots(1)
    model = new_model(slots, 1)
    shapes = ["a", "b", "a", "b", "a"]
    await model.add(*(request(id=str(n), signature=shape) for n, shape in enumerate(shapes)))
    run = await model.seats[0].next()
    assert ids(run) == ["0", "2", "4"]
    model.seats[0].release(run, learn=True)
    assert ids(await model.seats[0].next()) == ["1", "3"]


async def test_what_the_model_refuses_to_queue_is_answered_at_once(new_model):
    slots = Slots(1)
    model = new_model(slots, 1, batching=Batching(queue_policy=QueuePolicy(default_timeout_us=1)))
    told = [model.callers.ask(request()) for _ in range(2)]
    await settle()
    slots.add(model.lane, await model.callers.consumer.take(2))
    first = await told[0]
    assert (type(first), first.message) == (errors.QueueTimeout, "Request timeout expired")
    assert type(await told[1]) is errors.QueueTimeout


async def test_admission_refuses_in_the_words_of_the_error_table(new_model):
    slots = Slots(1)
    model = new_model(slots, 1, batching=Batching(queue_policy=QueuePolicy(max_queue_size=1)))
    slots.admit(model.lane, request(), "a")
    with pytest.raises(errors.QueueFull, match="Exceeds maximum queue size"):
        slots.admit(model.lane, request(), "b")
