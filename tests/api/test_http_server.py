"""The server wrapper: one port, no signals, no noise, and a stop that loses nothing and waits for nobody idle."""

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.transport.http import Counted, HttpServer, TlsFiles
from gateway.transport.ports import listening
from tests.support import background, settle

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class App:
    """Answers "ok"; while `free` is clear, only later. `entered` counts the requests that came in."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.entered = asyncio.Semaphore(0)

    async def answer(self, scope: Any, protocol: Any) -> None:
        self.entered.release()
        await self.free.wait()
        protocol.response_bytes(200, [], b"ok")


async def connect(port: int, **more: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, **more)


async def get(port: int, **more: Any) -> bytes:
    reader, writer = await connect(port, **more)
    writer.write(GET)
    answer = await reader.readuntil(b"ok")
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_free_port_is_taken_and_told() -> None:
    async with (
        HttpServer(Counted(App().answer), "127.0.0.1", 0) as first,
        HttpServer(Counted(App().answer), "localhost", 0) as second,
    ):
        assert first.port != second.port
        assert (await get(first.port)).startswith(b"HTTP/1.1 200")


async def test_a_port_in_use_is_refused_and_not_shared() -> None:
    async with HttpServer(Counted(App().answer), "127.0.0.1", 0) as server:
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}: Address already in use"):
            async with HttpServer(Counted(App().answer), "127.0.0.1", server.port):
                pass


async def test_the_port_can_be_taken_again_and_nothing_is_left_open() -> None:
    process = psutil.Process()
    async with HttpServer(Counted(App().answer), "127.0.0.1", 0) as server:
        port = server.port
    counts = []
    for _ in range(5):
        async with HttpServer(Counted(App().answer), "127.0.0.1", port):
            await get(port)
        counts.append(process.num_fds())
    assert counts[-1] <= counts[0]


async def test_accepted_sockets_do_not_delay_small_writes() -> None:
    async with HttpServer(Counted(App().answer), "127.0.0.1", 0) as server:
        reader, writer = await connect(server.port)
        writer.write(GET)
        await reader.readuntil(b"ok")
        ours = writer.get_extra_info("sockname")
        (theirs,) = [each.fd for each in psutil.Process().net_connections() if each.raddr == ours]
        with socket.socket(fileno=os.dup(theirs)) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        writer.close()


async def test_a_stop_closes_the_port_and_lets_requests_finish() -> None:
    app = App()
    app.free.clear()
    server = HttpServer(Counted(app.answer), "127.0.0.1", 0)
    await server.__aenter__()
    idle_reader, idle_writer = await connect(server.port)
    reader, writer = await connect(server.port)
    writer.write(GET)
    await app.entered.acquire()
    stopping = asyncio.ensure_future(server.__aexit__(None, None, None))
    assert await idle_reader.read() == b""  # granian has begun to stop
    with pytest.raises(ConnectionRefusedError):
        await connect(server.port)
    assert not stopping.done()
    app.free.set()
    assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
    await stopping
    for each in (writer, idle_writer):
        each.close()


@pytest.mark.slow
async def test_a_half_sent_request_does_not_hold_a_stop() -> None:
    async with HttpServer(Counted(App().answer), "127.0.0.1", 0) as server:
        await get(server.port)
        _, writer = await connect(server.port)
        writer.write(GET[:10])
        await writer.drain()
    writer.close()


async def test_an_error_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with HttpServer(Counted(App().answer), "127.0.0.1", 0):
            raise KeyError


async def test_a_listener_that_ends_by_itself_is_an_error() -> None:
    async def serve() -> None:
        async with HttpServer(Counted(App().answer), "127.0.0.1", 0) as server:
            server._server.stop()
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as ended:
        await serve()
    assert ended.group_contains(RuntimeError, match="ended by itself")


async def test_signals_and_standard_output_are_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    async with HttpServer(Counted(App().answer), "127.0.0.1", 0) as server:
        await get(server.port)
        assert [signal.getsignal(number) for number in numbers] == before
    assert capfd.readouterr() == ("", "")


async def test_connections_over_the_limit_wait_their_turn() -> None:
    async with HttpServer(Counted(App().answer), "127.0.0.1", 0, max_connections=2) as server:
        held = [await connect(server.port) for _ in range(2)]
        for reader, writer in held:
            writer.write(GET)
            await reader.readuntil(b"ok")
        async with background(get(server.port)) as (late,):
            for _, writer in held:
                assert not late.done()
                writer.close()
            assert (await late).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
async def test_a_server_that_leaves_ends_its_connections_and_the_other_takes_the_callers() -> None:
    app = App()
    async with HttpServer(Counted(app.answer), "127.0.0.1", 0, share=True) as leaving:
        reader, writer = await connect(leaving.port)
        writer.write(GET)
        assert b"connection: close" not in await reader.readuntil(b"ok")
        async with HttpServer(Counted(App().answer), "127.0.0.1", leaving.port, share=True) as staying:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(leaving.leave())
                await settle()
                writer.write(GET)
                assert b"connection: close" in await reader.readuntil(b"ok")
                assert await reader.read() == b""
            for _ in range(20):
                await get(staying.port)
        assert app.entered._value == 2
    writer.close()


@pytest.mark.slow
async def test_a_request_that_runs_when_its_server_leaves_is_answered() -> None:
    app = App()
    app.free.clear()
    async with HttpServer(Counted(app.answer), "127.0.0.1", 0, share=True) as server:
        reader, writer = await connect(server.port)
        writer.write(GET)
        await app.entered.acquire()
        await server.leave()
        with pytest.raises(ConnectionRefusedError):
            await connect(server.port)
        app.free.set()
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_listener_of_others_is_served_and_left_open() -> None:
    held = await listening("127.0.0.1", 0, 10, share=True)
    with held:
        async with HttpServer(Counted(App().answer), "", 0, listener=held.dup()) as server:
            assert server.port == held.getsockname()[1]
            await get(server.port)
        reader, writer = await connect(server.port)  # nobody is there to accept it, and it is not refused
        writer.write(GET)
        async with HttpServer(Counted(App().answer), "", 0, listener=held.dup()):
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.fixture
def certificate(tmp_path: Path) -> TlsFiles:
    tool = shutil.which("openssl")
    if tool is None:
        pytest.skip("openssl makes the certificate")
    files = TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem")
    subprocess.run(
        f"{tool} req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost "
        f"-keyout {files.key} -out {files.cert}".split(),
        check=True,
        capture_output=True,
    )
    return files


async def test_tls(certificate: TlsFiles) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate.cert))
    async with HttpServer(Counted(App().answer), "127.0.0.1", 0, tls=certificate) as server:
        answer = await get(server.port, ssl=trusting, server_hostname="localhost")
        assert answer.startswith(b"HTTP/1.1 200")


async def test_bad_tls_files_are_refused_and_the_port_is_free_again(certificate: TlsFiles) -> None:
    server = HttpServer(Counted(App().answer), "127.0.0.1", 0, tls=TlsFiles(certificate.key, certificate.key))
    with pytest.raises(ssl.SSLError):
        await server.__aenter__()
    async with HttpServer(Counted(App().answer), "127.0.0.1", server.port):
        pass
