"""`Nursery`: the gateway's handle on the process that forks its children. Started when the first child is wanted.

It reports each child's end, and what it was. When it dies itself its children die with it, and the next one that is
wanted starts another. Not for more than one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from gateway import errors
from gateway.child import mortal
from gateway.engines.isolated.frames import Exited, Kill, Spawn, Spawned, encode
from gateway.telemetry import log_event

_PACKET = 1 << 16
_PATIENCE = 20.0  # seconds that a fork may take, the start of the nursery and its imports on a busy machine included
# Threads of libraries would make forking unsafe. ONNX Runtime has one for its telemetry, which is off here anyway.
_QUIET = ("ORT_DISABLE_TELEMETRY=1", "OPENBLAS_NUM_THREADS=1")
_decode = msgspec.msgpack.Decoder(Spawned | Exited).decode


class ChildProcess:
    """A child: its process id, and how it ended once it has."""

    def __init__(self, number: int, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.name = name
        self.pid = 0
        self.started: asyncio.Future[None] = loop.create_future()
        self.exited: asyncio.Future[int | None] = loop.create_future()  # None: nobody knows

    def end(self, status: int | None) -> None:
        """Note that it is gone."""
        if not self.started.done():
            self.started.set_exception(errors.Unavailable("the process for the model did not start"))
            self.started.exception()
        if not self.exited.done():
            self.exited.set_result(status)


class Nursery:
    """Starts and ends children. `close` it."""

    def __init__(self, log_format: str = "text", verbose: int = 0, off: Sequence[str] = ()) -> None:
        """Children log to standard error in this format."""
        self._logging = log_format, str(verbose), ",".join(off)
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._children: dict[int, ChildProcess] = {}

    @property
    def pid(self) -> int | None:
        """Its process, while there is one."""
        return None if self._process is None else self._process.pid

    async def spawn(self, name: str, preload: Sequence[str], home: socket.socket) -> ChildProcess:
        """Fork a child that lives on its end of a socket pair, `home`, which this closes.

        `preload` are modules it will need, imported once for all. Raises `Unavailable`.
        """
        with home:
            child = ChildProcess(next(self._numbers), name)
            self._children[child.number] = child
            message = encode(Spawn(child.number, name, tuple(preload)))
            try:
                socket.send_fds(self._started(), [message], [home.fileno()])
                async with asyncio.timeout(_PATIENCE):
                    await child.started
            except (OSError, TimeoutError) as problem:
                await self.close()  # it hangs, or is about to be found dead
                raise errors.Unavailable(f"no process for the model can be started: {problem}") from problem
        return child

    def kill(self, child: ChildProcess) -> None:
        """End a child now; it is gone when `exited` says so."""
        if self._control is not None and not child.exited.done():
            with suppress(OSError):  # then it is dead itself, and its children with it
                self._control.send(encode(Kill(child.number)))

    async def close(self) -> None:
        """End the nursery and with it all children. The next `spawn` starts another."""
        process, self._process = self._process, None
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        if process is not None:
            process.kill()
            await asyncio.to_thread(process.wait)
        children, self._children = self._children, {}
        for child in children.values():
            child.end(None)

    def _started(self) -> socket.socket:
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603 - our own program; 2 ms, and once
                    _command(theirs.fileno(), *self._logging),
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what a model prints is for the log, and never for a client
                    stderr=2,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # a signal from the terminal is for the gateway, which ends in order
                )
            ours.setblocking(False)
            self._control = ours
            asyncio.get_running_loop().add_reader(ours.fileno(), self._read)
        return self._control

    def _read(self) -> None:
        assert self._control is not None
        try:
            packet = self._control.recv(_PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._died()
            return
        message = _decode(packet)
        child = self._children.get(message.child)
        if child is None:
            return
        if isinstance(message, Spawned):
            child.pid = message.pid
            if not child.started.done():
                child.started.set_result(None)
        else:
            del self._children[child.number]
            child.end(message.status)

    def _died(self) -> None:
        assert self._control is not None
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        self._control = None
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            status = process.wait()  # it has closed all it had, so this takes no time
            log_event("nursery_died", 40, exit_code=status, children=len(self._children))
        children, self._children = self._children, {}
        for child in children.values():
            child.end(-signal.SIGKILL)


def _command(descriptor: int, *rest: str) -> list[str]:
    path = os.pathsep.join(each or str(Path.cwd()) for each in sys.path)  # so that it runs the package that we are
    program = [sys.executable, "-P", "-m", "gateway.engines.isolated.forker", str(descriptor), *rest]
    return mortal(["/usr/bin/env", *_QUIET, f"PYTHONPATH={path}", *program])
