"""The batch decision, pure: which of the waiting jobs to run now, which to drop, or until when to wait, and why.

An idle engine takes what is waiting, up to the largest batch that keeps every deadline in it. When that would be
a small batch of a long line, the head of the line is dropped and the batch kept (early drop, Nexus, SOSP 2019):
serving an almost late head costs the time of many others. Without an `Outlook` nothing is known of durations, and
the decision is greedy. Only a model whose configuration asks for it (`max_queue_delay_microseconds`,
`preferred_batch_size`) waits, and then by Triton's rules (`dynamic_batch_scheduler.cc` GetDynamicBatch): the delay
counts from the oldest job, and a job's own deadline cuts it short. Time is given, never read, so that a simulator
can drive the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, TypeAlias

from gateway.scheduling.base import Limits, RefusalReason, W, Waiting
from gateway.scheduling.latency import LatencyModel

__all__ = ["Decision", "Limits", "Outlook", "Waiting", "on_free", "on_timer"]

Fill: TypeAlias = Callable[[Iterable[W]], Iterable[W]]
_ANY = 1 << 62  # rows


@dataclass(slots=True)
class Outlook(Generic[W]):
    """What is known of the time to come: how long batches take, and what else wants the engine."""

    latency: LatencyModel
    overhead: float = 0.0  # seconds between the end of a run and its answers
    backlog: int = 0  # rows that wait at the head's level
    target: Callable[[], int] = lambda: 1  # rows of the smallest batch that sustains the load
    idle: bool = False  # nothing else wants the engine
    shapes: bool = False  # requests of another shape wait too, and would wait for this one's delay
    probe: bool = False  # nothing ran for so long that the latency may be another one now
    fill: Fill[W] | None = None  # puts what stands behind the head in the order in which the batch is filled
    behind: Iterable[tuple[Iterable[W], int]] = ()  # lines of other levels to fill the batch from, and their rows

    def room(self, deadline: float | None, now: float) -> int:
        """Rows of the largest batch that ends by then."""
        return self.latency.cap if deadline is None else self.latency.room(deadline - now - self.overhead)


@dataclass(slots=True)
class Decision(Generic[W]):
    """Jobs to run now, with why the batch closed; or none, and when to ask again (None: on the next event).

    Reasons: `full` no further row fits, `deadline` a larger batch would miss a deadline, `explore` larger batches
    were not tried yet, `preferred` a preferred size was reached or would be passed, `delay` the queue delay or a
    deadline ran out, `shape` what else waits cannot share the batch, `share` the rest is left to the other
    instances or the next run, `single` the model does not join requests, `drained` nothing else waits.
    `dropped` are jobs that wait in vain.
    """

    jobs: list[W]
    rows: int
    reason: str
    ask_at: float | None = None
    dropped: list[tuple[W, RefusalReason]] = field(default_factory=list)


def on_free(
    waiting: Iterable[W],
    limits: Limits,
    share: int,
    now: float,
    outlook: Outlook[W] | None = None,
) -> Decision[W]:
    """Choose a batch for an instance that is free. `waiting` is most urgent first.

    `share` is how many rows are this instance's part of the work, or as many as gain from running together;
    the head is taken whatever its rows. A model with Triton's knobs set is batched by those alone.
    """
    patient = bool(limits.preferred) or limits.delay > 0
    most = max(limits.preferred, default=limits.max_rows) if patient else min(limits.max_rows, max(share, 1))
    dropped: list[tuple[W, RefusalReason]] = []
    if outlook is not None:
        at = _Moment(now, outlook)
        worth = min(most, outlook.latency.cap)
        waiting = _worth_a_batch(waiting, outlook.backlog, worth, at, dropped)
        if outlook.behind:
            waiting = chain(waiting, _behind(outlook.backlog, worth, at, dropped))
        if outlook.fill is not None:
            waiting = outlook.fill(waiting)
    decision = _gather(waiting, limits, most, "preferred" if patient else "share", _Room(now, outlook))
    if patient and outlook is not None and outlook.shapes and decision.reason == "drained":
        decision.reason = "shape"
    if patient:
        decision = on_timer(decision, limits, now, outlook)
    decision.dropped = dropped
    return decision


def on_timer(gathered: Decision[W], limits: Limits, now: float, outlook: Outlook[W] | None = None) -> Decision[W]:
    """Apply `preferred_batch_size` and `max_queue_delay_microseconds` to what could be run now."""
    if not gathered.jobs or gathered.reason == "single":
        return gathered
    preferred = _largest_preferred(gathered.jobs, limits.preferred)
    if preferred:
        return Decision(gathered.jobs[:preferred], _rows(gathered.jobs[:preferred]), "preferred")
    if gathered.reason != "drained":
        return gathered
    if limits.preferred and gathered.rows > max(limits.preferred):
        return Decision(gathered.jobs, gathered.rows, "preferred")
    until = min(job.enqueued for job in gathered.jobs) + limits.delay
    run = outlook.latency.bound(gathered.rows) + outlook.overhead if outlook else 0.0
    for job in gathered.jobs:
        if job.request.deadline is not None:
            # Half of a job's time may go to waiting, so that the other half is there for the engine.
            until = min(until, (job.enqueued + job.request.deadline) / 2, job.request.deadline - run)
    if now >= until:
        return Decision(gathered.jobs, gathered.rows, "delay")
    return Decision([], 0, "wait", ask_at=until)


def _worth_a_batch(
    line: Iterable[W], backlog: int, most: int, at: _Moment[W], dropped: list[tuple[W, RefusalReason]]
) -> Iterable[W]:
    """The line from the first job on that is worth a batch; those before it go to `dropped`. `backlog` is its rows."""
    waiting = iter(line)
    for job in waiting:
        if job.done:
            continue
        verdict = at.verdict(job, backlog, most)
        if verdict is None:
            return chain((job,), waiting)
        dropped.append((job, verdict))
        backlog -= job.request.rows
    return ()


def _behind(rows: int, most: int, at: _Moment[W], dropped: list[tuple[W, RefusalReason]]) -> Iterator[W]:
    """What the other levels' lines have to fill a batch with; `rows` stand before them."""
    for line, more in at.outlook.behind:
        rows += more
        yield from _worth_a_batch(line, rows, most, at, dropped)


