"""The batch decision, pure: which of the waiting jobs to run now, or until when to wait, and why.

Greedy: an idle engine takes what is waiting. Only a model whose configuration asks for it
(`max_queue_delay_microseconds`, `preferred_batch_size`) waits, and then by Triton's rules
(`dynamic_batch_scheduler.cc` GetDynamicBatch): the delay counts from the oldest job, and a job's own
deadline cuts it short. Time is given, never read, so that a simulator can drive the same code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from gateway.types import InferRequest


class Waiting(Protocol):
    """What the policy sees of a job; `enqueued` in seconds on the caller's clock."""

    request: InferRequest
    enqueued: float

    @property
    def done(self) -> bool:
        """True for a job nobody waits for, which is passed over."""


W = TypeVar("W", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Limits:
    """A model's own bounds: rows per batch, whether requests are joined, and Triton's two knobs."""

    max_rows: int = 1
    joins: bool = False
    delay: float = 0.0  # seconds
    preferred: tuple[int, ...] = ()


@dataclass(slots=True)
class Decision(Generic[W]):
    """Jobs to run now, with why the batch closed; or none, and when to ask again (None: on the next event).

    Reasons: `full` no further row fits, `preferred` a preferred size was reached or would be passed, `delay`
    the queue delay or a deadline ran out, `shape` what else waits cannot share the batch, `share` the rest is
    left to the other instances or the next run, `single` the model does not join requests, `drained` nothing else waits.
    """

    jobs: list[W]
    rows: int
    reason: str
    ask_at: float | None = None


def on_free(waiting: Iterable[W], limits: Limits, share: int, now: float) -> Decision[W]:
    """Choose a batch for an instance that is free. `waiting` is oldest first.

    `share` is how many rows are this instance's part of the work, or as many as gain from running together;
    the head is taken whatever its rows. A model with Triton's knobs set is batched by those alone.
    """
    if limits.preferred or limits.delay > 0:
        most = max(limits.preferred, default=limits.max_rows)
        return _patient(_gather(waiting, limits, most, "preferred"), limits, now)
    return _gather(waiting, limits, min(limits.max_rows, max(share, 1)), "share")


def _gather(waiting: Iterable[W], limits: Limits, most: int, short: str) -> Decision[W]:
    """The head of the line and those behind it that fit with it, up to `most` rows.

    `short` is why to stop at `most` where the model itself would take more.
    """
    jobs: list[W] = []
    rows = 0
    reason = "drained"
    for job in waiting:
        if job.done:
            continue
        if not jobs:
            jobs.append(job)
            rows = job.request.rows
            if not limits.joins:
                return Decision(jobs, rows, "single")
        elif job.request.signature != jobs[0].request.signature:
            # Passed over, not waited for: it heads the next batch, and order among its own shape is kept.
            reason = "shape"
        elif rows + job.request.rows > most:
            return Decision(jobs, rows, "full" if rows + job.request.rows > limits.max_rows else short)
        else:
            jobs.append(job)
            rows += job.request.rows
        if rows >= limits.max_rows:
            return Decision(jobs, rows, "full")
    return Decision(jobs, rows, reason)


def _patient(gathered: Decision[W], limits: Limits, now: float) -> Decision[W]:
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
    for job in gathered.jobs:
        if job.request.deadline is not None:
            # Half of a job's time may go to waiting, so that the other half is there for the engine.
            until = min(until, (job.enqueued + job.request.deadline) / 2)
    if now >= until:
        return Decision(gathered.jobs, gathered.rows, "delay")
    return Decision([], 0, "wait", ask_at=until)


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
