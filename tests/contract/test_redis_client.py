"""What `RedisClient` promises, against one server, a sentinel's primary and a cluster alike; all real."""

import asyncio
import os
import secrets
import threading
from pathlib import Path

import pytest
from redis.exceptions import OutOfMemoryError, ResponseError

from gateway.redis_client import Disconnected, RedisClient, RedisOptions
from tests.redis_support import cluster_node, options, redis_on_port, redis_server, sentinel
from tests.support import background, settle


@pytest.fixture(scope="module")
def sentinel_url():
    with redis_on_port() as primary, sentinel(primary) as port:
        yield f"redis+sentinel://127.0.0.1:{port}/svc"


@pytest.fixture(scope="module")
def cluster_url():
    with cluster_node() as port:
        asyncio.run(take_all_slots(port))
        yield f"redis+cluster://127.0.0.1:{port}"


async def take_all_slots(port):
    async with RedisClient(RedisOptions(f"redis://127.0.0.1:{port}")) as client:
        await client.call("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in await client.call("CLUSTER", "INFO"):  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.05)


@pytest.fixture(params=["redis", "sentinel", "cluster"])
def url(request):
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
async def client(url):
    async with RedisClient(options(url)) as client:
        assert client.connected
        yield client


@pytest.fixture
async def single(redis_url):
    async with RedisClient(options(redis_url)) as client:
        yield client


@pytest.fixture
def key(client):
    return client.keys.job("x")


def entries(reply):
    """The ids of an XREAD or XREADGROUP of one stream."""
    return [entry for _, found in reply or [] for entry, _ in found]


async def test_replies_are_plain_values(client, key):
    stream = client.keys.requests("m", "1", 1)
    assert await client.call("SET", key, "v") == b"OK"
    assert await client.call("GET", key) == b"v"
    assert await client.call("GET", key + "?") is None
    assert await client.call("STRLEN", key) == 1
    entry = await client.call("XADD", stream, "*", "f", b"\x00\xff", "n", 7)
    assert await client.call("XRANGE", stream, "-", "+") == [[entry, [b"f", b"\x00\xff", b"n", b"7"]]]


async def test_large_values_survive(client, key):
    value = os.urandom(5_000_000)
    await client.call("SET", key, memoryview(value), "PX", 60_000)
    assert await client.call("GET", key) == value


async def test_order_is_kept(client, key):
    calls = [client.call("RPUSH", key, number) for number in range(500)]
    for _ in range(5):
        await asyncio.sleep(0)
        calls += [client.call("RPUSH", key, number) for number in range(len(calls), len(calls) + 50)]
    assert await asyncio.gather(*calls) == list(range(1, len(calls) + 1))
    assert await client.call("LRANGE", key, 0, -1) == [b"%d" % number for number in range(len(calls))]


async def test_a_command_that_fails_fails_alone(client, key):
    results = await asyncio.gather(
        client.call("SET", key, 1),
        client.call("LPUSH", key, 1),
        client.call("NOSUCH", key),
        client.call("INCR", key),
        return_exceptions=True,
    )
    assert results[0] == b"OK"
    assert results[3] == 2
    assert str(results[1]).startswith("WRONGTYPE")
    assert all(type(failed) is ResponseError for failed in results[1:3])


async def test_atomic_runs_all_or_nothing(client, key):
    before = client.call("SET", key, 1)
    both = client.atomic(("INCR", key), ("GET", key))
    after = client.call("INCR", key)
    assert await asyncio.gather(before, both, after) == [b"OK", [2, b"2"], 3]
    with pytest.raises(ResponseError, match="unknown command"):
        await client.atomic(("INCR", key), ("NOSUCH", key))
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await client.atomic(("INCR", key), ("LPUSH", key, 1))  # at run time: Redis runs the others
    assert await client.call("GET", key) == b"4"


async def test_cancelled_callers_disturb_nobody(client, key):
    early = [client.call("INCR", key) for _ in range(10)]
    for future in early[::2]:
        future.cancel()
    await settle()
    late = [client.call("INCR", key) for _ in range(10)]
    both = [client.atomic(("INCR", key), ("INCR", key)) for _ in range(2)]
    await settle()
    both[0].cancel()
    for future in late[::2]:
        future.cancel()
    assert await asyncio.gather(*early[1::2], *late[1::2], both[1]) == [
        *range(2, 11, 2), *range(12, 21, 2), [23, 24],
    ]  # fmt: skip


async def test_bulk_goes_beside_the_other_calls(client):
    keys = [client.keys.payload(str(number)) for number in range(12)]
    values = [os.urandom(300_000) for _ in keys]
    lost = asyncio.ensure_future(client.bulk("SET", client.keys.payload("lost"), values[0], "PX", 60_000))
    await settle()
    lost.cancel()
    await asyncio.gather(*(client.bulk("SET", *pair, "PX", 60_000) for pair in zip(keys, values, strict=True)))
    assert await asyncio.gather(*(client.bulk("GET", key) for key in keys)) == values
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await client.bulk("LPUSH", keys[0], 1)
    assert await client.call("STRLEN", keys[0]) == 300_000


async def test_the_clock_is_redis_clock(client, key):
    before = client.clock(key)
    seconds, micros = await client.call("TIME")
    assert before - 0.1 <= int(seconds) + int(micros) / 1e6 <= client.clock(key) + 0.1


async def test_a_reader_waits_and_is_told(client, key):
    reader = client.reader()
    async with background(reader.call("XREAD", "BLOCK", 10_000, "STREAMS", key, "$", seconds=10)) as (reading,):
        while not reading.done():  # the first may come before it reads
            entry = await client.call("XADD", key, "*", "f", "v")
            await settle()
        assert entries(await reading)[0] <= entry
    await reader.close()


async def test_a_blocked_reader_can_be_told_to_return(client, key):
    reader = client.reader()
    await reader.unblock()  # nothing to unblock yet
    async with background(reader.call("XREAD", "BLOCK", 0, "STREAMS", key, "$", seconds=60)) as (reading,):
        while not reading.done():  # it may not be blocked yet
            await reader.unblock()
            await settle()
        assert await reading is None
    await client.call("XADD", key, "1-0", "f", "v")
    assert entries(await reader.call("XREAD", "STREAMS", key, 0, seconds=0)) == [b"1-0"]


async def test_closing_fails_what_is_open_and_leaves_nothing(url):
    def state():
        return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks()), threading.active_count()

    async with RedisClient(options(url)):
        pass  # what the process opens once
    before = state()
    async with RedisClient(options(url)) as client:
        reader = client.reader()
        blocked = asyncio.create_task(reader.call("XREAD", "BLOCK", 0, "STREAMS", "s", "$", seconds=60))
        await client.call("PING")
        await settle()
        waiting = client.call("PING")
    for left in (blocked, waiting, client.call("PING")):
        with pytest.raises(Disconnected, match="closed"):
            await left
    await settle()
    assert state() == before


