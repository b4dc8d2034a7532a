"""Responses out of the cache: for equal requests only, as Triton counts them, and never at another's cost."""

import asyncio

import numpy as np
import pytest

from gateway import errors
from gateway.config.model import ResponseCache
from gateway.middleware.cache import response_cache
from gateway.middleware.classification import classification
from gateway.middleware.store import MemoryStore
from gateway.types import DataType, RequestedOutput, Tensor
from tests.support import request, soon, tensor, tensor_config
from tests.unit.middleware_support import Rig, ask, callers, value_of

ON = ResponseCache()


def wrapped(rig: Rig, max_bytes: int = 1 << 20) -> Rig:
    rig.store = MemoryStore(max_bytes)
    rig.endpoint = response_cache(rig.service.infer, rig.service.prepare, rig.service.model_config, rig.store)
    return rig


@pytest.fixture
def rig() -> Rig:
    return wrapped(Rig(cache=ON))


async def warm(rig: Rig, answer: float = 7, **more) -> None:
    """Have the answer to `request(**more)` cached."""
    async with callers(rig) as asking:
        call = await asking.ask(request(**more))
        await rig.reply(answer)
        await call


async def test_a_hit_is_counted_as_triton_counts_it(rig: Rig):
    await warm(rig, id="a")
    counted = rig.counted
    assert (counted.success_count, counted.cache_miss_count, counted.cache_hit_count) == (1, 1, 0)
    assert counted.cache_miss_ns > 0
    hit = await ask(rig.endpoint, request(id="b"))
    assert (hit.id, value_of(hit), hit.timings, hit.model_version) == ("b", 7, None, "1")
    counted = rig.counted
    assert (counted.success_count, counted.cache_miss_count, counted.cache_hit_count) == (2, 1, 1)
    assert (counted.inference_count, counted.compute_count) == (1, 1)
    assert 0 < counted.cache_hit_ns <= counted.success_ns
    stats = counted.to_triton()["inference_stats"]
    assert (stats["success"]["count"], stats["queue"]["count"]) == (2, 2)
    assert (stats["compute_infer"]["count"], stats["cache_hit"]["count"], stats["cache_miss"]["count"]) == (1, 1, 1)
    assert await rig.idle()


async def test_a_model_that_does_not_ask_is_not_cached():
    rig = wrapped(Rig())
    for value in (1, 2):
        await warm(rig, value)
    assert (rig.counted.inference_count, rig.counted.cache_miss_count, rig.store.bytes) == (2, 0, 0)


async def test_without_a_digest_nothing_is_cached():
    rig = wrapped(Rig(cache=ON, digest=""))
    for value in (1, 2):
        await warm(rig, value)
    assert (rig.counted.inference_count, rig.counted.cache_miss_count, rig.store.bytes) == (2, 0, 0)


DIFFERENT = {
    "a value": {"value": 0.5},
    "the sign of zero": {"value": -0.0},
    "rows": {"rows": 2},
    "tenant": {"tenant": "b"},
    "outputs": {"outputs": ("OUT",)},
    "a parameter": {"parameters": {"mine": 1}},
}


@pytest.mark.parametrize("other", DIFFERENT.values(), ids=DIFFERENT)
async def test_other_requests_are_computed(rig: Rig, other):
    await warm(rig)
    async with callers(rig) as asking:
        call = await asking.ask(request(**other))
        await rig.reply(8)
        assert value_of(await call) == 8


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), ("1", 1)])
async def test_the_type_of_a_parameter_counts(rig: Rig, one, other):
    await warm(rig, parameters={"mine": one})
    async with callers(rig) as asking:
        call = await asking.ask(request(parameters={"mine": other}))
        await rig.reply(8)
        assert value_of(await call) == 8


async def test_parameters_that_say_when_do_not_count(rig: Rig):
    await warm(rig, parameters={"timeout": 50_000_000})
    assert value_of(await ask(rig.endpoint, request(parameters={"timeout": 60_000_000, "priority": 1}))) == 7


