"""A real server for tests of what lives in Redis: one for the whole session, each test with a prefix of its own."""

import secrets
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from gateway.queues.redis.queue import RedisQueue, Role
from gateway.redis_client import RedisClient, RedisOptions
from gateway.redis_server import _binary


@contextmanager
def redis_server() -> Iterator[str]:
    """A server that ends with the block. It runs beside the tests, whose event loops come and go."""
    with tempfile.TemporaryDirectory(prefix="lockgate-") as folder:
        socket = Path(folder) / "s"
        server = subprocess.Popen(
            [_binary(), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", folder],
            stdout=subprocess.PIPE,
        )
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if b"eady to accept connections" in line:
                    break
            yield f"unix://{socket}"
        finally:
            server.terminate()
            server.communicate()


def options(url: str) -> RedisOptions:
    """Keys that no other test has."""
    return RedisOptions(url, prefix=f"test-{secrets.token_hex(8)}")


@asynccontextmanager
async def fleet_queue(of: RedisOptions, role: Role = "all", *, key: bytes | None = None) -> AsyncIterator[RedisQueue]:
    """One process's queue."""
    async with RedisClient(of) as client, RedisQueue(client, role, key=key) as queue:
        yield queue
