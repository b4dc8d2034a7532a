"""Opening a `Wire`: the socket, TLS, who we are, and which database; and asking a server who it is."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError, ResponseError

from gateway.redis_client.options import Address, RedisOptions
from gateway.redis_client.wire import Disconnected, NotServing, Wire


class LoginRefused(Disconnected):
    """The server is there and does not let us in."""


async def dial(
    options: RedisOptions,
    address: Address,
    introduce: Callable[[Wire, RedisOptions], Awaitable[None]] | None = None,
) -> Wire:
    """A connection ready for commands. Raises `Disconnected`, `LoginRefused` among them, within `connect_timeout`.

    `introduce` is what is said first: to a server, unless given, who we are and which database we want.
    """
    wire = Wire(str(address), options.call_timeout)
    try:
        async with asyncio.timeout(options.connect_timeout):
            await _connect(wire, options, address)
            await (introduce or _introduce)(wire, options)
    except BaseException as problem:  # a caller who gives up leaves no connection behind
        wire.close("the connection was not completed")
        why = _explained(problem, address, options)
        if why is None:
            raise
        raise why from None
    return wire


async def identify(wire: Wire) -> str:
    """Ask a server who it is: the answer changes when its data may be other data.

    Raises `NotServing` for a replica and for a server that is loading its data; `Disconnected`.
    """
    try:
        text: bytes = await wire.call(("INFO",))
    except ResponseError:
        # An ACL without INFO: nothing can be known, so each connection counts as another server.
        return secrets.token_hex(16)
    facts = dict(line.partition(":")[::2] for line in text.decode("utf-8", "replace").splitlines())
    if facts.get("loading") == "1":
        raise NotServing(f"Redis at {wire.name} is loading its data")
    if facts.get("role") == "slave":
        raise NotServing(f"Redis at {wire.name} is a replica, which takes no writes; the primary's address is needed")
    return f"{facts.get('run_id')} {facts.get('master_replid')}"


def _explained(problem: BaseException, address: Address, options: RedisOptions) -> Disconnected | None:
    """What to tell people; None where the problem says it itself."""
    if isinstance(problem, TimeoutError):
        return Disconnected(f"Redis at {address} did not answer within {options.connect_timeout:g} s")
    if isinstance(problem, OSError):  # `ssl.SSLError` is one
        return Disconnected(f"cannot reach Redis at {address}: {problem.strerror or problem}")
    if isinstance(problem, RedisError):
        # The one refusal that is over when somebody else leaves.
        busy = "max number of clients" in str(problem)
        return (Disconnected if busy else LoginRefused)(f"Redis at {address} refuses us: {problem}")
    return None


async def _connect(wire: Wire, options: RedisOptions, address: Address) -> None:
    loop = asyncio.get_running_loop()
    context = await asyncio.to_thread(options.tls) if options.target.tls else None
    if address.path:
        await loop.create_unix_connection(lambda: wire, address.path)
    else:
        await loop.create_connection(lambda: wire, address.host, address.port, ssl=context)


async def _introduce(wire: Wire, options: RedisOptions) -> None:
    username, password = options.login()
    if username or password:
        await authenticate(wire, username, password)
    if options.target.db:
        await wire.call(("SELECT", options.target.db))
    await wire.call(("PING",))


async def authenticate(wire: Wire, username: str, password: str) -> None:
    """Say who we are."""
    await wire.call(("AUTH", username, password) if username else ("AUTH", password))
