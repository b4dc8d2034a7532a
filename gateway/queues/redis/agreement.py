"""What a command changed is known to every process before it is answered, so that its client may ask any of them next."""

from __future__ import annotations

from contextlib import suppress

from redis.exceptions import RedisError

from gateway.queues.redis.directory import Directory
from gateway.queues.redis.events import Events
from gateway.redis_client import Disconnected

_LOOK = "look"


class Agreement:
    """Has processes tell what they hold and read what others do, by a question that is answered when that is done."""

    def __init__(self, directory: Directory, events: Events) -> None:
        self._directory = directory
        self._events = events
        events.answers[_LOOK] = self._look

    async def reach(self) -> None:
        """Workers tell, then gateways read. Who is silent for a second is left behind, and learns it from its next beat."""
        members = self._directory.members
        await self._events.question(_LOOK, self._directory.workers() & members.keys())
        await self._look("")
        readers = [process for process, member in members.items() if member.announcement.role != "worker"]
        await self._events.question(_LOOK, readers)

    async def _look(self, _: str) -> bytes:
        # What Redis does not take or tell now comes with the next beat.
        with suppress(Disconnected, RedisError):
            await self._directory.announce()
            await self._directory.refresh()
        return b""
