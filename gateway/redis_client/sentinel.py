"""Asking sentinels where the primary is."""

from __future__ import annotations

from redis.exceptions import AuthenticationError

from gateway.redis_client.dial import authenticate, dial
from gateway.redis_client.options import Address, RedisOptions
from gateway.redis_client.wire import Disconnected, Wire


async def find_primary(options: RedisOptions) -> Address:
    """The primary's address as the first sentinel that knows it says. Raises `Disconnected`."""
    service = options.target.service
    why = ""
    for sentinel in options.target.addresses:
        try:
            wire = await dial(options, sentinel, _introduce)
        except Disconnected as problem:
            why = problem.message
            continue
        try:
            found = await wire.call(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service))
        except Disconnected as problem:
            why = problem.message
        else:
            if found:
                return Address(found[0].decode(), int(found[1]))
            why = f"the sentinel at {sentinel} knows no service '{service}'"
        finally:
            wire.close("asked")
    raise Disconnected(f"no sentinel says where '{service}' is: {why}")


async def _introduce(wire: Wire, options: RedisOptions) -> None:
    # Sentinels mostly have no password, and refuse the login of those that bring one.
    try:
        await wire.call(("PING",))
    except AuthenticationError:
        await authenticate(wire, *options.login())
