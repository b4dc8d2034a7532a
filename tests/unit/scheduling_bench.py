"""A worker without a clock for the tests of the scheduler: devices that take as long as they are told to."""

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass, field

from gateway.scheduling.base import Limits, Place
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.types import InferRequest


def affine(rows):
    return 0.004 + 0.00025 * rows


@dataclass(eq=False)
class Job:
    request: InferRequest
    lane: str
    enqueued: float
    outcome: str = ""
    answered: float = 0.0

    @property
    def done(self):
        return bool(self.outcome)


@dataclass
class Bench:
    """Lanes on devices of which each has slots; `speed` of a device multiplies what its runs take."""

    lanes: dict[str, Limits] = field(default_factory=lambda: {"m": Limits(64, joins=True)})
    places: tuple[Place, ...] = (Place("gpu", 1),)
    cores: dict[str, int] = field(default_factory=dict)
    true: object = staticmethod(affine)
    warm: bool = True
    max_bytes: int = 1 << 30
    way: float = 0.0

    def __post_init__(self):
        self.scheduler = DeadlineScheduler(self.cores, self.max_bytes, lambda: 0.5, self.way)
        self.now = 0.0
        self.speed = Counter({place.device: 1.0 for place in self.places})
        self.jobs, self.runs, self.refusals, self.batches = [], [], [], []
        self._events, self._number = [], itertools.count()
        for lane, limits in self.lanes.items():
            self.scheduler.open(lane, limits, self.places)
            if self.warm:
                self.learn(lane)

    def learn(self, lane):
        for place in self.places:
            for rows in {1, 2, 4, 8, 16, 32, 64, self.lanes[lane].max_rows}:
                for _ in range(3):
                    if rows <= self.lanes[lane].max_rows:
                        self.scheduler.warmed(lane, place.device, rows, self.true(rows) * self.speed[place.device])

    def ask(self, deadline=0.05, lane="m", *, admit=True, run=True, **more):
        """A request whose deadline is in so many seconds, as a job; `job.outcome` says if it was refused."""
        due = None if deadline is None else self.now + deadline
        request = InferRequest(lane, {}, deadline=due, **more)
        job = Job(request, lane, self.now)
        refusal = self.scheduler.admit(lane, request, self.now) if admit else None
        if refusal is not None:
            job.outcome = refusal.reason
            self.refusals.append(refusal)
        else:
            self.jobs.append(job)
            self.scheduler.add(lane, job, self.now)
            if run:
                self.dispatch()
        return job

    def answer(self, job, outcome):
        assert not job.outcome, f"{outcome} after {job.outcome}"
        job.outcome, job.answered = outcome, self.now
        self.scheduler.settle(job.lane, job.request, self.now)

    def dispatch(self):
        """Ask every device until nothing more starts."""
        for place in self.places:
            while True:
                answer = self.scheduler.dispatch(place.device, self.now)
                for job, refusal in answer.refused:
                    self.refusals.append(refusal)
                    self.answer(job, refusal.reason)
                if answer.run is None:
                    break
                self.start(answer.run)
            if answer.ask_at is not None and answer.ask_at > self.now:
                heapq.heappush(self._events, (answer.ask_at, next(self._number), None))

    def start(self, run):
        assert run.jobs
        assert run.rows == sum(job.request.rows for job in run.jobs)
        assert not any(job.done or job in each.jobs for job in run.jobs for each in self.runs)
        self.runs.append(run)
        self.batches.append(run)
        heapq.heappush(self._events, (self.now + self.true(run.rows) * self.speed[run.device], next(self._number), run))

    def finish(self, run, *, failed=False):
        self.runs = [each for each in self.runs if each is not run]
        self.scheduler.finished(run, self.now - run.started, self.now, failed=failed)
        for job in run.jobs:
            if not job.done:
                late = job.request.deadline is not None and self.now > job.request.deadline + 1e-9
                self.answer(job, "late" if late else "in_time")

    def advance(self, seconds):
        """Let time pass, with all that happens in it."""
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            moment, _, run = heapq.heappop(self._events)
            self.now = max(self.now, moment)
            if any(each is run for each in self.runs):  # it did not fail meanwhile
                self.finish(run)
            self.dispatch()
        self.now = until

    def drive(self, chance, rate, seconds, **more):
        """Poisson arrivals; returns their jobs, when all have their outcome."""
        until = self.now + seconds
        jobs = []
        while self.now < until:
            self.advance(chance.expovariate(rate))
            jobs.append(self.ask(**{name: value() if callable(value) else value for name, value in more.items()}))
        self.advance(60.0)
        assert all(job.outcome for job in jobs)
        return jobs


def share(jobs, outcome="in_time"):
    return sum(job.outcome == outcome for job in jobs) / max(len(jobs), 1)
