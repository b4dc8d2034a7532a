"""The sum over a fleet: the same whichever process is asked, and it never falls, whoever dies."""

import asyncio

import pytest
from redis.exceptions import OutOfMemoryError

from gateway import errors
from gateway.redis_client import RedisClient
from gateway.statistics import Statistics
from gateway.statistics.fleet import DEPARTED, QUESTION, FleetStatistics
from tests.redis_support import options
from tests.support import background, settle

KEY = "{lockgate}:stats"


class FakeRedis:
    """One hash, answered in the next turn of the loop. While `error` is set every command fails with it.

    While `hangs` is set nothing is answered.
    """

    def __init__(self) -> None:
        self.hash: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.hangs = False
        self.reads = 0

    def call(self, *command):
        return self.atomic(command, only=True)

    def atomic(self, *commands, only=False):
        future = asyncio.get_running_loop().create_future()
        if self.hangs:
            return future
        if self.error is not None:
            asyncio.get_running_loop().call_soon(future.set_exception, self.error)
        else:
            replies = [self._run(*command) for command in commands]
            asyncio.get_running_loop().call_soon(future.set_result, replies[0] if only else replies)
        return future

    def _run(self, name, key, *words):
        assert key == KEY
        if name == "HGETALL":
            self.reads += 1
            return [part for field, value in self.hash.items() for part in (field.encode(), value)]
        if name == "HDEL":
            return sum(self.hash.pop(word, None) is not None for word in words)
        field, value = words
        if name == "HSETNX" and field in self.hash:
            return 0
        assert name in ("HSET", "HSETNX")
        self.hash[field] = value
        return 1


class Fleet:
    """Processes that answer each other's questions, unless they are in `silent`."""

    def __init__(self) -> None:
        self.redis = FakeRedis()
        self.processes: dict[str, tuple[Statistics, FleetStatistics]] = {}
        self.silent: set[str] = set()
        self.rounds = 0
        self.now = 1000.0
        self.gate = asyncio.Event()
        self.gate.set()

    def start(self, name: str) -> tuple[Statistics, FleetStatistics]:
        async def ask(question: str) -> list[bytes]:
            assert question == QUESTION
            self.rounds += 1
            await self.gate.wait()
            return [of.answer() for each, (_, of) in self.processes.items() if each not in self.silent | {name}]

        local = Statistics()
        fleet = FleetStatistics(local, name, ask, redis=self.redis, key=KEY, clock=lambda: self.now)
        self.processes[name] = local, fleet
        return local, fleet

    def count(self, name: str, times: int = 1, version: str = "1") -> None:
        for _ in range(times):
            self.processes[name][0].of("m", version).record_success(1, None, 1)

    async def total(self, name: str, version: str = "1") -> int:
        return (await self.processes[name][1]()).of("m", version).success_count

    def kill(self, name: str) -> None:
        del self.processes[name]


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    for name in ("a", "b", "w"):
        fleet.start(name)
    return fleet


async def test_every_process_tells_the_same_sum(fleet: Fleet) -> None:
    fleet.count("a", 1)
    fleet.count("b", 10)
    fleet.count("w", 100)
    assert [await fleet.total(name) for name in ("a", "b", "w")] == [111] * 3


async def test_what_was_shown_of_a_process_outlives_it(fleet: Fleet) -> None:
    fleet.count("b", 10)
    assert await fleet.total("a") == 10
    fleet.count("b", 5)
    assert await fleet.total("w") == 15
    fleet.kill("b")
    assert [await fleet.total(name) for name in ("a", "w")] == [15, 15]
    fleet.start("c")
    assert await fleet.total("c") == 15


async def test_what_the_asked_process_showed_of_itself_outlives_it(fleet: Fleet) -> None:
    fleet.count("a", 3)
    assert await fleet.total("a") == 3
    fleet.kill("a")
    assert await fleet.total("b") == 3


async def test_a_process_that_is_silent_counts_once_and_with_its_newest_word(fleet: Fleet) -> None:
    fleet.count("b", 10)
    await fleet.total("a")
    fleet.count("b", 1)
    fleet.silent.add("b")
    assert await fleet.total("a") == 10
    fleet.silent.clear()
    assert await fleet.total("a") == 11


async def test_the_requests_of_the_dead_are_not_pending(fleet: Fleet) -> None:
    fleet.processes["b"][0].of("m", "1").pending = 7
    assert (await fleet.processes["a"][1]()).of("m", "1").pending == 7
    fleet.kill("b")
    assert (await fleet.processes["a"][1]()).of("m", "1").pending == 0


async def test_the_last_word_is_said_when_a_process_stops(fleet: Fleet) -> None:
    async with fleet.processes["b"][1]:
        fleet.count("b", 4)
    fleet.kill("b")
    assert await fleet.total("a") == 4


