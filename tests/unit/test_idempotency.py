"""A request that comes again under its key: one run, one answer, whatever becomes of the first."""

import asyncio
import time

import numpy as np
import pytest

from gateway import errors
from gateway.middleware.classification import classification
from gateway.middleware.idempotency import idempotency
from gateway.middleware.store import MemoryStore
from gateway.types import DataType, RequestedOutput
from tests.support import request, settle, soon, tensor
from tests.unit.middleware_support import Rig, ask, callers, value_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rig(clock: Clock) -> Rig:
    made = Rig()
    made.store = MemoryStore(1 << 20, clock)
    made.endpoint = idempotency(made.service.infer, made.service.prepare, made.store)
    return made


def keyed(value: float = 1.0, key: str = "k", **more):
    return request(value, idempotency_key=key, **more)


async def test_a_request_without_a_key_is_run_each_time(rig: Rig):
    async with callers(rig) as asking:
        for value in (1, 2):
            call = await asking.ask(request())
            await rig.reply(value)
            assert value_of(await call) == value
    assert rig.store.bytes == 0


async def test_a_repeat_gets_the_first_answer_under_its_own_id(rig: Rig):
    async with callers(rig) as asking:
        first = await asking.ask(keyed(id="a"))
        await rig.reply(7)
        assert ((await first).id, value_of(await first)) == ("a", 7)
        again = await ask(rig.endpoint, keyed(id="b"))
    assert (again.id, value_of(again), again.timings) == ("b", 7, None)
    assert (again.model_name, again.model_version, again.final) == ("m", "1", True)
    assert (rig.counted.success_count, rig.counted.inference_count) == (2, 1)


async def test_a_repeat_in_flight_joins_the_first(rig: Rig):
    async with callers(rig) as asking:
        calls = [await asking.ask(keyed(id=str(n))) for n in range(5)]
        await rig.reply(7)
        answers = await asyncio.gather(*calls)
        assert await rig.idle()
    assert [(each.id, value_of(each)) for each in answers] == [(str(n), 7) for n in range(5)]
    assert (rig.counted.success_count, rig.counted.inference_count) == (5, 1)


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "b"},
        {"key": "other"},
        {"model_version": "1"},
    ],
)
async def test_keys_are_a_tenants_own_for_one_model_and_version(rig: Rig, other):
    async with callers(rig) as asking:
        first = await asking.ask(keyed())
        second = await asking.ask(keyed(**other))
        await rig.reply(1)
        await rig.reply(2)
        assert (value_of(await first), value_of(await second)) == (1, 2)


OTHER_BODIES = {
    "value": {"value": 2.0},
    "shape": {"rows": 2},
    "outputs": {"outputs": ("OUT",)},
    "parameters": {"parameters": {"mine": 1}},
}


@pytest.mark.parametrize("other", OTHER_BODIES.values(), ids=OTHER_BODIES)
async def test_the_same_key_with_another_body_is_a_conflict(rig: Rig, other):
    async with callers(rig) as asking:
        first = await asking.ask(keyed())
        while_it_runs = await ask(rig.endpoint, keyed(**other))
        await rig.reply(7)
        afterwards = await ask(rig.endpoint, keyed(**other))
        assert value_of(await first) == 7
    for error in (while_it_runs, afterwards):
        assert type(error) is errors.Conflict
        assert "Idempotency-Key" in error.message
    assert rig.counted.refused == {"conflict": 2}
    assert rig.counted.failures["OTHER"] == 2
    assert await rig.idle()


async def test_a_conflict_is_told_as_soon_as_the_key_is_taken(rig: Rig):
    """The store takes its time to say whose the key is, and the run takes longer."""
    taken, claim = asyncio.Event(), rig.store.claim

    async def slowly(*asked):
        await taken.wait()
        return await claim(*asked)

    rig.store.claim = slowly
    async with callers(rig) as asking:
        first = await asking.ask(keyed())
        other = await asking.ask(keyed(2.0))
        taken.set()
        assert type(await other) is errors.Conflict
        assert not first.done()
        await rig.reply(7)
        assert value_of(await first) == 7


async def test_a_classification_is_part_of_the_body(rig: Rig):
    rig.endpoint = idempotency(
        classification(rig.service.infer, rig.service.model_config), rig.service.prepare, rig.store
    )
    asked = keyed()
    asked.outputs = (RequestedOutput("OUT", 1),)
    async with callers(rig) as asking:
        call = await asking.ask(asked)
        await rig.reply(7)
        assert (await call).outputs["OUT"].datatype is DataType.BYTES
        again = keyed()
        again.outputs = (RequestedOutput("OUT", 1),)
        assert (await ask(rig.endpoint, again)).outputs["OUT"].array.tolist() == (await call).outputs[
            "OUT"
        ].array.tolist()
        assert type(await ask(rig.endpoint, keyed(outputs=("OUT",)))) is errors.Conflict


async def test_when_it_is_to_be_answered_is_not_part_of_the_body(rig: Rig):
    async with callers(rig) as asking:
        first = await asking.ask(keyed(parameters={"timeout": 50_000_000}))
        await rig.reply(7)
        await first
        again = await ask(rig.endpoint, keyed(parameters={"timeout": 60_000_000, "priority": 1}, id="2"))
    assert value_of(again) == 7


