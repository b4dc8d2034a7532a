"""What a worker promises of sequences when things go wrong: no gap, no mixed state, and a clear end.

OUT is what the request before was asked with, which the model carries in its state, or 100 in a sequence's first.
"""

# ruff: noqa: SIM117 - what is asked within a run has a block of its own
import asyncio
import struct
import tempfile
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from gateway import errors
from gateway.engines.fake import Gate
from gateway.queues.memory import MemoryQueue
from gateway.queues.redis.queue import RedisQueue
from tests.contract.test_worker import Rig
from tests.redis_support import fleet_queue, options
from tests.support import background, refusal, request, settle, soon, until

STATE = """state {
  input_name: "BEFORE" output_name: "SAME" data_type: TYPE_FP32 dims: 2
  initial_state { data_type: TYPE_FP32 dims: 2 data_file: "first" name: "first" }
}"""
CONFIG = """
backend: "fake" max_batch_size: {rows}
input {{ name: "IN" data_type: TYPE_FP32 dims: 2 }}
output {{ name: "{first}" data_type: TYPE_FP32 dims: 2 }}
output {{ name: "{second}" data_type: TYPE_FP32 dims: 2 }}
instance_group {{ kind: KIND_CPU count: 1 }}
sequence_batching {{ {batching} }}
{parameters}
"""
START, END = {"sequence_start": True}, {"sequence_end": True}


class Sequences(Rig):
    def put(self, *, batching="direct {}", rows=4, carries=True, **parameters):
        """A model that carries its state, or one that may keep one itself, which answers with what it is asked."""
        entries = "".join(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()
        )
        self.write()
        first, second = ("SAME", "OUT") if carries else ("OUT", "SAME")
        text = CONFIG.format(
            rows=rows,
            first=first,
            second=second,
            batching=f"{batching}\n" + (STATE if carries else ""),
            parameters=entries,
        )
        (self.folder / "m" / "config.pbtxt").write_text(text)
        (self.folder / "m" / "initial_state").mkdir(exist_ok=True)
        (self.folder / "m" / "initial_state" / "first").write_bytes(struct.pack("<2f", 100, 100))

    async def say(self, of, value, *, deadline=None, **flags):
        asked = request(value, parameters={"sequence_id": of, **flags}, deadline=deadline)
        async with aclosing(self.service.infer(asked)) as responses:
            (response,) = [response async for response in responses]
        return response.outputs["OUT"].array.flat[0].item()

    @property
    def waiting(self):
        return self.statistics.of("m", "1").pending


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="gw") as path:
        (Path(path) / "repository").mkdir()
        yield Path(path)


@pytest.fixture(params=["memory", "redis"])
async def queue(request):
    if request.param == "memory":
        yield MemoryQueue()
        return
    async with fleet_queue(options(request.getfixturevalue("redis_url"))) as queue:
        yield queue


@pytest.fixture
async def rig(folder, queue):
    rig = Sequences(folder / "repository", queue)
    async with background(rig.worker.run()):
        yield rig


@asynccontextmanager
async def held(rig, folder, **more):
    """A loaded model whose instance is in a run of sequence 9 until that is released."""
    rig.put(gate=folder / "gate", **more)
    await rig.load()
    async with Gate(folder / "gate") as gate, background(rig.say(9, 0.0, **START)) as (first,):
        yield gate, await gate.arrival()
        await first


async def queued(rig, number, *, left=0):
    """So many requests wait or run; over Redis some are left to other workers, because there is no place for them here."""
    await until(lambda: rig.waiting == number)
    if isinstance(rig.queue, RedisQueue):
        await until(lambda: sum(len(reader.held) for reader in rig.queue._readers()) == number - left)
    await settle()


def has_ended(error, of):
    assert isinstance(error, errors.InvalidArgument)
    assert error.message.startswith(f"sequence {of} of model 'm' has ended: an earlier request of it failed")


def not_started(error, of):
    assert error.message == (
        f"inference request for sequence {of} to model 'm' must specify the START flag on the first request of the sequence"
    )


async def test_rows_without_work_share_a_batch_and_disturb_nobody(rig, folder):
    async with held(rig, folder) as (gate, run):  # in row 0
        calls = (rig.say(1, 1.0, **START), rig.say(2, 2.0, **START), rig.say(2, 3.0), rig.say(1, 4.0))
        async with background(*calls) as tasks:
            await queued(rig, 5)
            run.release()
            second = await gate.arrival()
            assert second.rows == 3  # rows 1 and 2, and one that is not ready
            second.release()
            (await gate.arrival()).release()
            assert [await task for task in tasks] == [100.0, 100.0, 2.0, 1.0]
    assert rig.statistics.of("m", "1").inference_count == 5


