"""Opening a `Wire`: the socket, TLS, who we are, and which database."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass

from redis.exceptions import AuthenticationError, RedisError, ResponseError

from gateway.redis_client.options import Address, RedisOptions
from gateway.redis_client.wire import Disconnected, NotServing, Wire


class LoginRefused(Disconnected):
    """The server is there and does not let us in."""


@dataclass(frozen=True, slots=True)
class Server:
    """Who answered: what its INFO says. `identity` changes when its data may be other data."""

    identity: str
    role: str


async def dial(options: RedisOptions, address: Address) -> Wire:
    """A connection ready for commands. Raises `Disconnected`, `LoginRefused` among them, within `connect_timeout`."""
    name = str(address)
    wire = Wire(name, options.call_timeout)
    try:
        async with asyncio.timeout(options.connect_timeout):
            await _connect(wire, options, address)
            await _introduce(wire, options)
    except TimeoutError:
        wire.close("")
        raise Disconnected(f"Redis at {name} did not answer within {options.connect_timeout:g} s") from None
    except OSError as problem:  # `ssl.SSLError` is one
        wire.close("")
        raise Disconnected(f"cannot reach Redis at {name}: {problem.strerror or problem}") from None
    except (RedisError, AuthenticationError) as problem:
        wire.close("")
        raise LoginRefused(f"Redis at {name} refuses us: {problem}") from None
    except BaseException:
        wire.close("")
        raise
    return wire


async def identify(wire: Wire) -> Server:
    """Ask the server who it is. Raises `NotServing` while it loads its data, `Disconnected`."""
    try:
        text: bytes = await wire.call(("INFO",))
    except ResponseError:
        # An ACL without INFO: nothing can be known, so each connection counts as another server.
        return Server(f"unknown {id(wire)}", "master")
    facts = dict(line.partition(":")[::2] for line in text.decode("utf-8", "replace").splitlines())
    if facts.get("loading") == "1":
        raise NotServing("Redis is loading its data")
    return Server(f"{facts.get('run_id', '')} {facts.get('master_replid', '')}", facts.get("role", "master"))


async def _connect(wire: Wire, options: RedisOptions, address: Address) -> None:
    loop = asyncio.get_running_loop()
    context: ssl.SSLContext | None = None
    if options.target.tls:
        context = await asyncio.to_thread(options.tls)
    if address.path:
        await loop.create_unix_connection(lambda: wire, address.path, ssl=context)
    else:
        await loop.create_connection(lambda: wire, address.host, address.port, ssl=context)


async def _introduce(wire: Wire, options: RedisOptions) -> None:
    username, password = options.login()
    if username or password:
        await wire.call(("AUTH", username, password) if username else ("AUTH", password))
    if options.target.db:
        await wire.call(("SELECT", options.target.db))
    await wire.call(("PING",))
