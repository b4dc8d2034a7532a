"""A real server for tests of what lives in Redis: one for the whole session, each test with a prefix of its own."""

import secrets
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from gateway.queues.redis.queue import RedisQueue, Role
from gateway.redis_client import RedisClient, RedisOptions
from gateway.redis_server import find_server


@contextmanager
def redis_process(*arguments: str, server: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A server that ends with the block, this one or the embedded. It runs beside the tests, whose event loops come and go."""
    with tempfile.TemporaryDirectory(prefix="lockgate-") as folder:
        process = subprocess.Popen([server or find_server(), *arguments, "--dir", folder], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if b"eady to accept connections" in line or b"Sentinel ID is" in line:
                    break
            else:
                raise RuntimeError(f"the server did not start with {arguments}")
            yield process
        finally:
            process.kill()
            process.communicate()


@contextmanager
def redis_server(*settings: str, server: str = "") -> Iterator[str]:
    """The URL of a server on a unix socket; `settings` are such as `--maxmemory 3mb`."""
    with tempfile.TemporaryDirectory(prefix="lockgate-") as folder:
        path = f"{folder}/s"
        with redis_process("--port", "0", "--unixsocket", path, "--save", "", *settings, server=server):
            yield f"unix://{path}"


def free_port() -> int:
    """A port that nobody has now. Only for servers that cannot take port 0."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def redis_on_port(*settings: str) -> Iterator[int]:
    """The TCP port of a server, for what needs one: clusters and sentinels."""
    port = free_port()
    with redis_process("--port", str(port), "--save", "", *settings):
        yield port


@contextmanager
def cluster_node(*settings: str) -> Iterator[int]:
    """The port of a node of a Redis Cluster, which has no slots yet."""
    bus = str(free_port())
    with redis_on_port("--cluster-enabled", "yes", "--cluster-port", bus, *settings) as port:
        yield port


@contextmanager
def sentinel(primary: int, *more: str) -> Iterator[int]:
    """The port of a sentinel that watches one primary as service `svc`; `more` are lines of its configuration."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="lockgate-") as folder:
        file = Path(folder, "sentinel.conf")
        file.write_text("\n".join([f"port {port}", f"sentinel monitor svc 127.0.0.1 {primary} 1", *more, ""]))
        with redis_process(str(file), "--sentinel"):
            yield port


def options(url: str, **more: object) -> RedisOptions:
    """Keys that no other test has."""
    return RedisOptions(url, prefix=f"test-{secrets.token_hex(8)}", **more)


@asynccontextmanager
async def fleet_queue(of: RedisOptions, role: Role = "all", *, key: bytes | None = None) -> AsyncIterator[RedisQueue]:
    """One process's queue."""
    async with RedisClient(of) as client, RedisQueue(client, role, key=key) as queue:
        yield queue
