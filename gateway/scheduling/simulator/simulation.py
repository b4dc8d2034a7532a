"""The discrete-event loop: a heap of events, a clock that jumps to the next of them, and a `Scheduler` under test.

The loop stands where the server's worker and gateway stand: it calls the scheduler at the same moments and obeys
its answers. It trusts nothing: a batch that is too large, a job that runs twice or a request without an outcome
is a `Fault`.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from gateway.scheduling.base import LaneKey, Refusal, Request, Run, Scheduler
from gateway.scheduling.simulator.scenario import Arrival, Device, Scenario

Outcome: TypeAlias = Literal["in_time", "late", "refused", "cancelled"]

_WARM_UP_RUNS = 3  # of each size, as the server does
_STUCK = 10_000  # events at one moment; a scheduler that asks to be asked at once, for ever, is found out


class Fault(Exception):
    """The scheduler broke its contract, or the simulation lost a request."""


@dataclass(slots=True)
class Asked:
    """What scheduling reads of a simulated request; satisfies `base.Request`."""

    rows: int
    size: int
    deadline: float | None
    priority: int
    tenant: str
    signature: Hashable = None
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Job:
    """One attempt of one call; satisfies `base.Waiting`. `reason` is that of a refusal."""

    request: Request
    enqueued: float
    lane: LaneKey
    call: int
    attempt: int
    arrival: Arrival
    admitted: bool = False
    running: bool = False
    outcome: Outcome | None = None
    answered: float = 0.0
    reason: str = ""

    @property
    def done(self) -> bool:
        """True once the attempt has its outcome."""
        return self.outcome is not None


@dataclass(frozen=True, slots=True)
class Ran:
    """A run that is over."""

    device: str
    rows: int
    started: float
    ended: float
    failed: bool


@dataclass(slots=True)
class Record:
    """Everything that happened: every attempt with its outcome, and every run."""

    scenario: Scenario
    jobs: list[Job] = field(default_factory=list)
    runs: list[Ran] = field(default_factory=list)


Event: TypeAlias = tuple[float, int, Callable[..., None], tuple[Any, ...]]


class Simulation:
    """One scenario with one scheduler and one seed; `run` it once."""

    def __init__(self, scenario: Scenario, scheduler: Scheduler[Job], seed: int = 0) -> None:
        self.now = 0.0
        self.record = Record(scenario)
        self._scenario = scenario
        self._scheduler = scheduler
        # Separate streams, so that two schedulers meet the same arrivals whatever they do with them.
        self._arrivals: Iterator[Arrival] = iter(scenario.arrivals(random.Random(f"{seed} arrivals")))
        self._noise = random.Random(f"{seed} noise")
        self._thinking = random.Random(f"{seed} thinking")
        self._models = {model.name: model for model in scenario.models}
        self._devices = {device.name: device for device in scenario.devices}
        self._running: dict[str, list[Run[Job]]] = {name: [] for name in self._devices}
        self._ask_at: dict[str, float] = {}
        self._events: list[Event] = []
        self._sequence = 0
        self._calls = 0

    def run(self) -> Record:
        """Simulate until every request has its outcome. Raises `Fault` when the scheduler breaks its contract."""
        self._open()
        if not self._scenario.cold:
            self._warm_up()
        for device in self._scenario.devices:
            if device.lost is not None:
                self._at(device.lost[0], self._lose, device)
                self._at(device.lost[1], self._regain, device)
        if self._scenario.clients is None:
            self._expect()
        else:
            for _ in range(self._scenario.clients.count):
                self._think()
        self._loop()
        self._check()
        return self.record

    def _loop(self) -> None:
        events, at_once = self._events, 0
        while events:
            moment, _, action, arguments = heapq.heappop(events)
            at_once = at_once + 1 if moment == self.now else 0
            if at_once > _STUCK:
                raise Fault(f"time stands still at {moment:.6f} s: {action.__name__}")
            self.now = moment
            action(*arguments)

    def _at(self, moment: float, action: Callable[..., None], *arguments: Any) -> None:
        self._sequence += 1  # events of one moment happen in the order they were made
        heapq.heappush(self._events, (moment, self._sequence, action, arguments))

    def _open(self) -> None:
        places = self._scenario.places(self.now)
        for model in self._scenario.models:
            self._scheduler.open(model.name, model.limits(), places)

    def _warm_up(self) -> None:
        """Show the scheduler how long each size takes before the first request, if it has a method `warmed`."""
        warmed = getattr(self._scheduler, "warmed", None)
        if warmed is None:
            return
        for model in self._scenario.models:
            for device in filter(self._is_there, self._scenario.devices):
                for rows in warm_up_sizes(model.max_rows):
                    for _ in range(_WARM_UP_RUNS):
                        warmed(model.name, device.name, rows, self._duration(model.name, rows, device))

    def _is_there(self, device: Device) -> bool:
        return device.there(self.now)

    def _duration(self, lane: LaneKey, rows: int, device: Device) -> float:
        seconds = self._models[str(lane)].latency(rows) * device.stretch(self.now)
        return seconds * self._noise.lognormvariate(0.0, self._scenario.noise) if self._scenario.noise else seconds

    # Requests

    def _expect(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            self._at(arrival.time, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        self._expect()
        self._call(arrival)

    def _call(self, arrival: Arrival) -> None:
        self._calls += 1
        self._send(arrival, self._calls, 0)

    def _send(self, arrival: Arrival, call: int, attempt: int) -> None:
        now = self.now
        deadline = None if arrival.deadline is None else now + arrival.deadline
        request = Asked(arrival.rows, arrival.size, deadline, arrival.priority, arrival.tenant)
        job = Job(request, now, arrival.model, call, attempt, arrival)
        self.record.jobs.append(job)
        refusal = self._scheduler.admit(job.lane, request, now)
        if refusal is not None:
            self._refuse(job, refusal)
            return
        job.admitted = True
        if arrival.patience is not None:
            self._at(now + arrival.patience, self._hang_up, job)
        self._scheduler.add(job.lane, job, now)
        for device in self._devices.values():
            self._ask(device)

    def _hang_up(self, job: Job) -> None:
        if not job.done:
            self._end(job, "cancelled")

    def _refuse(self, job: Job, refusal: Refusal) -> None:
        if job.done or job.running:
            raise Fault(f"a job was refused ({refusal.reason}) that {'is done' if job.done else 'runs'}")
        job.reason = refusal.reason
        retry = self._scenario.retry
        again = retry is not None and job.attempt < retry.attempts
        self._end(job, "refused", final=not again)
        if retry is not None and again:
            wait = max(retry.delay, refusal.retry_after or 0.0) if retry.obeys else retry.delay
            self._at(self.now + wait, self._send, job.arrival, job.call, job.attempt + 1)

    def _end(self, job: Job, outcome: Outcome, *, final: bool = True) -> None:
        if job.outcome is not None:
            raise Fault(f"a second outcome, {outcome}, of a request that was {job.outcome}")
        job.outcome, job.answered = outcome, self.now
        if job.admitted:
            self._scheduler.settle(job.lane, job.request, self.now)
        if final and self._scenario.clients is not None:
            self._think()

    def _think(self) -> None:
        clients = self._scenario.clients
        assert clients is not None
        moment = self.now + self._thinking.expovariate(1.0 / clients.think)
        if moment < self._scenario.seconds:
            self._at(moment, self._closed_call)

    def _closed_call(self) -> None:
        self._call(next(self._arrivals))

    # Devices

    def _ask(self, device: Device) -> None:
        """Have the scheduler decide on a device until it starts nothing more."""
        if not device.there(self.now):
            return
        while True:
            answer = self._scheduler.dispatch(device.name, self.now)
            for job, refusal in answer.refused:
                self._refuse(job, refusal)
            if answer.run is None:
                break
            self._start(answer.run, device)
        if answer.ask_at is not None:
            self._ask_later(device, max(answer.ask_at, self.now))

    def _ask_later(self, device: Device, moment: float) -> None:
        pending = self._ask_at.get(device.name)
        if pending is None or moment < pending:
            self._ask_at[device.name] = moment
            self._at(moment, self._timer, device, moment)

    def _timer(self, device: Device, moment: float) -> None:
        if self._ask_at.get(device.name) == moment:
            del self._ask_at[device.name]
            self._ask(device)

    def _start(self, run: Run[Job], device: Device) -> None:
        running = self._running[device.name]
        rows = sum(job.request.rows for job in run.jobs)
        most = self._models[str(run.lane)].max_rows
        if run.device != device.name or len(running) >= device.slots:
            raise Fault(f"a run on {run.device}, which has no free slot")
        if rows != run.rows or not run.jobs or (rows > most and len(run.jobs) > 1):
            raise Fault(f"a batch of {len(run.jobs)} jobs and {rows} rows, said to have {run.rows}, at most {most}")
        for job in run.jobs:
            if job.done or job.running or not job.admitted or job.lane != run.lane:
                raise Fault(f"a batch of {run.lane} with a job that runs, is done, or is another lane's")
            job.running = True
        running.append(run)
        self._at(self.now + self._duration(run.lane, rows, device), self._finish, run, device, self.now)

    def _finish(self, run: Run[Job], device: Device, started: float) -> None:
        running = self._running[device.name]
        if run not in running:
            return  # failed when the device was lost
        self._release(run, device, started, failed=False)
        for job in run.jobs:
            job.running = False
            if not job.done:
                deadline = job.request.deadline
                self._end(job, "in_time" if deadline is None or self.now <= deadline else "late")
        self._ask(device)

    def _release(self, run: Run[Job], device: Device, started: float, *, failed: bool) -> None:
        self._running[device.name].remove(run)
        self.record.runs.append(Ran(device.name, run.rows, started, self.now, failed))
        self._scheduler.finished(run, self.now - started, self.now, failed=failed)

    def _lose(self, device: Device) -> None:
        for run in list(self._running[device.name]):
            self._release(run, device, run.started, failed=True)
            for job in run.jobs:
                job.running = False
                if not job.done:
                    self._scheduler.add(job.lane, job, self.now)
        self._open()
        for other in self._devices.values():
            self._ask(other)

    def _regain(self, device: Device) -> None:
        self._open()
        self._ask(device)

    def _check(self) -> None:
        """Every request has one outcome and nothing runs; `_end` has seen to it that none has two."""
        without = sum(job.outcome is None for job in self.record.jobs)
        if without:
            raise Fault(f"{without} of {len(self.record.jobs)} requests have no outcome and nothing is left to happen")
        left = [job for model in self._scenario.models for job in self._scheduler.close(model.name)]
        if any(not job.done for job in left):
            raise Fault("a closed lane handed back jobs that wait, though every request has its outcome")


def warm_up_sizes(max_rows: int) -> list[int]:
    """1, 2, 4 ... and the largest batch."""
    sizes = [1 << power for power in range(max_rows.bit_length()) if 1 << power < max_rows]
    return [*sizes, max_rows]
