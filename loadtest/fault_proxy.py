"""A proxy in front of a TCP port or a unix socket that makes a network's faults, changed at run time.

    async with FaultProxy("127.0.0.1:6379") as proxy:
        client = connect(proxy.host, proxy.port)
        proxy.down.swallow = True      # replies vanish, and both ends believe that all is well
        proxy.reset()                  # every open connection breaks
        proxy.refuse = True            # and nobody gets in again

`up` is the way to the target and `down` the way back. Faults are set on both as plain attributes, and hold from the
next bytes on. A stream that lost bytes is of no use afterwards: `reset` it.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_CHUNK = 65536  # bytes
_HELD = 64  # chunks of one connection that are on their way at most


@dataclass
class Direction:
    """What happens to bytes on one way. `latency` and `jitter` are seconds; the counts are of all connections."""

    latency: float = 0.0
    jitter: float = 0.0
    swallow: bool = False  # bytes are taken and not given
    reset_after: int | None = None  # a connection breaks when it has carried this many bytes
    carried: int = 0
    swallowed: int = 0

    def __post_init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()

    @property
    def paused(self) -> bool:
        """Whether bytes are held back, as in a network that is cut; set to False they all go through."""
        return not self._open.is_set()

    @paused.setter
    def paused(self, paused: bool) -> None:
        (self._open.clear if paused else self._open.set)()

    async def clear(self) -> None:
        """Wait until bytes may pass."""
        await self._open.wait()

    def delay(self) -> float:
        """How long the next bytes take, in seconds."""
        return self.latency + random.uniform(0, self.jitter)


class FaultProxy:
    """An async context manager that listens while it is open.

    `target` is `host:port` or the path of a unix socket. It listens on `host` and `port` (0: a free one, which `port`
    then says), or on a unix socket when `path` is given; with `tls` it speaks TLS there, and not to the target.
    `reset_share` of new connections are reset at once.
    """

    def __init__(
        self,
        target: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        path: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.host, self.port, self.path = host, port, path
        self._tls = tls
        self.up = Direction()
        self.down = Direction()
        self.reset_share = 0.0
        self.refuse = False
        self.connections = 0  # accepted so far
        self._target = target
        self._open: set[_Connection] = set()
        self._group = asyncio.TaskGroup()

    @property
    def address(self) -> str:
        """Where it listens: `host:port`, or the path of the unix socket."""
        return self.path or f"{self.host}:{self.port}"

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        if self.path:
            self._server = await asyncio.start_unix_server(self._accept, self.path, ssl=self._tls)
        else:
            self._server = await asyncio.start_server(self._accept, self.host, self.port, ssl=self._tls)
            self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.reset()
        await self._group.__aexit__(kind, error, trace)

    def reset(self, share: float = 1.0) -> None:
        """Break every open connection, or each with this probability, so that both ends notice at once."""
        for connection in [*self._open]:
            if random.random() < share:
                connection.reset()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refuse or random.random() < self.reset_share:
            _break(writer)
            return
        connection = _Connection(self, reader, writer)
        self._open.add(connection)
        task = self._group.create_task(connection.run(self._target))
        connection.task = task
        task.add_done_callback(lambda _: self._open.discard(connection))


class _Connection:
    """One client's connection and ours to the target."""

    task: asyncio.Task[None]

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writers = [writer]

    async def run(self, target: str) -> None:
        """Carry bytes both ways until either end closes, or until it is cancelled."""
        try:
            reader, writer = await _connect(target)
            self._writers.append(writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(self._reader, writer, self._proxy.up))
                group.create_task(self._carry(reader, self._writers[0], self._proxy.down))
        except* OSError:
            pass  # an end broke, and so does the other
        finally:
            for each in self._writers:
                _break(each)

    def reset(self) -> None:
        """Break both ends."""
        for writer in self._writers:
            _break(writer)
        self.task.cancel()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction) -> None:
        """Carry bytes one way. They are read at once and delivered when they are due, so delay costs no throughput."""
        loop = asyncio.get_running_loop()
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_HELD)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deliver(late, writer, way))
            while True:
                data = await reader.read(_CHUNK)
                await late.put((loop.time() + way.delay(), data))
                if not data:
                    break

    async def _deliver(
        self, late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: Direction
    ) -> None:
        carried = 0
        while True:
            due, data = await late.get()
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            await way.clear()
            if way.swallow:
                way.swallowed += len(data)
                continue
            if writer.is_closing():
                raise ConnectionResetError("the other end is gone")
            room = len(data) if way.reset_after is None else max(0, way.reset_after - carried)
            writer.write(data[:room])
            await writer.drain()
            carried += len(data)
            way.carried += min(room, len(data))
            if not data or room < len(data):
                raise ConnectionResetError("the other end closed, or this one carried enough")


async def _connect(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if target.startswith("/"):
        return await asyncio.open_unix_connection(target)
    host, _, port = target.rpartition(":")
    return await asyncio.open_connection(host, int(port))


def _break(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset, which the other end notices in the middle of whatever it does."""
    link = writer.get_extra_info("socket")
    if link is not None and link.family != socket.AF_UNIX and link.fileno() >= 0:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
