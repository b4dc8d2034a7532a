"""How many requests may be on their way to a server at once: Netflix' Gradient2, and a gate that keeps to it.

Where nothing queues at the server, an answer takes as long as it always did and the limit grows; when answers come
later than over the long run, requests queue there and it shrinks in proportion. Nobody has to know the server's
capacity, nor when it changes. After github.com/Netflix/concurrency-limits, `Gradient2Limit` (constants included; the
code is our own), and, for answers that never came or were refused, halving as TCP does, which that class leaves out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

_QUEUE = 4.0  # requests that may queue at the server: what the limit grows by
_SMOOTHING = 0.2
_LONG = 600  # answers that the long average is about
_FIRST = 10  # answers whose plain mean it begins with
_RELAX = 0.9  # the long average falls so fast where it is more than twice the present
_INITIAL = 8.0
_LEAST = 1.0


class GradientLimit:
    """The limit. Pure state: it is told how long each answer took, and has no clock."""

    def __init__(self, most: int) -> None:
        """`most` is what it never exceeds."""
        self._most = float(most)
        self._exact = min(_INITIAL, self._most)
        self._long = 0.0  # seconds
        self._answers = 0

    @property
    def limit(self) -> int:
        """Requests that may be on their way; at least one."""
        return int(self._exact)

    def answered(self, seconds: float, open_requests: int) -> None:
        """An answer took so many seconds, while so many requests, this one among them, were on their way."""
        self._answers += 1
        weight = 1 / self._answers if self._answers <= _FIRST else 2 / (_LONG + 1)
        self._long += (seconds - self._long) * weight
        gradient = max(0.5, min(1.0, self._long / seconds)) if seconds > 0 else 1.0
        if self._long > 2 * seconds:
            self._long *= _RELAX  # the load is gone, and the average need not wait for hundreds of answers to see it
        if open_requests < self._exact / 2:
            return  # the limit did not limit, so this says nothing about it
        wanted = self._exact * gradient + _QUEUE
        self._exact = self._within(self._exact * (1 - _SMOOTHING) + wanted * _SMOOTHING)

    def dropped(self) -> None:
        """A request was refused because the server is busy, or never answered."""
        self._exact = self._within(self._exact / 2)

    def _within(self, limit: float) -> float:
        return max(_LEAST, min(self._most, limit))


class Gate:
    """Lets as many in as a limit says, first come, first served. For one event loop."""

    def __init__(self, limit: GradientLimit) -> None:
        self.limit = limit
        self.open = 0  # that are in
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many are not in yet."""
        return len(self._waiting)

    @property
    def free(self) -> bool:
        """Whether the next one is let in at once."""
        return not self._waiting and self.open < self.limit.limit

    @asynccontextmanager
    async def enter(self) -> AsyncGenerator[None, None]:
        """Wait to be let in; leaving lets others in."""
        if not self.free:
            await self._wait()
        else:
            self.open += 1
        try:
            yield
        finally:
            self.open -= 1
            self._admit()

    async def _wait(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in and cancelled in one turn of the loop
                self.open -= 1
                self._admit()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def _admit(self) -> None:
        while self._waiting and self.open < self.limit.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self.open += 1
                turn.set_result(None)