async def test_a_word_is_said_every_few_seconds() -> None:
    redis, local = FakeRedis(), Statistics()

    async def nobody(_: str) -> list[bytes]:
        return []

    written = asyncio.Event()
    local.refreshers.append(written.set)
    async with FleetStatistics(local, "a", nobody, redis=redis, key=KEY, seconds=0.001):
        for _ in range(30):  # which makes it look at the hash, too
            written.clear()
            await written.wait()
    assert list(redis.hash) == ["a"]
    assert redis.reads > 1


# --- without Redis


async def test_without_redis_the_sum_is_of_what_is_known(fleet: Fleet) -> None:
    fleet.count("a", 1)
    fleet.count("b", 10)
    await fleet.total("a")
    fleet.redis.error = errors.Unavailable("Redis is away")
    fleet.silent = {"b", "w"}
    fleet.count("a", 1)
    assert await fleet.total("a") == 12


async def test_a_redis_that_hangs_holds_nobody_up_for_long(fleet: Fleet, monkeypatch) -> None:
    fleet.count("b", 10)
    await fleet.total("a")
    monkeypatch.setattr("gateway.statistics.fleet._PATIENCE", 0.001)
    fleet.redis.hangs = True
    fleet.gate.clear()
    fleet.count("a", 1)
    assert await fleet.total("a") == 11
    async with fleet.processes["a"][1]:
        pass


async def test_a_question_that_cannot_be_asked_is_no_error(fleet: Fleet) -> None:
    async def broken(_: str) -> list[bytes]:
        raise errors.Unavailable("Redis is away")

    local = Statistics()
    local.of("m", "1").record_success(1, None, 1)
    fleet.count("b", 2)
    await fleet.total("a")
    lone = FleetStatistics(local, "x", broken, redis=fleet.redis, key=KEY)
    assert (await lone()).of("m", "1").success_count == 3


async def test_what_redis_has_lost_is_given_back(fleet: Fleet) -> None:
    fleet.count("b", 10)
    await fleet.total("a")
    fleet.kill("b")
    fleet.redis.hash.clear()
    assert await fleet.total("a") == 10
    fleet.start("c")
    assert await fleet.total("c") == 10


async def test_nothing_older_is_put_over_what_redis_has(fleet: Fleet) -> None:
    fleet.count("b", 10)
    await fleet.total("a")
    fleet.count("b", 1)
    await fleet.total("w")  # so `a` has not heard of it
    fleet.kill("b")
    kept = fleet.redis.hash["b"]
    await fleet.processes["a"][1].tidy()
    assert fleet.redis.hash["b"] == kept


async def test_a_redis_that_takes_nothing_is_logged_once(fleet: Fleet, caplog) -> None:
    fleet.redis.error = OutOfMemoryError("OOM command not allowed")
    written = asyncio.Event()
    local = Statistics()
    local.refreshers.append(written.set)

    async def nobody(_: str) -> list[bytes]:
        return []

    async with FleetStatistics(local, "a", nobody, redis=fleet.redis, key=KEY, seconds=0.001):
        for _ in range(3):
            written.clear()
            await written.wait()
    assert [str(record.msg) for record in caplog.records] == ['statistics_not_kept reason="OOM command not allowed"']


# --- one round for many


async def test_callers_that_come_during_a_round_share_the_next(fleet: Fleet) -> None:
    fleet.gate.clear()
    calls = [fleet.total("a") for _ in range(5)]
    async with background(*calls) as tasks:
        await settle()
        assert fleet.rounds == 1
        fleet.count("b", 3)  # after the first round began; the other four must see it
        fleet.gate.set()
        assert [await task for task in tasks[1:]] == [3] * 4
    assert fleet.rounds == 2


async def test_a_caller_who_leaves_disturbs_nobody(fleet: Fleet) -> None:
    fleet.gate.clear()
    fleet.count("b", 3)
    async with background(fleet.total("a"), fleet.total("a")) as (first, second):
        await settle()
        first.cancel()
        await settle()
        fleet.gate.set()
        assert await second == 3


# --- other versions of the code


async def test_a_word_that_cannot_be_read_is_skipped_counted_and_logged_once(fleet: Fleet, caplog) -> None:
    fleet.count("a")
    fleet.redis.hash["old"] = b"\x93\x01"
    for _ in range(2):
        total = await fleet.processes["a"][1]()
        assert (total.skipped, total.of("m", "1").success_count) == (1, 1)
    assert [str(record.msg) for record in caplog.records] == ["statistics_unreadable processes=1"]


# --- unload


