"""Sequences: which requests go on where others of them ended, in which row, and when their batch begins.

Pure state, as all of scheduling. An instance has slots; a sequence has one of them from its first request to its last, or
waits in line for one. Of a sequence one request runs at a time, in the order they came. Requests that were given up before
they ran leave a gap that nothing can fill: the rest of their sequence is handed back to be refused.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from gateway.sequence import SequenceId


class Job(Protocol):
    """What is seen of a job."""

    enqueued: float  # seconds

    @property
    def done(self) -> bool:
        """True for a job nobody waits for any more."""


W = TypeVar("W", bound=Job)


@dataclass(frozen=True, slots=True)
class Rules:
    """How many slots an instance has, and when a batch is worth starting. Times are seconds."""

    slots: int
    max_rows: int
    idle: float
    delay: float = 0.0
    preferred: tuple[int, ...] = ()  # of the oldest strategy
    utilization: float = 0.0  # of the direct strategy: the share of the slots that need not wait


@dataclass(frozen=True, slots=True)
class Item(Generic[W]):
    """One request and its place in its sequence."""

    job: W
    start: bool
    end: bool


@dataclass(slots=True, eq=False)
class Sequence(Generic[W]):
    """A sequence in a slot, or in line for one."""

    id: SequenceId
    waiting: deque[Item[W]] = field(default_factory=deque)
    instance: int = -1  # in line
    slot: int = -1
    last: float = 0.0  # when something came or ended
    running: Item[W] | None = None
    over: bool = False  # its last request has come, or it was given up
    state: object = None  # whatever is kept for it from one run to the next
    how: str = "ended"  # it comes to its end

    @property
    def idle(self) -> bool:
        """Whether nothing of it waits or runs."""
        return not self.waiting and self.running is None


@dataclass(frozen=True, slots=True)
class Placed(Generic[W]):
    """A request in a batch: `sequence.slot` is its row in the direct strategy."""

    item: Item[W]
    sequence: Sequence[W]


class Sequences(Generic[W]):
    """The sequences of one version. After each call `take_lost` has the jobs whose sequence was broken by it."""

    def __init__(
        self,
        rules: Rules,
        instances: int,
        alike: Callable[[Sequence[W], Item[W]], Hashable],
        ends: dict[str, int] | None = None,
    ) -> None:
        """Requests share a batch if `alike` says the same of them. `ends` counts how sequences ended: `ended` as their
        client said, `idle` for too long, or `failed`.
        """
        self.rules = rules
        self._ends = {} if ends is None else ends
        self._alike = alike
        self._known: dict[SequenceId, Sequence[W]] = {}  # that may go on
        self._line: deque[Sequence[W]] = deque()
        self._free = [(slot, instance) for slot in range(rules.slots) for instance in range(instances)]
        self._slots: list[dict[int, Sequence[W]]] = [{} for _ in range(instances)]
        self._lost: list[tuple[SequenceId, W]] = []

    @property
    def quiet(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._line and all(each.idle for each in self._seated())

    @property
    def places(self) -> int:
        """How many more sequences could have a slot at once."""
        return max(len(self._free) - len(self._line), 0)

    def add(self, id_: SequenceId, item: Item[W], now: float) -> bool:
        """A request has come. False if it does not begin its sequence, and nobody knows that."""
        sequence = self._known.get(id_)
        if sequence is None:
            if not item.start:
                return False
            sequence = Sequence(id_)
            self._line.append(sequence)
        sequence.waiting.append(item)
        sequence.last = now
        sequence.over = item.end
        if item.end:
            self._known.pop(id_, None)
        else:
            self._known[id_] = sequence
        self._seat()
        return True

    def ready_at(self, instance: int, now: float) -> float:
        """When a batch should begin, `now` or later; infinite without a request that could run."""
        waiting = [each.waiting[0].job for each in self._runnable(instance)]
        if not waiting:
            return math.inf
        rows, rules = len(waiting), self.rules
        full = rows >= min(rules.max_rows, rules.slots) or rows in rules.preferred
        if full or not rules.delay or (rules.utilization and rows / rules.slots >= rules.utilization):
            return now
        return max(min(job.enqueued for job in waiting) + rules.delay, now)

    def take(self, instance: int) -> list[Placed[W]]:
        """The next batch of an instance, oldest first, which runs from now on until `finished`."""
        batch: list[Placed[W]] = []
        kind: Hashable = None
        for sequence in sorted(self._runnable(instance), key=lambda each: each.waiting[0].job.enqueued):
            item = sequence.waiting[0]
            found = self._alike(sequence, item)
            if batch and found != kind:
                continue
            kind = found
            sequence.running = sequence.waiting.popleft()
            batch.append(Placed(item, sequence))
            if len(batch) == self.rules.max_rows:
                break
        return batch

    def finished(self, instance: int, failed: Iterable[Sequence[W]], now: float) -> None:
        """The batch of an instance is over. Sequences that failed are at their end."""
        for sequence in failed:
            self._break(sequence)
        for sequence in list(self._slots[instance].values()):
            if sequence.running is not None:
                sequence.running, sequence.last = None, now
            self._leave(sequence)
        self._seat()

    def lose(self, instance: int) -> None:
        """The instance has forgotten all of its sequences."""
        for sequence in list(self._slots[instance].values()):
            self._break(sequence)

    def reap(self, now: float) -> float:
        """End what has been idle for too long; returns when to ask again, infinite if there is nothing to end."""
        asks = math.inf
        for sequence in [each for each in self._seated() if each.idle]:
            until = sequence.last + self.rules.idle
            if until > now:
                asks = min(asks, until)
            else:
                self._forget(sequence, "idle")
                self._leave(sequence)
        self._seat()
        return asks

    def take_lost(self) -> list[tuple[SequenceId, W]]:
        """Jobs that nobody will run, to be refused, if they are not done."""
        lost, self._lost = self._lost, []
        return lost

    def close(self) -> list[W]:
        """End everything and hand back what waits."""
        waiting = [item.job for each in (*self._seated(), *self._line) for item in each.waiting]
        self._known.clear()
        self._line.clear()
        for each in self._seated():
            each.waiting.clear()
        return waiting

    # --- within

    def _seated(self) -> Iterator[Sequence[W]]:
        return (sequence for slots in self._slots for sequence in slots.values())

    def _runnable(self, instance: int) -> list[Sequence[W]]:
        """The sequences of an instance whose next request can run now."""
        slots = self._slots[instance]
        for sequence in list(slots.values()):
            self._pass_over(sequence)
            self._leave(sequence)
        self._seat()
        return [each for each in slots.values() if each.running is None and each.waiting]

    def _pass_over(self, sequence: Sequence[W]) -> None:
        """Nobody waits any more for a request that would be next: it is not run, nor is what goes on from it."""
        if sequence.waiting and sequence.waiting[0].job.done:
            self._break(sequence)

    def _break(self, sequence: Sequence[W]) -> None:
        """What waits of a sequence is lost, up to where it begins anew."""
        while sequence.waiting and (sequence.waiting[0].job.done or not sequence.waiting[0].start):
            self._lost.append((sequence.id, sequence.waiting.popleft().job))
        if not sequence.waiting:
            self._forget(sequence, "failed")

    def _forget(self, sequence: Sequence[W], how: str) -> None:
        sequence.over, sequence.how = True, how
        if self._known.get(sequence.id) is sequence:
            del self._known[sequence.id]

    def _leave(self, sequence: Sequence[W]) -> None:
        """Give its slot back if it is at its end."""
        if sequence.over and sequence.idle and sequence.slot >= 0:
            del self._slots[sequence.instance][sequence.slot]
            heapq.heappush(self._free, (sequence.slot, sequence.instance))
            sequence.slot = -1
            self._count(sequence)

    def _seat(self) -> None:
        """Give free slots to those that are in line."""
        while self._line and self._free:
            sequence = self._line.popleft()
            self._pass_over(sequence)
            if sequence.waiting:
                sequence.slot, sequence.instance = heapq.heappop(self._free)
                self._slots[sequence.instance][sequence.slot] = sequence
            else:
                self._count(sequence)

    def _count(self, sequence: Sequence[W]) -> None:
        self._ends[sequence.how] = self._ends.get(sequence.how, 0) + 1
