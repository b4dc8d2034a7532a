"""Which kinds of clients' memory there are, as the settings say."""

from __future__ import annotations

from contextlib import AsyncExitStack

from gateway.config.settings import Settings
from gateway.service.registers import Registers
from gateway.service.shared_regions import SharedRegions
from gateway.shm import registered


def without_memory(settings: Settings) -> tuple[str, ...]:
    """The extensions that are not there."""
    kinds = (("system", settings.allow_client_shm), ("redis", bool(settings.client_shm_redis)))
    return tuple(f"{kind}_shared_memory" for kind, allowed in kinds if not allowed)


async def client_memory(
    stack: AsyncExitStack, settings: Settings, registers: Registers, host: str
) -> SharedRegions | None:
    """The regions until `stack` is closed; None where clients may have none. Raises `GatewayError`."""
    if not settings.allow_client_shm:
        return None
    regions = SharedRegions(stack.enter_context(registered()), registers, host)
    if settings.client_shm_redis:
        from gateway.service.redis_regions import redis_regions

        redis = redis_regions(settings.client_shm_redis, regions.regions, registers)
        regions.redis = await stack.enter_async_context(redis)
    return regions
