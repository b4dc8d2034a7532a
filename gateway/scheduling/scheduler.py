"""The deadline-aware scheduler: keeps the state, asks the pure decisions, and learns from every run.

It promises to keep the deadline of what it admits, to refuse the rest early, and never to let an engine idle while
something waits for it. See `SCHEDULING.md` for the algorithm and where it comes from.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from gateway.scheduling.admission import Situation, eta, expiry, level_of, on_arrival, policy_of
from gateway.scheduling.base import (
    Dispatch,
    LaneKey,
    Refusal,
    RefusalReason,
    Request,
    Run,
    W,
)
from gateway.scheduling.lanes import (
    CRITICAL,
    DEFAULT,
    PATIENCE,
    SHEDDABLE,
    SPILL,
    Active,
    Device,
    Entry,
    Lane,
    discount,
)
from gateway.scheduling.policy import Decision
from gateway.scheduling.registry import Registry
from gateway.scheduling.selection import Head, choose, is_alone, level_class, most_urgent, owed

_BEHIND = 1e6  # seconds; added to the rank of what a DELAY policy puts behind the others
_AGED = 0.05  # part of the engine time of critical work that default work is owed while it waits
_NEWS = 0.1
_LONGEST_ANSWER = 0.5  # seconds; what took longer was held up by something else
_BYTES = 1 << 30


class DeadlineScheduler(Registry[W]):
    """Implements `gateway.scheduling.base.Scheduler`. `cores` gives the slots of each device, 1 if it has none there.

    Requests admitted and not settled hold at most `max_bytes`. `jitter` gives random numbers from 0 to 1.
    """

    def __init__(
        self,
        cores: Mapping[str, int] | None = None,
        max_bytes: int = _BYTES,
        jitter: Callable[[], float] = random.random,
        way: float = 0.0,
    ) -> None:
        """`way` is for how many seconds of its deadline a request or its answer is where nobody here can see it."""
        super().__init__(cores or {})
        self._jitter = jitter
        self._way = way
        self._at = Situation(0.0, way, jitter, max_bytes)
        self._admitted: dict[int, Entry[W]] = {}  # by the identity of the request, which lives until it is settled

    # --- requests

    def foresee(self, lane: LaneKey, request: Request, now: float) -> tuple[Refusal | None, float]:
        """What `admit` would say now, and in how many seconds the answer would come. Counts nothing."""
        state = self._lanes[lane]
        number = level_of(state.limits, request)
        entry = self._entry(state, request, now, number)
        at = self._at
        at.now = now
        verdict = on_arrival(state, entry, number, at)
        seconds = eta(state, state.fast, entry, number, at) - now if state.fast else 0.0
        return verdict if isinstance(verdict, Refusal) else None, seconds

    def admit(self, lane: LaneKey, request: Request, now: float) -> Refusal | None:
        """Ask at the gateway whether to accept a request. None accepts it and counts its rows until `settle`."""
        state = self._lanes.get(lane)
        if state is None:
            return None
        number = level_of(state.limits, request)
        entry = self._entry(state, request, now, number)
        at = self._at
        at.now = now
        verdict = on_arrival(state, entry, number, at)
        if isinstance(verdict, Refusal):
            if number < SHEDDABLE:  # what gives way to all others makes no load by being refused
                state.arrivals.add(request.rows, now)
            state.report.refused[verdict.reason] += 1
            if verdict.until > state.closed_until:
                state.closed_until, state.closed_for = verdict.until, state.fast[0].current.longest
            return verdict
        state.arrivals.add(entry.rows, now)
        if verdict == "spill":
            number += SPILL
            state.report.spilled += 1
        state.count(entry, number)
        state.report.admitted += 1
        state.tenants[entry.tenant] = state.tenants.get(entry.tenant, 0) + entry.rows
        at.bytes_left -= request.size
        self._admitted[id(request)] = entry
        if number == CRITICAL and len(state.levels) > 1 and not state.limits.priority_levels:
            self._displace(state, now)
        return None

    def turn_away(self, lane: LaneKey, deadline: float) -> float | None:
        """In how many seconds to try again with a request of which only the deadline is known, if it would be refused.

        None when nothing like it was refused, or something has changed since. Changes nothing: any thread may ask.
        """
        state = self._lanes.get(lane)
        if state is None or deadline > state.closed_until or len(state.levels) > 1:
            return None
        return max(state.closed_until - deadline, state.closed_for) * (1 + self._jitter() / 2)

    def turned_away(self, lane: LaneKey, times: int, now: float) -> None:
        """So many requests were refused because `turn_away` said so."""
        if (state := self._lanes.get(lane)) is not None:
            state.arrivals.add(times, now)
            state.report.refused["overload"] += times

    def settle(self, lane: LaneKey, request: Request, now: float) -> None:  # noqa: ARG002 - the entry knows its lane, closed or not
        """An admitted request is answered or given up."""
        entry = self._admitted.pop(id(request), None)
        if entry is None:
            return
        if entry.counted:
            discount(entry)
            entry.lane.closed_until = -math.inf
        if entry.run is not None and entry.run.ended < math.inf:
            self._note_overhead(now - entry.run.ended)
        if request.deadline is not None and now > request.deadline:
            entry.lane.report.late += 1
        self._at.bytes_left += request.size
        tenants = entry.lane.tenants
        left = tenants[entry.tenant] - entry.rows
        if left > 0:
            tenants[entry.tenant] = left
        else:
            del tenants[entry.tenant]

    def add(self, lane: LaneKey, job: W, now: float) -> None:
        """A job has reached the worker and waits."""
        state = self._lanes[lane]
        request = job.request
        entry = self._admitted.get(id(request))
        if entry is None or entry.lane is not state or not entry.counted:
            # Not asked for, or handed back by a run that failed; the old entry may still be somewhere in line.
            number = level_of(state.limits, request)
            again = self._entry(state, request, job.enqueued, number)
            state.count(again, number)
            if entry is None:
                state.arrivals.add(request.rows, now)
            else:
                self._admitted[id(request)] = again
                if entry.lane is not state:
                    state.tenants[request.tenant] = state.tenants.get(request.tenant, 0) + request.rows
            entry = again
        state.reached(entry, job)
        if state.requests >= state.sweep_at:
            state.sweep()

    def add_all(self, lane: LaneKey, jobs: Sequence[W], now: float) -> None:
        """`add` for jobs that came together."""
        state = self._lanes[lane]
        simple = state.plain and not state.limits.priority_levels
        known = self._admitted
        if simple and not any([job.request.priority or id(job.request) in known for job in jobs]):  # noqa: C419 - a list takes half of the time
            state.take_in(jobs, now, fifo=not state.trusted)
        else:
            for job in jobs:
                entry = known.get(id(job.request))
                if entry is None or entry.lane is not state or not entry.counted:
                    self.add(lane, job, now)
                else:
                    state.reached(entry, job)
        if state.requests >= state.sweep_at:
            state.sweep()

    # --- runs

    def dispatch(self, device: str, now: float) -> Dispatch[W]:
        """What to do on a device now. Ask on arrivals, on ends of runs and at `ask_at`; again until no run comes."""
        answer: Dispatch[W] = Dispatch()
        state = self._devices.get(device)
        if state is None:
            return answer
        asks = math.inf
        for lane in state.lanes:
            if lane.next_expiry < math.inf:
                if lane.next_expiry <= now:
                    self._expire(lane, now)
                asks = min(asks, lane.next_expiry)
            if lane.refused:
                answer.refused += lane.refused
                lane.refused = []
        if state.free > 0:
            asks = min(asks, self._assign(state, now, answer))
        answer.ask_at = asks if asks < math.inf else None
        return answer

    def finished(self, run: Run[W], seconds: float, now: float, *, failed: bool = False, learn: bool = True) -> None:
        """A run is over: its cores are free, and its duration is learned from unless it failed or is no typical one.

        It took so many `seconds`; what has passed since is between its end and its answers.
        """
        device = self._devices[run.device]
        active = next((each for each in device.active if each.run is run), None)
        if active is None:
            return
        device.active.remove(active)
        run.ended = min(run.started + seconds, now)
        _relieve(active, device)
        lane = self._lanes.get(run.lane)
        if active.level == DEFAULT:
            device.credit = max(device.credit - seconds, 0.0)
        elif active.level == CRITICAL and any(owed(each) for each in device.lanes):
            device.credit += _AGED * seconds
        if lane is None:
            return
        lane.running -= run.rows
        lane.last_run = now
        lane.closed_until = -math.inf
        lane.forget_levels()
        report = lane.report
        if failed:
            report.failed += 1
        if failed or not learn:
            return
        active.model.observe(run.rows, seconds)
        report.record(run, seconds, active.model)
        if len(lane.seats) > 1:
            lane.rank_places()

    def lend(self, run: Run[W]) -> None:
        """A run waits for other runs, which may have its cores until it is over."""
        device = self._devices[run.device]
        if any(each.run is run and not each.relieved for each in device.active):
            device.free += run.cores
            run.cores = 0

    def relieve(self, run: Run[W], now: float) -> Dispatch[W]:
        """A run is about to end: the next one of its instance, decided now as of that end.

        None where another model's comes next, or nothing, or another instance is idle: then it keeps its cores to the end.
        """
        answer: Dispatch[W] = Dispatch()
        device = self._devices[run.device]
        active = next((each for each in device.active if each.run is run), None)
        if active is None or active.relieved or run.cores != active.seat.threads:
            return answer
        if active.seat.running < active.seat.count:  # and would be given it, to begin at once on cores that are taken
            return answer
        _relieve(active, device)
        self._assign(device, now, answer, only=run.lane)
        if answer.run is None:
            active.relieved = False
            active.seat.running += 1
            device.free -= run.cores
        return answer

    # --- within

    def _note_overhead(self, seconds: float) -> None:
        """Learn from one answer how long after the end of its run it left. The last of a batch count, not the mean."""
        if seconds < _LONGEST_ANSWER:
            seconds += self._way
            news = _NEWS if seconds > self._at.overhead else _NEWS / 10
            self._at.overhead += (seconds - self._at.overhead) * news

    def _entry(self, lane: Lane[W], request: Request, enqueued: float, number: int) -> Entry[W]:
        rank = request.deadline
        if not lane.trusted:
            rank = enqueued  # first in, first out
        elif rank is None:
            rank = enqueued + PATIENCE
        entry = Entry(lane, request, request.rows, request.tenant, rank, enqueued)
        if not lane.plain:
            entry.expires = expiry(policy_of(lane.limits, number), request, enqueued)
        return entry

    def _assign(self, device: Device[W], now: float, answer: Dispatch[W], only: LaneKey | None = None) -> float:
        """Start one batch, of the most urgent lane that has one, if that is `only`. Returns when to ask again at the latest."""
        passed = set(self._held.get(device.name, ())) if self._held else set()
        asks = math.inf
        while (head := most_urgent(device, passed)) is not None:
            lane, seat = head.lane, head.seat
            if only not in (None, lane.key):
                break
            if seat.threads > device.free:
                break  # what is free is kept for the most urgent, or a wide run would wait for ever
            decision = choose(head, now, self._at.overhead)
            for dropped, reason in decision.dropped:
                self._drop(lane, dropped, reason, now)
            answer.refused += lane.refused
            lane.refused = []
            if decision.jobs:
                answer.run = self._start(head, decision, now)
                break
            if decision.ask_at is not None or not decision.dropped:
                passed.add(lane)
                asks = min(asks, decision.ask_at or math.inf)
        return asks

    def _start(self, head: Head[W], decision: Decision[Entry[W]], now: float) -> Run[W]:
        lane, seat, device = head.lane, head.seat, head.seat.device
        jobs = [entry.job for entry in decision.jobs if entry.job is not None]
        lane.depart(decision.jobs, decision.rows)
        if len(lane.tenants) > 1:
            lane.turns.charge(decision.jobs, lane.tenants)
        cores = seat.widest if is_alone(device) else seat.threads
        seat.current = model = seat.latency(head.entry.request)
        if cores != seat.threads:
            model = seat.latency(head.entry.request, cores)
        predicted = model.mean(decision.rows) if model.known else None
        run = Run(lane.key, device.name, jobs, decision.rows, cores, decision.reason, now, predicted)
        for entry in decision.jobs:
            entry.run = run
        device.active.append(Active(run, seat, model, level_class(lane, head.level), now + (predicted or 0.0)))
        device.free -= cores
        seat.running += 1
        lane.report.closed[decision.reason] += 1
        if not lane.waiting:
            lane.standing_since = math.inf
        elif lane.standing_since == math.inf:
            lane.standing_since = now
        return run

    def _drop(self, lane: Lane[W], entry: Entry[W], reason: RefusalReason, now: float) -> None:
        """A job waits in vain on this device: a slower pool answers it in time, or nobody does."""
        level = entry.level
        assert level is not None
        if level.number < SPILL and lane.slow:
            number = level.number + SPILL
            deadline = entry.request.deadline
            end = eta(lane, lane.slow, entry, number, Situation(now, self._at.overhead))
            if deadline is not None and end <= deadline:
                level.remove(entry)
                lane.move(entry, number)
                lane.report.spilled += 1
                return
        if reason == "expired":
            self._refuse(lane, entry, Refusal("expired", "the request can no longer be answered by its deadline"))
        else:
            model = lane.fast[0].current
            text = "overloaded: the request was dropped so that others keep their deadline"
            self._refuse(lane, entry, Refusal("shed", text, model.mean(model.cap) * (1 + self._jitter() / 2)))

    def _displace(self, lane: Lane[W], now: float) -> None:
        """Shed the newest of the least urgent jobs if critical work has made the end of the queue late."""
        for least in reversed(lane.levels.values()):
            last = least.newest()
            if last is None:
                continue
            deadline = last.request.deadline
            if least.number % SPILL == CRITICAL or deadline is None or not lane.fast or not lane.trusted:
                return
            if eta(lane, lane.fast, last, least.number, Situation(now, self._at.overhead)) > deadline:
                least.remove(last)
                self._refuse(lane, last, Refusal("shed", "more urgent requests took its place", 1 + self._jitter()))
            return

    def _refuse(self, lane: Lane[W], entry: Entry[W], refusal: Refusal) -> None:
        discount(entry)
        lane.closed_until = -math.inf
        if entry.job is not None and not entry.job.done:
            lane.refused.append((entry.job, refusal))
            lane.report.refused[refusal.reason] += 1

    def _expire(self, lane: Lane[W], now: float) -> None:
        """Apply the queue policy to those who have waited too long: refuse them, or put them behind the others."""
        for entry in [entry for entry in lane.entries() if entry.counted and entry.expires <= now]:
            level = entry.level
            assert level is not None
            level.remove(entry)
            entry.expires = math.inf
            if not policy_of(lane.limits, level.number % SPILL).delays:
                self._refuse(lane, entry, Refusal("queue_timeout", "Request timeout expired"))
            elif entry.done:
                discount(entry)
            else:
                entry.rank += _BEHIND
                level.push(entry)
        lane.next_expiry = min((entry.expires for entry in lane.entries() if entry.counted), default=math.inf)


def _relieve(active: Active[W], device: Device[W]) -> None:
    """Its instance and its cores are free, if they have not been before."""
    if not active.relieved:
        active.relieved = True
        active.seat.running -= 1
        device.free += active.run.cores