# --- one server


async def reads(client):
    """How often the server has read from a socket."""
    info = (await client.call("INFO", "stats")).decode()
    return int(info.partition("total_reads_processed:")[2].partition("\r")[0])


async def test_what_is_called_in_one_turn_is_one_pipeline(single):
    before = await reads(single)
    calls = [single.call("INCR", single.keys.job("n")) for _ in range(300)]
    calls += [single.atomic(("INCR", single.keys.job("n")), ("GET", single.keys.job("n"))) for _ in range(10)]
    await asyncio.gather(*calls)
    # The second look is a read too, and one may be for the time.
    assert await reads(single) - before <= 3


async def test_what_is_called_while_a_pipeline_is_unanswered_is_the_next_one(single):
    before = await reads(single)
    held = single.call("PING")
    calls = [held]
    turns = 0
    while not held.done():  # each turn of the loop calls once
        calls.append(single.call("PING"))
        await asyncio.sleep(0)
        turns += 1
    await asyncio.gather(*calls)
    assert turns > 1
    assert await reads(single) - before <= 4


async def test_bulk_uses_few_connections_again_and_again():
    with redis_server() as url:
        async with RedisClient(options(url)) as client:
            for _ in range(3):
                await asyncio.gather(*(client.bulk("SET", str(number), bytes(100_000)) for number in range(20)))
            assert len((await client.call("CLIENT", "LIST")).splitlines()) == 1 + 4


