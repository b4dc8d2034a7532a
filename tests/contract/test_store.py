"""Where answers are kept: the promises of `Store` and `ClaimStore`, in memory and in a real Redis; fleets of gateways."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest
from redis.exceptions import OutOfMemoryError

from gateway import errors
from gateway.config.model import ResponseCache
from gateway.middleware import redis_store
from gateway.middleware.cache import response_cache
from gateway.middleware.idempotency import idempotency
from gateway.middleware.redis_store import RedisStore, SharedStore
from gateway.middleware.store import Kept, MemoryStore
from gateway.queues.redis.seal import Seal
from gateway.redis_client import RedisClient, RedisOptions
from gateway.redis_server import EmbeddedServer
from gateway.types import DataType, InferResponse, Tensor
from tests.redis_support import options
from tests.support import request, settle, soon, tensor, until
from tests.unit.middleware_support import Callers, Rig, ask, callers, value_of

BODY, OTHER = b"b" * 32, b"o" * 32
KEY = b"k" * 32


def response(value: float = 1.0) -> InferResponse:
    words = Tensor(DataType.BYTES, (1,), b"\2\0\0\0hi")
    return InferResponse("m", "1", {"OUT": tensor([[value, value]]), "W": words}, parameters={"p": "x"}, digest="d")


def told(kept: Kept | None) -> Any:
    """Everything an entry says, as plain values."""
    if kept is None or kept.response is None:
        return kept and (kept.body, None, kept.pending)
    got = kept.response
    outputs = {name: (each.datatype, each.shape, bytes(each.wire)) for name, each in got.outputs.items()}
    return kept.body, (got.model_name, got.model_version, outputs, dict(got.parameters), got.digest), kept.pending


@asynccontextmanager
async def redis_store_of(of: RedisOptions, *, key: bytes | None = None, **more: Any) -> AsyncIterator[RedisStore]:
    async with (
        RedisClient(of) as client,
        RedisStore(client, client.keys.idempotency, Seal(key), more.pop("max_bytes", 1 << 20), **more) as store,
    ):
        store.client = client
        yield store


@asynccontextmanager
async def shared_store_of(of: RedisOptions, max_bytes: int = 1 << 20) -> AsyncIterator[SharedStore]:
    async with RedisClient(of) as client:
        yield SharedStore(client, client.keys.cached, Seal(None), max_bytes)


@pytest.fixture(params=["memory", "redis", "sealed", "shared"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    if request.param == "memory":
        yield MemoryStore(1 << 20)
        return
    of = options(request.getfixturevalue("redis_url"))
    if request.param == "shared":
        async with shared_store_of(of) as made:
            yield made
        return
    async with redis_store_of(of, key=b"s" * 32 if request.param == "sealed" else None) as made:
        yield made


# --- what every store promises


async def test_what_is_put_is_got_tensor_for_tensor(store: Any) -> None:
    assert await store.get(KEY) is None
    for kept in (Kept(BODY, response()), Kept(b"", response(2.0)), Kept(BODY)):
        key = os.urandom(32)
        await store.put(key, kept, 60.0)
        assert told(await store.get(key)) == told(kept)


async def test_what_is_put_is_gone_after_its_time(claims: Any) -> None:
    await claims.put(KEY, Kept(BODY, response()), 0.02)
    await _gone(claims)


async def _gone(store: Any) -> None:
    while await store.get(KEY) is not None:  # noqa: ASYNC110 - its time is over when the store says so
        await asyncio.sleep(0)


async def _had(store: Any) -> None:
    """Have the key, as soon as nobody else has it."""
    while await store.claim(KEY, BODY) is not None:
        await store.settled(KEY)


@pytest.fixture(params=["memory", "redis", "sealed"])
async def claims(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    if request.param == "memory":
        yield MemoryStore(1 << 20)
        return
    of = options(request.getfixturevalue("redis_url"))
    async with redis_store_of(of, key=b"s" * 32 if request.param == "sealed" else None) as made:
        yield made


async def test_a_claim_ends_with_an_answer_or_a_release(claims: Any) -> None:
    assert await claims.claim(KEY, BODY) is None
    claims.release(KEY)
    assert await claims.claim(KEY, OTHER) is None
    await claims.put(KEY, Kept(OTHER, response()), 60)
    assert told(await claims.claim(KEY, BODY)) == told(Kept(OTHER, response()))
    claims.release(KEY)  # it is not ours
    assert told(await claims.get(KEY)) == told(Kept(OTHER, response()))
    await claims.settled(KEY)


# --- claims between processes


async def test_a_key_is_one_process_s_at_a_time(redis_url: str) -> None:
    of = options(redis_url)
    async with redis_store_of(of) as one, redis_store_of(of) as two:
        found = await asyncio.gather(one.claim(KEY, BODY), two.claim(KEY, OTHER))
        assert sorted(kept is None for kept in found) == [False, True]
        winner, loser, body = (one, two, BODY) if found[0] is None else (two, one, OTHER)
        assert await loser.claim(KEY, BODY) == Kept(body, pending=True)
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(loser.settled(KEY))
            await settle()
            assert not waiting.done()
            winner.release(KEY)
        assert await loser.claim(KEY, BODY) is None


async def test_a_claim_lives_as_long_as_its_run(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "LEASE", 60.0)
    monkeypatch.setattr(redis_store, "_RENEWAL", 0.01)
    async with redis_store_of(options(redis_url)) as one:
        name = one.client.keys.idempotency(KEY.hex())
        assert await one.claim(KEY, BODY) is None
        given = one._claims[KEY].until
        await one.client.call("PEXPIRE", name, 30_000)
        await until(lambda: one._claims[KEY].until > given)
        assert await one.client.call("PTTL", name) > 30_000
        await one.client.call("DEL", name)
        await until(lambda: not one._claims)  # lost, and not renewed for whoever has it now


async def test_the_claim_of_a_process_that_died_ends(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "LEASE", 0.1)
    of = options(redis_url)
    async with redis_store_of(of) as two:
        async with redis_store_of(of) as one:
            assert await one.claim(KEY, BODY) is None
        await two.settled(KEY)
        assert await two.claim(KEY, BODY) is None


async def test_what_a_stalled_process_computed_does_not_replace_what_took_its_place(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "LEASE", 0.02)
    of = options(redis_url)
    async with redis_store_of(of) as one, redis_store_of(of) as two:
        assert await one.claim(KEY, BODY) is None
        await two.settled(KEY)  # the lease is over: nobody renewed it within 20 ms
        monkeypatch.setattr(redis_store, "LEASE", 3.0)
        assert await two.claim(KEY, OTHER) is None
        one.release(KEY)
        await one.put(KEY, Kept(BODY, response()), 60)
        assert await two.claim(KEY, BODY) == Kept(OTHER, pending=True)
        await two.put(KEY, Kept(OTHER, response(2.0)), 60)
        assert (await one.get(KEY)).body == OTHER


async def test_a_claim_that_is_cancelled_on_its_way_is_given_back(redis_url: str) -> None:
    of = options(redis_url)
    async with redis_store_of(of) as one, redis_store_of(of) as two:
        call = asyncio.create_task(one.claim(KEY, BODY))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        await _had(two)
        assert one._claims == {}


async def test_a_record_of_another_deployment_or_release_is_not_believed(redis_url: str) -> None:
    of = options(redis_url)
    async with redis_store_of(of, key=b"a" * 32) as ours, redis_store_of(of, key=b"b" * 32) as theirs:
        await theirs.put(KEY, Kept(BODY, response()), 60)
        assert await ours.get(KEY) is None
        with pytest.raises(errors.Unavailable, match="cannot be honoured now: what Redis has under its key"):
            await ours.claim(KEY, BODY)
    async with redis_store_of(of) as ours:
        name = ours.client.keys.idempotency(KEY.hex())
        for value in (b"", b"1", b"2x" + bytes(50), b"1r" + bytes(5), b"1r\0\4\0\0\0junk"):
            await ours.client.call("SET", name, value)
            assert await ours.get(KEY) is None


async def test_a_record_is_good_under_its_own_key_only(redis_url: str) -> None:
    other = b"q" * 32
    async with redis_store_of(options(redis_url), key=b"a" * 32) as store:
        await store.put(KEY, Kept(BODY, response()), 60)
        keys = store.client.keys
        await store.client.call("COPY", keys.idempotency(KEY.hex()), keys.idempotency(other.hex()))
        assert await store.get(KEY) is not None
        assert await store.get(other) is None


async def test_what_a_process_has_in_redis_is_bounded(redis_url: str) -> None:
    async with redis_store_of(options(redis_url), max_bytes=1000) as store:
        keys = [bytes((n,)) * 32 for n in range(20)]
        for key in keys:
            assert await store.claim(key, BODY) is None
            await store.put(key, Kept(BODY, response()), 60)
            assert store.bytes <= 1000
        found = [await store.get(key) for key in keys]
        assert found[0].response is not None
        assert found[-1] == Kept(BODY)  # enough to tell another body


async def test_the_share_comes_back_with_time(redis_url: str) -> None:
    async with redis_store_of(options(redis_url), max_bytes=100) as store:
        await store.put(KEY, Kept(b"", response()), 0.01)
        assert store.bytes > 50
        await _gone(store)
        await store.put(OTHER, Kept(b"", response()), 60)
        assert await store.get(OTHER) is not None


# --- Redis out of reach, full, or frozen


async def test_without_redis_a_key_cannot_be_honoured_and_the_cache_is_done_without() -> None:
    of = options("unix:///nowhere/s")
    async with redis_store_of(of) as store:
        assert await store.get(KEY) is None
        await store.put(KEY, Kept(BODY, response()), 60)
        with pytest.raises(errors.Unavailable, match="the Idempotency-Key cannot be honoured now"):
            await store.claim(KEY, BODY)
    async with shared_store_of(of) as shared:
        assert await shared.get(KEY) is None
        await shared.put(KEY, Kept(b"", response()), 60)
        assert told(await shared.get(KEY)) == told(Kept(b"", response()))


async def test_a_redis_without_memory_refuses_keys_and_not_the_cache() -> None:
    async with EmbeddedServer(max_memory=1 << 20) as server, RedisClient(options(server.url)) as client:
        fill = [client.call("SET", f"full:{n}", bytes(100_000)) for n in range(100)]
        assert any(isinstance(each, OutOfMemoryError) for each in await asyncio.gather(*fill, return_exceptions=True))
        async with redis_store_of(options(server.url)) as store:
            with pytest.raises(errors.Unavailable, match="Redis refused it: OOM"):
                await store.claim(KEY, BODY)
            await store.put(KEY, Kept(BODY, response()), 60)
        async with shared_store_of(options(server.url)) as shared:
            await shared.put(KEY, Kept(b"", response()), 60)
            assert await shared.get(KEY) is not None


class Counting:
    """A client that counts its calls."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self.calls = 0

    def call(self, *command: Any) -> asyncio.Future[Any]:
        self.calls += 1
        return self._client.call(*command)


