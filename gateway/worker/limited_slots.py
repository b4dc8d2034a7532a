"""`Slots` where rates are limited: an instance is given a run only while the resources that it claims are free.

What it waits for it does not hold, neither slots nor resources, and its requests stay in line. What is freed on one device
may be waited for on another, so a decision is about all of them. Models whose instances claim nothing are served as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from gateway.engines.base import Engine
from gateway.placement import Placement
from gateway.queues.base import Job
from gateway.scheduling.base import LaneKey, Run
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.worker.resources import Claim, Resources, claim
from gateway.worker.slots import Seat, Slots

Place: TypeAlias = tuple[LaneKey, str]


class LimitedSlots(Slots):
    """See the module."""

    def __init__(self, scheduler: DeadlineScheduler[Job], resources: Resources) -> None:
        super().__init__(scheduler)
        self._resources = resources
        # By the identity of the engine, which is kept so that no other gets that; whose it is.
        self._claims: dict[int, tuple[Engine, LaneKey, Claim]] = {}
        self._limited: dict[LaneKey, LaneKey] = {}  # the lanes of instances with claims, and whose they are
        self._running: dict[int, tuple[Run[Job], Claim]] = {}
        self._deciding = False
        # Of the decision that is being made:
        self._chosen: dict[Place, Seat] = {}  # may run now
        self._passed: set[Place] = set()  # may, and has nothing to run yet
        self._asks: dict[str, float] = {}

    def require(self, lane: LaneKey, engines: Sequence[tuple[Engine, Placement]]) -> None:
        """See `Slots.require`."""
        if any(placement.limiter for _, placement in engines):
            claims = [
                claim(placement.limiter, placement.instead_of or placement.device.name) for _, placement in engines
            ]
            self._resources.open(lane, claims)
            for (engine, _), each in zip(engines, claims, strict=True):
                self._claims[id(engine)] = engine, lane, each

    def close(self, lane: LaneKey) -> None:
        """See `Slots.close`."""
        super().close(lane)
        for engine in [engine for engine, (_, owner, _) in self._claims.items() if owner == lane]:
            del self._claims[engine]
        for each in [each for each, owner in self._limited.items() if lane in (each, owner)]:
            del self._limited[each]
        self._resources.close(lane)

    def seat(self, lane: LaneKey, device: str, engine: Engine | None = None) -> Seat:
        """See `Slots.seat`."""
        seat = super().seat(lane, device, engine)
        if id(engine) in self._claims:
            _, self._limited[lane], seat.claim = self._claims[id(engine)]
        return seat

    def finished(self, run: Run[Job], *, learn: bool, failed: bool = False, seconds: float | None = None) -> None:
        """See `Slots.finished`."""
        if (found := self._running.pop(id(run), None)) is not None:
            self._resources.give_back(found[1])
        super().finished(run, learn=learn, failed=failed, seconds=seconds)

    def relieve(self, run: Run[Job]) -> bool:  # noqa: ARG002 - see `Slots`
        """Never: until it has ended it has its resources."""
        return False

    # --- decisions

    def _assign(self, device: str) -> None:
        self._scheduled.discard(device)
        if self._deciding:  # a run came to nothing in the middle of a decision
            self._wake(device)
            return
        self._deciding = True
        try:
            self._decide(device)
        finally:
            self._deciding = False

    def _decide(self, device: str) -> None:
        devices = dict.fromkeys([device, *(on for lane, on in self._idle if lane in self._limited)])
        self._passed.clear()
        self._asks.clear()
        self._choose()
        self._ask(devices)
        while self._chosen:  # who has nothing to run yet, e.g. because its batch may grow, is to hold up nobody
            self._passed.update(self._chosen)
            self._choose()
            self._ask(devices)
        for each, ask_at in self._asks.items():
            super()._later(each, ask_at)

    def _ask(self, devices: Iterable[str]) -> None:
        for device in devices:
            super()._assign(device)

    def _later(self, device: str, ask_at: float) -> None:
        self._asks[device] = min(ask_at, self._asks.get(device, ask_at))

    def _choose(self) -> None:
        """Settle who may run now, and have the scheduler pass over the others."""
        seats: dict[Claim, tuple[Place, Seat]] = {}
        groups: list[list[Claim]] = []
        for place, idle in self._idle.items():
            if idle and place[0] in self._limited and place not in self._passed and self.scheduler.ready(*place):
                found = {seat.claim: (place, seat) for seat in idle if seat.claim is not None}
                seats |= found
                groups.append(list(found))
        self._chosen = dict(seats[each] for each in self._resources.in_turn(groups))
        held: dict[str, list[LaneKey]] = {}
        for lane in self._limited:
            for device in self._devices.get(lane, ()):
                if (lane, device) not in self._chosen:
                    held.setdefault(device, []).append(lane)
        self.scheduler.hold(held)

    def _start(self, run: Run[Job]) -> None:
        place = (run.lane, run.device)
        seat = self._chosen.get(place)
        if seat is None:
            super()._start(run)
            return
        assert seat.claim is not None
        self._idle[place].remove(seat)
        self._idle[place].append(seat)  # where the next is taken from
        self._resources.take(seat.claim)
        self._running[id(run)] = run, seat.claim
        super()._start(run)
        self._choose()