async def test_a_poison_request_ends_its_own_sequence_and_no_other(rig, folder):
    async with held(rig, folder, poison=13) as (gate, run):
        calls = (rig.say(1, 1.0, **START), rig.say(2, 13.0, **START), rig.say(2, 3.0), rig.say(1, 4.0))
        async with background(calls[0], refusal(calls[1]), refusal(calls[2]), calls[3]) as tasks:
            await queued(rig, 5)
            run.release()
            for _ in range(4):  # both, each alone, and what comes after
                (await gate.arrival()).release()
            assert (await tasks[0], await tasks[3]) == (100.0, 1.0)
            assert isinstance(await tasks[1], errors.Internal)
            has_ended(await tasks[2], 2)
    not_started(await refusal(rig.say(2, 5.0)), 2)


async def test_a_failed_batch_ends_its_sequences_where_the_model_may_keep_their_state(rig, folder):
    async with held(rig, folder, poison=13, carries=False) as (gate, run):
        calls = (rig.say(1, 1.0, **START), rig.say(2, 13.0, **START), rig.say(1, 4.0))
        async with background(*map(refusal, calls)) as tasks:
            await queued(rig, 4)
            run.release()
            (await gate.arrival()).release()
            assert isinstance(await tasks[0], errors.Internal)
            assert isinstance(await tasks[1], errors.Internal)
            has_ended(await tasks[2], 1)
        async with background(rig.say(9, 5.0)) as (goes_on,):
            (await gate.arrival()).release()
            assert await goes_on == 5.0


async def test_a_crash_ends_every_sequence_of_an_instance_that_may_keep_their_state(rig):
    rig.put(lost=13, carries=False)
    await rig.load()
    assert await rig.say(1, 1.0, **START) == 1.0
    assert isinstance(await refusal(rig.say(2, 13.0, **START)), errors.Internal)
    not_started(await refusal(rig.say(1, 2.0)), 1)
    assert await rig.say(1, 3.0, **START) == 3.0


async def test_a_crash_leaves_the_states_of_the_others(rig):
    rig.put(lost=13)
    await rig.load()
    assert await rig.say(1, 1.0, **START) == 100.0
    assert isinstance(await refusal(rig.say(2, 13.0, **START)), errors.Internal)
    assert await rig.say(1, 2.0) == 1.0


async def test_a_cancelled_request_leaves_a_gap_that_ends_its_sequence(rig, folder):
    async with held(rig, folder) as (gate, run):
        async with background(rig.say(9, 1.0), refusal(rig.say(9, 2.0))) as (gone, behind):
            await queued(rig, 3)
            gone.cancel()
            await asyncio.wait([gone])
            run.release()
            has_ended(await behind, 9)
        not_started(await refusal(rig.say(9, 3.0)), 9)
        async with background(rig.say(9, 4.0, **START)) as (anew,):
            (await gate.arrival()).release()
            assert await anew == 100.0


async def test_a_request_that_was_too_late_ends_its_sequence(rig, folder):
    async with held(rig, folder) as (_, run):
        error = await refusal(rig.say(9, 1.0, deadline=soon()))
        assert isinstance(error, errors.DeadlineExceeded)
        run.release()
    not_started(await refusal(rig.say(9, 2.0)), 9)


async def test_a_reload_answers_what_was_accepted_and_ends_the_sequences(rig, folder):
    async with held(rig, folder) as (gate, run), background(rig.say(9, 1.0)) as (accepted,):
        await queued(rig, 2)
        rig.put(gate=folder / "other")
        async with background(rig.load()) as (loading,):
            run.release()
            (await gate.arrival()).release()
            assert await accepted == 0.0
            await loading
    not_started(await refusal(rig.say(9, 2.0)), 9)
    assert await rig.say(9, 3.0, **START) == 100.0


async def test_an_unload_answers_what_was_accepted(rig, folder):
    async with held(rig, folder, rows=1, batching="max_sequence_idle_microseconds: 1000") as (gate, run):
        async with background(rig.say(1, 1.0, **START), rig.unload()) as (in_line, unloading):
            await queued(rig, 2, left=1)
            run.release()
            (await gate.arrival()).release()  # once the other has been idle for too long
            assert await in_line == 100.0
            await unloading
            await until(lambda: rig.states() == {"1": ("UNAVAILABLE", "unloaded")})


async def test_the_direct_strategy_waits_for_its_slots_as_long_as_it_is_told(rig, folder):
    day = 86_400_000_000
    batching = f"direct {{ minimum_slot_utilization: 0.5 max_queue_delay_microseconds: {day} }}"
    rig.put(batching=batching, gate=folder / "gate")
    await rig.load()
    async with Gate(folder / "gate") as gate, background(rig.say(1, 1.0, **START), rig.say(2, 2.0, **START)) as tasks:
        run = await gate.arrival()
        assert run.rows == 2
        run.release()
        assert [await task for task in tasks] == [100.0, 100.0]
