"""Payloads too large for a stream entry: beside it, in shared memory when both ends share a host, else in Redis.

The entry then holds a reference, `f:<size>:<file>` or `b:<size>:<id>`. It is data from the network: nothing but a file
or key that `Payloads` could have made is ever opened for it. Whoever makes a payload gets rid of it; the reader of an
answer may do so too. What is forgotten ends with its time to live, and what a dead process left with the next sweep.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self

from gateway.message import BadMessage
from gateway.queues.redis.shared_files import FOLDER, Missing, SharedFiles, fill
from gateway.redis_client import RedisClient
from gateway.telemetry import log_event
from gateway.types import Buffer

__all__ = ["INLINE", "Missing", "Payloads"]

INLINE = 256 * 1024  # bytes; less than this travels in the stream entry itself

_OFF_LOOP = 4 << 20  # bytes that take longer to write than a thread takes to begin
_REFERENCE = re.compile(r"([fb]):([1-9][0-9]{0,11}):([0-9A-Za-z._-]{1,250})")
_WORD = re.compile(r"[0-9A-Za-z_-]{1,64}")


class Payloads:
    """The payloads of one process. `host` is equal for two processes that can hand each other files; None for none."""

    def __init__(self, client: RedisClient, owner: str, folder: Path | None = FOLDER) -> None:
        """`owner` is the process id, a word. Without a `folder` everything goes through Redis."""
        self._client = client
        self._owner = owner
        self._serial = count()
        self._full = False
        self._files: SharedFiles | None = None
        self.host: str | None = None
        if folder is None:
            return
        try:
            self._files = SharedFiles(folder)
            self.host = self._files.host
        except OSError as problem:
            log_event("no_shared_memory", folder=str(folder), reason=str(problem), instead="payloads go through Redis")

    @property
    def bytes_held(self) -> int:
        """The shared memory that this process's payloads take, those it keeps for the next included."""
        return 0 if self._files is None else self._files.held

    async def put(self, identity: str, parts: Sequence[Buffer], *, same_host: bool, ttl: float) -> str:
        """Keep these bytes, one or more, for `ttl` seconds or until removed; returns the reference.

        `identity` is up to 64 letters, digits, `_` and `-`, and need not be unique. Raises what `RedisClient.call` does.
        """
        if not _WORD.fullmatch(identity):
            raise ValueError(f"'{identity}' cannot name a payload")
        size = sum(map(len, parts))
        unique = f"{identity}.{self._owner}.{next(self._serial):x}"
        if same_host and self._files is not None and (name := await self._share(self._files, unique, parts, ttl)):
            return f"f:{size}:{name}"
        key = self._client.keys.payload(unique)
        data = memoryview(parts[0]) if len(parts) == 1 else b"".join(parts)
        await self._client.bulk("SET", key, data, "PX", max(1, round(ttl * 1000)))
        return f"b:{size}:{unique}"

    async def get(self, reference: str) -> Buffer:
        """The bytes of a payload, a view of the file where it is one, which outlives the file.

        Raises `Missing`, `BadMessage`, and what `RedisClient.call` does.
        """
        kind, size, name = _parsed(reference)
        if kind == "f":
            if self._files is None:
                raise BadMessage("a payload is in the shared memory of another host")
            return self._files.read(name, size)
        data: bytes | None = await self._client.bulk("GET", self._client.keys.payload(name))
        if data is None:
            raise Missing("the data of this request is no longer there; send it again")
        if len(data) != size:
            raise BadMessage(f"a payload has {len(data)} bytes, {size} were put there")
        return data

    def remove(self, reference: str) -> None:
        """Nobody needs the payload any more. Raises `BadMessage` for what is no reference, and nothing else."""
        kind, _, name = _parsed(reference)
        if kind == "b":
            # Redis forgets it by itself, if later, so nobody waits for this or learns that it failed.
            self._client.call("UNLINK", self._client.keys.payload(name)).add_done_callback(_ended)
        elif self._files is not None:
            self._files.done(name)

    def sweep(self) -> int:
        """Remove files whose time is over and those of dead processes; returns how many. To be called now and then."""
        return 0 if self._files is None else self._files.sweep()

    def close(self) -> None:
        """Remove this process's files; what others already look at stays with them."""
        if self._files is not None:
            self._files.close()
            self._files = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _share(self, files: SharedFiles, unique: str, parts: Sequence[Buffer], ttl: float) -> str | None:
        """Write a file; None when there is no room for it."""
        size = sum(map(len, parts))
        try:
            name, descriptor = files.create(unique, size, ttl)
            try:
                if size < _OFF_LOOP:
                    fill(descriptor, parts)
                else:
                    # Shielded, because a thread that does not begin closes nothing.
                    work = asyncio.get_running_loop().run_in_executor(None, fill, descriptor, parts)
                    work.add_done_callback(_ended)
                    await asyncio.shield(work)
            except BaseException:
                files.discard(name)
                raise
        except OSError as problem:
            if not self._full:
                self._full = True
                log_event(
                    "shared_memory_full", logging.WARNING, reason=str(problem), bytes=size,
                    instead="payloads go through Redis; give the container more, such as --shm-size=1g",
                )  # fmt: skip
            return None
        return name


def _parsed(reference: str) -> tuple[str, int, str]:
    parts = _REFERENCE.fullmatch(reference)
    if parts is None:
        raise BadMessage(f"'{reference[:200]}' is not a reference to a payload")
    return parts[1], int(parts[2]), parts[3]


def _ended(work: asyncio.Future[Any]) -> None:
    if not work.cancelled():
        work.exception()  # seen: asyncio would complain