async def test_nothing_waits_behind_bulk(single):
    """The large commands are all sent before the small one, which is answered before the last of them."""
    key = single.keys.payload("x")
    large = [asyncio.ensure_future(single.bulk("SET", key, bytes(8_000_000), "PX", 60_000)) for _ in range(8)]
    await settle()
    await single.call("PING")
    assert not all(call.done() for call in large)
    await asyncio.gather(*large)


async def test_a_full_server_is_an_error_of_its_own():
    with redis_server() as url:
        async with RedisClient(options(url)) as client:
            await client.call("SET", "small", 1)
            await client.call("CONFIG", "SET", "maxmemory", 1)
            with pytest.raises(OutOfMemoryError):
                await client.call("XADD", "s", "*", "f", "v")
            with pytest.raises(OutOfMemoryError):
                await client.atomic(("SET", "a", 1), ("SET", "b", 1))
            assert await client.call("GET", "small") == b"1"
            assert client.connected


async def test_a_password_or_acl_user_from_a_file_that_changes(tmp_path):
    with redis_server() as url:
        async with RedisClient(options(url)) as admin:
            password = tmp_path / "password"
            password.write_text("first\n")
            await admin.call("ACL", "SETUSER", "app", "on", ">first", "~*", "&*", "+@all")
            mine = options(url, username="app", password_file=password)
            async with RedisClient(mine) as client:
                assert await client.call("ACL", "WHOAMI") == b"app"
                await admin.call("ACL", "SETUSER", "app", "resetpass", ">second")
                password.write_text("second\n")
                await admin.call("CLIENT", "KILL", "USER", "app")
                await back(client)
                assert await client.call("ACL", "WHOAMI") == b"app"
                assert client.generation == 1
            password.write_text("wrong")
            with pytest.raises(Disconnected, match="refuses us: WRONGPASS"):
                await RedisClient(mine).__aenter__()


async def back(client):
    """Until a call gets through: a lost connection is noticed at some call."""
    while True:
        await client.online()
        try:
            return await client.call("PING")
        except Disconnected:
            await settle()


async def test_a_user_with_few_rights_can_work():
    with redis_server() as url:
        rights = ["-@all", "+xadd", "+ping"]
        async with RedisClient(options(url)) as admin:
            await admin.call("ACL", "SETUSER", "few", "on", ">pw", "~*", *rights)
            async with RedisClient(options(url.replace("unix://", "unix://few:pw@"))) as client:
                assert client.clock() > 1e9
                await client.call("XADD", "s", "*", "f", "v")
                await client.bulk("XADD", "s", "*", "f", "v")
                await client.reader().unblock()
                await admin.call("CLIENT", "KILL", "USER", "few")
                await back(client)
                assert client.generation == 2  # who it is cannot be known, so the worst is assumed


async def test_databases_are_apart(redis_url):
    key = secrets.token_hex(8)
    async with RedisClient(options(redis_url + "?db=3")) as third, RedisClient(options(redis_url)) as zeroth:
        await third.call("SET", key, 1, "PX", 60_000)
        assert await zeroth.call("GET", key) is None
    with pytest.raises(Disconnected, match="out of range"):
        await RedisClient(options(redis_url + "?db=999")).__aenter__()


async def test_a_password_that_nobody_asked_for_is_refused(redis_url):
    with pytest.raises(Disconnected, match="refuses us"):
        await RedisClient(options(redis_url.replace("unix://", "unix://:pw@"))).__aenter__()
