"""A fleet on a Redis of several servers: a primary that dies and its replica, and a cluster."""

import asyncio
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace

import pytest

from gateway.config.model import SequenceBatching
from gateway.queues.base import Keeps, Lane, PoolState
from gateway.redis_client import RedisClient
from tests.contract.test_redis_faults import meet, until_sentinel_knows_a_replica
from tests.fleet_support import READY, known, take
from tests.redis_support import cluster_node, fleet_queue, free_port, options, redis_on_port, redis_process, sentinel
from tests.support import answer, ask, background, model_config, request

SEQUENCES = replace(model_config(), batching=None, sequences=SequenceBatching(idle_us=1_000_000))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


async def test_a_failover_loses_no_request():
    """What was sent and not replicated, what was read and not answered: all of it is answered by the replica."""
    now = ("sentinel down-after-milliseconds svc 300", "sentinel failover-timeout svc 2000")
    with ExitStack() as stack:
        first = free_port()
        server = stack.enter_context(
            redis_process("--port", str(first), "--save", "", "--repl-diskless-sync-delay", "0")
        )
        stack.enter_context(redis_on_port("--replicaof", f"127.0.0.1 {first}"))
        port = stack.enter_context(sentinel(first, *now))
        await until_sentinel_knows_a_replica(port)
        of = options(f"redis+sentinel://127.0.0.1:{port}/svc")
        async with fleet_queue(of, "gateway") as gateway, fleet_queue(of, "worker") as held:
            consumer = held.consumer([Lane("m", "1")], 4)
            async with background(*(ask(gateway, request(id=str(n))) for n in range(12))) as callers:
                jobs = await take(held, 4, consumer)
                server.kill()
                for job in jobs:
                    job.reply(answer(job.request))
                while not all(caller.done() for caller in callers):
                    async with background(consumer.take(4)) as (taking,):
                        await asyncio.wait([taking, *callers], return_when=asyncio.FIRST_COMPLETED)
                        if taking.done():
                            for job in taking.result():
                                job.reply(answer(job.request))
                assert [caller.result().id for caller in callers] == [str(n) for n in range(12)]


async def test_a_fleet_on_a_cluster():
    """Its lanes are on several servers, and what all processes share on one of them."""
    names = [f"m{n}" for n in range(6)]
    async with AsyncExitStack() as stack:
        ports = [stack.enter_context(cluster_node()) for _ in range(2)]
        nodes = [await stack.enter_async_context(RedisClient(options(f"redis://127.0.0.1:{port}"))) for port in ports]
        await meet(*nodes, ports[1])
        of = options(f"redis+cluster://127.0.0.1:{ports[0]}")
        gateway = await stack.enter_async_context(fleet_queue(of, "gateway"))
        held = await stack.enter_async_context(fleet_queue(of, "worker"))
        for name in names:
            held.publish(PoolState(name, READY.versions))
        await known(lambda: all(gateway.pool(name) for name in names))
        for _ in range(3):
            async with background(
                *(ask(gateway, request(model_name=name), Lane(name, "1")) for name in names)
            ) as asked:
                for name in names:
                    (job,) = await take(held, 1, held.consumer([Lane(name, "1")], 4), Lane(name, "1"))
                    job.reply(answer(job.request))
                assert [(await caller).model_name for caller in asked] == names
        for name in names:
            held.publish(PoolState(name, tuple(replace(each, config=SEQUENCES) for each in READY.versions)))
        await known(lambda: all(gateway.pool(name).versions[0].config.sequences for name in names))
        for name in names:
            lane = Lane(name, "1")
            consumer = held.consumer([lane], keeps=Keeps(lambda: 4, 1.0))
            for flags in ({"sequence_start": True}, {}, {"sequence_end": True}):
                parameters = {"sequence_id": "x", **flags}
                async with background(ask(gateway, request(model_name=name, parameters=parameters), lane)) as (asked,):
                    (job,) = await take(held, 1, consumer, lane)
                    job.reply(answer(job.request))
                    assert (await asked).model_name == name
        slots = [await nodes[0].call("CLUSTER", "KEYSLOT", held.client.keys.requests(name, "1", 2)) for name in names]
        assert {slot < 8192 for slot in slots} == {True, False}