async def test_an_unload_reaches_those_that_were_cut_off_and_those_that_are_new(fleet: Fleet) -> None:
    for name in ("a", "b", "w"):
        fleet.count(name)
    await fleet.total("a")
    fleet.kill("b")
    fleet.processes["w"][0].forget("m", "1", 5)
    assert await fleet.total("a") == 0
    fleet.kill("w")
    local, late = fleet.start("late")
    async with late:
        assert local.epoch("m", "1") == 5
    fleet.count("late")
    assert await fleet.total("a") == 1


# --- the long dead


async def look(fleet: Fleet, *names: str) -> None:
    for name in names:
        fleet.processes[name][0].of("m", "1")
        fleet.processes[name][1].answer()
    for name in names:
        await fleet.processes[name][1].tidy()


async def test_the_words_of_the_long_dead_are_folded_into_one(fleet: Fleet) -> None:
    for name, times in (("a", 1), ("b", 10), ("w", 100)):
        fleet.count(name, times)
    await fleet.total("a")
    fleet.kill("b")
    for _ in range(24):
        await look(fleet, "a", "w")
        assert await fleet.total("w") == 111
        fleet.now += 300
    assert set(fleet.redis.hash) == {"a", "w", DEPARTED}
    fleet.kill("a")
    for _ in range(24):
        await look(fleet, "w")
        assert await fleet.total("w") == 111
        fleet.now += 300
    assert set(fleet.redis.hash) == {"w", DEPARTED}
    fleet.start("c")
    assert await fleet.total("c") == 111


async def test_who_was_taken_for_dead_counts_no_second_time(fleet: Fleet, caplog) -> None:
    fleet.count("b", 10)
    await fleet.total("a")
    frozen = fleet.processes["b"]
    fleet.kill("b")
    for _ in range(24):
        await look(fleet, "a")
        fleet.now += 300
    fleet.processes["b"] = frozen
    assert [await fleet.total(name) for name in ("a", "b")] == [10, 10]
    assert "statistics_disowned" in caplog.text


async def test_what_is_folded_survives_an_empty_redis(fleet: Fleet) -> None:
    fleet.count("b", 10)
    await fleet.total("a")
    fleet.kill("b")
    for _ in range(24):
        await look(fleet, "a")
        fleet.now += 300
    fleet.redis.hash.clear()
    assert await fleet.total("a") == 10
    assert set(fleet.redis.hash) == {"a", "w", DEPARTED}


async def test_what_cannot_be_read_is_not_folded(fleet: Fleet) -> None:
    fleet.redis.hash["old"] = b"\x93\x01"
    await fleet.total("b")
    fleet.kill("b")
    for _ in range(24):
        await look(fleet, "a")
        fleet.now += 300
    assert {"old", "b"} <= set(fleet.redis.hash)


async def test_a_round_on_a_redis_that_took_long_folds_nothing(fleet: Fleet) -> None:
    await fleet.total("b")
    fleet.kill("b")
    await look(fleet, "a")
    fleet.now += 7200
    ask_clock = fleet.processes["a"][1]
    ticks = iter((fleet.now, fleet.now + 11))
    ask_clock._clock = lambda: next(ticks)
    await ask_clock.tidy()
    assert "b" in fleet.redis.hash


async def test_the_least_of_the_live_folds_and_nobody_else(fleet: Fleet) -> None:
    await fleet.total("w")
    fleet.kill("b")
    for _ in range(24):
        for name in ("a", "w"):
            fleet.processes[name][1].answer()
        await fleet.processes["w"][1].tidy()
        fleet.now += 170
    assert "b" in fleet.redis.hash
    await fleet.processes["a"][1].tidy()
    fleet.now += 3700
    fleet.processes["w"][1].answer()
    await fleet.processes["a"][1].tidy()
    assert "b" not in fleet.redis.hash


# --- on a real Redis


async def test_two_processes_on_a_real_redis(redis_url: str) -> None:
    first, second = Statistics(), Statistics()
    async with RedisClient(options(redis_url)) as client:

        async def ask_first(_: str) -> list[bytes]:
            return [of_first.answer()]

        async def ask_nobody(_: str) -> list[bytes]:
            return []

        key = client.keys.stats
        async with FleetStatistics(first, "gateway-1", ask_nobody, redis=client, key=key) as of_first:
            first.of("m", "1").record_success(1, None, 1)
            async with FleetStatistics(second, "worker-2", ask_first, redis=client, key=key) as of_second:
                second.of("m", "1").record_batch(4, 1, 2, 3, "full")
                entry = (await of_second()).of("m", "1").to_triton()
                assert (entry["inference_stats"]["success"]["count"], entry["execution_count"]) == (1, 1)
            # The second is gone; nobody answers the first.
            assert (await of_first()).of("m", "1").to_triton() == entry
        assert sorted(await client.call("HKEYS", key)) == [b"gateway-1", b"worker-2"]