async def test_a_frozen_redis_is_waited_for_briefly_and_then_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "_PATIENCE", 0.05)
    async with EmbeddedServer() as server:
        of = options(server.url)
        async with redis_store_of(of, patience=0.05) as store, shared_store_of(of) as shared:
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(errors.Unavailable, match=r"Redis did not answer for 0\.05 s"):
                    await store.claim(KEY, BODY)
                counting = shared._redis._client = Counting(shared._redis._client)
                for n in range(5):
                    assert await shared.get(bytes((n,)) * 32) is None
                assert counting.calls == 1
            finally:
                os.kill(server.pid, signal.SIGCONT)
            # The claim went through after all, and nobody wanted it any more.
            async with redis_store_of(of) as other:
                await _had(other)


# --- gateways that share it


class Fleet:
    """Gateways with the same model behind them, each with a store and an endpoint of its own."""

    def __init__(self, rig: Rig, endpoints: list[Any], stores: list[Any]) -> None:
        self.rig = rig
        self.endpoints = endpoints
        self.stores = stores


@asynccontextmanager
async def fleet(redis_url: str, *, cache: bool = False, size: int = 2) -> AsyncIterator[Fleet]:
    rig, of = Rig(cache=ResponseCache() if cache else None), options(redis_url)
    async with AsyncExitStack() as stack:
        enter = shared_store_of if cache else redis_store_of
        stores = [await stack.enter_async_context(enter(of)) for _ in range(size)]
        service = rig.service
        endpoints = [
            response_cache(service.infer, service.prepare, service.model_config, store)
            if cache
            else idempotency(service.infer, service.prepare, store)
            for store in stores
        ]
        yield Fleet(rig, endpoints, stores)


