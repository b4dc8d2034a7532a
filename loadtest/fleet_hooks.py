# ruff: noqa: SLF001 - it reaches into the queue, to stop a process at a chosen step
"""Gateways and workers that die at a moment of our choice, or are of a newer release: `python -m loadtest.fleet_hooks HOOK worker ...`.

What follows the hook is the command line of `gateway`.
"""

# ruff: noqa: SLF001 - nothing but a hook dies at these moments
from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

from gateway.cli import main as gateway_main
from gateway.message import VERSION, pack_request, unpack_request
from gateway.queues.redis import calls, lane, queue
from gateway.queues.redis.lane import LaneReader
from gateway.queues.redis.link import Link
from gateway.queues.redis.outbox import Outbox

DEAD = 9  # exit status of who dies by a hook
_ANSWERS = 20  # acknowledgements sent before the one that is not
_UNREAD = 2.0  # seconds that a worker lives which never reads


def dies_unread() -> None:
    """A worker that announces itself, and dies before it has read anything."""

    async def read(_: LaneReader) -> None:
        await asyncio.sleep(_UNREAD)
        os._exit(DEAD)

    LaneReader._read = read  # type: ignore[method-assign]


def dies_reading() -> None:
    """A worker that dies with the first requests that it is given, before it has looked at them."""

    async def enter(*_: object) -> None:
        os._exit(DEAD)

    LaneReader.enter = enter  # type: ignore[assignment,method-assign]


def dies_unacknowledged() -> None:
    """A worker that dies when an answer is stored and its request not acknowledged."""
    acknowledge, number = Outbox._acknowledge, count(1)

    def die(outbox: Outbox, stream: str, entries: list[bytes]) -> None:
        if next(number) > _ANSWERS:
            os._exit(DEAD)
        acknowledge(outbox, stream, entries)

    Outbox._acknowledge = die  # type: ignore[method-assign]


def newer() -> None:
    """A process of the next release: it writes requests in a new version, and reads both."""

    def pack(request: Any) -> Any:
        header, parts = pack_request(request)
        return bytes((VERSION + 1,)) + header[1:], parts

    def unpack(header: bytes, payload: Any) -> Any:
        return unpack_request(bytes((VERSION,)) + header[1:], payload)

    calls.pack_request = pack
    lane.unpack_request = unpack
    queue.Link = partial(Link, reads=VERSION + 1)  # type: ignore[assignment,misc]


HOOKS: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (dies_unread, dies_reading, dies_unacknowledged, newer)
}


def main() -> int:
    """Be a gateway or a worker with a hook."""
    HOOKS[sys.argv[1]]()
    return gateway_main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
