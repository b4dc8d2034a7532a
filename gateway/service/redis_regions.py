"""Clients' tensors in a Redis: a region is a stretch of the string at a key, the same for every gateway of a fleet.

Triton has no such kind. It has the endpoints of the others (`/v2/redissharedmemory/...`), and requests name its regions
as they name any other. The Redis is one that the operator names for it, and clients' keys begin with a prefix that no
key of a queue begins with, so that nobody reads or writes what is not theirs to.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from redis.exceptions import ResponseError

from gateway.config.client_memory import CLIENT_KEYS
from gateway.errors import InvalidArgument, ResourceExhausted
from gateway.redis_client import Disconnected, RedisClient, RedisOptions
from gateway.redis_client.wire import Reply, Word
from gateway.service.registers import Registers
from gateway.service.shared_regions import SharedRegions
from gateway.shm import Regions
from gateway.shm import errors as texts
from gateway.types import Buffer, Place

_LARGEST = 512 << 20  # bytes, Redis' limit of a string
_MOST = 65_536  # regions
_LONGEST = 1024  # characters of a key


@dataclass(slots=True)
class RedisRegion:
    """See `Memory`. What it holds is looked at by each request; nothing is kept here."""

    name: str
    key: str
    offset: int
    byte_size: int
    client: RedisClient
    users: int = 0
    leaving: bool = False

    @property
    def kind(self) -> str:
        """See `Memory`."""
        return "redis"

    async def load(self, place: Place) -> Buffer:
        """See `Memory`. Raises `InvalidArgument` where the key holds less, `Unavailable` where Redis is away."""
        if not place.size:
            return b""
        begin = self.offset + place.offset
        found = await self.ask("GETRANGE", self.key, begin, begin + place.size - 1)
        assert isinstance(found, bytes)
        if len(found) < place.size:
            raise texts.redis_key_too_short(self.name, self.key, len(found), place.size)
        return found

    async def store(self, place: Place, data: Buffer) -> None:
        """See `Memory`. Other bytes of the key stay as they are."""
        if len(data):
            await self.ask("SETRANGE", self.key, self.offset + place.offset, memoryview(data))

    async def ask(self, *command: Word) -> Reply:
        """Have Redis do it. Raises `GatewayError`."""
        try:
            return await self.client.bulk(*command)
        except Disconnected:
            raise texts.redis_memory_away() from None
        except ResponseError as problem:
            raise texts.redis_memory_refused(self.name, self.key, str(problem)) from None


class RedisRegions(SharedRegions):
    """The regions in Redis; see `SharedRegions`."""

    kind = "redis"
    word = "redis-region"

    def __init__(self, regions: Regions, registers: Registers, client: RedisClient) -> None:
        super().__init__(regions, registers, "")
        self._client = client

    async def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Make a stretch of the string at `key`, which need not be there yet, known as `name`. Raises `GatewayError`."""
        if not key.startswith(CLIENT_KEYS) or not CLIENT_KEYS < key[:_LONGEST] == key:
            raise texts.foreign_redis_key(name, key, CLIENT_KEYS)
        if not 0 < byte_size <= _LARGEST - offset:
            raise texts.region_out_of_bounds(name)
        if len(self.regions.status(kind=self.kind)) >= _MOST:
            raise ResourceExhausted(
                f"{_MOST} shared memory regions are registered, which is as many as there may be; unregister some"
            )
        await RedisRegion(name, key, offset, byte_size, self._client).ask("STRLEN", key)  # it is there, and no list
        await super().register(name, key, offset, byte_size)

    def _open(self, name: str, key: str, offset: int, byte_size: int) -> None:
        self.regions.add(RedisRegion(name, key, offset, byte_size, self._client))


@asynccontextmanager
async def redis_regions(url: str, regions: Regions, registers: Registers) -> AsyncGenerator[RedisRegions, None]:
    """The regions in the Redis at `url`, for the duration of the block. Raises `GatewayError` for one that refuses us."""
    try:
        options = RedisOptions(url)
    except InvalidArgument as problem:
        raise InvalidArgument(f"--client-shm-redis: {problem.message}") from None
    async with RedisClient(options) as client:
        yield RedisRegions(regions, registers, client)
