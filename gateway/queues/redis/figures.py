"""The queue's figures for `/metrics`: read from the streams, and from what workers announce."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from redis.exceptions import RedisError, ResponseError

from gateway.errors import GatewayError
from gateway.queues.base import Capacity, Lane
from gateway.queues.figures import FleetFigures, LaneFigures
from gateway.queues.redis.lane import CLASSES
from gateway.redis_client import RedisClient
from gateway.redis_client.keys import GROUP

_PATIENCE = 2.0  # seconds; a scrape does not wait for ever


async def look(client: RedisClient, capacities: Mapping[Lane, Sequence[Capacity | None]]) -> FleetFigures:
    """The figures of these lanes, of which each live worker has announced its capacity, or None if none is learned."""
    lanes = list(capacities)
    try:
        async with asyncio.timeout(_PATIENCE):
            found = await asyncio.gather(*(_lane(client, lane, capacities[lane]) for lane in lanes))
    except (GatewayError, RedisError, TimeoutError):
        return FleetFigures(connected=False)
    return FleetFigures(client.connected, dict(zip(lanes, found, strict=True)))


async def _lane(client: RedisClient, lane: Lane, capacities: Sequence[Capacity | None]) -> LaneFigures:
    streams = [client.keys.requests(*lane, klass) for klass in CLASSES]
    lengths, pending = await asyncio.gather(
        asyncio.gather(*(client.call("XLEN", stream) for stream in streams)),
        asyncio.gather(*(_pending(client, stream) for stream in streams)),
    )
    # Not XINFO's lag, which is unknown once an entry was deleted unread. What is acknowledged is deleted.
    lag = max(0, sum(lengths) - sum(pending))
    learned = [each for each in capacities if each is not None and each.seconds(each.rows) > 0]
    rate = sum(each.places * each.rows / each.seconds(each.rows) for each in learned)
    if learned:  # the others are taken to be like them
        rate *= len(capacities) / len(learned)
    return LaneFigures(lag, sum(pending), len(capacities), rate)


async def _pending(client: RedisClient, stream: str) -> int:
    try:
        summary = await client.call("XPENDING", stream, GROUP)
    except ResponseError:  # NOGROUP: nobody has read it yet
        return 0
    return int(summary[0])