def keyed(value: float = 1.0, **more: Any) -> Any:
    return request(value, idempotency_key="k", **more)


async def begin(asking: Callers, of: Fleet, index: int, what: Any) -> asyncio.Task[Any]:
    of.rig.endpoint = of.endpoints[index]
    return await asking.ask(what)


async def test_a_repeat_at_another_gateway_gets_the_first_answer(redis_url: str) -> None:
    async with fleet(redis_url) as of, callers(of.rig) as asking:
        first = await begin(asking, of, 0, keyed(id="a"))
        job = await of.rig.job()
        waiting = [await begin(asking, of, 1, keyed(id=f"b{n}")) for n in range(3)]
        conflict = await begin(asking, of, 1, keyed(2.0))
        assert type(await conflict) is errors.Conflict
        job.reply(of.rig.answered(job.request, 7))
        answers = [await each for each in (first, *waiting)]
        assert [(each.id, value_of(each)) for each in answers] == [("a", 7), ("b0", 7), ("b1", 7), ("b2", 7)]
        assert value_of(await ask(of.endpoints[1], keyed())) == 7
        assert of.rig.counted.inference_count == 1
        assert type(await ask(of.endpoints[1], keyed(3.0))) is errors.Conflict


async def test_another_body_that_comes_first_at_a_gateway_spoils_nothing(redis_url: str) -> None:
    """It asks Redis for the key, and while it does nobody here knows whose the key is."""
    async with fleet(redis_url) as of, callers(of.rig) as asking:
        first = await begin(asking, of, 0, keyed())
        job = await of.rig.job()
        async with asyncio.TaskGroup() as tasks:
            conflict = tasks.create_task(ask(of.endpoints[1], keyed(2.0)))
            repeat = tasks.create_task(ask(of.endpoints[1], keyed()))
            assert type(await conflict) is errors.Conflict
            job.reply(of.rig.answered(job.request, 7))
            assert value_of(await repeat) == 7
        assert value_of(await first) == 7