async def test_a_public_model_answers_every_tenant():
    rig = wrapped(Rig(cache=ResponseCache(public=True)))
    await warm(rig, tenant="a")
    assert value_of(await ask(rig.endpoint, request(tenant="b"))) == 7


async def test_inputs_are_told_apart_by_name_and_in_any_order():
    both = (tensor_config("A"), tensor_config("B"))
    rig = wrapped(Rig(cache=ON, inputs=both))
    one, two = tensor([[1.0, 1.0]]), tensor([[2.0, 2.0]])
    await warm(rig, inputs={"A": one, "B": two})
    assert value_of(await ask(rig.endpoint, request(inputs={"B": two, "A": one}))) == 7
    async with callers(rig) as asking:
        for inputs in ({"A": two, "B": one}, {"B": one, "A": two}):
            call = await asking.ask(request(inputs=inputs))
            if not call.done():
                await rig.reply(8)
            assert value_of(await call) == 8


async def test_strings_and_empty_tensors_have_keys():
    rig = wrapped(Rig(cache=ON, inputs=(tensor_config("IN", DataType.BYTES, (-1,)),)))
    asked = [
        request(inputs={"IN": Tensor.from_array(DataType.BYTES, np.array([words], object).reshape(1, len(words)))})
        for words in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [])
    ]
    async with callers(rig) as asking:
        for value, each in enumerate(asked):
            call = await asking.ask(each)
            await rig.reply(value)
            assert value_of(await call) == value
        for value, each in enumerate(asked):
            assert value_of(await ask(rig.endpoint, each)) == value


@pytest.mark.parametrize("change", [{"digest": "d2"}, {"version": "2"}], ids=["other files", "another version"])
async def test_a_model_that_is_loaded_anew_is_asked_anew(rig: Rig, change):
    await warm(rig)
    rig.publish(cache=ON, **change)
    async with callers(rig) as asking:
        call = await asking.ask(request())
        assert not call.done()
    rig.publish(cache=ON)
    assert value_of(await ask(rig.endpoint, request())) == 7


async def test_an_answer_of_another_load_or_version_is_not_kept(rig: Rig):
    """A worker may have loaded it anew and this gateway not have heard of it; and it may be loaded as it was again."""
    for change in ({"digest": "d2"}, {"digest": ""}, {"model_version": "9"}):
        async with callers(rig) as asking:
            call = await asking.ask(request())
            job = await rig.job()
            response = rig.answered(job.request, 1)
            for name, value in change.items():
                setattr(response, name, value)
            job.reply(response)
            assert value_of(await call) == 1
    assert rig.store.bytes == 0


async def test_an_unloaded_model_is_unknown_though_its_answers_are_kept(rig: Rig):
    await warm(rig)
    rig.queue.withdraw("m")
    assert type(await ask(rig.endpoint, request())) is errors.NotFound


# --- equal requests at the same time


async def test_equal_requests_at_the_same_time_run_once(rig: Rig):
    async with callers(rig) as asking:
        calls = [await asking.ask(request(id=str(n))) for n in range(5)]
        await rig.reply(7)
        assert [(each.id, value_of(each)) for each in await asyncio.gather(*calls)] == [(str(n), 7) for n in range(5)]
        assert await rig.idle()
    counted = rig.counted
    assert (counted.success_count, counted.inference_count) == (5, 1)
    assert (counted.cache_hit_count, counted.cache_miss_count) == (4, 1)


async def test_cancelling_the_one_that_runs_leaves_it_to_another(rig: Rig):
    async with callers(rig) as asking:
        first, second, third = [await asking.ask(request()) for _ in range(3)]
        job = await rig.job()
        await asking.leave(first)
        assert job.done
        await rig.reply(7)
        assert value_of(await second) == value_of(await third) == 7
    assert rig.counted.inference_count == 1


async def test_one_that_waits_may_leave_or_expire(rig: Rig):
    async with callers(rig) as asking:
        first, second = [await asking.ask(request(deadline=soon(60))) for _ in range(2)]
        await asking.leave(second)
        third = await asking.ask(request(deadline=soon(60)))
        await rig.reply(7)
        assert value_of(await first) == value_of(await third) == 7
    assert rig.counted.failures["CANCELED"] == 1


