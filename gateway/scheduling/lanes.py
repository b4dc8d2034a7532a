"""The state that scheduling decides on: jobs waiting in lanes, and the devices that lanes run on.

Nothing here decides. A lane keeps its jobs by level (the priority class, or Triton's strict priority level), and
within a level by signature, because only jobs of one signature share a batch. Counts of rows are kept up to date
at every change, so that an admission reads them at no cost.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic

import msgspec

from gateway.scheduling.arrivals import Arrivals
from gateway.scheduling.base import LaneKey, Limits, Place, Refusal, Request, Run, W
from gateway.scheduling.fairness import Turns
from gateway.scheduling.latency import LatencyModel
from gateway.scheduling.report import LaneReport

CRITICAL, DEFAULT, SHEDDABLE = 0, 1, 2  # priority classes, most urgent first
SPILL = 1000  # added to the level of what only a slower pool can answer in time
_UNEQUAL = 2.0  # a place that takes this many times as long per row as the best is of a slower pool
PATIENCE = 10.0  # seconds; ranks a request without a deadline, so that those with one never starve it
_SWEEP = 1024  # entries in a line, below which dead ones among them are not worth looking for

_rank = attrgetter("rank")
_enqueued = attrgetter("enqueued")


class Entry(msgspec.Struct, Generic[W], eq=False, gc=False):
    """One request from its admission until it runs, is refused or given up.

    `level` is what it is counted in while `counted` is true.
    """

    lane: Lane[W]
    request: Request
    rows: int
    tenant: str
    rank: float  # the deadline, or what stands for it
    enqueued: float
    job: W | None = None
    level: Level[W] | None = None
    counted: bool = False
    expires: float = math.inf  # when its queue policy times it out
    run: Run[W] | None = None

    @property
    def done(self) -> bool:
        """True when it no longer waits, or nobody waits for it."""
        return not self.counted or self.job.done  # type: ignore[union-attr] # what is in line has a job


class Level(Generic[W]):
    """The entries of one priority of a lane: counts of all that were admitted, and a line for each signature."""

    __slots__ = ("lines", "number", "requests", "rows", "waiting")

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows = 0
        self.requests = 0
        self.waiting = 0  # rows of those that have reached the worker
        self.lines: dict[Hashable, deque[Entry[W]]] = {}

    def push(self, entry: Entry[W]) -> None:
        """Put an entry in line, by rank, behind its equals."""
        line = self.lines.get(entry.request.signature)
        if line is None:
            line = self.lines[entry.request.signature] = deque()
        if not line or entry.rank >= line[-1].rank:
            line.append(entry)
        else:
            insort(line, entry, key=_rank)

    def prune(self) -> None:
        """Forget at the front of each line those that nobody waits for."""
        empty: list[Hashable] = []
        for signature, line in self.lines.items():
            while line:
                entry = line[0]
                if entry.counted:
                    if not entry.done:
                        break
                    discount(entry)
                line.popleft()
            else:
                empty.append(signature)
        for signature in empty:
            del self.lines[signature]

    def head(self) -> Entry[W] | None:
        """The first of all lines."""
        self.prune()
        return min((line[0] for line in self.lines.values()), key=_rank, default=None)

    def remove(self, entry: Entry[W]) -> None:
        """Take an entry out of its line; its rank must not have changed since it was pushed."""
        line = self.lines[entry.request.signature]
        line.remove(entry)
        if not line:
            del self.lines[entry.request.signature]

    def newest(self) -> Entry[W] | None:
        """Of the last in each line the one that came last."""
        lasts = (next((entry for entry in reversed(line) if not entry.done), None) for line in self.lines.values())
        return max((last for last in lasts if last is not None), key=_enqueued, default=None)

    def sweep(self) -> None:
        """Forget every entry that nobody waits for, wherever it stands."""
        for signature, line in list(self.lines.items()):
            for entry in line:
                if entry.done:
                    discount(entry)
            self.lines[signature] = deque(entry for entry in line if not entry.done)
            if not self.lines[signature]:
                del self.lines[signature]


def discount(entry: Entry[W]) -> None:
    """Take an entry out of the counts; its place in the line is passed over from now on."""
    if not entry.counted:
        return
    entry.counted = False
    lane, level, rows = entry.lane, entry.level, entry.rows
    assert level is not None
    lane.rows -= rows
    lane.requests -= 1
    level.rows -= rows
    level.requests -= 1
    if entry.job is not None:
        lane.waiting -= rows
        level.waiting -= rows


class Seat(Generic[W]):
    """A lane's instances on one device, and what is known of how long they run."""

    def __init__(self, device: Device[W], place: Place, max_rows: int) -> None:
        self.device = device
        self.count = place.count
        self.threads = min(place.threads, device.cores)
        self.widest = max(self.threads, min(place.widest, device.cores))
        self.parallel = max(1, min(self.count, device.cores // self.threads))
        self.running = 0
        self.max_rows = max_rows
        self.models: dict[tuple[int, int], LatencyModel] = {}
        self.current = LatencyModel(max_rows)  # that of the last run, on `threads` cores

    @property
    def free(self) -> bool:
        """Whether an instance is idle and may have its cores."""
        return self.running < self.count and self.device.free >= self.threads

    def latency(self, request: Request, cores: int = 0) -> LatencyModel:
        """The model for requests of this size per row on so many cores; a new size starts from what is known."""
        key = ((request.size // request.rows).bit_length(), cores or self.threads)
        model = self.models.get(key)
        if model is not None and model.known:
            return model
        if not self.models and key[1] == self.threads:
            # What warm-up measured, table and all, is taken to be of the first size that is asked for.
            model = self.models[key] = self.current
            return model
        near = self.models.get((key[0], self.threads), self.current)
        near = near if near.known else self.current
        if near.known:
            model = LatencyModel.from_prior(self.max_rows, near.to_prior())
        self.models[key] = model = model or LatencyModel(self.max_rows)
        return model

    def warmed(self, rows: int, seconds: float, cores: int | None) -> None:
        """Learn from a run of unknown size per row, whose model others start from."""
        if cores in (None, self.threads):
            self.current.observe(rows, seconds)

    def succeed(self, other: Seat[W]) -> None:
        """Take over what another seat on the same device learned and what it runs."""
        self.models, self.current, self.running = other.models, other.current, other.running


@dataclass(slots=True, eq=False)
class Active(Generic[W]):
    """A run under way: when it should end, and what it teaches."""

    run: Run[W]
    seat: Seat[W]
    model: LatencyModel
    level: int
    ends: float
    relieved: bool = False  # its instance has its next run already


class Device(Generic[W]):
    """What lanes compete for: `cores` slots."""

    def __init__(self, name: str, cores: int) -> None:
        self.name = name
        self.cores = cores
        self.free = cores
        self.lanes: list[Lane[W]] = []
        self.active: list[Active[W]] = []
        self.credit = 0.0  # engine seconds that default work is owed by critical work

    def residual(self, seat: Seat[W], now: float) -> float:
        """Seconds until the seat can start a run."""
        if seat.running < seat.count and self.free >= seat.threads:
            return 0.0
        soonest = math.inf
        for active in self.active:
            if (seat.running < seat.count or active.seat is seat) and not active.relieved:
                # A run that is overdue is likely to take as long again as it is overdue.
                soonest = min(soonest, abs(active.ends - now))
        return soonest if soonest < math.inf else 0.0


@dataclass(eq=False)
class Lane(Generic[W]):
    """One queue of one model version: its jobs, its places and its history."""

    key: LaneKey
    limits: Limits
    report: LaneReport = field(default_factory=LaneReport)
    levels: dict[int, Level[W]] = field(default_factory=dict)
    seats: dict[str, Seat[W]] = field(default_factory=dict)
    fast: list[Seat[W]] = field(default_factory=list)  # the best pool: those about as quick as the quickest
    slow: list[Seat[W]] = field(default_factory=list)
    past: dict[str, Seat[W]] = field(default_factory=dict)  # the last seat on every device that the lane had one on
    turns: Turns = field(default_factory=Turns)
    tenants: dict[str, int] = field(default_factory=dict)  # rows admitted and not settled
    refused: list[tuple[W, Refusal]] = field(default_factory=list)  # to be handed out by the next dispatch
    plain: bool = True  # no queue policy is set
    rows: int = 0  # admitted and not running yet
    waiting: int = 0  # rows that have reached the worker and do not run yet
    requests: int = 0  # admitted and not running yet
    running: int = 0  # rows
    next_expiry: float = math.inf
    standing_since: float = math.inf  # since when its queue has not been empty
    last_run: float = -math.inf
    closed_until: float = -math.inf  # requests whose deadline is before this are refused until something changes
    closed_for: float = 0.0  # seconds; they had better not be back before the next batch has gone
    sweep_at: int = _SWEEP
    excess: float = 0.0  # how far it is above its fair share of a device, as of a moment ago
    excess_until: float = -math.inf
    arrivals: Arrivals = field(default_factory=Arrivals)

    def level(self, number: int) -> Level[W]:
        """The level of this number."""
        level = self.levels.get(number)
        if level is None:
            level = self.levels[number] = Level(number)
            self.levels = dict(sorted(self.levels.items()))
        return level

    def count(self, entry: Entry[W], number: int) -> None:
        """An entry is admitted at this level, or moves to it."""
        if entry.counted:
            discount(entry)
        entry.counted = True
        rows = entry.rows
        entry.level = level = self.levels.get(number) or self.level(number)
        self.rows += rows
        self.requests += 1
        level.rows += rows
        level.requests += 1
        if entry.job is not None:
            self.waiting += rows
            level.waiting += rows

    @property
    def trusted(self) -> bool:
        """Whether deadlines order the lane; else it is served first in, first out."""
        return not self.fast or self.fast[0].current.trusted

    def take_in(self, jobs: Iterable[W], now: float, *, fifo: bool) -> None:
        """Jobs of the default level that nobody was asked about have come: count them, and put them in line.

        As `count` and `push` for each of them, but with 9,500 instructions less a request: most come this way.
        """
        level = self.levels.get(DEFAULT) or self.level(DEFAULT)
        requests = rows = 0
        for job in jobs:
            request = job.request
            rank = request.deadline
            if fifo:
                rank = job.enqueued
            elif rank is None:
                rank = job.enqueued + PATIENCE
            requests += 1
            rows += request.rows
            entry = Entry(self, request, request.rows, request.tenant, rank, job.enqueued, job, level, True)
            line = level.lines.get(request.signature)
            if line is None:
                level.lines[request.signature] = deque((entry,))
            elif rank >= line[-1].rank:
                line.append(entry)
            else:
                insort(line, entry, key=_rank)
        self.rows += rows
        self.waiting += rows
        self.requests += requests
        level.rows += rows
        level.waiting += rows
        level.requests += requests
        self.arrivals.add(rows, now)

    def reached(self, entry: Entry[W], job: W) -> None:
        """The job of an entry that is counted has come: it waits in line from now on."""
        assert entry.level is not None
        entry.job = job
        entry.level.waiting += entry.rows
        self.waiting += entry.rows
        entry.level.push(entry)
        self.next_expiry = min(self.next_expiry, entry.expires)

    def depart(self, entries: Sequence[Entry[W]], rows: int) -> None:
        """These, which wait, run now."""
        self.rows -= rows
        self.waiting -= rows
        self.requests -= len(entries)
        self.running += rows
        for entry in entries:
            entry.counted = False
        if len(self.levels) == 1:
            (only,) = self.levels.values()
            only.rows -= rows
            only.waiting -= rows
            only.requests -= len(entries)
            only.prune()
            return
        for entry in entries:
            level = entry.level
            assert level is not None
            level.rows -= entry.rows
            level.waiting -= entry.rows
            level.requests -= 1
        for level in self.levels.values():
            level.prune()

    def forget_levels(self) -> None:
        """Drop the levels that nothing is at, so that a lane without priorities costs no more than it must."""
        if len(self.levels) > 1 or DEFAULT not in self.levels:
            self.levels = {number: level for number, level in self.levels.items() if level.requests or level.lines} or {
                DEFAULT: Level(DEFAULT)
            }

    def move(self, entry: Entry[W], number: int) -> None:
        """Put an entry that waits, and is in no line any more, in line at another level."""
        self.count(entry, number)
        self.level(number).push(entry)

    def unspill(self) -> None:
        """Nothing waits for the best pool: it may have what was left to the slower ones."""
        for level in [level for level in self.levels.values() if level.number >= SPILL]:
            for line in list(level.lines.values()):
                for entry in line:
                    if not entry.done:
                        self.move(entry, level.number - SPILL)
            level.lines.clear()

    def rank_places(self) -> None:
        """Tell the best pool from the slower ones by what was learned; what was not measured counts as good."""
        seats = list(self.seats.values())
        costs = [seat.current.mean(seat.current.efficient) / seat.current.efficient for seat in seats]
        best = min((cost for cost in costs if cost > 0), default=0.0)
        self.fast = [seat for seat, cost in zip(seats, costs, strict=True) if cost <= _UNEQUAL * best]
        self.slow = [seat for seat, cost in zip(seats, costs, strict=True) if cost > _UNEQUAL * best]

    def head(self, first: int = 0) -> tuple[Level[W], Entry[W]] | None:
        """The most urgent entry that waits, and its level, which is at least `first`."""
        for level in self.levels.values():
            if level.lines and level.number >= first:
                entry = level.head()
                if entry is not None:
                    return level, entry
        return None

    def behind(self, first: Level[W], signature: Hashable, least: int = 0) -> Iterator[tuple[Iterable[Entry[W]], int]]:
        """The lines of other levels, from `least`, that may share a batch with the head of one, and their rows."""
        for level in self.levels.values():
            if level is not first and level.number >= least and signature in level.lines:
                yield level.lines[signature], level.waiting

    def entries(self) -> Iterable[Entry[W]]:
        """Everything in line."""
        for level in self.levels.values():
            for line in level.lines.values():
                yield from line

    def sweep(self) -> None:
        """Forget what nobody waits for, of which there may be much while a run hangs."""
        for level in self.levels.values():
            level.sweep()
        self.sweep_at = max(_SWEEP, 2 * self.requests)
