"""Jobs when their Redis dies, is full or is not there: nothing that was accepted is lost, and nothing ends twice."""

import os
import signal
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import pytest

from gateway import errors
from gateway.jobs import runner
from gateway.jobs.runner import RunnerOptions
from gateway.redis_client import RedisOptions
from gateway.redis_server import EmbeddedServer
from tests.jobs_support import Gateway, gateway
from tests.redis_support import redis_server
from tests.support import refusal, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PATIENCE", "_TROUBLE"):
        monkeypatch.setattr(runner, name, 0.05)


async def ends(one: Gateway) -> Counter[str]:
    """How often each job has ended, by what was told of it."""
    entries = await one.client.call("XRANGE", one.client.keys.job_events(), "-", "+")
    told = [dict(zip(words[::2], words[1::2], strict=True)) for _, words in entries]
    return Counter(each[b"job"].decode() for each in told if each[b"state"] not in (b"queued", b"running"))


async def written_through(one: Gateway) -> None:
    """Else Redis may hold back the last second of its file while the disk is busy, and lose it when it is killed."""
    await one.client.call("CONFIG", "SET", "appendfsync", "always")


@pytest.mark.slow
async def test_jobs_survive_a_redis_that_is_killed_and_started_from_its_file(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path, persistent=True) as server, gateway(RedisOptions(server.url)) as one:
        await written_through(one)
        one.model.free.clear()
        jobs = [await one.submit(n) for n in range(20)]
        for _ in jobs[:5]:
            await one.model.entered.acquire()
        async with aclosing(one.jobs.watch(jobs[-1].id, "", heartbeat=0.1)) as changes:
            await anext(changes)
            os.kill(server.pid, signal.SIGKILL)
            one.model.free.set()  # these runs end while there is nowhere to write it down
            await server.restarted()
            states = [change.event.state async for change in changes if change.event]
        assert states[-1] == "done"
        ended = [await one.ended(job) for job in jobs]
        assert [job.state for job in ended] == ["done"] * 20
        assert [await one.result(job) for job in jobs] == [[[2.0 * n, 2.0 * n]] for n in range(20)]
        assert await ends(one) == dict.fromkeys([job.id for job in jobs], 1)


@pytest.mark.slow
async def test_no_lease_is_taken_away_because_redis_was(tmp_path: Path) -> None:
    """Nobody could renew, so the leases that ran out meanwhile say nothing."""
    options = RunnerOptions(lease=3)
    async with (
        EmbeddedServer(tmp_path, persistent=True) as server,
        gateway(RedisOptions(server.url), runner=options) as one,
    ):
        await written_through(one)
        one.model.free.clear()
        job = await one.submit()
        await one.model.entered.acquire()
        os.kill(server.pid, signal.SIGKILL)
        await server.restarted()
        key = one.client.keys.jobs("running")
        await one.client.online()
        await one.client.call("ZADD", key, "XX", 1, job.id)  # as if it had been away for long
        with one.jobs.feed.subscribe(job.id) as inbox:
            while float(await one.client.call("ZSCORE", key, job.id)) == 1:
                assert await inbox.next(0.02) is None
        one.model.free.set()
        ended = await one.ended(job)
        assert (ended.state, ended.attempts, ended.crashes) == ("done", 1, 0)


async def test_a_full_redis_refuses_new_jobs_and_gets_the_results_of_old_ones_later() -> None:
    with redis_server() as url:
        async with gateway(RedisOptions(url)) as one:
            one.model.free.clear()
            job = await one.submit(5.0)
            await one.model.entered.acquire()
            await one.client.call("CONFIG", "SET", "maxmemory", 1)
            error = await refusal(one.submit())
            assert isinstance(error, errors.Unavailable)
            assert "no memory left" in error.message
            one.model.free.set()
            await one.model.left.acquire()
            assert (await one.jobs.get(job.id, "")).state == "running"
            await one.client.call("CONFIG", "SET", "maxmemory", 0)
            assert (await one.ended(job)).state == "done"
            assert await one.result(job) == [[10.0, 10.0]]


@pytest.mark.slow
async def test_without_redis_jobs_are_refused_at_once_and_the_gateway_lives(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path, persistent=True) as server, gateway(RedisOptions(server.url)) as one:
        job = await one.ended(await one.submit())
        server._supervisor.cancel()  # it stays away
        os.kill(server.pid, signal.SIGKILL)
        await until(lambda: not one.client.connected)
        for call in (
            one.submit(),
            one.jobs.get(job.id, ""),
            one.jobs.cancel(job.id, ""),
            one.jobs.list("", ["done"], 1),
        ):
            assert isinstance(await refusal(call), errors.Unavailable)
        assert one.runner is not None
        await one.runner.drain()


async def test_an_emptied_redis_ends_what_was_lost_and_serves_on() -> None:
    with redis_server() as url:
        async with gateway(RedisOptions(url)) as one:
            one.model.free.clear()
            job = await one.submit()
            await one.model.entered.acquire()
            async with aclosing(one.jobs.watch(job.id, "", heartbeat=0.05)) as changes:
                await anext(changes)
                await one.client.call("FLUSHALL")  # a test may
                with pytest.raises(errors.NotFound):
                    _ = [change async for change in changes]
            await one.model.left.acquire()  # nobody will ask for its result
            one.model.free.set()
            assert (await one.ended(await one.submit())).state == "done"
