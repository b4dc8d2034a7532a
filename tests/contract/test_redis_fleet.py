"""What a fleet promises beyond `Queue`: processes join, stop and die, Redis forgets, and every request is answered once."""

# ruff: noqa: ASYNC110, SIM117 - what other processes do sets no event here; and each process has a block of its own
import asyncio
import time

import pytest

from gateway import errors, message
from gateway.queues.base import Capacity, Load, PoolState, Unload, VersionState
from gateway.queues.redis.queue import RedisQueue
from gateway.queues.redis.wanted import Wanted
from gateway.redis_client import RedisOptions
from tests.fleet_support import READY, Mortal, emptied, hurry, known, take
from tests.redis_support import fleet_queue, options
from tests.support import LANE, answer, ask, background, model_config, refusal, request, settle

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture(params=["redis_url", "debian_redis_url"])
def fleet(request: pytest.FixtureRequest) -> RedisOptions:
    return options(request.getfixturevalue(request.param))


# --- pools


async def test_a_gateway_learns_what_workers_hold_and_forgets_it_when_they_die(fleet):
    async with fleet_queue(fleet, "gateway") as gateway:
        assert gateway.pools() == []
        mortal = Mortal(fleet, "worker")
        async with mortal as held:
            held.publish(READY)
            await known(lambda: gateway.pool("m") is not None)
            pool = gateway.pool("m")
            assert [(state.version, state.state) for state in pool.versions] == [("1", "READY")]
            assert pool.versions[0].config == READY.versions[0].config
            await mortal.die()
            await known(lambda: not gateway.pool("m").versions)
            assert gateway.pool("m").reason == "no live worker holds it"


async def test_two_workers_are_one_pool_until_the_last_has_left(fleet):
    async with fleet_queue(fleet, "gateway") as gateway:
        async with fleet_queue(fleet, "worker") as one:
            one.publish(READY)
            async with fleet_queue(fleet, "worker") as two:
                two.publish(PoolState("m", (VersionState("1", "LOADING"),)))
                await known(lambda: len(gateway._directory.members) == 2 and gateway.pool("m") is not None)
                assert gateway.pool("m").versions[0].state == "READY"
                one.leave()
                await known(lambda: gateway.pool("m").versions[0].state == "LOADING")
        await known(lambda: not gateway.pool("m").versions)


async def test_a_gateway_that_starts_later_knows_a_model_whose_workers_are_gone(fleet):
    async with fleet_queue(fleet, "worker") as held:
        held.publish(READY)
        await known(lambda: bool(held._directory._known))
    async with fleet_queue(fleet, "gateway") as gateway:
        assert gateway.pool("m").reason == "no live worker holds it"
        assert gateway.pool("other") is None


