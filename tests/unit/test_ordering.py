"""Answers leave in the order of their requests, and nothing is held for ever."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import errors
from gateway.queues.memory import MemoryQueue
from gateway.worker.ordering import Order
from tests.support import LANE, Callers, answer, request, settle


@pytest.fixture
async def callers():
    async with Callers() as callers:
        yield callers


def ids(*names):
    return [request(id=name) for name in names]


async def entered(callers, order, *names):
    """Jobs of these requests as their runner gets them, and what their callers are told."""
    told = [callers.ask(each) for each in ids(*names)]
    await settle()
    return order.enter(await callers.consumer.take(len(names))), told


def reply(job, *, final=True):
    return job.reply(answer(job.request, final=final))


async def test_a_job_looks_like_the_one_it_stands_for(callers):
    (given_,) = await callers.jobs(*ids("a"))
    (job,) = Order().enter([given_])
    assert (job.request, job.enqueued, job.done) == (given_.request, given_.enqueued, False)


async def test_an_early_answer_is_held_and_counts_as_given(callers):
    (first, second), (one, two) = await entered(callers, Order(), "a", "b")
    assert reply(second)
    assert second.done
    assert not reply(second)
    assert not second.fail(errors.stopping())
    await settle()
    assert not two.done()
    assert first.fail(errors.stopping())
    assert isinstance(await one, errors.Unavailable)
    assert (await two).id == "b"


async def test_who_gives_up_holds_nobody(callers):
    order = Order()
    (first, second), (one, two) = await entered(callers, order, "a", "b")
    reply(second)
    await callers.leave(0)
    order.leave(first.request)
    assert (await two).id == "b"
    assert one.cancelled()
    assert first.done
    assert not reply(first)


async def test_a_job_handed_back_holds_nobody_and_takes_its_turn_again(callers):
    order = Order()
    (first, second), (one, two) = await entered(callers, order, "a", "b")
    reply(second)
    first.release()
    assert (await two).id == "b"
    (again,) = order.enter(await callers.consumer.take(1))
    reply(again)
    assert (await one).id == "a"


async def test_every_answer_of_a_request_waits_for_its_turn():
    queue, order = MemoryQueue(), Order()
    a, b = ids("a", "b")
    first, second = queue.submit(LANE, a), queue.submit(LANE, b)
    jobs = order.enter(await queue.consumer([LANE]).take(2))
    reply(jobs[1], final=False)
    reply(jobs[0], final=False)
    assert not (await anext(first)).final
    waiting = anext(second)
    reply(jobs[1])
    assert not waiting.done()
    reply(jobs[0])
    assert (await anext(first)).final
    assert not (await waiting).final
    assert (await anext(second)).final
    for each in (first, second):
        await each.aclose()


@given(
    st.permutations(range(6)), st.lists(st.sampled_from(["answer", "fail", "leave", "release"]), min_size=6, max_size=6)
)
def test_whatever_ends_in_whatever_way_the_answers_are_in_order(sequence, ends):
    asyncio.run(_all_end(sequence, ends))


async def _all_end(sequence, ends):
    told = []
    order = Order()
    async with Callers() as callers:
        jobs, tasks = await entered(callers, order, *map(str, range(6)))
        for number, task in enumerate(tasks):
            task.add_done_callback(lambda _, number=number: told.append(number))
        for number in sequence:
            job = jobs[number]
            if ends[number] == "answer":
                assert reply(job)
            elif ends[number] == "fail":
                assert job.fail(errors.stopping())
            elif ends[number] == "release":
                job.release()
            else:
                await callers.leave(number)
                order.leave(job.request)
            await settle()
        answered = [number for number in range(6) if ends[number] in ("answer", "fail")]
        assert [number for number in told if number in answered] == answered