async def test_the_first_cancelled_leaves_the_run_to_a_repeat(rig: Rig):
    async with callers(rig) as asking:
        first = await asking.ask(keyed())
        second = await asking.ask(keyed())
        third = await asking.ask(keyed())
        cancelled = await rig.job()
        await asking.leave(first)
        assert cancelled.done
        await rig.reply(7)
        assert value_of(await second) == value_of(await third) == 7
    assert rig.counted.failures["CANCELED"] == 1


async def test_a_repeat_that_leaves_disturbs_nobody(rig: Rig):
    async with callers(rig) as asking:
        first = await asking.ask(keyed())
        second = await asking.ask(keyed())
        await asking.leave(second)
        await rig.reply(7)
        assert value_of(await first) == 7
    assert rig.counted.failures["CANCELED"] == 1
    assert value_of(await ask(rig.endpoint, keyed())) == 7


@pytest.mark.parametrize(
    "error",
    [
        errors.Overloaded("full", 1.0),
        errors.DeadlineExceeded("late"),
        errors.Unavailable("not ready"),
        errors.Internal("the model failed"),
    ],
)
async def test_an_error_is_not_kept(rig: Rig, error):
    async with callers(rig) as asking:
        first = await asking.ask(keyed())
        waiting = await asking.ask(keyed())
        (await rig.job()).fail(error)
        assert await first is error
        await rig.reply(7)
        assert value_of(await waiting) == 7
    assert value_of(await ask(rig.endpoint, keyed())) == 7


async def test_a_bad_request_does_not_use_up_its_key(rig: Rig):
    bad = keyed(inputs={"IN": tensor([[1.0, 2.0, 3.0]])})
    assert type(await ask(rig.endpoint, bad)) is errors.InvalidArgument
    async with callers(rig) as asking:
        call = await asking.ask(keyed())
        await rig.reply(7)
        assert value_of(await call) == 7


async def test_each_caller_has_its_own_deadline(rig: Rig):
    async with callers(rig) as asking:
        first = await asking.ask(keyed())
        hurried = await asking.ask(keyed(deadline=soon()))
        assert type(await hurried) is errors.DeadlineExceeded
        await rig.reply(7)
        assert value_of(await first) == 7
    assert rig.counted.refused == {"expired": 1}


async def test_a_deadline_of_the_first_is_not_the_repeats(rig: Rig):
    async with callers(rig) as asking:
        first = await asking.ask(keyed(parameters={"timeout": 60_000_000}))
        patient = await asking.ask(keyed())
        job = await rig.job()
        job.fail(errors.deadline_passed())
        assert type(await first) is errors.DeadlineExceeded
        await rig.reply(7)
        assert value_of(await patient) == 7


async def test_answers_are_kept_for_five_minutes(rig: Rig, clock: Clock):
    async with callers(rig) as asking:
        first = await asking.ask(keyed())
        await rig.reply(1)
        await first
        clock.now = 299.0
        assert value_of(await ask(rig.endpoint, keyed())) == 1
        clock.now = 301.0
        second = await asking.ask(keyed())
        await rig.reply(2)
        assert value_of(await second) == 2


async def test_a_large_answer_is_given_to_who_waits_and_is_computed_again_later(rig: Rig):
    large = tensor(np.ones((1, 100_000)))

    async def reply(value: float) -> None:
        job = await rig.job()
        response = rig.answered(job.request, value)
        response.outputs["LARGE"] = large
        job.reply(response)

    async with callers(rig) as asking:
        first, waiting = await asking.ask(keyed()), await asking.ask(keyed())
        await reply(1)
        assert value_of(await first) == value_of(await waiting) == 1
        assert rig.store.bytes < 10_000
        assert type(await ask(rig.endpoint, keyed(2.0))) is errors.Conflict
        again = await asking.ask(keyed())
        await reply(2)
        assert value_of(await again) == 2


async def test_what_is_kept_is_bounded_and_holds_no_batch(rig: Rig):
    batch = np.zeros((1000, 2), np.float32)
    async with callers(rig) as asking:
        call = await asking.ask(keyed())
        job = await rig.job()
        response = rig.answered(job.request, 1)
        response.outputs["OUT"] = tensor(batch[:1])
        job.reply(response)
        await call
    (entry,) = rig.store._entries.values()
    assert type(entry.kept.response.outputs["OUT"].wire) is bytes


async def test_a_closed_call_that_never_began_does_nothing(rig: Rig):
    await rig.endpoint(keyed()).aclose()
    assert await rig.idle()


async def test_while_the_server_stops_a_repeat_is_refused_like_any_request(rig: Rig):
    rig.service.drain()
    error = await ask(rig.endpoint, keyed())
    assert (type(error), error.message) == (errors.Unavailable, "Server not ready")


async def test_a_deadline_that_is_over_is_answered(rig: Rig):
    assert type(await ask(rig.endpoint, keyed(deadline=time.monotonic() - 1))) is errors.DeadlineExceeded
    await settle()
    async with callers(rig) as asking:
        call = await asking.ask(keyed())
        await rig.reply(7)
        assert value_of(await call) == 7