async def test_a_model_that_left_the_repository_is_forgotten_by_all(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        held.publish(READY)
        await known(lambda: gateway.pool("m") is not None)
        held.withdraw("m")
        await known(lambda: gateway.pool("m") is None)


# --- death


async def test_what_a_dead_worker_held_is_run_by_another_alone(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as heir:
        mortal = Mortal(fleet, "worker")
        async with mortal as doomed:
            async with background(*(ask(gateway, request(id=str(n))) for n in range(3))) as callers:
                assert len(await take(doomed, 3)) == 3
                await mortal.die()
                consumer, signatures = heir.consumer([LANE], 8), set()
                for _ in range(3):
                    (job,) = await consumer.take(8)  # one at a time
                    signatures.add(job.request.signature)
                    assert job.reply(answer(job.request))
                assert len(signatures) == 3  # they join no batch
                assert [(await caller).id for caller in callers] == ["0", "1", "2"]
        await known(lambda: heir.counts.recovered == 3)
        await emptied(gateway)


async def test_a_request_that_kills_two_workers_is_buried_and_answered(fleet):
    async with fleet_queue(fleet, "gateway") as gateway:
        async with background(refusal(ask(gateway, request(id="poison")))) as (caller,):
            for _ in range(2):
                mortal = Mortal(fleet, "worker")
                async with mortal as doomed:
                    await take(doomed, 1)
            async with fleet_queue(fleet, "worker") as heir:
                heir.consumer([LANE], 8)
                error = await caller
                assert type(error) is errors.Internal
                assert "lost 2 workers" in error.message
                assert heir.counts.dead_letters == 1
                letters = await heir._client.call("XRANGE", heir._client.keys.dead("m", "1"), "-", "+")
                assert b"poison" in letters[0][1]


async def test_where_requests_are_contained_what_a_dead_worker_held_is_run_together(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as heir:
        mortal = Mortal(fleet, "worker")
        async with mortal as doomed:
            async with background(*(ask(gateway, request(id=str(n))) for n in range(3))) as callers:
                assert len(await take(doomed, 3)) == 3
                await mortal.die()
                jobs = await take(
                    heir, 3, heir.consumer([LANE], 8, contained=True)
                )  # none is answered before the third
                assert {job.request.signature for job in jobs} == {None}
                for job in jobs:
                    job.reply(answer(job.request))
                assert [(await caller).id for caller in callers] == ["0", "1", "2"]
        await emptied(gateway)


async def test_a_request_that_kills_workers_though_it_is_contained_is_buried_too(fleet):
    async with fleet_queue(fleet, "gateway") as gateway:
        async with background(refusal(ask(gateway, request(id="poison")))) as (caller,):
            for _ in range(3):
                mortal = Mortal(fleet, "worker")
                async with mortal as doomed:
                    await take(doomed, 1, doomed.consumer([LANE], 8, contained=True))
            async with fleet_queue(fleet, "worker") as heir:
                heir.consumer([LANE], 8, contained=True)
                error = await caller
                assert type(error) is errors.Internal
                assert "lost 3 workers" in error.message


async def test_a_dead_letter_that_cannot_be_kept_is_answered_and_logged(fleet, caplog):
    async with fleet_queue(fleet, "gateway") as gateway:
        await gateway.client.call("SET", gateway.client.keys.dead("m", "1"), "no stream")
        async with background(refusal(ask(gateway, request(id="poison")))) as (caller,):
            for _ in range(2):
                mortal = Mortal(fleet, "worker")
                async with mortal as doomed:
                    await take(doomed, 1)
            async with fleet_queue(fleet, "worker") as heir:
                heir.consumer([LANE], 8)
                assert type(await caller) is errors.Internal
                await known(lambda: "dead_letter_not_kept" in caplog.text)


async def test_an_answer_that_was_not_acknowledged_is_not_given_twice(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as heir:
        mortal = Mortal(fleet, "worker")
        async with mortal as doomed:
            doomed._outbox._acknowledge = lambda *_: None  # it dies just before
            async with background(ask(gateway, request(id="a"))) as (caller,):
                (job,) = await take(doomed, 1)
                job.reply(answer(job.request))
                assert (await caller).id == "a"
                await mortal.die()
                (again,) = await take(heir, 1)
                again.reply(answer(again.request))
                await known(lambda: gateway.counts.duplicates == 1)
        await emptied(gateway)


async def test_requests_of_a_dead_gateway_are_dropped(fleet):
    mortal = Mortal(fleet, "gateway")
    async with fleet_queue(fleet, "worker") as held, fleet_queue(fleet, "gateway") as other:
        async with mortal as doomed, background(*(refusal(ask(doomed, request(id=str(n)))) for n in range(5))):
            jobs = await take(held, 2)
            await mortal.die()
            await known(lambda: all(job.done for job in jobs))
        await emptied(other)
        assert held.counts.orphans >= 2


# --- stopping


async def test_a_worker_that_stops_hands_over_what_it_has_not_run(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as heir:
        heir.publish(READY)
        async with background(*(ask(gateway, request(id=str(n))) for n in range(6))) as callers:
            async with fleet_queue(fleet, "worker") as leaver:
                await known(lambda: any(leaver._directory.others(LANE)))
                consumer = leaver.consumer([LANE], 8)
                held = await take(leaver, 2, consumer)
                await known(lambda: len(leaver._lanes[LANE].held) == 6)
                leaver.leave()
                consumer.close()
                for job in held:
                    job.reply(answer(job.request))
            jobs = await take(heir, 4)
            assert all(job.request.signature is None for job in jobs)  # no delivery was counted
            for job in jobs:
                job.reply(answer(job.request))
            assert sorted([(await caller).id for caller in callers]) == [str(n) for n in range(6)]


async def test_drained_waits_for_what_other_gateways_sent_when_nobody_else_serves(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        consumer = held.consumer([LANE], 8)
        async with background(ask(gateway, request(id="a"))) as (caller,):
            (job,) = await take(held, 1, consumer)
            async with background(held.drained(LANE)) as (draining,):
                await settle()
                assert not draining.done()
                job.reply(answer(job.request))
                assert (await caller).id == "a"
                await draining


# --- loss


async def test_a_request_that_redis_lost_is_sent_again(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        async with background(ask(gateway, request(id="a"))) as (caller,):
            await known(lambda: all(call.entries for call in gateway._calls._calls.values()))
            client = gateway._client
            for each in (1, 2, 3):
                await client.call("DEL", client.keys.requests("m", "1", each))
            gateway._calls.suspect()
            await gateway._calls.audit()
            (job,) = await take(held, 1)
            job.reply(answer(job.request))
            assert (await caller).id == "a"
            assert gateway.counts.resubmitted == 1


async def test_an_entry_that_was_read_by_nobody_alive_is_found(fleet):
    """A reader that was cut off while its answer was on the way: the entry is its, and it never saw it."""
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        consumer = held.consumer([LANE], 8)
        stream = held._client.keys.requests("m", "1", 2)
        async with background(ask(gateway, request(id="first"))) as (caller,):
            (job,) = await take(held, 1, consumer)  # the group is there
            job.reply(answer(job.request))
            await caller
        reading = held._lanes[LANE]._task
        held._lanes[LANE].cancel()
        await asyncio.wait([reading])
        async with background(ask(gateway, request(id="a"))) as (caller,):
            lost = ("XREADGROUP", "GROUP", "workers", held.process, "COUNT", 1, "STREAMS", stream, ">")
            while not (await held._client.call(*lost) or (await held._client.call("XPENDING", stream, "workers"))[0]):
                await asyncio.sleep(0.01)
            (job,) = await take(held, 1, consumer)
            assert job.request.signature is None
            job.reply(answer(job.request))
            assert (await caller).id == "a"


# --- cancelling


async def test_a_cancelled_call_is_not_run_wherever_it_is(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        async with background(*(ask(gateway, request(id=str(n))) for n in range(4))) as callers:
            consumer = held.consumer([LANE], 2)
            jobs = await take(held, 2, consumer)
            for caller in callers[:3]:
                caller.cancel()
            await asyncio.wait(callers[:3])
            await known(lambda: all(job.done for job in jobs))
            (last,) = await take(held, 1, consumer)
            assert last.request.id == "3"
            last.reply(answer(last.request))
            assert (await callers[3]).id == "3"
        await emptied(gateway)


# --- commands


async def test_a_command_reaches_every_worker_and_one_that_dies_is_not_waited_for(fleet):
    mortal = Mortal(fleet, "worker")
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as one, mortal as doomed:
        await known(lambda: len(gateway._directory.workers()) == 2)
        first, second = one.commands(), doomed.commands()
        async with background(gateway.send(Load("m"))) as (sender,):
            order = await anext(first)
            await anext(second)
            order.finish(None)
            await mortal.die()
            await sender
        await first.aclose()


async def test_what_a_command_changed_is_known_to_every_gateway_when_it_is_answered(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "gateway") as other:
        async with fleet_queue(fleet, "worker") as worker:
            await known(lambda: len(gateway._directory.members) == len(other._directory.members) == 2)
            orders = worker.commands()
            for command, state in ((Load("m"), READY), (Unload("m"), PoolState("m", ()))):
                async with background(gateway.send(command)) as (sender,):
                    order = await anext(orders)
                    worker.publish(state)
                    order.finish(None)
                    await sender
                found = [queue.pool("m").versions for queue in (gateway, other)]
                assert [[each.state for each in versions] for versions in found] == [
                    ["READY"] * len(state.versions)
                ] * 2


async def test_a_worker_without_the_model_does_not_fail_a_command(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as one:
        async with fleet_queue(fleet, "worker") as two:
            await known(lambda: len(gateway._directory.workers()) == 2)
            first, second = one.commands(), two.commands()
            async with background(gateway.send(Load("m"))) as (sender,):
                (await anext(first)).finish(None)
                missing = "failed to load 'm', failed to poll from model repository"
                (await anext(second)).finish(errors.Internal(missing))
                await sender
            async with background(refusal(gateway.send(Load("m")))) as (sender,):
                (await anext(first)).finish(None)
                (await anext(second)).finish(errors.InvalidArgument("its config does not parse"))
                assert (await sender).message == "its config does not parse"


async def test_a_command_without_workers_says_so(fleet):
    async with fleet_queue(fleet, "gateway") as gateway:
        error = await refusal(gateway.send(Load("m")))
        assert "no worker is alive" in error.message


async def test_the_files_of_a_load_command_are_kept_once_and_not_in_the_events(fleet, monkeypatch):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as one:
        await known(lambda: len(gateway._directory.workers()) == 1)
        command, orders = Load("m", {"config": "{}", "file:1/model.onnx": "QUJD"}), one.commands()
        async with background(gateway.send(command)) as (sender,):
            order = await anext(orders)
            assert order.command == command
            order.finish(None)
            await sender
        keys = gateway.client.keys
        assert b"QUJD" not in repr(await gateway.client.call("XRANGE", keys.events, "-", "+")).encode()
        assert list(await gateway.wanted()) == [command]

        other = Load("m", {"file:2/model.onnx": "QUJD"})
        monkeypatch.setattr(gateway._wanted, "note", lambda _: Wanted.read(gateway._wanted))  # nothing is noted
        monkeypatch.setattr(gateway._wanted, "restore", lambda *_: Wanted.read(gateway._wanted))
        async with background(anext(orders)):
            error = await refusal(gateway.send(other))
        assert "another command for model 'm' came before its files could be read" in error.message


async def test_files_that_redis_would_drop_the_connection_for_are_refused(fleet, monkeypatch):
    monkeypatch.setattr("gateway.queues.redis.wanted._LARGEST", 100)
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker"):
        await known(lambda: len(gateway._directory.workers()) == 1)
        error = await refusal(gateway.send(Load("m", {"config": "{}", "file:1/model.onnx": "QUJD" * 50})))
        assert isinstance(error, errors.InvalidArgument)
        assert "has room for 100 bytes, files in base64" in error.message
        assert list(await gateway.wanted()) == []


async def test_a_question_is_answered_by_all_others(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as one:
        one.answers["name"] = lambda rest: f"one {rest}".encode()
        await known(lambda: len(gateway._directory.members) == 1)
        assert await gateway.ask("name:it") == [b"one it"]


# --- versions and seals


async def test_a_newer_message_is_left_for_a_newer_worker(fleet, monkeypatch):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as old:
        old.consumer([LANE], 8)
        pack, unpack = message.pack_request, message.unpack_request
        monkeypatch.setattr("gateway.queues.redis.calls.pack_request", lambda asked: _newer(pack(asked)))
        monkeypatch.setattr("gateway.queues.redis.lane.unpack_request", lambda head, body: unpack(_older(head), body))
        async with background(ask(gateway, request(id="a"))) as (caller,):
            await known(lambda: bool(old._lanes[LANE].foreign))
            async with fleet_queue(fleet, "worker") as new:
                new._link.reads += 1
                new.publish(READY)
                (job,) = await take(new, 1)
                assert job.request.signature is None
                job.reply(answer(job.request))
                assert (await caller).id == "a"


def _newer(packed):
    header, parts = packed
    return bytes((header[0] + 1,)) + header[1:], parts


def _older(header):
    return bytes((header[0] - 1,)) + header[1:]


async def test_messages_of_another_deployment_are_not_believed(fleet):
    ours, theirs = b"0123456789abcdef", b"fedcba9876543210"
    async with fleet_queue(fleet, "gateway", key=theirs) as forger, fleet_queue(fleet, "worker", key=ours) as held:
        held.consumer([LANE], 8)
        async with background(refusal(ask(forger, request(deadline=time.monotonic() + 0.5)))) as (caller,):
            await known(lambda: held.counts.damaged > 0)
            assert isinstance(await caller, errors.DeadlineExceeded)


async def test_what_no_worker_believes_is_not_sent_for_ever(fleet, monkeypatch):
    monkeypatch.setattr("gateway.queues.redis.calls._YOUNG", 0.0)
    ours, theirs = b"0123456789abcdef", b"fedcba9876543210"
    async with fleet_queue(fleet, "gateway", key=theirs) as forger, fleet_queue(fleet, "worker", key=ours) as held:
        held.consumer([LANE], 8)
        error = await refusal(ask(forger, request()))
        assert isinstance(error, errors.Unavailable)
        assert "the same queue key" in error.message
        assert held.counts.damaged == 6


# --- admission


class Measured:
    """The admission of a worker that knows its speed: 1 ms a row, 8 at once."""

    asks_all = False

    def capacity(self) -> Capacity:
        return Capacity(0.0, 0.001, 1.0, 8, 1)


async def test_gateways_refuse_what_the_fleet_cannot_answer_in_time(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as held:
        state = VersionState("1", "READY", config=model_config(), admission=Measured())  # type: ignore[arg-type]
        held.publish(PoolState("m", (state,)))
        await known(lambda: gateway.pool("m") is not None and bool(_admission(gateway)._rate))
        admission = _admission(gateway)
        for _ in range(100):
            admission.admit(request(deadline=time.monotonic() + 10))
        with pytest.raises(errors.Overloaded) as refused:
            admission.admit(request(deadline=time.monotonic() + 0.05))
        assert refused.value.retry_after > 0
        with pytest.raises(errors.DeadlineTooShort):
            admission.admit(request(deadline=time.monotonic() + 0.0001))
        admission.admit(request(deadline=time.monotonic() + 0.3))


def _admission(queue: RedisQueue):
    return queue.pool("m").versions[0].admission