async def test_when_the_first_leaves_the_repeat_elsewhere_runs(redis_url: str) -> None:
    async with fleet(redis_url) as of, callers(of.rig) as asking:
        first = await begin(asking, of, 0, keyed())
        await of.rig.job()
        second = await begin(asking, of, 1, keyed())
        await asking.leave(first)
        await of.rig.reply(7)
        assert value_of(await second) == 7


async def test_a_repeat_elsewhere_keeps_its_own_deadline(redis_url: str) -> None:
    async with fleet(redis_url) as of, callers(of.rig) as asking:
        first = await begin(asking, of, 0, keyed())
        job = await of.rig.job()
        assert type(await ask(of.endpoints[1], keyed(deadline=soon(0.03)))) is errors.DeadlineExceeded
        job.reply(of.rig.answered(job.request, 7))
        assert value_of(await first) == 7


async def test_a_large_answer_is_computed_again_elsewhere(redis_url: str) -> None:
    async with fleet(redis_url) as of, callers(of.rig) as asking:
        for index in range(2):
            call = await begin(asking, of, index, keyed())
            job = await of.rig.job()
            answer = of.rig.answered(job.request, 7)
            answer.outputs["LARGE"] = tensor(np.ones((1, 100_000)))
            job.reply(answer)
            assert value_of(await call) == 7
        assert type(await ask(of.endpoints[0], keyed(2.0))) is errors.Conflict


async def test_a_failed_first_does_not_use_up_the_key_elsewhere(redis_url: str) -> None:
    async with fleet(redis_url) as of, callers(of.rig) as asking:
        first = await begin(asking, of, 0, keyed())
        (await of.rig.job()).fail(errors.Overloaded("full", 1.0))
        assert type(await first) is errors.Overloaded
        second = await begin(asking, of, 1, keyed())
        await of.rig.reply(7)
        assert value_of(await second) == 7


async def test_many_repeats_everywhere_run_once(redis_url: str) -> None:
    async with fleet(redis_url, size=4) as of, callers(of.rig) as asking:
        calls = [await begin(asking, of, n % 4, keyed(id=str(n))) for n in range(40)]
        await of.rig.reply(7)
        answers = [await each for each in calls]
        assert [(each.id, value_of(each)) for each in answers] == [(str(n), 7) for n in range(40)]
        assert of.rig.counted.inference_count == 1


async def test_with_redis_gone_while_it_runs_the_answer_is_given() -> None:
    rig = Rig()
    async with EmbeddedServer() as server, redis_store_of(options(server.url), patience=0.05) as store:
        rig.endpoint = idempotency(rig.service.infer, rig.service.prepare, store)
        async with callers(rig) as asking:
            call = await asking.ask(keyed())
            job = await rig.job()
            os.kill(server.pid, signal.SIGSTOP)
            try:
                job.reply(rig.answered(job.request, 7))
                assert value_of(await call) == 7
                refused = await ask(rig.endpoint, keyed())
            finally:
                os.kill(server.pid, signal.SIGCONT)
    assert type(refused) is errors.Unavailable
    assert rig.counted.refused == {"unavailable": 1}


async def test_a_response_cached_by_one_gateway_is_a_hit_at_another(redis_url: str) -> None:
    async with fleet(redis_url, cache=True) as of, callers(of.rig) as asking:
        call = await begin(asking, of, 0, request())
        await of.rig.reply(7)
        await call
        client = of.stores[0]._redis._client
        await client.call("PING")  # what was sent before it has arrived
        hit = await ask(of.endpoints[1], request(id="x"))
        assert (hit.id, value_of(hit)) == ("x", 7)
        assert (of.rig.counted.cache_hit_count, of.rig.counted.inference_count) == (1, 1)
        assert of.stores[1]._memory.bytes > 0  # the next time nobody asks Redis


async def test_a_response_too_large_to_share_is_kept_near(redis_url: str) -> None:
    async with shared_store_of(options(redis_url), 8 << 20) as one:
        kept = Kept(b"", InferResponse("m", "1", {"OUT": tensor(np.ones((1, 1 << 19)))}))
        await one.put(KEY, kept, 60)
        assert await one.get(KEY) is kept
        assert one._redis.bytes == 0
