"""What a fleet promises of sequences: one worker, one order, no request twice, no gap, and a clear end when the worker dies."""

# ruff: noqa: ASYNC110, SIM117 - what other processes do sets no event here; and each process has a block of its own
import asyncio
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from gateway import errors
from gateway.config.model import SequenceBatching
from gateway.message import pack_request
from gateway.queues.base import Job, Keeps, PoolState, VersionState
from gateway.queues.redis import calls, wire
from gateway.queues.redis.beside import INLINE
from gateway.queues.redis.owned import OwnReader
from gateway.queues.redis.queue import RedisQueue
from gateway.redis_client import Disconnected, RedisOptions
from gateway.types import InferResponse
from tests.fleet_support import Mortal, hurry, known
from tests.redis_support import fleet_queue, options
from tests.support import LANE, answer, ask, background, model_config, refusal, request, soon, tensor

pytestmark = pytest.mark.slow

CONFIG = replace(model_config(), batching=None, sequences=SequenceBatching(idle_us=1_000_000))
READY = PoolState("m", (VersionState("1", "READY", config=CONFIG),))
START, END = {"sequence_start": True}, {"sequence_end": True}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture(params=["redis_url", "debian_redis_url"])
def fleet(request: pytest.FixtureRequest) -> RedisOptions:
    return options(request.getfixturevalue(request.param))


def part(of: int | str, value: float = 0.0, **more):
    parameters = {
        "sequence_id": of,
        **{key: more.pop(key) for key in ("sequence_start", "sequence_end") if key in more},
    }
    return request(value, parameters=parameters, **more)


def value_of(job: Job) -> float:
    return job.request.inputs["IN"].array.flat[0].item()


def named(job: Job, by: str) -> InferResponse:
    return msgspec.structs.replace(answer(job.request), parameters={"by": by})


class Holder:
    """A worker's consumer with so many places, and the jobs that it takes in its order."""

    def __init__(self, queue: RedisQueue, places: int = 8) -> None:
        self.queue = queue
        self.places = places
        self.keeps = Keeps(lambda: self.places, 1.0)
        queue.publish(READY)
        self.consumer = queue.consumer([LANE], keeps=self.keeps)

    def free(self, places: int) -> None:
        """There are so many places now, more than before."""
        self.places = places
        self.keeps.freed()

    async def take(self, count: int = 1) -> list[Job]:
        jobs: list[Job] = []
        while len(jobs) < count:
            jobs += await self.consumer.take(count - len(jobs))
        return jobs

    async def serve(self) -> None:
        """Answer every request with what it brings and this worker's name."""
        while jobs := await self.consumer.take(8):
            for job in jobs:
                job.reply(named(job, self.queue.process))


async def by(gateway: RedisQueue, of: int | str, value: float = 0.0, **flags) -> str:
    """Who answers a request."""
    return (await ask(gateway, part(of, value, **flags))).parameters["by"]


async def begin(gateway: RedisQueue, holder: Holder) -> None:
    """Sequence 7 has its first answer."""
    async with background(ask(gateway, part(7, **START)), holder.take()) as (asked, taken):
        (job,) = await taken
        job.reply(answer(job.request))
        await asked


async def read_no_more(own: OwnReader) -> None:
    """The stream's reader ends, as with the loss of its connection."""
    assert own._task is not None
    own.cancel()
    await asyncio.wait([own._task])


async def read_again(own: OwnReader) -> None:
    """The stream's reader begins anew, as after the loss of its connection."""
    await read_no_more(own)
    own._reader = own._link.client.reader()
    own._task = own._link.start(own._read(), "again")


@asynccontextmanager
async def two_gateways(fleet):
    """And a worker with its holder; the first gateway has begun sequence 7 there."""
    gateways = fleet_queue(fleet, "gateway"), fleet_queue(fleet, "gateway")
    async with gateways[0] as gateway, gateways[1] as other, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await served(other, worker)
        await begin(gateway, holder)
        yield gateway, other, worker, holder


async def stored(own: OwnReader, count: int) -> None:
    """Wait until the stream has so many requests."""
    while await own._link.client.call("XLEN", own.stream) != count:
        await asyncio.sleep(0.01)