@dataclass(slots=True)
class _Moment(Generic[W]):
    """An outlook at a time."""

    now: float
    outlook: Outlook[W]

    def verdict(self, job: W, backlog: int, most: int) -> RefusalReason | None:
        """Why a head of the line should not be served, None if it should. `backlog` is what waits from it on."""
        deadline = job.request.deadline
        if deadline is None:
            return None
        now, outlook = self.now, self.outlook
        if not outlook.latency.trusted:
            # The best tuned batcher there is: first in first out, and a time limit at half the deadline.
            return "shed" if now - job.enqueued > (deadline - job.enqueued) / 2 else None
        room = outlook.room(deadline, now)
        rows = job.request.rows
        if room < rows and now + outlook.overhead + outlook.latency.bound(rows) > deadline:
            return None if backlog <= rows and self._worth_a_try(rows, deadline) else "expired"
        if room < backlog and room < most and room < min(backlog, most, outlook.target()):
            return "shed"
        return None

    def _worth_a_try(self, rows: int, deadline: float) -> bool:
        """Whether to run a lone job that is likely to be late: nothing else wants the engine."""
        if not self.outlook.idle or self.now >= deadline:
            return False
        return self.outlook.probe or self.now + self.outlook.latency.mean(rows) <= deadline


def _gather(waiting: Iterable[W], limits: Limits, most: int, short: str, room: _Room) -> Decision[W]:
    """The head of the line and those behind it that fit with it, up to `most` rows.

    `short` is why to stop at `most` where the model itself would take more.
    """
    jobs: list[W] = []
    rows = 0
    reason = "drained"
    signature: Hashable = None
    for job in waiting:
        if job.done:
            continue
        request = job.request
        if jobs and request.signature != signature:
            # Passed over, not waited for: it heads the next batch, and order among its own shape is kept.
            reason = "shape"
            continue
        signature = request.signature
        if request.deadline is not None and request.deadline < room.deadline:
            room.narrow(request.deadline)
        if jobs and (rows + request.rows > most or rows + request.rows > room.rows):
            return Decision(jobs, rows, _why(rows + request.rows, limits, most, short, room))
        jobs.append(job)
        rows += request.rows
        if rows >= limits.max_rows or not limits.joins:
            return Decision(jobs, rows, "full" if limits.joins else "single")
    return Decision(jobs, rows, reason)


def _why(rows: int, limits: Limits, most: int, short: str, room: _Room) -> str:
    """Why a batch of so many rows is not formed."""
    if rows > limits.max_rows:
        return "full"
    if rows > most:
        return short
    return "explore" if rows > room.explored else "deadline"


class _Room:
    """How many rows a batch may have so that every deadline in it is kept."""

    __slots__ = ("_now", "_outlook", "deadline", "explored", "rows")

    def __init__(self, now: float, outlook: Outlook[W] | None) -> None:
        self._now = now
        self._outlook = outlook
        known = outlook is not None and outlook.latency.trusted
        self.deadline = math.inf if known else -math.inf  # the earliest that counts
        self.explored = self.rows = outlook.latency.cap if outlook is not None else _ANY

    def narrow(self, deadline: float) -> None:
        """An earlier deadline is to be kept too."""
        assert self._outlook is not None
        self.deadline = deadline
        self.rows = min(self.rows, self._outlook.room(deadline, self._now))


def _largest_preferred(jobs: list[W], sizes: tuple[int, ...]) -> int:
    """How many jobs from the head make the largest preferred number of rows exactly; 0 if none does."""
    best = rows = 0
    for count, job in enumerate(jobs, start=1):
        rows += job.request.rows
        if rows in sizes:
            best = count
    return best


def _rows(jobs: list[W]) -> int:
    return sum(job.request.rows for job in jobs)
