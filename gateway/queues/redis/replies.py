"""The stream of a gateway's answers: made, read, and kept alive for as long as there is somebody to read it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError

from gateway.message import BadMessage
from gateway.queues.redis import wire
from gateway.queues.redis.link import Link
from gateway.redis_client import Disconnected, unheeded

_LIVES = 10.0  # seconds that the answers of a gateway outlive its last beat
_BLOCK = 1.0  # seconds


class Replies:
    """What other processes answer to this one."""

    def __init__(self, link: Link, role: str, deliver: Callable[[wire.Frame], Awaitable[None]]) -> None:
        """`deliver` is given each answer; it raises `BadMessage` for one that is no use."""
        self._link = link
        self._role = role
        self._deliver_frame = deliver
        self._key = link.client.keys.replies(link.process)
        self._last = b"0-0"

    async def open(self) -> None:
        """Make the stream, without which answers to this process are dropped."""
        client = self._link.client
        opened = client.call("XADD", self._key, "MAXLEN", "~", 10_000, "*", "opened", self._role)
        client.call("PEXPIRE", self._key, int(_LIVES * 1000)).add_done_callback(unheeded)
        self._last = b"0-0"
        await opened

    async def run(self) -> None:
        """Read until cancelled."""
        client = self._link.client
        reader = client.reader()
        try:
            while True:
                try:
                    reply = await reader.call(
                        "XREAD", "COUNT", 64, "BLOCK", int(_BLOCK * 1000), "STREAMS", self._key, self._last,
                        seconds=_BLOCK,
                    )  # fmt: skip
                except Disconnected:
                    await client.online()
                except RedisError as problem:
                    self._link.report("replies_unreadable", reason=str(problem))
                    await asyncio.sleep(_BLOCK)
                else:
                    for _, self._last, fields in wire.entries(reply):
                        await self._deliver(fields)
        finally:
            await reader.close()

    async def keep(self) -> None:
        """To be called with every beat. Raises `Disconnected` and `RedisError`."""
        client = self._link.client
        if not await client.call("PEXPIRE", self._key, int(_LIVES * 1000)):
            await self.open()
        await client.call("XTRIM", self._key, "MINID", "~", self._last)

    async def _deliver(self, fields: dict[bytes, bytes]) -> None:
        for name, value in fields.items():
            if name == b"opened":
                continue
            try:
                await self._deliver_frame(wire.read_frame(name, value, self._link.seal))
            except BadMessage as problem:
                self._link.damaged(problem, "the replies")