async def given_up(gateway: RedisQueue, value: float) -> None:
    """A request of sequence 7 that nobody waits for any more before it could be sent."""
    await gateway.submit(LANE, part(7, value)).aclose()


def ends_unheard(gateway: RedisQueue, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """So often Redis does not hear from this gateway that a sequence has ended."""
    call, lost = gateway.client.call, []

    def loses_some(*words):
        if words[0] != "HSET" or words[-1] != b"!e" or len(lost) == times:
            return call(*words)
        lost.append(asyncio.get_running_loop().create_future())
        lost[-1].set_exception(Disconnected("on its way"))
        return lost[-1]

    monkeypatch.setattr(gateway.client, "call", loses_some)


async def served(gateway: RedisQueue, *workers: RedisQueue) -> None:
    def all_known() -> bool:
        members = gateway._directory.members
        return all(each.process in members and members[each.process].serves(LANE) for each in workers)

    await known(all_known)


@asynccontextmanager
async def two_workers(fleet, places=(8, 0)):
    """A gateway that knows two workers with so many places each, the first of which dies by `die`."""
    mortal = Mortal(fleet, "worker")
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as other, mortal as doomed:
        first, second = Holder(doomed, places[0]), Holder(other, places[1])
        await served(gateway, doomed, other)
        yield gateway, mortal, first, second


def is_lost(error: errors.GatewayError, of: int | str) -> None:
    assert type(error) is errors.SequenceLost
    assert error.message == (
        f"sequence {of} of model 'm' was lost with the worker that ran it, or on the way to it. Begin it again with the "
        "START flag"
    )


def not_started(error: errors.GatewayError, of: int | str) -> None:
    assert type(error) is errors.InvalidArgument
    assert error.message == (
        f"inference request for sequence {of} to model 'm' must specify the START flag on the first request of the sequence"
    )


async def test_a_sequence_stays_with_one_worker_whichever_gateway_is_asked(fleet):
    async with two_workers(fleet, (3, 8)) as (gateway, _, first, second), fleet_queue(fleet, "gateway") as other:
        await served(other, first.queue, second.queue)
        async with background(first.serve(), second.serve()):
            owners = {of: await by(gateway, of, **START) for of in (1, 2, 3, "1", "ü/{x}")}
            for of, owner in owners.items():
                assert {await by(each, of) for each in (other, gateway, other)} == {owner}
            assert await by(other, 1, **END) == owners[1]


async def test_whoever_has_no_place_leaves_a_beginning_to_others(fleet):
    async with two_workers(fleet, (0, 8)) as (gateway, _, _, second), background(second.serve()):
        assert {await by(gateway, of, **START) for of in range(1, 12)} == {second.queue.process}


async def test_requests_in_flight_keep_their_order(fleet):
    large = np.zeros((INLINE // 8 + 1, 2))
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        asked = [part(7, 0, **START), *(part(7, value) for value in range(1, 10))]
        for place in (2, 5):  # what is sent beside the stream takes longer on its way
            large[:] = place
            asked[place] = part(7, inputs={"IN": tensor(large)}, rows=len(large))
        async with background(*(ask(gateway, each) for each in asked), holder.take(10)) as tasks:
            jobs = await tasks[-1]
            assert [value_of(job) for job in jobs] == list(range(10))
            for job in jobs:
                job.reply(answer(job.request))
            await asyncio.gather(*tasks)


async def test_what_comes_before_any_worker_has_a_place_waits_for_it_at_every_gateway(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "gateway") as other:
        async with fleet_queue(fleet, "worker") as worker:
            holder = Holder(worker, places=0)
            await served(gateway, worker)
            await served(other, worker)
            async with background(by(gateway, 7, 1.0, **START)) as (begin,):
                key = gateway.client.keys.sequence("m", "1", 7)
                while not await gateway.client.call("HGETALL", key):
                    await asyncio.sleep(0.01)
                async with background(by(gateway, 7, 2.0), by(other, 7, 2.0)) as later:
                    await known(lambda: bool(other._calls.routes._lines))
                    holder.free(1)
                    async with background(holder.serve()):
                        assert {await begin, *[await each for each in later]} == {worker.process}


# --- ends


async def test_after_its_end_a_sequence_begins_wherever_there_is_a_place(fleet):
    async with two_workers(fleet) as (gateway, _, first, second), background(first.serve(), second.serve()):
        assert await by(gateway, 7, **START) == first.queue.process
        await by(gateway, 7, **END)
        not_started(await refusal(by(gateway, 7)), 7)
        first.consumer.close()
        second.free(8)
        assert await by(gateway, 7, **START) == second.queue.process


async def test_a_beginning_comes_to_the_worker_that_has_the_sequence_already(fleet):
    async with two_workers(fleet, (8, 8)) as (gateway, _, first, second), background(first.serve(), second.serve()):
        owner = await by(gateway, 7, **START)
        assert {await by(gateway, 7, **START) for _ in range(8)} == {owner}
        key = gateway.client.keys.sequence("m", "1", 7)
        assert len(await gateway.client.call("HGETALL", key)) == 4  # nothing is left of the beginnings before


async def test_a_sequence_that_nobody_began_is_refused_without_asking_a_worker(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        Holder(worker)
        await served(gateway, worker)
        not_started(await refusal(ask(gateway, part("x"))), "x")


async def test_a_request_that_is_given_up_ends_its_sequence(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        assert isinstance(await refusal(ask(gateway, part(7, deadline=soon()))), errors.DeadlineExceeded)
        not_started(await refusal(ask(gateway, part(7))), 7)


async def test_what_waits_behind_a_request_that_was_given_up_is_not_run(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        own = worker._own[LANE]
        async with background(ask(gateway, part(7, 1.0)), refusal(ask(gateway, part(7, 2.0)))) as (gone, behind):
            await known(lambda: len(own.held) == 2)
            gone.cancel()
            await known(lambda: len(own.held) == 1)
            async with background(holder.take()):
                assert "sequence 7 of model 'm' has ended: an earlier request of it" in (await behind).message


async def test_who_is_refused_behind_a_request_that_was_given_up_may_ask_any_gateway(fleet, monkeypatch):
    async with two_gateways(fleet) as (gateway, other, _, holder):
        ends_unheard(gateway, monkeypatch, 3)
        await given_up(gateway, 1.0)
        async with background(holder.serve()):
            assert "has ended: an earlier request of it" in (await refusal(by(gateway, 7, 2.0))).message
            not_started(await refusal(by(other, 7, 3.0)), 7)


async def test_who_hears_that_redis_took_no_request_may_ask_any_gateway(fleet, monkeypatch):
    async with two_gateways(fleet) as (gateway, other, _, holder):
        ends_unheard(gateway, monkeypatch, 3)
        call = gateway.client.call
        monkeypatch.setattr(gateway.client, "call", lambda *words: call("XADD") if words[0] == "XADD" else call(*words))
        async with background(holder.serve()):
            assert "does not take requests now" in (await refusal(by(gateway, 7, 1.0))).message
            not_started(await refusal(by(other, 7, 2.0)), 7)


# --- death


async def test_what_a_dead_worker_had_of_a_sequence_is_refused_and_never_run_again(fleet):
    async with two_workers(fleet) as (gateway, mortal, first, second):
        await begin(gateway, first)
        second.free(8)
        async with background(refusal(by(gateway, 7)), refusal(by(gateway, 7)), first.take(2)) as (one, two, taken):
            await taken
            await mortal.die()
            is_lost(await one, 7)
            is_lost(await two, 7)
        is_lost(await refusal(by(gateway, 7)), 7)
        async with background(second.serve()):
            assert await by(gateway, 7, **START) == second.queue.process
            assert await by(gateway, 7) == second.queue.process


async def test_a_beginning_that_may_have_run_is_not_run_again(fleet):
    async with two_workers(fleet) as (gateway, mortal, first, second):
        async with background(refusal(by(gateway, 7, **START)), first.take()) as (begun, taken):
            await taken
            second.free(8)
            async with background(second.serve()):
                await mortal.die()
                is_lost(await begun, 7)
                assert await by(gateway, 7, **START) == second.queue.process


async def test_a_beginning_sent_to_a_worker_whose_death_nobody_has_noticed_begins_at_another(fleet):
    async with two_workers(fleet) as (gateway, mortal, first, second):
        await begin(gateway, first)
        second.free(8)
        await mortal.die()
        assert first.queue.process in gateway._directory.members
        async with background(second.serve()):
            assert await by(gateway, 7, **START) == second.queue.process
            assert await by(gateway, 7) == second.queue.process


async def test_a_beginning_is_not_made_at_another_worker_once_its_sequence_was_given_up(fleet):
    async with two_workers(fleet) as (gateway, mortal, first, second):
        await begin(gateway, first)
        second.free(8)
        await mortal.die()
        assert first.queue.process in gateway._directory.members
        async with background(second.serve()), aclosing(gateway.submit(LANE, part(7, 1.0, **START))) as begun:
            await given_up(gateway, 2.0)
            is_lost(await refusal(anext(begun)), 7)
            not_started(await refusal(by(gateway, 7, 3.0)), 7)
            assert await by(gateway, 7, **START) == second.queue.process


async def test_a_worker_that_leaves_finishes_what_it_has_and_begins_nothing(fleet):
    async with two_workers(fleet) as (gateway, _, first, second):
        await begin(gateway, first)
        second.free(8)
        async with background(by(gateway, 7), first.take()) as (last, taken):
            (job,) = await taken
            first.queue.leave()
            await known(lambda: not gateway._directory.members[first.queue.process].serves(LANE))
            is_lost(await refusal(by(gateway, 7)), 7)
            async with background(first.queue.drained(LANE)) as (drained,):
                await asyncio.sleep(0.2)
                assert not drained.done()
                job.reply(named(job, "first"))
                assert await last == "first"
                await drained
        async with background(second.serve()):
            assert {await by(gateway, of, **START) for of in range(1, 9)} == {second.queue.process}


async def test_a_worker_that_has_unloaded_the_model_refuses_what_is_on_its_way(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        holder.consumer.close()
        is_lost(await refusal(by(gateway, 7)), 7)


async def test_a_model_that_is_gone_for_long_is_not_listened_for_until_it_is_back(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        own = worker._own[LANE]
        holder.consumer.close()
        assert own._task is not None
        assert not own._task.done()
        own._until = 0.0
        await asyncio.wait([own._task])
        again = Holder(worker)
        await begin(gateway, again)
        async with background(again.serve()):
            assert await by(gateway, 7) == worker.process


async def test_a_sequence_whose_gateway_died_goes_on_through_another(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        mortal = Mortal(fleet, "gateway")
        async with background(holder.serve()), mortal as doomed:
            await served(doomed, worker)
            await by(doomed, 7, **START)
            await mortal.die()
            assert await by(gateway, 7) == worker.process


async def test_a_beginning_that_a_dead_worker_has_read_is_not_run_again(fleet):
    async with two_workers(fleet) as (gateway, mortal, first, second):
        await begin(gateway, first)
        async with background(refusal(by(gateway, 7, **START)), first.take()) as (begun, taken):
            await taken
            second.free(8)
            await mortal.die()
            is_lost(await begun, 7)


async def test_a_beginning_that_nobody_has_taken_is_another_workers(fleet):
    async with two_workers(fleet) as (gateway, _, first, second):
        async with background(by(gateway, 7, **START)) as (begun,):
            await known(lambda: bool(first.queue._lanes[LANE].held))
            first.consumer.close()
            second.free(8)
            async with background(second.serve()):
                assert await begun == second.queue.process
                assert await by(gateway, 7) == second.queue.process


async def test_nothing_of_an_earlier_beginning_is_run_in_a_later_one(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        (token,) = worker._lanes[LANE].begun._tokens
        await begin(gateway, holder)
        own = worker._own[LANE]
        late = wire.encode(wire.Envelope(bytes(16), gateway.process, 0, token))
        header, (payload,) = pack_request(part(7))
        fields = (wire.ENVELOPE, late, wire.HEADER, header, wire.PAYLOAD, payload)
        await gateway.client.call("XADD", own.stream, "*", *fields)
        async with background(by(gateway, 7, 2.0), holder.take()) as (asked, taken):
            (job,) = await taken
            assert value_of(job) == 2.0
            job.reply(named(job, "worker"))
            assert await asked == "worker"


# --- what Redis loses


async def test_a_request_that_was_lost_on_its_way_to_redis_is_no_gap(fleet):
    """Not while what comes behind it is answered as if nothing were missing."""
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        call, lost = gateway.client.call, []

        def loses_one(*words):
            if words[0] != "XADD" or lost:
                return call(*words)
            lost.append(asyncio.get_running_loop().create_future())
            lost[0].set_exception(Disconnected("on its way"))
            return lost[0]

        gateway.client.call = loses_one
        async with background(refusal(by(gateway, 7, 1.0)), refusal(by(gateway, 7, 2.0)), holder.serve()) as asked:
            is_lost(await asked[0], 7)
            is_lost(await asked[1], 7)


@pytest.mark.parametrize("all_of_it", [True, False])
async def test_what_comes_behind_a_request_that_redis_lost_is_not_run(fleet, monkeypatch, all_of_it):
    """Be it with its stream, or alone as with a primary that another server has replaced."""
    monkeypatch.setattr(calls, "_YOUNG", 60.0)  # its gateway does not look after it
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        own = worker._own[LANE]
        await read_no_more(own)
        async with background(refusal(by(gateway, 7, 1.0))) as (lost,):
            await stored(own, 1)
            if all_of_it:
                await gateway.client.call("DEL", own.stream)
            else:
                ((entry, _),) = await gateway.client.call("XRANGE", own.stream, "-", "+")
                await gateway.client.call("XDEL", own.stream, entry)
            async with background(refusal(by(gateway, 7, 2.0)), holder.serve()) as (behind, _):
                await stored(own, 1)
                await read_again(own)
                assert "sequence 7 of model 'm' has ended: an earlier request of it" in (await behind).message
            gateway._calls.suspect()
            is_lost(await lost, 7)


async def test_two_gateways_that_send_at_once_make_no_gap_for_each_other(fleet):
    async with two_gateways(fleet) as (gateway, other, worker, holder):
        own = worker._own[LANE]
        await read_no_more(own)
        async with AsyncExitStack() as stack:
            asked = []
            for value, each in enumerate((gateway, other, gateway, other), 1):
                asked += await stack.enter_async_context(background(by(each, 7, value)))
                await stored(own, value)
            await read_again(own)
            jobs = await holder.take(4)
            assert [value_of(job) for job in jobs] == [1, 2, 3, 4]
            for job in jobs:
                job.reply(named(job, "worker"))
            assert await asyncio.gather(*asked) == ["worker"] * 4


async def test_a_large_answer_that_cannot_be_stored_is_not_waited_for(fleet, monkeypatch):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)

        async def lost(*_: object, **__: object) -> str:
            raise Disconnected("while it was being written")

        monkeypatch.setattr(worker._link.payloads, "put", lost)
        async with background(refusal(by(gateway, 7)), holder.take()) as (asked, taken):
            (job,) = await taken
            job.reply(answer(job.request, OUT=tensor(np.zeros((INLINE // 8 + 1, 2)))))
            assert type(await asked) is errors.SequenceLost


async def test_a_request_that_redis_lost_is_refused_and_not_sent_again(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        async with background(refusal(by(gateway, 7)), holder.take()) as (lost, taken):
            (job,) = await taken
            await gateway.client.call("XDEL", job.stream, job.entry)
            await gateway.client.call("XACK", job.stream, "workers", job.entry)
            is_lost(await lost, 7)
        is_lost(await refusal(by(gateway, 7)), 7)
        assert gateway.counts.resubmitted == 0


async def test_what_was_read_and_not_heard_of_is_taken_in_its_order(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        own = worker._own[LANE]
        await read_no_more(own)
        async with background(*(ask(gateway, part(7, value)) for value in range(1, 6))) as asked:
            await stored(own, 5)
            read = ("XREADGROUP", "GROUP", "workers", worker.process, "COUNT", 3, "STREAMS", own.stream, ">")
            assert len((await worker.client.call(*read))[0][1]) == 3
            await read_again(own)
            jobs = await holder.take(5)
            assert [value_of(job) for job in jobs] == [1, 2, 3, 4, 5]
            for job in jobs:
                job.reply(answer(job.request))
            await asyncio.gather(*asked)


async def test_what_was_run_is_not_run_again_though_its_answer_is_lost(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        async with background(refusal(by(gateway, 7)), holder.take()) as (lost, taken):
            (job,) = await taken
            job.lane.forget(job)  # as after an answer that Redis never took
            await read_again(worker._own[LANE])
            assert type(await lost) is errors.SequenceLost
            async with background(refusal(by(gateway, 7)), holder.take()) as (later, again):
                assert "has ended" in (await later).message
                assert not again.done()


async def test_a_request_that_cannot_be_read_ends_its_sequence(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await begin(gateway, holder)
        (token,) = worker._lanes[LANE].begun._tokens
        damaged = wire.encode(wire.Envelope(bytes(16), gateway.process, 0, token))
        await gateway.client.call("XADD", worker._own[LANE].stream, "*", wire.ENVELOPE, damaged, wire.HEADER, b"?")
        async with background(refusal(by(gateway, 7)), holder.take()) as (later, _):
            assert "has ended" in (await later).message


async def test_a_gap_before_any_worker_has_begun_ends_the_sequence_too(fleet):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker, places=0)
        await served(gateway, worker)
        lines = gateway._calls.routes._lines
        async with background(ask(gateway, part(7, 1.0, **START)), ask(gateway, part(7, 2.0))) as (begun, gone):
            await known(lambda: bool(lines) and not gone.done())
            gone.cancel()
            await known(lambda: not lines)
            holder.free(1)
            async with background(holder.serve()):
                await begun
                not_started(await refusal(by(gateway, 7, 3.0)), 7)


@pytest.mark.parametrize("comes", [True, False])
async def test_a_claim_that_comes_after_the_answer_is_waited_for_a_while(fleet, monkeypatch, comes):
    gateways = fleet_queue(fleet, "gateway"), fleet_queue(fleet, "gateway")
    async with gateways[0] as gateway, gateways[1] as other, fleet_queue(fleet, "worker") as worker:
        holder = Holder(worker)
        await served(gateway, worker)
        await served(other, worker)
        call, claims = worker.client.call, []
        key = gateway.client.keys.sequence("m", "1", 7)

        def held_back(*words):
            if words[:2] != ("HSETNX", key):
                return call(*words)
            claims.append(words)
            return asyncio.get_running_loop().create_future()

        monkeypatch.setattr(worker.client, "call", held_back)
        await begin(gateway, holder)
        async with background(holder.serve()):
            if comes:
                async with background(by(gateway, 7)) as (later,):
                    await known(lambda: bool(gateway._calls.routes._lines))
                    await call(*claims[0])
                    assert await later == worker.process
            else:
                is_lost(await refusal(by(other, 7)), 7)
                is_lost(await refusal(by(gateway, 7)), 7)
                assert await by(gateway, 7, **START) == worker.process


async def test_models_without_sequences_cost_nothing_more(fleet, monkeypatch):
    async with fleet_queue(fleet, "gateway") as gateway, fleet_queue(fleet, "worker") as worker:
        worker.publish(PoolState("m", (VersionState("1", "READY", config=model_config()),)))
        await known(lambda: gateway.pool("m") is not None)
        calls, call = [], gateway.client.call
        monkeypatch.setattr(gateway.client, "call", lambda *words: calls.append(words[0]) or call(*words))
        async with background(ask(gateway, part(7, **START))) as (asked,):
            consumer = worker.consumer([LANE], 8)
            (job,) = await consumer.take(8)
            job.reply(answer(job.request))
            await asked
        assert calls.count("XADD") == 1
        assert not {"HGETALL", "HDEL"} & set(calls)
