"""Baselines that serve first in, first out: Triton's dynamic batcher with its knobs, and Clipper's AIMD.

Sources: `dynamic_batch_scheduler.cc` and `scheduler_utils.cc` of triton-inference-server/core; Crankshaw et al.,
"Clipper: A Low-Latency Online Prediction Serving System", NSDI 2017, section 4.3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

from gateway.scheduling.base import Dispatch, LaneKey, Limits, Place, Refusal, Request, Run, W


@dataclass(slots=True)
class Line(Generic[W]):
    """The jobs of one lane, oldest first, and where they may run."""

    limits: Limits
    places: dict[str, Place]
    waiting: deque[W] = field(default_factory=deque)

    def trim(self) -> None:
        """Forget the jobs at the head that nobody waits for."""
        while self.waiting and self.waiting[0].done:
            self.waiting.popleft()


class Fifo(Generic[W]):
    """Triton's dynamic batcher: all that waits, oldest first, up to the largest batch, as soon as a slot is free.

    As shipped it refuses nothing. `timeout` is `default_queue_policy`'s with the action REJECT: the seconds after which
    a request that still waits is refused; `delay` is `max_queue_delay_microseconds`: how long the oldest request
    waits for others when the batch is not full. Between lanes the one whose head is oldest comes first.
    """

    def __init__(self, timeout: float | None = None, delay: float = 0.0) -> None:
        self._timeout = timeout
        self._delay = delay
        self._lines: dict[LaneKey, Line[W]] = {}
        self._running: dict[str, int] = {}

    def open(self, lane: LaneKey, limits: Limits, places: Sequence[Place]) -> None:
        """A lane is there, or has other places now."""
        line = self._lines.setdefault(lane, Line(limits, {}))
        line.limits, line.places = limits, {place.device: place for place in places}

    def close(self, lane: LaneKey) -> list[W]:
        """The lane is gone; its jobs."""
        return list(self._lines.pop(lane).waiting)

    def admit(self, lane: LaneKey, request: Request, now: float) -> Refusal | None:
        """Accepts everything."""
        del lane, request, now
        return None

    def settle(self, lane: LaneKey, request: Request, now: float) -> None:
        """Counts nothing."""

    def add(self, lane: LaneKey, job: W, now: float) -> None:
        """A job waits."""
        del now
        self._lines[lane].waiting.append(job)

    def dispatch(self, device: str, now: float) -> Dispatch[W]:
        """Refuse what waited too long; then, if a slot is free, run the lane whose head comes first."""
        answer: Dispatch[W] = Dispatch()
        for lane, line in self._lines.items():
            self._drop(lane, line, answer, now)
        running = self._running.get(device, 0)
        here = [(lane, line) for lane, line in self._lines.items() if line.waiting and device in line.places]
        for lane, line in sorted(here, key=lambda item: self.urgency(item[1].waiting[0])):
            if running >= line.places[device].count:
                continue
            rows = self.most_rows(lane, line, device, now)
            until = self.patience(lane, line) if self._gathered(line) < rows else now
            if until <= now:
                answer.run = self._take(lane, device, rows, now)
                return answer
            answer.ask_at = until if answer.ask_at is None else min(answer.ask_at, until)
        return answer

    def finished(self, run: Run[W], seconds: float, now: float, *, failed: bool = False) -> None:
        """The run's slot is free."""
        del now
        self._running[run.device] -= 1
        if not failed:
            self.learn(run, seconds)

    # What the batchers differ in

    def urgency(self, head: W) -> float:
        """What lanes are ordered by, least first."""
        return head.enqueued

    def refusal(self, lane: LaneKey, line: Line[W], now: float) -> Refusal | None:
        """Whether the job at the head of a line is to be refused now."""
        del lane
        if self._timeout is not None and now - line.waiting[0].enqueued > self._timeout:
            return Refusal("queue_timeout", "Request timeout expired")
        return None

    def most_rows(self, lane: LaneKey, line: Line[W], device: str, now: float) -> int:
        """How many rows a batch takes at most, whatever its head has."""
        del lane, device, now
        return line.limits.max_rows

    def patience(self, lane: LaneKey, line: Line[W]) -> float:
        """Until when a batch that is not full waits for more."""
        del lane
        return line.waiting[0].enqueued + self._delay

    def learn(self, run: Run[W], seconds: float) -> None:
        """A run took so long."""

    # The mechanics they share

    def _drop(self, lane: LaneKey, line: Line[W], answer: Dispatch[W], now: float) -> None:
        line.trim()
        while line.waiting and (refusal := self.refusal(lane, line, now)) is not None:
            answer.refused.append((line.waiting.popleft(), refusal))
            line.trim()

    def _gathered(self, line: Line[W]) -> int:
        most, rows = line.limits.max_rows, 0
        for job in line.waiting:
            rows += 0 if job.done else job.request.rows
            if rows >= most:
                break
        return rows

    def _take(self, lane: LaneKey, device: str, most: int, now: float) -> Run[W]:
        line = self._lines[lane]
        jobs: list[W] = []
        rows = 0
        while line.waiting:
            job = line.waiting[0]
            if not job.done:
                if jobs and (rows + job.request.rows > most or not line.limits.joins):
                    break
                jobs.append(job)
                rows += job.request.rows
            line.waiting.popleft()
        self._running[device] = self._running.get(device, 0) + 1
        return Run(lane, device, jobs, rows, 1, "fifo", now)


class Greedy(Fifo[W]):
    """This gateway before it knew deadlines: as `Fifo`, but a request whose deadline has passed is not run,
    and between lanes the earliest deadline comes first.
    """

    def urgency(self, head: W) -> float:
        """The head's deadline."""
        return head.enqueued + 10.0 if head.request.deadline is None else head.request.deadline

    def refusal(self, lane: LaneKey, line: Line[W], now: float) -> Refusal | None:
        """Refuses what is late already."""
        del lane
        deadline = line.waiting[0].request.deadline
        return Refusal("expired", "the deadline has passed") if deadline is not None and now > deadline else None


class Aimd(Fifo[W]):
    """Clipper's adaptive batch size: one row more after each batch within the `deadline`, a tenth less after one that is not.

    It bounds the time of a batch and not of its wait, so above capacity its line grows without end.
    """

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline
        self._sizes: dict[LaneKey, float] = {}

    def most_rows(self, lane: LaneKey, line: Line[W], device: str, now: float) -> int:
        """The present size."""
        del device, now
        return min(int(self._sizes.get(lane, 1.0)), line.limits.max_rows)

    def learn(self, run: Run[W], seconds: float) -> None:
        """Grow or back off. A batch that did not fill its size says nothing about a larger one."""
        size = self._sizes.get(run.lane, 1.0)
        if seconds > self._deadline:
            self._sizes[run.lane] = max(1.0, size * 0.9)
        elif run.rows >= int(size):
            self._sizes[run.lane] = min(size + 1.0, self._lines[run.lane].limits.max_rows)
