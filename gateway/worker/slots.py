"""Drives the scheduler: where jobs, slots and instances meet.

An instance waits in a `Seat` for its next run. Arrivals of one turn of the event loop are seen together, because
each device is asked once at the end of the turn what to do. All decisions are the scheduler's; this module knows
the clock, and that nothing the scheduler hands out is ever lost.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from weakref import WeakValueDictionary

from gateway.engines.base import Engine
from gateway.placement import Placement
from gateway.queues.base import Job, Lane
from gateway.scheduling.base import Dispatch, LaneKey, Limits, Place, Request, Run
from gateway.scheduling.refusals import refused
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.worker.ordering import Order
from gateway.worker.resources import Claim

_WAY = 0.002  # seconds that a batch may take from the decision to the engine and back,
_WAY_SHARE = 0.1  # or this part of the time it runs
_MEASURED = 4  # versions at once: a thousand that are loaded together would all stand in line, and be measured as such


class Seat:
    """One open run of an instance: waits here for its next batch. Made by `Slots.seat`.

    `waited` is False while the instance goes from one run to the next without a pause.
    """

    def __init__(self, slots: Slots, lane: LaneKey, device: str) -> None:
        self.place = (lane, device)
        self.waited = True
        self.waiter: asyncio.Future[Run[Job]] | None = None
        self.claim: Claim | None = None  # where rates are limited
        self._slots = slots

    async def next(self) -> Run[Job]:
        """Wait for a batch and the slots to run it."""
        run = self._slots.take(self)
        self.waited = run is None
        if run is not None:
            return run
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            return await self.waiter
        except asyncio.CancelledError:
            # Cancelled in the same turn as a batch was assigned: the batch is not lost.
            if self.waiter.done() and not self.waiter.cancelled():
                self._slots.give_back(self.waiter.result())
            raise
        finally:
            self._slots.leave(self)

    def release(self, run: Run[Job], *, learn: bool, failed: bool = False, seconds: float | None = None) -> None:
        """The run is over; its slots are free. What is no measurement of a whole run is not to be learned from.

        The engine was at work for so many `seconds`, where that is known. Saying it again changes nothing.
        """
        self._slots.finished(run, learn=learn, failed=failed, seconds=seconds)

    def lend(self, run: Run[Job]) -> None:
        """The run waits for other runs, which may have its slots. Saying it again changes nothing."""
        self._slots.lend(run)

    def relieve(self, run: Run[Job]) -> bool:
        """The run is about to end: have the next one decided now, as of that end. False if there is none to begin then."""
        return self._slots.relieve(run)


class Slots:
    """All devices of a worker and the lanes on them."""

    def __init__(self, scheduler: DeadlineScheduler[Job]) -> None:
        self.scheduler = scheduler
        self._idle: dict[tuple[LaneKey, str], deque[Seat]] = {}
        self._early: dict[tuple[LaneKey, str], deque[Run[Job]]] = {}  # runs whose instance is about to sit down
        self._devices: dict[LaneKey, tuple[str, ...]] = {}
        self._scheduled: set[str] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._turn = asyncio.Event()
        self.measuring = asyncio.Semaphore(_MEASURED)
        self.orders: WeakValueDictionary[Lane, Order] = WeakValueDictionary()  # of lanes whose answers keep theirs

    # --- lanes

    def open(self, lane: LaneKey, limits: Limits, places: Sequence[Place]) -> None:
        """A version serves: see `Scheduler.open`. Move seats that are on other devices at once."""
        self.scheduler.open(lane, limits, places)
        self._devices[lane] = devices = tuple(dict.fromkeys(place.device for place in places))
        for place in [place for place in self._early if place[0] == lane and place[1] not in devices]:
            for run in self._early.pop(place):
                self.give_back(run)

    def close(self, lane: LaneKey) -> None:
        """The version serves no more: every job of it that does not run goes back to the queue, in order."""
        early = [run for place, runs in self._early.items() if place[0] == lane for run in runs]
        waiting = self.scheduler.close(lane)
        for job in reversed([*(job for run in early for job in run.jobs), *waiting]):
            job.release()
        for run in early:
            self.finished(run, learn=False)
        for places in (self._idle, self._early):
            for place in [place for place in places if place[0] == lane]:
                del places[place]
        self._devices.pop(lane, None)

    def require(self, lane: LaneKey, engines: Sequence[tuple[Engine, Placement]]) -> None:
        """A version will open lanes for these instances. Raises `InvalidArgument` if one of them could never run."""

    def seat(self, lane: LaneKey, device: str, engine: Engine | None = None) -> Seat:  # noqa: ARG002 - see `LimitedSlots`
        """A place for one open run of an instance of the lane."""
        return Seat(self, lane, device)

    def move(self, seat: Seat, device: str) -> None:
        """Have an instance take its runs on another device from now on."""
        if seat.place[1] == device:
            return
        waits = seat in self._idle.get(seat.place, ())
        self.leave(seat)
        seat.place = (seat.place[0], device)
        if waits:
            self._idle.setdefault(seat.place, deque()).append(seat)
            self._wake(device)

    def add(self, lane: LaneKey, jobs: Sequence[Job]) -> None:
        """Jobs have come out of the queue, and wait from now on."""
        self.scheduler.add_all(lane, jobs, time.monotonic())
        self._wake_all(lane)

    async def settled(self, lane: LaneKey) -> None:
        """Wait until no job of the lane waits or runs."""
        while not self.scheduler.is_quiet(lane):
            self._turn.clear()
            await self._turn.wait()

    # --- for gateways

    def admit(self, lane: LaneKey, request: Request, request_id: str) -> None:
        """Accept a request. Raises the `GatewayError` to refuse it with."""
        refusal = self.scheduler.admit(lane, request, time.monotonic())
        if refusal is not None:
            raise refused(refusal, request_id)

    # --- for seats

    def take(self, seat: Seat) -> Run[Job] | None:
        """A run that was decided before the seat asked; without one the seat counts as idle."""
        if early := self._early.get(seat.place):
            return early.popleft()
        self._idle.setdefault(seat.place, deque()).append(seat)
        if self.scheduler.waits(seat.place[0]):
            self._wake(seat.place[1])
        return None

    def leave(self, seat: Seat) -> None:
        """A seat no longer waits."""
        seats = self._idle.get(seat.place)
        if seats and seat in seats:
            seats.remove(seat)

    def give_back(self, run: Run[Job]) -> None:
        """A run nobody will carry out."""
        for job in reversed(run.jobs):
            job.release()
        self.finished(run, learn=False)

    def finished(self, run: Run[Job], *, learn: bool, failed: bool = False, seconds: float | None = None) -> None:
        """A run is over; see `Seat.release`."""
        if run.ended < math.inf:
            return
        now = time.monotonic()
        taken = now - run.started
        if seconds is not None:
            # The way to the engine and back is a part of every run; what an event loop that is behind adds is none.
            taken = min(max(taken, seconds), seconds + max(_WAY, _WAY_SHARE * seconds))
        self.scheduler.finished(run, taken, now, failed=failed, learn=learn)
        # At once: what is decided at the end of the turn begins behind the answers to this run's jobs.
        self._assign(run.device)

    def lend(self, run: Run[Job]) -> None:
        """See `Seat.lend`."""
        self.scheduler.lend(run)
        self._wake(run.device)

    def relieve(self, run: Run[Job]) -> bool:
        """See `Seat.relieve`."""
        assert run.predicted is not None
        dispatch = self.scheduler.relieve(run, max(run.started + run.predicted, time.monotonic()))
        self._carry_out(dispatch)
        return dispatch.run is not None

    # --- decisions

    def _wake_all(self, lane: LaneKey) -> None:
        for device in self._devices.get(lane, ()):
            self._wake(device)

    def _wake(self, device: str) -> None:
        """Something changed: decide at the end of this turn of the event loop."""
        if device not in self._scheduled:
            self._scheduled.add(device)
            asyncio.get_running_loop().call_soon(self._assign, device)

    def _assign(self, device: str) -> None:
        self._scheduled.discard(device)
        if (timer := self._timers.pop(device, None)) is not None:
            timer.cancel()
        now = time.monotonic()
        while True:
            dispatch = self.scheduler.dispatch(device, now)
            self._carry_out(dispatch)
            if dispatch.run is None:
                break
        if dispatch.ask_at is not None:
            self._later(device, dispatch.ask_at)

    def _carry_out(self, dispatch: Dispatch[Job]) -> None:
        for job, refusal in dispatch.refused:
            job.fail(refused(refusal, job.request.id))
        if dispatch.run is not None:
            self._start(dispatch.run)
        self._turn.set()

    def _later(self, device: str, ask_at: float) -> None:
        if (timer := self._timers.pop(device, None)) is not None:
            timer.cancel()  # set by a decision made within this one
        delay = max(ask_at - time.monotonic(), 0.0)
        self._timers[device] = asyncio.get_running_loop().call_later(delay, self._wake, device)

    def _start(self, run: Run[Job]) -> None:
        seats = self._idle.get((run.lane, run.device))
        if not seats:
            self._early.setdefault((run.lane, run.device), deque()).append(run)
            return
        seat = seats.pop()  # the one that ran last: its weights are still in the caches
        if seat.waiter is None or seat.waiter.done():  # cancelled in this very turn
            self.give_back(run)
        else:
            seat.waiter.set_result(run)
