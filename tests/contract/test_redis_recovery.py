"""What a fleet does when Redis stands still, is full or forgets, and when what processes left behind is found."""

# ruff: noqa: ASYNC110, SIM117 - what other processes do sets no event here; and each process has a block of its own
import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gateway import errors
from gateway.queues.base import Load, Unload
from gateway.queues.redis import directory, events
from gateway.queues.redis import queue as queue_module
from gateway.queues.redis.beside import INLINE
from gateway.queues.redis.lane import RedisConsumer
from gateway.queues.redis.queue import RedisQueue
from gateway.redis_client import RedisClient, RedisOptions
from tests.fleet_support import READY, Mortal, emptied, entries, hurry, known, proxied, take
from tests.redis_support import fleet_queue, options, redis_server
from tests.support import LANE, answer, ask, background, refusal, request, settle, tensor

pytestmark = pytest.mark.slow

LARGE = tensor(np.arange(INLINE // 2, dtype=np.float32).reshape(1, -1))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture
def fleet(redis_url: str) -> RedisOptions:
    return options(redis_url)


def large(**more):
    """A request that does not fit into the stream."""
    return request(inputs={"IN": LARGE}, **more)


async def forget(queue: RedisQueue, *keys: str) -> None:
    for key in keys:
        await queue.client.call("DEL", key)


async def sent(queue: RedisQueue) -> None:
    """Wait until requests are in their streams."""
    calls = queue._calls._calls
    await known(lambda: bool(calls) and all(call.entries for call in calls.values()))


async def answering(queue: RedisQueue) -> None:
    """A worker that does its work."""
    await answered_from(queue.consumer([LANE], 8))


async def answered_from(consumer: RedisConsumer) -> None:
    while jobs := await consumer.take(8):
        for job in jobs:
            job.reply(answer(job.request))


def answers_of(queue: RedisQueue) -> list[Path]:
    """The files of its large answers."""
    return list(Path("/dev/shm").glob(f"lockgate-*answer.{queue.process}.*"))


def link(path: str, target: str) -> None:
    Path(path).symlink_to(target)


def streams(queue: RedisQueue) -> list[str]:
    return [queue.client.keys.requests("m", "1", each) for each in (1, 2, 3)]


# --- silence that is no death


async def test_who_was_cut_off_declares_nobody_dead(redis_url, tmp_path):
    """Replies are held back for longer than an announcement lives; all that was announced has lapsed by then."""
    async with proxied(redis_url, str(tmp_path)) as (proxy, of):
        async with fleet_queue(of, "gateway") as gateway, fleet_queue(of, "worker") as held:
            held.publish(READY)
            await known(lambda: gateway.pool("m") is not None and len(held._directory.members) == 1)
            proxy.down.paused = True
            await asyncio.sleep(3 * directory._LIVES)
            proxy.down.paused = False
            looked = gateway._directory._looked, held._directory._looked
            await known(lambda: gateway._directory._looked > looked[0] and held._directory._looked > looked[1])
            assert gateway.pool("m").versions
            assert not gateway._directory.dead
            assert not held._directory.dead


async def test_a_full_redis_kills_nobody():
    with redis_server() as url:
        of = options(url)
        async with fleet_queue(of, "gateway") as gateway, fleet_queue(of, "worker") as held:
            held.publish(READY)
            await known(lambda: gateway.pool("m") is not None and len(held._directory.members) == 1)
            await gateway.client.call("CONFIG", "SET", "maxmemory", 1)
            error = await refusal(ask(gateway, request()))
            assert isinstance(error, errors.Unavailable)
            assert "its memory is full" in error.message
            await asyncio.sleep(3 * directory._LIVES)
            assert not gateway._directory.dead
            assert not held._directory.dead
            assert await gateway.client.call("EXISTS", gateway.client.keys.process(held.process))
            await gateway.client.call("CONFIG", "SET", "maxmemory", 0)
            async with background(ask(gateway, request(id="a"))) as (caller,):
                (job,) = await take(held, 1)
                job.reply(answer(job.request))
                assert (await caller).id == "a"


async def test_a_live_process_that_redis_forgot_is_not_dead(fleet, monkeypatch):
    hurry(monkeypatch, lives=2.0)
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        held.publish(READY)
        await known(lambda: gateway.pool("m") is not None and gateway._directory.sure)
        keys = gateway.client.keys
        await forget(gateway, keys.processes, keys.process(held.process), keys.holding(held.process), keys.models)
        await gateway._directory.refresh()
        assert held.process in gateway._directory.members
        await known(lambda: held._directory._written[0] == b"")  # it notices that what it holds is not there
        async with fleet_queue(fleet, "gateway") as newcomer:
            await known(lambda: newcomer.pool("m") is not None and bool(newcomer.pool("m").versions))


async def test_names_of_long_dead_processes_do_not_stay(fleet):
    async with fleet_queue(fleet, "gateway") as gateway:
        await gateway.client.call("HSET", gateway.client.keys.processes, "worker-of-old", "worker")
        while await gateway.client.call("HEXISTS", gateway.client.keys.processes, "worker-of-old"):
            await asyncio.sleep(0.01)
        assert await gateway.client.call("HEXISTS", gateway.client.keys.processes, gateway.process)


async def test_a_stranger_keeps_what_it_runs_while_nothing_is_sure(fleet):
    """A worker that has just begun knows nobody yet; others may run long batches."""
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        async with background(ask(gateway, request(id="a"))) as (caller,):
            (job,) = await take(held, 1)
            async with fleet_queue(fleet, "worker") as newcomer:
                newcomer.consumer([LANE], 8)
                newcomer._directory.members.clear()
                newcomer._directory._deaf()
                for _ in range(3):
                    newcomer._directory.members.clear()
                    await newcomer._recover()
                assert newcomer.counts.recovered == 0
                assert not newcomer._lanes[LANE].held
            job.reply(answer(job.request))
            assert (await caller).id == "a"


# --- what Redis has lost


async def test_a_request_is_missed_though_others_have_refilled_its_stream(fleet):
    """As after FLUSHALL: nothing tells of it but that the entry is not there."""
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "gateway") as other:
        async with background(ask(gateway, request(id="a")), ask(other, request(id="b"))) as callers:
            await sent(gateway)
            await forget(gateway, *streams(gateway))
            async with background(ask(other, request(id="c"))) as (late,):
                async with fleet_queue(fleet, "worker") as held:
                    jobs = await take(held, 3)
                    assert sorted(job.request.id for job in jobs) == ["a", "b", "c"]
                    for job in jobs:
                        job.reply(answer(job.request))
                    assert [(await caller).id for caller in (*callers, late)] == ["a", "b", "c"]
        assert gateway.counts.resubmitted == 1


@pytest.mark.parametrize("shared", [True, False])
async def test_tensors_that_were_lost_are_sent_again(fleet, shared):
    async with fleet_queue(fleet, "gateway") as gateway:
        if not shared:
            gateway._calls._share = lambda _: False
        async with background(ask(gateway, large(id="a"))) as (caller,):
            await sent(gateway)
            (call,) = gateway._calls._calls.values()
            gateway._link.payloads.remove(call.reference)
            async with fleet_queue(fleet, "worker") as held:
                (job,) = await take(held, 1)
                assert np.array_equal(job.request.inputs["IN"].array, LARGE.array)
                job.reply(answer(job.request))
                assert (await caller).id == "a"
        await emptied(gateway)
        assert gateway.counts.resubmitted == 1


async def test_an_answer_whose_tensors_were_lost_is_made_again(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        consumer = held.consumer([LANE], 8)
        get, lost = gateway._link.payloads.get, []

        async def lose_once(reference):
            if not lost:
                lost.append(reference)
                held._link.payloads.remove(reference)
            return await get(reference)

        gateway._link.payloads.get = lose_once
        async with background(ask(gateway, request(id="a"))) as (caller,):
            for _ in range(2):
                (job,) = await take(held, 1, consumer)
                job.reply(answer(job.request, OUT=LARGE))
            assert np.array_equal((await caller).outputs["OUT"].array, LARGE.array)
        assert len(lost) == 1


async def test_large_answers_that_nobody_waits_for_leave_no_file(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        async with background(ask(gateway, request(id="a"))) as (caller,):
            (job,) = await take(held, 1)
            held._events._on.clear()  # the cancel does not come through
            caller.cancel()
            await asyncio.wait([caller])
            assert job.reply(answer(job.request, OUT=LARGE))
            await known(lambda: gateway.counts.duplicates == 1)
            assert not answers_of(held)


async def test_a_lost_connection_does_not_lose_a_large_answer(redis_url, tmp_path):
    """The answer cannot be put beside the stream, so the request is run again."""
    async with proxied(redis_url, str(tmp_path)) as (proxy, of), RedisClient(of) as direct:
        async with RedisQueue(direct, "gateway") as gateway, fleet_queue(of, "worker") as held:
            held._link.payloads.host = None
            consumer = held.consumer([LANE], 8)
            async with background(ask(gateway, request(id="a"))) as (caller,):
                (job,) = await take(held, 1, consumer)
                proxy.refuse = True
                proxy.reset()
                await known(lambda: not held.client.connected)
                job.reply(answer(job.request, OUT=LARGE))
                proxy.refuse = False
                (job,) = await take(held, 1, consumer)
                job.reply(answer(job.request, OUT=LARGE))
                assert (await caller).id == "a"


async def test_an_answer_is_stored_before_its_request_is_acknowledged(fleet):
    """Also where what was left unacknowledged is looked after in that very moment."""
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        async with background(ask(gateway, request(id="a"))) as (caller,):
            (job,) = await take(held, 1)
            call, sent = held.client.call, []
            held.client.call = lambda *command: (sent.append(command[0]), call(*command))[1]
            job.reply(answer(job.request))
            held._outbox.retry()
            assert (await caller).id == "a"
            assert "XADD" in sent
            assert "XACK" not in sent[: sent.index("XADD")]


# --- entries that change hands


async def test_a_worker_that_is_busy_takes_over_all_that_a_dead_one_held(fleet):
    mortal = Mortal(fleet, "worker")
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as heir:
        async with mortal as doomed, background(*(ask(gateway, request(id=str(n))) for n in range(10))) as callers:
            await take(doomed, 8)
            busy = await take(heir, 2, heir.consumer([LANE], 2))  # all that it may have
            await mortal.die()
            await known(lambda: len(heir._lanes[LANE].held) == 10)
            for job in busy:
                job.reply(answer(job.request))
            async with background(answering(heir)):
                assert [(await caller).id for caller in callers] == [str(n) for n in range(10)]


async def test_one_of_many_kills_its_workers_and_the_others_are_answered(fleet):
    """Nobody is buried for what was only waiting beside the one that kills."""
    names = [str(n) for n in range(4)] + ["poison"]
    async with fleet_queue(fleet, "gateway") as gateway:
        poisoned = refusal(ask(gateway, request(id="poison")))
        async with background(*(ask(gateway, request(id=name)) for name in names[:-1]), poisoned) as callers:
            first, second = Mortal(fleet, "worker"), Mortal(fleet, "worker")
            async with first as doomed:
                assert sorted(job.request.id for job in await take(doomed, 5)) == names  # one batch
            async with second as doomed:
                consumer = doomed.consumer([LANE], 8)
                while (job := (await consumer.take(8))[0]).request.id != "poison":
                    job.reply(answer(job.request))
            async with fleet_queue(fleet, "worker") as heir, background(answering(heir)):
                error = await callers[-1]
                assert isinstance(error, errors.Internal)
                assert "lost 2 workers" in error.message
                assert [(await caller).id for caller in callers[:-1]] == names[:-1]
                assert heir.counts.dead_letters == 1


async def test_what_a_revived_worker_has_answered_is_not_tried(fleet):
    """It was not dead: its answer comes while another has taken the request over and not begun it yet."""
    mortal = Mortal(fleet, "worker")
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as heir:
        async with mortal as frozen, background(*(ask(gateway, request(id=name)) for name in "ab")) as callers:
            jobs = await take(frozen, 2)
            heir._directory._forget_member(frozen.process, heir._directory.members[frozen.process])
            heir._directory._see = lambda *_: asyncio.sleep(0)  # it stays dead to this one
            consumer = heir.consumer([LANE], 8)
            (tried,) = await consumer.take(8)
            for job in jobs:
                job.reply(answer(job.request))
            assert [(await caller).id for caller in callers] == ["a", "b"]
            tried.reply(answer(tried.request))
            await emptied(gateway)
            await known(lambda: not heir._lanes[LANE].held)


async def test_two_heirs_share_what_a_dead_worker_held(fleet):
    mortal = Mortal(fleet, "worker")
    async with fleet_queue(fleet, "gateway") as gateway:
        async with fleet_queue(fleet, "worker") as one, fleet_queue(fleet, "worker") as two:
            for heir in (one, two):
                heir.publish(READY)
            await known(lambda: all(list(each._directory.others(LANE)) for each in (one, two)))
            async with mortal as doomed, background(*(ask(gateway, request(id=str(n))) for n in range(8))) as callers:
                await take(doomed, 8)
                await mortal.die()
                async with background(answering(one), answering(two)):
                    assert [(await caller).id for caller in callers] == [str(n) for n in range(8)]
                assert one.counts.recovered + two.counts.recovered == 8


async def test_the_name_of_a_dead_worker_is_struck_off_its_group(fleet, monkeypatch):
    monkeypatch.setattr("gateway.queues.redis.recovery._ROUNDS", 1)
    mortal = Mortal(fleet, "worker")
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as heir:
        async with mortal as doomed, background(ask(gateway, request(id="a"))) as (caller,):
            await take(doomed, 1)
            await mortal.die()
            (job,) = await take(heir, 1)
            job.reply(answer(job.request))
            await caller
        stream = streams(heir)[1]
        while len(found := await heir.client.call("XINFO", "CONSUMERS", stream, "workers")) > 1:
            await asyncio.sleep(0.01)
        assert heir.process.encode() in found[0]


async def test_what_waited_past_its_deadline_makes_room_at_once(fleet, monkeypatch):
    """A worker that comes late drops what nobody waits for any more, as fast as it can read."""
    monkeypatch.setattr(queue_module, "BEAT", 2.0)  # twenty of these are more than the test has
    async with fleet_queue(fleet, "gateway") as gateway:
        deadline = time.monotonic() + 0.1
        expiring = [refusal(ask(gateway, request(id=str(n), deadline=deadline))) for n in range(40)]
        async with background(*expiring, ask(gateway, request(id="live"))) as callers:
            for caller in callers[:-1]:
                assert isinstance(await caller, errors.DeadlineExceeded)
            async with fleet_queue(fleet, "worker") as held:
                (job,) = await take(held, 1, held.consumer([LANE], 2))
                assert job.request.id == "live"
                job.reply(answer(job.request))
                assert (await callers[-1]).id == "live"
        await emptied(gateway)


async def test_what_could_not_be_handed_over_stays(fleet):
    """Nobody takes it here, and giving it away fails: it waits for the next consumer."""
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        consumer = held.consumer([LANE], 8)
        async with background(ask(gateway, request(id="a"))) as (caller,):
            await known(lambda: len(held._lanes[LANE].held) == 1)
            consumer.close()
            await held._recover()
            (job,) = await take(held, 1)
            job.reply(answer(job.request))
            assert (await caller).id == "a"


async def test_a_message_for_a_newer_worker_stays_with_it(fleet, monkeypatch):
    """It is given away once, and not taken back in the same breath."""
    given = []
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as old:
        old.consumer([LANE], 8)
        monkeypatch.setattr("gateway.queues.redis.lane.version_of", lambda header: header[0] + 1)
        call = old.client.call
        old.client.call = lambda *command: (given.append(command) if command[0] == "XCLAIM" else None, call(*command))[
            1
        ]
        async with fleet_queue(fleet, "worker") as new:
            new._link.reads += 1
            new.publish(READY)
            async with background(ask(gateway, request(id="a"))) as (caller,):
                (job,) = await take(new, 1)
                job.reply(answer(job.request))
                assert (await caller).id == "a"
    assert all(command[3] == new.process for command in given)


# --- commands


async def test_a_command_that_redis_lost_is_repeated(fleet, monkeypatch):
    monkeypatch.setattr(events, "_ASK_AGAIN", 0.1)
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        await known(lambda: gateway._directory.workers() == {held.process})
        hear, heard = held._events._hear, []
        held._events._hear = heard.append  # the first one is lost
        async with background(gateway.send(Load("m"))) as (sender,):
            await known(lambda: bool(heard))
            held._events._hear = hear
            order = await anext(held.commands())
            assert order.command == Load("m")
            order.finish(None)
            await sender


async def test_a_command_is_carried_out_once_however_often_it_is_repeated(fleet, monkeypatch):
    monkeypatch.setattr(events, "_ASK_AGAIN", 0.05)
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        await known(lambda: gateway._directory.workers() == {held.process})
        orders = held.commands()
        async with background(gateway.send(Load("m"))) as (sender,):
            order = await anext(orders)
            tell, told = held._outbox.tell, []
            held._outbox.tell = lambda *what: told.append(what)
            order.finish(None)  # the report is lost
            await known(lambda: len(told) > 2)
            held._outbox.tell = tell
            await sender
            assert not held._events._orders
        await orders.aclose()


async def test_a_worker_that_joins_later_learns_what_was_commanded(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        await known(lambda: gateway._directory.workers() == {held.process})
        assert await held.wanted() == []
        async with background(obeying(held)):
            await gateway.send(Load("m", {"config": "{}"}))
            await gateway.send(Load("n"))
            await gateway.send(Unload("n"))
            error = await refusal(gateway.send(Load("broken")))
            assert error.message == "no"
            await refusal(gateway.send(Load("n", {"broken": "yes"})))
        async with fleet_queue(fleet, "worker") as late:
            found = {command.model: command for command in await late.wanted()}
            assert found == {"m": Load("m", {"config": "{}"}), "n": Unload("n")}
        async with fleet_queue(fleet, "worker", key=b"0123456789abcdef") as stranger:
            assert await stranger.wanted() == []  # what it is not signed for, it does not do
            assert stranger.counts.damaged == 2


async def obeying(queue: RedisQueue) -> None:
    async for order in queue.commands():
        broken = "broken" in order.command.model or (
            isinstance(order.command, Load) and "broken" in order.command.parameters
        )
        order.finish(errors.InvalidArgument("no") if broken else None)


async def test_a_worker_that_does_not_understand_commands_is_given_up(fleet, monkeypatch, caplog):
    """One with another key: it is alive, and believes nothing."""
    monkeypatch.setattr(events, "_ASK_AGAIN", 0.05)
    ours, theirs = b"0123456789abcdef", b"fedcba9876543210"
    async with fleet_queue(fleet, "gateway", key=ours) as gateway, fleet_queue(fleet, "worker", key=theirs) as held:
        await known(lambda: gateway._directory.workers() == {held.process})
        error = await refusal(gateway.send(Load("m")))
        assert isinstance(error, errors.Unavailable)
        assert "--queue-key-file" in error.message
        assert held.counts.damaged > 2
        assert len([line for line in caplog.messages if line.startswith("message_damaged")]) <= 2  # one in each process


# --- starting and stopping


async def test_two_workers_that_unload_at_once_leave_nothing_behind(fleet):
    """Each of them believes that the other one goes on, until it hears otherwise."""
    unloading = replace(READY, versions=(replace(READY.versions[0], state="UNLOADING"),))
    async with fleet_queue(fleet, "gateway") as gateway:
        async with fleet_queue(fleet, "worker") as one, fleet_queue(fleet, "worker") as two:
            for held in (one, two):
                held.publish(READY)
            await known(lambda: all(list(each._directory.others(LANE)) for each in (one, two)))
            consumers = [held.consumer([LANE], 2) for held in (one, two)]
            async with background(*(ask(gateway, request(id=str(n))) for n in range(20))) as callers:
                await known(lambda: len(one._lanes[LANE].held) + len(two._lanes[LANE].held) >= 4)
                for held in (one, two):
                    held.publish(unloading)
                async with background(one.drained(LANE), two.drained(LANE)) as stopping:
                    await settle()
                    async with background(*map(answered_from, consumers)):
                        await asyncio.wait(stopping)
                        for consumer in consumers:
                            consumer.close()
                assert [(await caller).id for caller in callers] == [str(n) for n in range(20)]


async def test_a_worker_that_stops_without_redis_does_not_wait_for_it(redis_url, tmp_path):
    async with proxied(redis_url, str(tmp_path)) as (proxy, of):
        async with fleet_queue(of, "worker") as held:
            held.consumer([LANE], 8)
            proxy.refuse = True
            proxy.reset()
            await known(lambda: not held.client.connected)
            await held.drained(LANE)


async def test_processes_that_start_before_redis_find_each_other_later(tmp_path):
    of = options(f"unix://{tmp_path}/s")
    async with fleet_queue(of, "gateway") as gateway, fleet_queue(of, "worker") as held:
        held.publish(READY)
        async with background(ask(gateway, request(id="a")), take(held, 1)) as (caller, taking):
            await settle()
            assert not gateway.healthy()
            with redis_server() as url:
                link(f"{tmp_path}/s", url.removeprefix("unix://"))
                (job,) = await taking
                job.reply(answer(job.request))
                assert (await caller).id == "a"
                await known(lambda: gateway.pool("m") is not None)
                assert gateway.healthy()


async def test_a_hundred_losses_of_the_connection_leave_no_task_and_no_entry(redis_url, tmp_path):
    async with proxied(redis_url, str(tmp_path)) as (proxy, of):
        async with fleet_queue(of, "gateway") as gateway, fleet_queue(of, "worker") as held:
            async with background(answering(held)):
                await ask(gateway, request(id="first"))
                before = tasks()
                for number in range(100):
                    async with background(ask(gateway, request(id=str(number)))) as (caller,):
                        await asyncio.sleep(0)
                        proxy.reset()
                        assert (await caller).id == str(number)
                await known(lambda: tasks() <= before)
                await emptied(gateway)
                assert await entries(gateway) == 0


def tasks() -> int:
    """Tasks of this process but for those of proxied connections."""
    return len([task for task in asyncio.all_tasks() if "fault_proxy" not in str(task.get_coro())])
