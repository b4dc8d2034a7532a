"""What load and unload commands last asked for: a worker that joins later does it too.

The fields of one hash, by model: the kind of command and its parameters, signed.
"""

from __future__ import annotations

import asyncio

import msgspec

from gateway import errors
from gateway.message import BadMessage
from gateway.queues.base import Command, Load, Unload
from gateway.queues.redis.link import Link


class _Wanted(msgspec.Struct, array_like=True, gc=False):
    loaded: bool
    parameters: dict[str, str] = {}


_FILE = "file:"
_LARGEST = 500 << 20  # bytes; Redis drops the connection of who sends it more than 512 MiB at once
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Wanted).decode


class Wanted:
    """Read and written beside what a process has under way, for files may be large. Every method raises `Disconnected` and `RedisError`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._turn = asyncio.Lock()  # in the order in which they are noted, commands are told

    async def note(self, command: Command) -> bytes | None:
        """Remember a command; returns what was known of its model before, for `restore`."""
        call, key = self._link.client.bulk, self._link.client.keys.wanted
        loads = isinstance(command, Load)
        data = _encode(_Wanted(loads, command.parameters if isinstance(command, Load) else {}))
        sealed = self._link.seal.sign(command.model.encode(), data) + data
        if len(sealed) > _LARGEST:
            raise errors.InvalidArgument(
                f"a load request to a fleet has room for {_LARGEST} bytes, files in base64, and this one has {len(sealed)}; "
                "put the model into the repository"
            )
        async with self._turn:
            before = await call("HGET", key, command.model)
            await call("HSET", key, command.model, sealed)
        assert before is None or isinstance(before, bytes)
        return before

    async def whole(self, command: Load) -> Load:
        """A load command with the contents of its files. Raises `Unavailable` when another one came since."""
        value = await self._link.client.bulk("HGET", self._link.client.keys.wanted, command.model)
        found = None if value is None else self._read(command.model.encode(), value)
        if not isinstance(found, Load) or hollow(found) != command:
            raise errors.Unavailable(f"another command for model '{command.model}' came before its files could be read")
        return found

    async def restore(self, model: str, before: bytes | None) -> None:
        """The command came to nothing."""
        call, key = self._link.client.bulk, self._link.client.keys.wanted
        await (call("HDEL", key, model) if before is None else call("HSET", key, model, before))

    async def read(self) -> list[Command]:
        """The last command for each model."""
        found = await self._link.client.bulk("HGETALL", self._link.client.keys.wanted)
        commands: list[Command] = []
        for model, value in zip(found[::2], found[1::2], strict=True):
            try:
                commands.append(self._read(model, value))
            except BadMessage as problem:
                self._link.damaged(problem, "the wanted models")
        return commands

    def _read(self, model: bytes, value: bytes) -> Command:
        size = self._link.seal.size
        self._link.seal.verify(value[:size], model, value[size:])
        try:
            wanted = _decode(value[size:])
        except (msgspec.DecodeError, ValueError) as problem:
            raise BadMessage(f"what is wanted of a model cannot be read: {problem}") from None
        return Load(model.decode(), wanted.parameters) if wanted.loaded else Unload(model.decode())


def hollow(command: Load) -> Load:
    """A load command as workers are told of it: without the contents of its files, which are too much for an event."""
    told = {key: "" if key.startswith(_FILE) else value for key, value in command.parameters.items()}
    return Load(command.model, told)


def has_files(command: Load) -> bool:
    """Whether files come with a load command."""
    return any(key.startswith(_FILE) for key in command.parameters)
