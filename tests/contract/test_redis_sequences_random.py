"""Sequences through two gateways and two workers while all sorts of things go wrong, against what each client has sent.

Each request brings a number of its own and is answered with the numbers that its sequence's state is made of. Those must
be all that its client has sent since it began, in that order: so nothing is mixed, run twice, left out or out of order.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import count

import msgspec
import numpy as np
import pytest

from gateway import errors
from gateway import sequence as refusals
from gateway.config.model import SequenceBatching
from gateway.queues.base import Job, Keeps, PoolState, VersionState
from gateway.queues.redis.beside import INLINE
from gateway.queues.redis.queue import RedisQueue
from gateway.redis_client import RedisClient
from gateway.sequence import SequenceId, flag, id_of
from tests.fleet_support import Mortal, hurry, known
from tests.redis_support import fleet_queue, options
from tests.support import LANE, answer, ask, model_config, request, tensor

CONFIG = replace(model_config(), batching=None, sequences=SequenceBatching(idle_us=60_000_000))
READY = PoolState("m", (VersionState("1", "READY", config=CONFIG),))
LARGE = INLINE // 8 + 1  # rows of a request that goes beside the stream
BEGINNINGS = 14


class Worker:
    """Carries a list of numbers for each sequence, as long as it lives."""

    def __init__(self, queue: RedisQueue, ran: Counter[int], chance: random.Random) -> None:
        self._queue = queue
        self._ran = ran
        self._chance = chance
        self._states: dict[SequenceId, list[int]] = {}
        queue.publish(READY)
        self._consumer = queue.consumer([LANE], keeps=Keeps(lambda: 100, 60.0))

    async def serve(self) -> None:
        """Until cancelled."""
        while jobs := await self._consumer.take(8):
            for job in jobs:
                for _ in range(self._chance.randrange(3)):
                    await asyncio.sleep(0)
                self._run(job)

    def _run(self, job: Job) -> None:
        id_ = id_of(job.request)
        if flag(job.request, "sequence_start"):
            self._states[id_] = []
        if job.done:
            self._states.pop(id_, None)
        elif id_ not in self._states:
            job.fail(refusals.not_started(id_, "m"))
        else:
            number = int(job.request.inputs["IN"].array.flat[0])
            self._ran[number] += 1
            state = self._states[id_]
            state.append(number)
            job.reply(msgspec.structs.replace(answer(job.request), parameters={"state": ",".join(map(str, state))}))
            if flag(job.request, "sequence_end"):
                del self._states[id_]


@dataclass
class Fleet:
    """Two gateways, two workers, and what went well or wrong."""

    chance: random.Random
    gateways: list[RedisQueue] = field(default_factory=list)
    workers: list[Mortal] = field(default_factory=list)
    serving: dict[Mortal, asyncio.Task[None]] = field(default_factory=dict)
    ran: Counter[int] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    numbers: count = field(default_factory=count)

    async def hire(self, of, tasks: asyncio.TaskGroup) -> None:
        mortal = Mortal(of, "worker")
        queue = await mortal.__aenter__()
        worker = Worker(queue, self.ran, self.chance)
        self.workers.append(mortal)
        self.serving[mortal] = tasks.create_task(worker.serve())
        await known(lambda: all(queue.process in gateway._directory.members for gateway in self.gateways))

    async def kill(self, mortal: Mortal) -> None:
        self.workers.remove(mortal)
        self.serving.pop(mortal).cancel()
        await mortal.die()


@dataclass
class Client:
    """Sends the requests of one sequence, some at once, through one gateway or another, and gives some up."""

    id: SequenceId
    fleet: Fleet
    sent: list[int] = field(default_factory=list)  # since it began

    async def run(self) -> None:
        chance = self.fleet.chance
        for _ in range(BEGINNINGS):
            gateway = chance.choice(self.fleet.gateways)
            begins = True
            for _ in range(chance.randint(1, 4)):
                some = [self._request(begins=begins and not place) for place in range(chance.choice((1, 1, 2, 5)))]
                begins = False
                if await self._ask(gateway, some):  # else only this gateway is sure to know of the gap
                    gateway = chance.choice(self.fleet.gateways)

    async def _ask(self, gateway: RedisQueue, some: list) -> bool:
        """Whether none of them was given up."""
        asked = [asyncio.create_task(self._one(gateway, each)) for each in some]
        if self.fleet.chance.random() < 0.15:
            for _ in range(self.fleet.chance.randrange(40)):
                await asyncio.sleep(0)
            self.fleet.chance.choice(asked).cancel()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return not any(each.cancelled() for each in asked)

    def _request(self, *, begins: bool):
        number = next(self.fleet.numbers)
        chance = self.fleet.chance
        parameters = {"sequence_id": self.id, "sequence_start": begins, "sequence_end": chance.random() < 0.05}
        large = chance.random() < 0.1
        inputs = {"IN": tensor(np.full((LARGE if large else 1, 2), number))}
        return number, begins, request(parameters=parameters, inputs=inputs, rows=LARGE if large else 1)

    async def _one(self, gateway: RedisQueue, what) -> None:
        number, begins, asked = what
        self.sent = [number] if begins else [*self.sent, number]
        sent = self.sent
        try:
            async with asyncio.timeout(10):
                given = await ask(gateway, asked)
        except (errors.SequenceLost, errors.InvalidArgument, errors.Unavailable) as error:
            self.fleet.told[type(error).__name__] += 1
        else:
            self.fleet.told["answered"] += 1
            state = [int(each) for each in given.parameters["state"].split(",")]
            assert state == sent, f"sequence {self.id}: {state} instead of {sent}"


async def misfortunes(fleet: Fleet, of, tasks: asyncio.TaskGroup) -> None:
    """One after the other, whenever some more requests were answered or refused."""
    for misfortune in ("cut", "death", "cut", "empty", "cut", "leave", "cut"):
        goal = fleet.told.total() + 40
        await known(lambda goal=goal: fleet.told.total() >= goal)
        client = fleet.gateways[0].client
        if misfortune == "empty":  # it begins anew with nothing
            await client.call("DEL", *[key async for key in keys(client, "*")])
        if misfortune in {"cut", "empty"}:
            await client.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        else:
            victim = fleet.chance.choice(fleet.workers)
            await fleet.hire(of, tasks)
            if misfortune == "leave":
                victim.queue.leave()
            await fleet.kill(victim)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
async def test_every_answer_is_of_all_that_was_sent_and_nothing_else(redis_url, monkeypatch, seed):
    hurry(monkeypatch)
    of = options(redis_url)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        gateways = [await stack.enter_async_context(fleet_queue(of, "gateway")) for _ in range(2)]
        fleet = Fleet(random.Random(seed), gateways)
        for _ in range(2):
            await fleet.hire(of, tasks)
        clients = [Client(each, fleet) for each in (1, "1", 2, "ü", 3, 4)]
        trouble = tasks.create_task(misfortunes(fleet, of, tasks))
        async with asyncio.timeout(30), asyncio.TaskGroup() as asking:
            for client in clients:
                asking.create_task(client.run())
        trouble.cancel()
        assert max(fleet.ran.values()) == 1
        assert fleet.told["answered"] > 50
        await known(lambda: not any(each._calls._calls or each._calls.routes._lines for each in gateways))
        await nothing_stays(gateways[0].client)
        for worker in list(fleet.workers):
            await fleet.kill(worker)


async def nothing_stays(client: RedisClient) -> None:
    """What Redis knows of sequences and of single workers is forgotten in time."""
    for kind in ("s:*", "q:*:worker-*"):
        async for key in keys(client, kind):
            assert await client.call("PTTL", key) != -1, key


async def keys(client: RedisClient, kind: str) -> AsyncIterator[bytes]:
    """Those of this fleet."""
    cursor: bytes | int = 0
    while True:
        cursor, found = await client.call("SCAN", cursor, "MATCH", f"*{client.keys.prefix}*:{kind}", "COUNT", 1000)
        for key in found:
            yield key
        if not int(cursor):
            break
