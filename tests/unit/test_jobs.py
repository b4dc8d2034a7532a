"""Jobs in a real Redis: each ends once, whoever dies, and what is told of it is what happened."""

import asyncio
import time
from contextlib import aclosing

import numpy as np
import pytest

from gateway import errors
from gateway.jobs.leases import Leases
from gateway.jobs.record import STATES
from gateway.jobs.runner import RunnerOptions
from gateway.jobs.store import StoreOptions
from gateway.message import BadMessage
from tests.jobs_support import LEASE, Model, die, gateway
from tests.redis_support import options
from tests.support import answer, background, refusal, tensor


async def test_a_job_is_queued_run_and_done(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        job = await one.submit(3.0)
        assert (job.state, job.attempts, job.tenant, job.model) == ("queued", 0, "", "m") or job.state != "queued"
        ended = await one.ended(job)
        assert (ended.state, ended.attempts, ended.crashes) == ("done", 1, 0)
        assert ended.created <= (ended.started or 0) <= (ended.finished or 0)
        assert await one.result(job) == [[6.0, 6.0]]


async def test_ids_cannot_be_guessed(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        ids = {(await one.submit()).id for _ in range(5)}
        assert len(ids) == 5
        assert all(len(bytes.fromhex(each)) == 16 for each in ids)


async def test_a_job_has_no_deadline_but_its_expiry_and_the_least_urgent_priority(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        await one.ended(await one.submit())
        await one.ended(await one.submit(fields={"parameters": {"priority": 2, "timeout": 5}}))
        first, second = one.model.seen
        assert first.deadline is not None
        assert first.deadline > time.monotonic() + 3500  # a run that hangs ends some time
        assert first.priority == 9
        assert second.parameters == {"priority": 2}  # what the service makes of it is the service's business
        assert second.priority == 0


async def test_the_queue_is_in_order_and_tells_positions(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        jobs = [await one.submit(n) for n in range(3)]
        assert [(await one.jobs.get(job.id, "")).position for job in jobs] == [1, 2, 3]
        await one.jobs.cancel(jobs[0].id, "")
        assert [(await one.jobs.get(job.id, "")).position for job in jobs] == [None, 1, 2]


async def test_the_number_of_jobs_run_at_once_is_bounded(redis_url: str) -> None:
    async with gateway(options(redis_url), runner=RunnerOptions(limit=2, lease=5)) as one:
        one.model.free.clear()
        jobs = [await one.submit(n) for n in range(4)]
        for _ in range(2):
            await one.model.entered.acquire()
        await one.jobs.cancel(jobs[0].id, "")  # its place is taken by the third
        await one.model.entered.acquire()
        assert one.model.entered.locked()
        assert [request.inputs["IN"].array[0, 0] for request in one.model.seen] == [0, 1, 2]
        one.model.free.set()
        for job in jobs[1:]:
            assert (await one.ended(job)).state == "done"


async def test_the_bytes_run_at_once_are_bounded(redis_url: str) -> None:
    async with gateway(options(redis_url), runner=RunnerOptions(max_bytes=1, lease=5)) as one:
        one.model.free.clear()
        await one.submit()
        second = await one.submit()
        await one.model.entered.acquire()
        assert (await one.jobs.get(second.id, "")).state == "queued"
        one.model.free.set()
        await one.ended(second)


# --- errors


async def test_what_the_model_refuses_has_failed_with_that_error(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        one.model.problems = [errors.InvalidArgument("no such shape")]
        job = await one.ended(await one.submit())
        assert (job.state, job.attempts) == ("failed", 1)
        error = await one.jobs.result(job)
        assert isinstance(error, errors.InvalidArgument)
        assert error.message == "no such shape"


async def test_a_fault_is_the_end_of_its_job_and_says_nothing(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        one.model.problems = [KeyError("/secret")]
        job = await one.ended(await one.submit())
        assert job.state == "failed"
        assert isinstance(job.error, errors.Internal)
        assert "secret" not in job.error.message
        assert (await one.ended(await one.submit())).state == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        errors.Unavailable("not ready"),
        errors.unknown_model("m"),
        errors.Cancelled("stopping"),
        errors.deadline_passed(),  # the run's, not the job's
    ],
)
async def test_what_is_not_available_now_is_run_again(
    redis_url: str, problem: errors.GatewayError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.jobs.runner._FIRST", 0.01)
    async with gateway(options(redis_url)) as one:
        one.model.problems = [problem]
        one.model.free.clear()
        job = await one.submit(2.0)
        await one.model.entered.acquire()
        one.model.free.set()
        ended = await one.ended(job)
        assert (ended.state, ended.attempts, ended.error) == ("done", 2, None)


async def test_a_job_that_waits_says_why(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        one.model.problems = [errors.Unavailable("not ready")]
        job = await one.until(await one.submit(), lambda job: job.attempts == 1 and job.state == "queued")
        assert isinstance(job.error, errors.Unavailable)
        assert job.error.message == "not ready"


async def test_a_busy_model_keeps_the_job_in_its_place(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        one.model.problems = [errors.Overloaded("busy", 0.01), errors.Shed("dropped", 0.01)]
        job = await one.ended(await one.submit())
        assert (job.state, job.attempts, len(one.model.seen)) == ("done", 1, 3)


async def test_a_job_that_expires_has_failed(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        job = await one.ended(await one.submit(fields={"deadline": time.monotonic() - 1}))
        assert job.state == "failed"
        assert isinstance(job.error, errors.DeadlineExceeded)
        assert one.model.seen == []


async def test_a_damaged_request_is_a_dead_letter(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of, runs=False) as one:
        job = await one.submit()
        await one.client.call("HSET", one.client.keys.job(job.id), "payload", b"123")
    async with gateway(of) as other:
        ended = await other.ended(job)
        assert ended.state == "dead"
        assert ended.error is not None


async def test_a_request_sealed_with_another_key_is_a_dead_letter_and_not_run(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of, runs=False, key=b"a" * 32) as one:
        job = await one.submit()
    async with gateway(of, key=b"b" * 32) as other:
        ended = await other.ended(job)
        assert ended.state == "dead"
        assert "--queue-key-file" in ended.error.message  # type: ignore[union-attr]
        assert other.model.seen == []


async def test_a_result_sealed_with_another_key_is_not_given_out(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of, key=b"a" * 32) as one:
        job = await one.ended(await one.submit())
        assert await one.result(job) == [[2.0, 2.0]]
        async with gateway(of, runs=False, key=b"b" * 32) as other:
            assert isinstance(await refusal(other.jobs.result(job)), BadMessage)


@pytest.mark.parametrize("field", ["state", "created", "attempts", "v"])
async def test_a_record_that_cannot_be_read_harms_no_other(redis_url: str, field: str) -> None:
    of = options(redis_url)
    async with gateway(of, runs=False) as one:
        bad = await one.submit()
        await one.client.call("HSET", one.client.keys.job(bad.id), field, b"\xff\x00x")
        await one.client.call("XADD", one.client.keys.job_events(), "*", "what", "ever")
    async with gateway(of) as other:
        assert (await other.ended(await other.submit())).state == "done"
        assert isinstance(await refusal(other.jobs.get(bad.id, "")), errors.NotFound)
        assert [job.state for job in await other.jobs.list("", STATES, 10)] == ["done"]


async def test_a_newer_record_is_left_for_newer_gateways(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        job = await one.submit()
        await one.client.call("HSET", one.client.keys.job(job.id), "v", 99)
        leases = Leases(one.jobs.store, LEASE)
        assert await leases.due(5) == [job.id]
        assert await leases.claim(job.id) is None
        assert await leases.due(5) == []
        assert (await one.jobs.get(job.id, "")).state == "queued"


async def test_large_tensors_go_through(redis_url: str) -> None:
    async with gateway(options(redis_url), key=b"k" * 32) as one:
        job = await one.submit(3.0, fields={"rows": 200_000, "size": 1_600_000})
        await one.ended(job)
        result = await one.result(job)
        assert (len(result), result[-1]) == (200_000, [6.0, 6.0])


# --- once, and never lost


async def test_two_runners_share_the_jobs_and_each_is_run_once(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of) as one, gateway(of) as other:
        jobs = await asyncio.gather(*[one.submit(n) for n in range(60)])
        async with asyncio.TaskGroup() as group:
            ended = [group.create_task(other.ended(job)) for job in jobs]
        assert [(task.result().state, task.result().attempts) for task in ended] == [("done", 1)] * 60
        assert [await one.result(job) for job in jobs] == [[[2.0 * n, 2.0 * n]] for n in range(60)]
        values = [request.inputs["IN"].array[0, 0] for request in (*one.model.seen, *other.model.seen)]
        assert sorted(values) == list(range(60))


async def test_a_gateway_that_dies_loses_its_jobs_to_another(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of) as one:
        one.model.free.clear()
        job = await one.submit(4.0)
        await one.model.entered.acquire()
        await die(one)
        async with gateway(of) as other:
            ended = await other.ended(job)
            assert (ended.state, ended.attempts, ended.crashes) == ("done", 2, 1)
            assert await other.result(job) == [[8.0, 8.0]]


async def test_a_run_whose_lease_was_lost_changes_nothing(redis_url: str) -> None:
    """The first gateway was only slow: its result comes after another one's, and is dropped."""
    of = options(redis_url)
    async with gateway(of, runs=False) as one:
        leases = Leases(one.jobs.store, LEASE)
        job = await one.submit()
        slow = await leases.claim(job.id)
        assert slow is not None
        assert await leases.claim(job.id) is None
        with one.jobs.feed.subscribe(job.id) as inbox:
            while not await leases.recover():
                await inbox.next(LEASE / 4)
        quick = await leases.claim(job.id)
        assert quick is not None
        assert await leases.renew({job.id: slow.token}) == [job.id]
        assert not await leases.finish(slow, "failed", {})
        assert not await leases.postpone(slow, 0.0, None)
        assert await leases.finish(quick, "done", {"result": b"q"})
        assert not await leases.finish(slow, "done", {"result": b"s"})
        assert (await one.jobs.store.result(job.id))[0].header == b"q"
        assert (await one.jobs.store.counts()) == {**dict.fromkeys(STATES, 0), "done": 1}


async def test_ending_a_job_twice_is_ending_it_once(redis_url: str) -> None:
    """The reply was lost, so the runner asks again."""
    async with gateway(options(redis_url), runs=False) as one:
        leases = Leases(one.jobs.store, LEASE)
        claim = await leases.claim((await one.submit()).id)
        assert claim is not None
        assert await leases.finish(claim, "done", {"result": b"1"})
        assert await leases.finish(claim, "done", {"result": b"2"})
        assert (await one.jobs.store.result(claim.job.id))[0].header == b"1"


@pytest.mark.slow
async def test_leases_are_renewed_while_a_job_runs(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of) as one, gateway(of) as other:
        one.model.free.clear()
        other.model.free.clear()
        job = await one.submit()
        running = await one.until(job, lambda job: job.state == "running")
        score = await one.client.call("ZSCORE", one.client.keys.jobs("running"), job.id)
        with one.jobs.feed.subscribe(job.id) as inbox:
            later = score
            while float(later) < float(score) + 3 * LEASE:
                assert await inbox.next(LEASE / 4) is None  # nothing happens to it
                later = await one.client.call("ZSCORE", one.client.keys.jobs("running"), job.id)
        assert (await one.jobs.get(job.id, "")).lease == running.lease
        one.model.free.set()
        other.model.free.set()
        assert (await one.ended(job)).crashes == 0


async def test_the_third_gateway_that_dies_makes_a_dead_letter(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        leases = Leases(one.jobs.store, 0.0)
        job = await one.submit()
        for state in ("queued", "queued", "dead"):
            assert await leases.claim(job.id) is not None
            assert await leases.recover() == [(job.id, state)]
        dead = await one.jobs.get(job.id, "")
        assert (dead.attempts, dead.crashes) == (3, 3)
        assert "lost 3 times" in (await one.jobs.result(dead)).message  # type: ignore[union-attr]
        requeued = await one.jobs.store.requeue(job.id)
        assert (requeued.state, requeued.crashes, requeued.attempts, requeued.error) == ("queued", 0, 0, None)
        claim = await leases.claim(job.id)
        assert claim is not None
        assert claim.request.payload


async def test_a_stop_hands_its_jobs_back_at_once(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of, runs=False) as watching:
        async with gateway(of, runner=RunnerOptions(lease=1000)) as one:
            one.model.free.clear()
            job = await one.submit(1.0)
            await one.model.entered.acquire()
        found = await watching.jobs.get(job.id, "")
        assert (found.state, found.crashes) == ("queued", 0)
        async with gateway(of) as other:
            assert (await other.ended(job)).state == "done"


async def test_a_drain_waits_for_what_runs_and_takes_no_more(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        one.model.free.clear()
        first = await one.submit()
        await one.model.entered.acquire()
        assert one.runner is not None
        async with background(one.runner.drain()) as (drained,):
            second = await one.submit()
            await asyncio.sleep(0)
            assert not drained.done()
            one.model.free.set()
            await drained
        assert (await one.jobs.get(first.id, "")).state == "done"
        assert (await one.jobs.get(second.id, "")).state == "queued"


# --- cancelling


async def test_cancelling_at_every_state(redis_url: str) -> None:
    async with gateway(options(redis_url), runner=RunnerOptions(limit=1, lease=5)) as one:
        one.model.free.clear()
        running, queued = await one.submit(1.0), await one.submit(2.0)
        await one.model.entered.acquire()
        assert (await one.jobs.cancel(queued.id, "")).state == "cancelled"
        assert (await one.jobs.cancel(running.id, "")).state == "cancelled"
        await one.model.left.acquire()  # the run was ended, not only forgotten
        one.model.free.set()
        done = await one.ended(await one.submit(3.0))
        assert (await one.jobs.cancel(done.id, "")).state == "done"
        assert (await one.jobs.cancel(running.id, "")).state == "cancelled"  # as often as one likes
        one.model.problems = [errors.InvalidArgument("no")]
        failed = await one.ended(await one.submit(4.0))
        assert (await one.jobs.cancel(failed.id, "")).state == "failed"
        assert isinstance(await one.jobs.result(await one.jobs.get(running.id, "")), errors.Cancelled)
        assert len(one.model.seen) == 3
        assert await one.jobs.store.counts() == {
            **dict.fromkeys(STATES, 0), "cancelled": 2, "done": 1, "failed": 1,
        }  # fmt: skip


async def test_another_gateway_s_run_is_cancelled_too(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of) as one, gateway(of, runs=False) as other:
        one.model.free.clear()
        job = await other.submit()
        await one.model.entered.acquire()
        await other.jobs.cancel(job.id, "")
        await one.model.left.acquire()


async def test_a_cancelled_job_keeps_no_tensors(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        job = await one.submit()
        assert (await one.jobs.store.request(job.id)).payload
        await one.jobs.cancel(job.id, "")
        assert await one.jobs.store.request(job.id) == (b"", b"", b"")


# --- tenants, limits, time to live


async def test_tenants_see_their_own_jobs_only(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        job = await one.submit(tenant="a")
        for call in (one.jobs.get, one.jobs.cancel):
            error = await refusal(call(job.id, "b"))
            assert isinstance(error, errors.NotFound)
            assert str(error) == str(await refusal(call("0" * 32, "b"))).replace("0" * 32, job.id)
        async with aclosing(one.jobs.watch(job.id, "b")) as changes:
            assert isinstance(await refusal(anext(changes)), errors.NotFound)
        assert [found.id for found in await one.jobs.list("a", STATES, 10)] == [job.id]
        assert await one.jobs.list("b", STATES, 10) == []
        assert (await one.jobs.get(job.id, "a")).state == "queued"


@pytest.mark.parametrize("bad", ["", "x", "../../etc", "A" * 32, "0" * 31, "é" * 32, "{jobs}:" + "0" * 32])
async def test_an_id_that_is_none_is_not_found(redis_url: str, bad: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        assert isinstance(await refusal(one.jobs.get(bad, "")), errors.NotFound)


async def test_jobs_are_listed_by_state_newest_first(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        jobs = [await one.submit(n) for n in range(5)]
        await one.jobs.cancel(jobs[2].id, "")
        newest = [jobs[n].id for n in (4, 3, 1, 0)]
        assert [job.id for job in await one.jobs.list("", ["queued"], 10)] == newest
        assert [job.id for job in await one.jobs.list("", ["queued"], 2)] == newest[:2]
        assert [job.id for job in await one.jobs.list("", ["cancelled"], 2)] == [jobs[2].id]
        assert len(await one.jobs.list("", STATES, 10)) == 5


async def test_more_jobs_than_a_page_are_listed(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.jobs.store._PAGE", 3)
    async with gateway(options(redis_url), runs=False) as one:
        for n in range(8):
            await one.submit(tenant="ab"[n % 2])
        assert len(await one.jobs.list("a", ["queued"], 10)) == 4


async def test_the_number_of_jobs_is_bounded(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False, store=StoreOptions(max_jobs=2)) as one:
        jobs = [await one.submit() for _ in range(2)]
        await one.jobs.cancel(jobs[0].id, "")  # is kept, and so counts
        error = await refusal(one.submit())
        assert isinstance(error, errors.ResourceExhausted)
        assert "--max-jobs" in error.message
        assert error.retry_after


async def test_a_finished_job_is_kept_for_its_time_to_live(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(options(redis_url), store=StoreOptions(ttl=1000)) as one:
        job = await one.ended(await one.submit())
        assert 900_000 < await one.client.call("PTTL", one.client.keys.job(job.id)) <= 1_000_000
        await one.client.call("DEL", one.client.keys.job(job.id))  # as Redis does when the time is over
        assert isinstance(await refusal(one.jobs.get(job.id, "")), errors.NotFound)
        assert await one.jobs.list("", STATES, 5) == []
        now = one.jobs.store.clock()
        monkeypatch.setattr(one.jobs.store, "clock", lambda: now + 1001)
        await Leases(one.jobs.store, LEASE).prune()
        assert await one.jobs.store.counts() == dict.fromkeys(STATES, 0)


async def test_a_dead_letter_is_kept_for_a_week(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False, store=StoreOptions(ttl=1)) as one:
        leases = Leases(one.jobs.store, 0.0)
        job = await one.submit()
        for _ in range(3):
            await leases.claim(job.id)
            await leases.recover()
        assert await one.client.call("PTTL", one.client.keys.job(job.id)) > 6 * 86_400_000


async def test_only_what_failed_or_died_is_queued_again(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        done = await one.ended(await one.submit())
        assert isinstance(await refusal(one.jobs.store.requeue(done.id)), errors.InvalidArgument)
        assert isinstance(await refusal(one.jobs.store.requeue("0" * 32)), errors.NotFound)
        one.model.problems = [errors.Internal("the model raised")]
        failed = await one.ended(await one.submit())
        assert failed.state == "failed"
        await one.jobs.store.requeue(failed.id)
        assert (await one.ended(failed)).state == "done"


async def test_a_value_that_redis_cannot_hold_is_refused(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(options(redis_url)) as one:
        job = await one.submit(fields={"rows": 2})
        await one.ended(job)
        monkeypatch.setattr("gateway.jobs.store._LARGEST", 15)
        assert isinstance(await refusal(one.submit(fields={"rows": 2})), errors.InvalidArgument)
        monkeypatch.setattr("gateway.jobs.store._LARGEST", 8)
        monkeypatch.setattr(Model, "__call__", _twice)
        ended = await one.ended(await one.submit(fields={"rows": 1}))
        assert ended.state == "failed"
        assert "result of 16 bytes" in ended.error.message  # type: ignore[union-attr]


async def _twice(_: Model, of):
    yield answer(of, OUT=tensor(np.ones((2, 2))))


# --- idempotency keys


async def test_a_repeat_under_the_same_key_is_the_same_job(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of) as one, gateway(of) as other:
        first, second = await asyncio.gather(
            one.submit(1.0, fields={"idempotency_key": "k"}), other.submit(1.0, fields={"idempotency_key": "k"})
        )
        assert first.id == second.id
        await one.ended(first)
        assert (await other.submit(1.0, fields={"idempotency_key": "k"})).id == first.id
        assert isinstance(await refusal(one.submit(2.0, fields={"idempotency_key": "k"})), errors.Conflict)
        assert len(one.model.seen) + len(other.model.seen) == 1
        assert (await other.ended(await other.submit(1.0, tenant="b", fields={"idempotency_key": "k"}))).id != first.id
        assert len(one.model.seen) + len(other.model.seen) == 2


# --- watching


async def test_every_change_is_told_in_order_and_then_the_end(redis_url: str) -> None:
    of = options(redis_url)
    async with gateway(of, runs=False) as one:
        job = await one.submit()
        async with aclosing(one.jobs.watch(job.id, "")) as changes:
            assert (await anext(changes)).event.state == "queued"  # type: ignore[union-attr]
            model = Model()
            model.problems = [errors.Unavailable("later", 0.01)]
            async with gateway(of, model=model):
                seen = [(change.event.state, change.event.id) async for change in changes if change.event]
        assert [state for state, _ in seen] == ["running", "queued", "running", "done"]
        assert [identity for _, identity in seen] == sorted(identity for _, identity in seen)
        assert one.jobs.feed.subscribers == 0


async def test_watching_what_has_ended_tells_the_end_only(redis_url: str) -> None:
    async with gateway(options(redis_url)) as one:
        job = await one.ended(await one.submit())
        changes = [change async for change in one.jobs.watch(job.id, "")]
        assert [change.event.state for change in changes] == ["done"]  # type: ignore[union-attr]


async def test_a_missed_event_is_made_up_for_by_the_record(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        job = await one.submit()
        async with aclosing(one.jobs.watch(job.id, "", heartbeat=0.01)) as changes:
            await anext(changes)
            assert (await anext(changes)).event is None
            await one.client.call("HSET", one.client.keys.job(job.id), "state", "cancelled")
            states = [change.event.state async for change in changes if change.event]
        assert states == ["cancelled"]


async def test_a_stop_ends_the_watches(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False) as one:
        job = await one.submit()
        async with aclosing(one.jobs.watch(job.id, "")) as changes:
            await anext(changes)
            one.jobs.end_watches()
            assert [change async for change in changes] == []
