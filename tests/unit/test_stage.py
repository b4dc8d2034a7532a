"""A stage: the jobs of one version that wait for an instance, counted right whatever becomes of them."""

import time

import pytest

from gateway.config.model import Batching
from gateway.worker.stage import Stage
from tests.support import Callers, answer, background, model_config, request, settle


@pytest.fixture
async def callers():
    async with Callers() as callers:
        yield callers


def ids(jobs):
    return [job.request.id for job in jobs]


def numbered(count, rows=1):
    return [request(id=str(n), rows=rows) for n in range(count)]


async def test_an_idle_instance_gets_all_that_is_staged(callers):
    stage = Stage(model_config(), instances=1)
    stage.extend(await callers.jobs(*numbered(3, rows=2)))
    decision = stage.choose(time.monotonic())
    assert (ids(decision.jobs), decision.rows, decision.reason) == (["0", "1", "2"], 6, "drained")
    assert (len(stage), stage.urgency()) == (0, None)


async def test_staged_and_running_rows_are_shared_between_instances(callers):
    stage = Stage(model_config(), instances=2)
    stage.extend(await callers.jobs(*numbered(6)))
    first = stage.choose(time.monotonic())
    second = stage.choose(time.monotonic())
    assert (ids(first.jobs), first.reason) == (["0", "1", "2"], "share")
    assert (ids(second.jobs), second.reason) == (["3", "4", "5"], "drained")


async def test_rows_that_have_run_no_longer_count(callers):
    stage = Stage(model_config(), instances=2)
    stage.extend(await callers.jobs(*numbered(6)))
    stage.finished(stage.choose(time.monotonic()).rows, 0.001)
    assert ids(stage.choose(time.monotonic()).jobs) == ["3", "4"]


async def test_a_batch_is_no_longer_than_gains_from_it(callers):
    stage = Stage(model_config(), instances=1, long_run=0.02)
    stage.extend(await callers.jobs(*numbered(8)))
    stage.finished(stage.choose(time.monotonic()).rows, seconds=8 * 0.009)
    stage.extend(await callers.jobs(*numbered(8)))
    decision = stage.choose(time.monotonic())
    assert (decision.rows, decision.reason) == (3, "share")


async def test_a_model_without_batching_runs_one_request_at_a_time(callers):
    stage = Stage(model_config(batching=None), instances=1)
    stage.extend(await callers.jobs(*numbered(2, rows=3)))
    decision = stage.choose(time.monotonic())
    assert (ids(decision.jobs), decision.rows, decision.reason) == (["0"], 3, "single")


async def test_tritons_default_preferred_size_is_greedy_and_shared(callers):
    # `dynamic_batching {}` arrives here as a preferred size of max_batch_size.
    stage = Stage(model_config(batching=Batching(0, (8,))), instances=2)
    stage.extend(await callers.jobs(*numbered(4)))
    decision = stage.choose(time.monotonic())
    assert (ids(decision.jobs), decision.reason) == (["0", "1"], "share")


async def test_the_configurations_knobs_are_used(callers):
    stage = Stage(model_config(batching=Batching(60_000_000, (4,))), instances=1)
    stage.extend(await callers.jobs(*numbered(3)))
    decision = stage.choose(time.monotonic())
    assert decision.jobs == []
    assert decision.ask_at is not None
    stage.extend(await callers.jobs(request(id="3"), request(id="4")))
    decision = stage.choose(time.monotonic())
    assert (ids(decision.jobs), decision.reason) == (["0", "1", "2", "3"], "preferred")
    assert len(stage) == 1


async def test_jobs_passed_over_keep_their_order(callers):
    shapes = ["a", "b", "a", "b", "a"]
    stage = Stage(model_config(), instances=1)
    stage.extend(await callers.jobs(*(request(id=str(n), signature=shape) for n, shape in enumerate(shapes))))
    assert ids(stage.choose(time.monotonic()).jobs) == ["0", "2", "4"]
    assert ids(stage.choose(time.monotonic()).jobs) == ["1", "3"]


async def test_the_head_decides_the_urgency(callers):
    stage = Stage(model_config(), instances=1)
    assert stage.urgency() is None
    now = time.monotonic()
    stage.extend(await callers.jobs(request(deadline=now + 50), request(deadline=now + 40)))
    assert stage.urgency() == now + 50
    await callers.leave(0)
    assert stage.urgency() == now + 40


async def test_a_head_without_a_deadline_is_not_passed_over_for_ever(callers):
    stage = Stage(model_config(), instances=1)
    before = time.monotonic()
    stage.extend(await callers.jobs(request()))
    assert before < stage.urgency() < before + 60


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_a_cancelled_job_is_not_chosen_and_not_counted(callers, gone):
    stage = Stage(model_config(), instances=2)
    stage.extend(await callers.jobs(*numbered(3, rows=2)))
    await callers.leave(gone)
    left = [str(n) for n in range(3) if n != gone]
    taken = []
    while decision := stage.choose(time.monotonic()):
        if not decision.jobs:
            break
        taken += ids(decision.jobs)
        stage.finished(decision.rows, 0.001)
    assert taken == left
    await stage.settled()


async def test_cancelled_jobs_do_not_pile_up_behind_a_hung_run(callers):
    stage = Stage(model_config(), instances=1)
    for _ in range(3000):
        (job,) = await callers.jobs(request())
        job.reply(answer(job.request))
        stage.extend([job])
    assert len(stage) < 2048


async def test_release_hands_every_job_back_in_order(callers):
    stage = Stage(model_config(), instances=1)
    stage.extend(await callers.jobs(*numbered(3)))
    await callers.leave(1)
    stage.release()
    assert len(stage) == 0
    assert ids(await callers.consumer.take(3)) == ["0", "2"]


async def test_settled_waits_for_what_is_staged_and_what_runs(callers):
    stage = Stage(model_config(), instances=1)
    await stage.settled()
    stage.extend(await callers.jobs(request()))
    async with background(stage.settled()) as (settled,):
        await settle()
        decision = stage.choose(time.monotonic())
        await settle()
        assert not settled.done()
        stage.finished(decision.rows, 0.001)
        await settled


async def test_settled_does_not_wait_for_a_job_that_was_cancelled_before_it_ran(callers):
    stage = Stage(model_config(batching=Batching(60_000_000)), instances=1)
    stage.extend(await callers.jobs(request()))
    async with background(stage.settled()) as (settled,):
        await settle()
        await callers.leave(0)
        assert stage.urgency() is None  # as the slots ask when the delay is over
        await settled
