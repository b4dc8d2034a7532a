"""The slots of one device: where models meet.

A run needs as many slots as the cores it uses. When slots are free and jobs are staged, the stage with the
earliest deadline gets them, if one of its instances here is free. Arrivals of one turn of the event loop are
seen together, because the decision is made once at its end.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from operator import itemgetter

from gateway.queues.base import Job
from gateway.scheduling.policy import Decision
from gateway.worker.stage import Stage


@dataclass(slots=True)
class Assignment:
    """A batch and the cores to run it on; give it back with `Slots.release`."""

    jobs: list[Job]
    rows: int
    reason: str
    cores: int
    started: float  # time.monotonic


class Seat:
    """One open run of an instance: waits here for its next batch. Made by `Slots.seat`."""

    def __init__(self, slots: Slots, stage: Stage, threads: int, widest: int) -> None:
        self.stage = stage
        self.threads = threads
        self.widest = widest
        self.waiter: asyncio.Future[Assignment] | None = None
        self._slots = slots

    async def next(self) -> Assignment:
        """Wait for a slot and a batch, together."""
        self.waiter = asyncio.get_running_loop().create_future()
        self._slots.sit(self)
        try:
            return await self.waiter
        except asyncio.CancelledError:
            # Cancelled in the same turn as a batch was assigned: the batch is not lost.
            if self.waiter.done() and not self.waiter.cancelled():
                assignment = self.waiter.result()
                for job in reversed(assignment.jobs):
                    job.release()
                self.release(assignment)
            raise
        finally:
            self._slots.leave(self)

    def release(self, assignment: Assignment) -> None:
        """The run is over; its slots are free."""
        self.stage.finished(assignment.rows, time.monotonic() - assignment.started)
        self._slots.release(assignment.cores)


class Slots:
    """The scheduler of one device with `cores` slots."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._free = cores
        self._idle: dict[Stage, deque[Seat]] = {}
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None

    def seat(self, stage: Stage, threads: int, widest: int | None = None) -> Seat:
        """A place for an instance of the stage's model that runs on `threads` cores when the device is loaded and
        on at most `widest`, or every core, when it is alone.
        """
        threads = min(threads, self._cores)
        return Seat(self, stage, threads, max(threads, min(widest or self._cores, self._cores)))

    def wake(self) -> None:
        """Something changed: decide at the end of this turn of the event loop."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._assign)

    def sit(self, seat: Seat) -> None:
        """A seat waits for a batch."""
        self._idle.setdefault(seat.stage, deque()).append(seat)
        if len(seat.stage):
            self.wake()

    def leave(self, seat: Seat) -> None:
        """A seat no longer waits."""
        seats = self._idle.get(seat.stage)
        if seats and seat in seats:
            seats.remove(seat)
        if not seats:
            self._idle.pop(seat.stage, None)

    def release(self, cores: int) -> None:
        """A run gives its slots back."""
        self._free += cores
        self.wake()

    def _assign(self) -> None:
        self._scheduled = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        patient: dict[Stage, float] = {}
        while self._free > 0 and self._assign_one(now, patient):
            pass
        if patient:
            delay = max(min(patient.values()) - now, 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self.wake)

    def _assign_one(self, now: float, patient: dict[Stage, float]) -> bool:
        """Start one batch. `patient` collects the stages that want to wait, and until when."""
        for stage in self._by_urgency():
            if stage in patient:
                continue
            seat = self._idle[stage][0]
            if seat.threads > self._free:
                return False  # what is free is kept for the most urgent, or a wide run would wait for ever
            decision = stage.choose(now)
            if decision.jobs:
                self._start(seat, decision, now)
                return True
            if decision.ask_at is not None:
                patient[stage] = decision.ask_at
        return False

    def _by_urgency(self) -> list[Stage]:
        ranked = [(urgency, stage) for stage in self._idle if (urgency := stage.urgency()) is not None]
        return [stage for _, stage in sorted(ranked, key=itemgetter(0))]

    def _start(self, seat: Seat, decision: Decision[Job], now: float) -> None:
        # A lone run may use every core; with anything else to do, each run keeps to its own.
        alone = self._free == self._cores and not any(len(stage) for stage in self._idle)
        cores = seat.widest if alone else seat.threads
        self._free -= cores
        self.leave(seat)
        assignment = Assignment(decision.jobs, decision.rows, decision.reason, cores, now)
        assert seat.waiter is not None
        if seat.waiter.done():  # cancelled in this very turn
            for job in reversed(decision.jobs):
                job.release()
            seat.release(assignment)
            return
        seat.waiter.set_result(assignment)