async def test_the_others_run_side_by_side_when_the_first_fails(rig: Rig):
    async with callers(rig) as asking:
        first, second, third = [await asking.ask(request()) for _ in range(3)]
        error = errors.Internal("the model failed")
        (await rig.job()).fail(error)
        assert await first is error
        jobs = await rig.job(), await rig.job()
        for value, job in enumerate(jobs):
            job.reply(rig.answered(job.request, value))
        assert [value_of(await second), value_of(await third)] == [0, 1]


async def test_the_first_one_expiring_leaves_its_run_to_another(rig: Rig):
    async with callers(rig) as asking:
        first, second = [await asking.ask(request()) for _ in range(2)]
        (await rig.job()).fail(errors.deadline_passed())
        assert type(await first) is errors.DeadlineExceeded
        await rig.reply(7)
        assert value_of(await second) == 7


@pytest.mark.parametrize("more", [{"deadline": 60}, {"parameters": {"priority": 1}}])
async def test_a_more_urgent_request_does_not_wait_for_a_less_urgent_one(rig: Rig, more):
    urgent = {**more, **({"deadline": soon(60)} if "deadline" in more else {})}
    async with callers(rig) as asking:
        patient, hurried = await asking.ask(request()), await asking.ask(request(**urgent))
        await rig.reply(1)
        await rig.reply(2)
        assert (value_of(await patient), value_of(await hurried)) == (1, 2)


# --- what is kept


async def test_errors_are_not_kept(rig: Rig):
    async with callers(rig) as asking:
        call = await asking.ask(request())
        (await rig.job()).fail(errors.Internal("the model failed"))
        assert type(await call) is errors.Internal
    assert rig.counted.cache_miss_count == 0
    await warm(rig)


async def test_a_bad_request_is_refused_as_ever(rig: Rig):
    error = await ask(rig.endpoint, request(id="r", inputs={"IN": tensor([[1.0]])}))
    assert type(error) is errors.InvalidArgument
    assert error.message.startswith("[request id: r] unexpected shape")
    assert rig.counted.failures["OTHER"] == 1
    assert type(await ask(rig.endpoint, request(model_name="nobody"))) is errors.NotFound


async def test_the_bytes_are_bounded_and_the_least_used_goes_first():
    rig = wrapped(Rig(cache=ON), 3_500)
    for value in (1, 2):
        await warm(rig, value, value=value)
    assert value_of(await ask(rig.endpoint, request(1))) == 1
    await warm(rig, 3, value=3)
    assert rig.store.bytes <= 3_500
    assert value_of(await ask(rig.endpoint, request(1))) == 1
    async with callers(rig) as asking:
        call = await asking.ask(request(2))
        assert not call.done()


async def test_a_top_k_request_is_answered_from_the_tensor_that_is_kept(rig: Rig):
    rig.endpoint = classification(rig.endpoint, rig.service.model_config)
    await warm(rig, outputs=("OUT",))

    def top(count: int):
        asked = request()
        asked.outputs = (RequestedOutput("OUT", count),)
        return asked

    assert (await ask(rig.endpoint, top(1))).outputs["OUT"].array.tolist() == [[b"7.000000:1"]]
    assert (await ask(rig.endpoint, top(2))).outputs["OUT"].shape == (1, 2)
    assert value_of(await ask(rig.endpoint, request(outputs=("OUT",)))) == 7
    assert await rig.idle()


async def test_what_a_caller_makes_of_an_answer_stays_its_own(rig: Rig):
    await warm(rig)
    one, two = await ask(rig.endpoint, request()), await ask(rig.endpoint, request())
    assert one.outputs["OUT"] is not two.outputs["OUT"]
    assert one.outputs["OUT"].wire == two.outputs["OUT"].wire
    with pytest.raises(ValueError, match="read-only"):
        one.outputs["OUT"].array[0, 0] = 1
