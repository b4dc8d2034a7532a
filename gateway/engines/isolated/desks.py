"""`Desks`: the two places at which batches for one child are laid out, so that the next is there when one ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.engines.base import EngineCrashed
from gateway.engines.isolated.area import NOWHERE, Span, beside
from gateway.engines.isolated.frames import Frame
from gateway.types import Batch


class NeverSeen(EngineCrashed):
    """The process was gone before it was given the batch."""

    def __init__(self) -> None:
        super().__init__("the engine's process had ended before the batch")


class Given:
    """A batch that has a desk, until there is nothing more to do for it. If `reply` is cancelled nobody waits for it."""

    __slots__ = ("batch", "desk", "hung", "over", "patience", "reply")

    def __init__(self, batch: Batch, patience: float, hung: Callable[[], None]) -> None:
        """`hung` is to be called if the child is at it for so many seconds."""
        self.batch = batch
        self.patience = patience
        self.hung = hung
        self.desk = -1
        self.reply: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self.over = False  # the child has nothing more to say of it


class Desks:
    """Of one link. `works` is told when the first is taken, and when all are free again, until they are closed."""

    def __init__(self, works: Callable[[bool], None]) -> None:
        self._works = works
        self._free = [1, 0]  # the next one last
        self._taken: list[Given] = []
        self._spans = [NOWHERE, NOWHERE]  # where the inputs of the last batch of each lie
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether any is taken."""
        return bool(self._taken)

    @property
    def batch(self) -> Batch | None:
        """What the child is at, if somebody waits for that."""
        given = self._taken[0] if self._taken else None
        return None if given is None or given.over or given.reply.cancelled() else given.batch

    def single(self) -> None:
        """There is but one from now on. For models that are told to go on after each answer: the line is all their own."""
        del self._free[0]

    async def take(self, given: Given) -> Given:
        """Wait until there is one for this batch. Raises `NeverSeen` when there will be none any more."""
        while not self._free and not self._closed:
            await self._changed.wait()
        if self._closed:
            raise NeverSeen
        given.desk = self._free.pop()
        self._taken.append(given)
        if len(self._taken) == 1:
            self._works(True)
        return given

    def span(self, desk: int, size: int) -> Span:
        """Where the inputs of a batch at this desk may lie: not where the other's do."""
        self._spans[desk] = span = beside(size, self._spans[1 - desk])
        return span

    def leave(self, given: Given) -> None:
        """There is nothing more to do for a batch."""
        given.over = True
        if given in self._taken:
            self._taken.remove(given)
            self._free.append(given.desk)
            self._tell()
            if not self._taken and not self._closed:
                self._works(False)

    def close(self) -> None:
        """Nobody is given one any more."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        """Have everybody who waits look again."""
        self._changed.set()
        self._changed.clear()
