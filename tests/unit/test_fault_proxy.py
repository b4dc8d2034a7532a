"""The fault proxy of the tests and load tests: each fault happens, and nothing else does."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from loadtest.fault_proxy import FaultProxy
from tests.support import settle, until


@asynccontextmanager
async def echo(path):
    """A server that gives back what it is sent."""

    async def serve(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path
    finally:
        server.close()


@pytest.fixture
async def proxy(tmp_path):
    async with echo(str(tmp_path / "echo")) as target, FaultProxy(target) as proxy:
        yield proxy


@asynccontextmanager
async def connected(proxy):
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_bytes_pass_both_ways(proxy):
    async with connected(proxy) as (reader, writer):
        sent = bytes(range(256)) * 4096
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
    assert (proxy.up.carried, proxy.down.carried, proxy.connections) == (len(sent), len(sent), 1)


async def test_a_close_is_passed_on(proxy):
    async with connected(proxy) as (_, writer):
        writer.write(b"x")
        await until(lambda: proxy.down.carried == 1)
        writer.close()
        await until(lambda: not proxy._open)


async def test_swallowed_replies_never_come(proxy):
    proxy.down.swallow = True
    async with connected(proxy) as (reader, writer):
        writer.write(b"lost")
        await until(lambda: proxy.down.swallowed == 4)
        proxy.down.swallow = False
        writer.write(b"found")
        assert await reader.readexactly(5) == b"found"


async def test_a_paused_way_holds_bytes_and_gives_them_later(proxy):
    proxy.up.paused = True
    async with connected(proxy) as (reader, writer):
        writer.write(b"late")
        await until(lambda: proxy.connections == 1)
        await settle()
        assert proxy.up.carried == 0
        proxy.up.paused = False
        assert await reader.readexactly(4) == b"late"


async def test_a_reset_breaks_open_connections_and_no_later_one(proxy):
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read()
    async with connected(proxy) as (reader, writer):
        writer.write(b"y")
        assert await reader.readexactly(1) == b"y"


async def test_a_connection_breaks_after_its_bytes(proxy):
    proxy.down.reset_after = 3
    async with connected(proxy) as (reader, writer):
        writer.write(b"12345")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(5)
    assert proxy.down.carried == 3


@pytest.mark.parametrize("how", [{"refuse": True}, {"reset_share": 1.0}])
async def test_new_connections_are_reset(proxy, how):
    for name, value in how.items():
        setattr(proxy, name, value)
    async with connected(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_latency_delays_and_keeps_the_order(proxy):
    loop = asyncio.get_running_loop()
    proxy.up.latency, proxy.up.jitter = 0.02, 0.02
    async with connected(proxy) as (reader, writer):
        started = loop.time()
        for number in range(20):
            writer.write(b"%02d" % number)
            await settle()
        assert await reader.readexactly(40) == b"".join(b"%02d" % number for number in range(20))
        assert loop.time() - started >= 0.02


async def test_it_can_listen_on_a_unix_socket(tmp_path):
    async with echo(str(tmp_path / "echo")) as target, FaultProxy(target, path=str(tmp_path / "proxy")) as proxy:
        reader, writer = await asyncio.open_unix_connection(proxy.address)
        writer.write(b"z")
        assert await reader.readexactly(1) == b"z"
        writer.close()


async def test_a_target_that_is_not_there_breaks_the_connection(tmp_path):
    async with FaultProxy(str(tmp_path / "nobody")) as proxy, connected(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read()
