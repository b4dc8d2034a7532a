"""What every queue promises (gateway/queues/base.py), run against each implementation."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from gateway import errors
from gateway.queues.base import Lane, Load, PoolState, Queue, Unload, VersionState
from gateway.queues.memory import MemoryQueue
from tests.redis_support import fleet_queue, options
from tests.support import LANE, answer, ask, background, refusal, request, settle, soon


@pytest.fixture(params=["memory", "redis", "sealed", "debian"])
async def queue(request: pytest.FixtureRequest) -> AsyncIterator[Queue]:
    if request.param == "memory":
        yield MemoryQueue()
        return
    key = b"0123456789abcdef" if request.param == "sealed" else None
    url = request.getfixturevalue("debian_redis_url" if request.param == "debian" else "redis_url")
    async with fleet_queue(options(url), key=key) as queue:
        yield queue


async def take(queue: Queue, count: int, lane: Lane = LANE):
    """Exactly `count` jobs, by a consumer of its own."""
    consumer = queue.consumer([lane])
    jobs = []
    while len(jobs) < count:
        jobs += await consumer.take(count - len(jobs))
    return jobs


# --- answers


async def test_a_request_gets_the_answer_its_worker_gives(queue):
    asked = request(7.0, id="a")
    async with background(ask(queue, asked)) as (caller,):
        (job,) = await take(queue, 1)
        assert job.request.id == "a"
        assert not job.done
        assert job.reply(answer(job.request))
        assert (await caller).id == "a"
        assert job.done


async def test_a_job_knows_when_it_was_enqueued(queue):
    before = time.monotonic()
    async with background(ask(queue, request())):
        (job,) = await take(queue, 1)
        estimated = 0.0 if isinstance(queue, MemoryQueue) else 0.01  # Redis' clock, and in milliseconds
        assert before - estimated <= job.enqueued <= time.monotonic()


async def test_a_failure_reaches_the_caller_as_the_same_error(queue):
    async with background(refusal(ask(queue, request()))) as (caller,):
        (job,) = await take(queue, 1)
        error = errors.Internal("the model fell over")
        assert job.fail(error)
        assert type(await caller) is errors.Internal
        assert (await caller).message == error.message


async def test_a_job_is_answered_at_most_once(queue):
    async with background(ask(queue, request(id="a"))) as (caller,):
        (job,) = await take(queue, 1)
        assert job.reply(answer(job.request))
        assert not job.reply(answer(job.request))
        assert not job.fail(errors.Internal("too late"))
        assert (await caller).id == "a"


async def test_several_responses_stream_in_order_and_end_with_the_final_one(queue):
    async def collect():
        async with aclosing(queue.submit(LANE, request())) as answers:
            return [response async for response in answers]

    async with background(collect()) as (caller,):
        (job,) = await take(queue, 1)
        for number in range(3):
            assert job.reply(answer(request(id=str(number)), final=number == 2))
        assert not job.reply(answer(request(id="3")))
        assert [(r.id, r.final) for r in await caller] == [("0", False), ("1", False), ("2", True)]


async def test_a_stream_that_fails_gives_first_what_came_before(queue):
    async with aclosing(queue.submit(LANE, request())) as responses, background(take(queue, 1)) as (taker,):
        first = asyncio.ensure_future(anext(responses))
        (job,) = await taker
        job.reply(answer(request(id="0"), final=False))
        job.fail(errors.Internal("half way"))
        assert (await first).id == "0"
        with pytest.raises(errors.Internal, match="half way"):
            await anext(responses)


# --- cancellation (MLServer adaptive.py:114-122 is the mistake not to repeat)


@pytest.mark.parametrize("cancelled", [0, 1, 2])
async def test_a_cancelled_caller_never_disturbs_its_batch_mates(queue, cancelled):
    async with background(*(ask(queue, request(id=str(n))) for n in range(3))) as callers:
        jobs = await take(queue, 3)
        callers[cancelled].cancel()
        await asyncio.wait([callers[cancelled]])
        assert [job.done for job in jobs] == [n == cancelled for n in range(3)]
        assert [job.reply(answer(job.request)) for job in jobs] == [n != cancelled for n in range(3)]
        for number, caller in enumerate(callers):
            if number != cancelled:
                assert (await caller).id == str(number)


async def test_failing_a_job_nobody_waits_for_is_a_no_op(queue):
    async with background(ask(queue, request())) as (caller,):
        (job,) = await take(queue, 1)
        caller.cancel()
        await asyncio.wait([caller])
        assert not job.fail(errors.Internal("nobody reads this"))
        job.release()
    async with background(ask(queue, request(id="next"))):
        assert [job.request.id for job in await take(queue, 1)] == ["next"]


async def test_a_cancelled_request_is_not_taken(queue):
    async with background(*(ask(queue, request(id=str(n))) for n in range(3))) as callers:
        await settle()
        callers[0].cancel()
        await asyncio.wait([callers[0]])
        assert [job.request.id for job in await take(queue, 2)] == ["1", "2"]


async def test_closing_the_iterator_between_responses_cancels(queue):
    async with background(take(queue, 1)) as (taker,):
        async with aclosing(queue.submit(LANE, request())) as responses:
            waiting = asyncio.ensure_future(anext(responses))
            (job,) = await taker
            job.reply(answer(job.request, final=False))
            await waiting
            assert not job.done
        assert job.done
        assert not job.reply(answer(job.request))


# --- deadlines


async def test_a_deadline_already_passed_is_refused_and_never_queued(queue):
    with pytest.raises(errors.DeadlineExceeded, match=r"^Request timeout expired$"):
        await ask(queue, request(deadline=time.monotonic() - 1))
    async with background(ask(queue, request(id="live"))):
        assert [job.request.id for job in await take(queue, 1)] == ["live"]


async def test_a_deadline_passes_while_the_request_waits(queue):
    with pytest.raises(errors.DeadlineExceeded):
        await ask(queue, request(id="late", deadline=soon()))
    async with background(ask(queue, request(id="live"))):
        (job,) = await take(queue, 1)
        if job.request.id == "late" and not isinstance(queue, MemoryQueue):
            # A worker counts from when Redis has the request, and takes one that a busy machine was slow to send.
            (job,) = await take(queue, 1)
        assert job.request.id == "live"


async def test_a_deadline_passes_while_the_worker_holds_the_job(queue):
    late_call = refusal(ask(queue, request(id="late", deadline=soon(0.5))))
    async with background(late_call, ask(queue, request(id="mate"))) as (expiring, mate):
        late, kept = await take(queue, 2)
        assert isinstance(await expiring, errors.DeadlineExceeded)
        assert late.done
        assert not late.reply(answer(late.request))
        assert kept.reply(answer(kept.request))
        assert (await mate).id == "mate"


async def test_an_answer_before_the_deadline_is_the_only_answer(queue):
    async with background(ask(queue, request(deadline=soon(60)))) as (caller,):
        (job,) = await take(queue, 1)
        job.reply(answer(job.request))
        await caller


# --- taking


async def test_jobs_are_taken_in_the_order_they_were_submitted(queue):
    async with background(*(ask(queue, request(id=str(n))) for n in range(10))):
        await settle()
        taken = await take(queue, 4) + await take(queue, 6)
        assert [job.request.id for job in taken] == [str(n) for n in range(10)]


async def test_take_waits_for_the_first_job(queue):
    consumer = queue.consumer([LANE])
    async with background(consumer.take(5)) as (taking,):
        await settle()
        assert not taking.done()
        async with background(ask(queue, request(id="a"))):
            assert [job.request.id for job in await taking] == ["a"]


async def test_a_released_job_goes_back_to_the_front(queue):
    async with background(*(ask(queue, request(id=str(n))) for n in range(4))) as callers:
        first, second = await take(queue, 2)
        second.release()
        first.release()
        jobs = await take(queue, 4)
        assert [job.request.id for job in jobs] == ["0", "1", "2", "3"]
        for job in jobs:
            assert job.reply(answer(job.request))
        assert [(await caller).id for caller in callers] == ["0", "1", "2", "3"]


async def test_a_release_wakes_a_waiting_consumer(queue):
    async with background(ask(queue, request(id="a"))):
        (job,) = await take(queue, 1)
        async with background(take(queue, 1)) as (other,):
            await settle()
            assert not other.done()
            job.release()
            assert [job.request.id for job in await other] == ["a"]


async def test_two_consumers_share_a_lane_without_loss_or_repetition(queue):
    seen: list[str] = []

    async def work(consumer):
        while jobs := await consumer.take(3):
            for job in jobs:
                seen.append(job.request.id)
                job.reply(answer(job.request))
            await asyncio.sleep(0)

    consumers = [queue.consumer([LANE]) for _ in range(2)]
    async with background(*(work(consumer) for consumer in consumers)):
        answers = await asyncio.gather(*(ask(queue, request(id=str(n))) for n in range(50)))
    assert [a.id for a in answers] == [str(n) for n in range(50)]
    assert sorted(seen, key=int) == [str(n) for n in range(50)]


async def test_a_consumer_of_two_lanes_takes_the_oldest_of_each_first(queue):
    other = Lane("n", "1")
    async with background(ask(queue, request(id="a")), ask(queue, request(id="b"), other), ask(queue, request(id="c"))):
        await settle()
        consumer = queue.consumer([other, LANE])
        taken = await consumer.take(3)
        while len(taken) < 3:
            taken += await consumer.take(3 - len(taken))
        assert [job.request.id for job in taken if job.request.id != "b"] == ["a", "c"]
        assert sorted(job.request.id for job in taken) == ["a", "b", "c"]
        if isinstance(queue, MemoryQueue):  # where all lanes are read at once
            assert [job.request.id for job in taken] == ["a", "b", "c"]


async def test_lanes_are_apart(queue):
    other = Lane("m", "2")
    async with background(ask(queue, request(id="one")), ask(queue, request(id="two"), other)):
        assert [job.request.id for job in await take(queue, 1, other)] == ["two"]
        assert [job.request.id for job in await take(queue, 1)] == ["one"]


async def test_closing_a_consumer_ends_its_waiting_take(queue):
    consumer = queue.consumer([LANE])
    async with background(consumer.take(1)) as (taking,):
        await settle()
        consumer.close()
        consumer.close()
        assert await taking == []
    assert await consumer.take(1) == []


async def test_a_consumer_closed_as_a_job_arrives_leaves_it_to_the_other(queue):
    first, second = queue.consumer([LANE]), queue.consumer([LANE])
    async with background(first.take(1), second.take(1)) as (gone, stays):
        await settle()
        async with background(ask(queue, request(id="a"))):
            await asyncio.sleep(0)  # the job is queued and has woken the first consumer, which has not run yet
            first.close()
            assert await gone == []
            assert [job.request.id for job in await stays] == ["a"]


async def test_a_take_cancelled_as_a_job_arrives_leaves_it_to_the_other(queue):
    first, second = queue.consumer([LANE]), queue.consumer([LANE])
    async with background(first.take(1), second.take(1)) as (gone, stays):
        await settle()
        async with background(ask(queue, request(id="a"))):
            await asyncio.sleep(0)
            gone.cancel()
            assert [job.request.id for job in await stays] == ["a"]


async def test_jobs_taken_before_a_close_stay_the_takers(queue):
    consumer = queue.consumer([LANE])
    async with background(ask(queue, request(id="a"))) as (caller,):
        (job,) = await consumer.take(1)
        consumer.close()
        assert job.reply(answer(job.request))
        assert (await caller).id == "a"


# --- drained


async def test_drained_waits_for_every_accepted_request(queue):
    calls = [ask(queue, request(id="0")), ask(queue, request(id="1")), refusal(ask(queue, request(id="2")))]
    async with background(*calls) as callers:
        answered, cancelled = await take(queue, 2)
        async with background(queue.drained(LANE)) as (draining,):
            answered.reply(answer(answered.request))
            callers[1].cancel()
            await asyncio.wait(callers[:2])
            assert cancelled.done
            await settle()
            assert not draining.done()
            (last,) = await take(queue, 1)
            last.fail(errors.Internal("also an answer"))
            await draining


async def test_drained_of_an_empty_lane_returns_at_once(queue):
    await queue.drained(LANE)


async def test_two_may_wait_for_the_same_lane_to_drain(queue):
    async with background(ask(queue, request())):
        (job,) = await take(queue, 1)
        async with background(queue.drained(LANE), queue.drained(LANE)) as waiting:
            await settle()
            job.reply(answer(job.request))
            await asyncio.gather(*waiting)


async def test_a_lane_serves_again_after_it_was_drained(queue):
    await queue.drained(LANE)
    async with background(ask(queue, request(id="a"))) as (caller,):
        (job,) = await take(queue, 1)
        job.reply(answer(job.request))
        assert (await caller).id == "a"


# --- pools


async def test_a_pool_is_what_its_workers_last_published(queue):
    assert queue.pool("m") is None
    queue.publish(PoolState("m", (VersionState("1", "LOADING"),)))
    queue.publish(PoolState("b", reason="its config does not parse"))
    ready = PoolState("m", (VersionState("1", "READY"),))
    queue.publish(ready)
    assert queue.pool("m") == ready
    assert [pool.model for pool in queue.pools()] == ["b", "m"]
    queue.withdraw("b")
    queue.withdraw("b")
    assert queue.pool("b") is None
    assert queue.pools() == [ready]


# --- commands


async def test_commands_reach_the_worker_in_order_and_report_back(queue):
    commands = [Load("a"), Load("b", {"config": "{}"}), Unload("a")]
    orders = queue.commands()
    async with background(*(queue.send(command) for command in commands)) as senders:
        received = [await anext(orders) for _ in commands]
        assert [order.command for order in received] == commands
        received[0].finish(None)
        await senders[0]
        await settle()
        assert not senders[1].done()
        received[2].finish(None)
        received[1].finish(None)
        await asyncio.gather(*senders)
    await orders.aclose()


async def test_a_command_that_fails_raises_what_the_worker_reported(queue):
    orders = queue.commands()
    async with background(refusal(queue.send(Load("a")))) as (sender,):
        order = await anext(orders)
        error = errors.InvalidArgument("no such file")
        order.finish(error)
        order.finish(None)  # a second report changes nothing
        told = await sender
        assert (type(told), told.message) == (errors.InvalidArgument, "no such file")
    await orders.aclose()


async def test_a_worker_that_waits_for_commands_is_woken(queue):
    orders = queue.commands()
    async with background(anext(orders)) as (waiting,):
        await settle()
        async with background(queue.send(Load("a"))) as (sender,):
            order = await waiting
            order.finish(None)
            await sender
    await orders.aclose()


# --- close


async def test_close_answers_all_that_still_waits_and_accepts_no_more(queue):
    waiting = [ask(queue, request()), ask(queue, request()), queue.send(Load("m"))]
    async with background(*map(refusal, waiting)) as callers:
        (held,) = await take(queue, 1)
        await settle()
        queue.close()
        assert not held.reply(answer(held.request))
        told = [await caller for caller in callers]
    told += [await refusal(ask(queue, request())), await refusal(queue.send(Unload("m")))]
    assert [(type(error), error.message) for error in told] == [(errors.Unavailable, "Server not ready")] * 5
