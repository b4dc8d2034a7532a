"""Admission, pure: whether a request can be answered by its deadline, given what waits and runs.

The predicted end is a *fair* ETA (`SCHEDULING.md` section 2): a request waits for its own lane's work, and for at
most as much of each other lane and of each other tenant, so that one hot model or client is refused by its own
queue and nobody else's. It is approximate and may be; what it accepts by mistake, the early drop at dispatch
gives up.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from gateway.scheduling.base import Limits, QueuePolicy, Refusal, RefusalReason, Request, W
from gateway.scheduling.lanes import CRITICAL, DEFAULT, SHEDDABLE, SPILL, Device, Entry, Lane, Seat

_BUSY = 0.8  # utilisation above which nothing sheddable is admitted
_STANDING = 0.1  # seconds for which a queue must not have been empty to be a standing one (CoDel's interval)
_SETTLED = 0.004  # seconds for which a lane's excess is taken as unchanged
_LONGEST = 1 << 62  # microseconds; a client may send a number that no float can hold
_LIGHT = 2.0  # times the constant part of a batch; in a shorter one, who comes along costs next to nothing
_STALE = 1.0  # seconds without a run after which the latency may be another one

_rank = attrgetter("rank")


@dataclass(slots=True)
class Situation:
    """What admission knows beside the lane: the time and what does not belong to one lane."""

    now: float
    overhead: float = 0.0  # seconds between the end of a run and its answers
    jitter: Callable[[], float] = float  # 0 to 1, random: spreads the return of refused clients
    bytes_left: int = 1 << 62


def level_of(limits: Limits, request: Request) -> int:
    """The priority class of a request, or Triton's level where the model sets `priority_levels`."""
    priority = request.priority
    if not priority and not limits.priority_levels:
        return DEFAULT
    if limits.priority_levels:
        if 1 <= priority <= limits.priority_levels:
            return priority
        return limits.default_priority or (limits.priority_levels + 1) // 2
    if priority == 1:
        return CRITICAL
    return SHEDDABLE if priority >= 3 else DEFAULT


def policy_of(limits: Limits, level: int) -> QueuePolicy:
    """Triton's queue policy for a level."""
    if limits.priority_levels:
        return limits.priority_queues.get(level, limits.queue)
    return limits.queue


def expiry(policy: QueuePolicy, request: Request, enqueued: float) -> float:
    """When its queue policy times a request out; infinity for never."""
    seconds = policy.timeout
    if policy.allow_override:
        override = _microseconds(request) / 1e6
        if override > 0 and (seconds <= 0 or override < seconds):
            seconds = override
    return enqueued + seconds if seconds > 0 else math.inf


def on_arrival(lane: Lane[W], entry: Entry[W], number: int, at: Situation) -> Refusal | Literal["accept", "spill"]:
    """Admit a request to its lane, to the lane's slower pool, or refuse it. Changes nothing."""
    request = entry.request
    if not lane.plain or number == SHEDDABLE or request.size > at.bytes_left:
        refusal = _limits(lane, entry, number, at)
        if refusal is not None:
            return refusal
    deadline = request.deadline
    if deadline is None or not lane.fast or _surely(lane, entry, deadline, at):
        return "accept"
    service = min(seat.latency(entry.request).mean(entry.rows) for seat in lane.seats.values())
    idle = _is_idle(lane)
    if at.now + service > deadline:
        # Nothing is lost by trying, and nothing else would ever show that the device recovered.
        probe = idle and at.now < deadline and at.now - lane.last_run > _STALE
        return "accept" if probe else _refuse("deadline", service, deadline - at.now, None)
    end = eta(lane, lane.fast, entry, number, at)
    if idle or end <= deadline:
        return "accept"
    if lane.slow and eta(lane, lane.slow, entry, number + SPILL, at) <= deadline:
        return "spill"
    model = lane.fast[0].current
    again = max(end - deadline, model.mean(model.cap))  # not before the next batch has gone
    # Others may be of less consequence to the queue, have more of it to themselves, or stand further ahead.
    alike = number == DEFAULT and len(lane.levels) == 1 and len(lane.tenants) < 2 and not lane.slow
    again *= 1 + at.jitter() / 2
    return _refuse("overload", end - at.now, deadline - at.now, again, end if alike else -math.inf)


def _limits(lane: Lane[W], entry: Entry[W], number: int, at: Situation) -> Refusal | None:
    """What is refused whatever the predicted time."""
    if not lane.plain and _is_full(lane, number):
        return Refusal("queue_full", "Exceeds maximum queue size")
    if entry.request.size > at.bytes_left:
        return Refusal("overload", "the requests that wait hold as many bytes as the server keeps", 1 + at.jitter())
    gives_way = number == SHEDDABLE and not lane.limits.priority_levels
    if gives_way and not _is_idle(lane) and not _is_quiet(lane, at.now):
        return Refusal("overload", "the server is busy, and the request's priority is to give way", 1 + at.jitter())
    return None


def _surely(lane: Lane[W], entry: Entry[W], deadline: float, at: Situation) -> bool:
    """Whether even a bound that costs nothing to find is within the deadline, or no bound can be trusted."""
    seat = lane.fast[0]
    if not seat.current.trusted:
        return True
    if len(lane.fast) > 1:
        return False
    device = seat.device
    if len(device.lanes) > 1 or seat.parallel > 1:
        for other in device.lanes:
            if other is not lane and other.rows:
                return False
        if lane.excess > 0:
            return False
    model = seat.latency(entry.request)
    wait = device.residual(seat, at.now) + ((lane.rows + entry.rows - 1) // model.cap + 1) * model.longest
    return at.now + at.overhead + wait * model.tail <= deadline


def eta(lane: Lane[W], pool: Sequence[Seat[W]], entry: Entry[W], number: int, at: Situation) -> float:
    """When a request of this level would be answered by a pool, with the fair part of what is before it."""
    now = at.now
    seat = pool[0]
    residual = seat.device.residual(seat, now)
    parallel = seat.parallel
    for other in pool[1:]:
        parallel += other.parallel
        left = other.device.residual(other, now)
        if left < residual:
            seat, residual = other, left
    model = seat.latency(entry.request)
    rows = rows_before(lane, entry, number) + entry.rows
    share = -(-rows // parallel)
    batch = max(min(model.cap, model.room(entry.rank - now - at.overhead)), entry.rows, 1)
    full, rest = divmod(share - 1, batch)
    wait = residual + full * model.mean(batch)
    # Those who arrive until its batch starts ride along, and make it longer.
    last = model.mean(min(batch, rest + 1 + int(lane.arrivals.rate(now) / parallel * wait)))
    own = full * model.mean(batch) + last
    ahead = 0.0
    if len(seat.device.lanes) > 1:
        rides = not full and own <= _LIGHT * model.fit[0]
        turn = _turn(lane, number) if rides else math.inf  # it goes when those go that it goes with
        ahead = _ahead(entry, seat.device, own, now, (number, turn))
    return now + at.overhead + (residual + own + ahead) * model.tail


def rows_before(lane: Lane[W], entry: Entry[W], number: int) -> int:
    """Rows of the lane that run before the request does."""
    rows = 0
    for level in lane.levels.values():
        if level.number > number:
            break
        if level.number < number - number % SPILL:
            continue  # not of this pool
        rows += level.rows
        line = level.lines.get(entry.request.signature)
        if level.number == number and line and entry.rank < line[-1].rank:
            behind = len(line) - bisect_right(line, entry.rank, key=_rank)
            rows -= behind * level.waiting // max(level.requests, 1)
    if len(lane.tenants) > 1:
        own = lane.tenants.get(entry.tenant, 0) + entry.rows
        others = sum(min(count, own) for tenant, count in lane.tenants.items() if tenant != entry.tenant)
        rows = min(rows, own - entry.rows + others)
    return max(rows, 0)


def work(seat: Seat[W], rows: int) -> float:
    """Engine seconds in so many rows of a lane at its seat."""
    model = seat.current
    full, rest = divmod(rows, model.cap)
    return full * model.mean(model.cap) + (model.mean(rest) if rest else 0.0)


def utilisation(device: Device[W], now: float) -> float:
    """The part of the device's time that today's arrivals need in batches as large as they may be."""
    busy = 0.0
    for lane in device.lanes:
        seat = lane.seats[device.name]
        model = seat.current
        busy += lane.arrivals.rate(now) * model.mean(model.efficient) / model.efficient * seat.threads / device.cores
    return busy


def target(lane: Lane[W], device: Device[W], now: float) -> int:
    """Rows of the lane's smallest batch that sustains today's arrivals on the device.

    Each lane costs the constant part of a batch whenever it is visited and the rest by its rows. What is left
    beside the rows gives the shortest period in which all can be visited.
    """
    constant = slope = 0.0
    for each in device.lanes:
        seat = each.seats[device.name]
        a, b = seat.current.fit
        rate = each.arrivals.rate(now) * seat.threads / device.cores
        constant += a * min(1.0, rate)
        slope += b * rate
    return math.ceil(lane.arrivals.rate(now) * constant / max(0.02, 0.95 - slope))


def _is_full(lane: Lane[W], number: int) -> bool:
    most = policy_of(lane.limits, number).max_size
    level = lane.levels.get(number)
    waiting = lane.requests if not lane.limits.priority_levels else level.requests if level else 0
    return 0 < most <= waiting


def _turn(lane: Lane[W], number: int) -> float:
    """The rank of the first that waits in a lane, as long as nothing more urgent than the level is there."""
    if next(iter(lane.levels), number) < number:
        return -math.inf
    return min((line[0].rank for level in lane.levels.values() for line in level.lines.values()), default=math.inf)


def _ahead(entry: Entry[W], device: Device[W], own: float, now: float, place: tuple[int, float]) -> float:
    """Seconds for which the device is kept by other lanes before a request that waits and runs `own` seconds in its lane.

    Of each other lane at most as much counts as of this one, and its next batch; nothing of one whose turn comes after
    this `place`, a level and a rank. A lane that wants more than its fair share of the device also leaves room for what
    will have come to the others by then.
    """
    lane, latest = entry.lane, entry.rank - own
    number, turn = place
    ahead = 0.0
    excess = _excess(lane, device, latest + own - now, now)
    for other in device.lanes:
        if other is lane:
            continue
        rows = other.rows
        if rows and turn < math.inf and _turn(other, number) > turn:
            continue
        seat = other.seats[device.name]
        model = seat.current
        if excess > 0:
            rows = max(rows, min(model.cap, rows + int(excess * other.arrivals.rate(now) * (latest - now))))
        if rows > 0:
            seconds = min(work(seat, rows), own + model.mean(min(model.cap, rows + 1)))
            ahead += seconds * seat.threads / device.cores
    return ahead


def _excess(lane: Lane[W], device: Device[W], period: float, now: float) -> float:
    """How far a lane is above its max-min fair share of a device whose lanes are visited once in a period; 0 to 1."""
    if now >= lane.excess_until:
        wanted = [_demand(other, device, period, now) for other in device.lanes]
        own = _demand(lane, device, period, now)
        lane.excess = min(max(sum(min(each, own) for each in wanted) - 1, 0.0), 1.0)
        lane.excess_until = now + _SETTLED
    return lane.excess


def _demand(lane: Lane[W], device: Device[W], period: float, now: float) -> float:
    """The part of a device's time that a lane's arrivals need when it is visited once in a period."""
    seat = lane.seats[device.name]
    a, b = seat.current.fit
    rate = lane.arrivals.rate(now)
    return (rate * b + min(rate, 1 / period) * a) * seat.threads / device.cores


def _is_idle(lane: Lane[W]) -> bool:
    """Whether a request of this lane would start at once."""
    return not lane.rows and any(
        seat.free and not any(other.waiting for other in seat.device.lanes) for seat in lane.fast
    )


def _is_quiet(lane: Lane[W], now: float) -> bool:
    """Whether there is room for work that gives way to any other."""
    for seat in lane.fast:
        standing = any(other.waiting and now - other.standing_since > _STANDING for other in seat.device.lanes)
        if not standing and utilisation(seat.device, now) < _BUSY:
            return True
    return not lane.fast


def _refuse(
    reason: RefusalReason, needed: float, left: float, retry_after: float | None, until: float = -math.inf
) -> Refusal:
    milliseconds = f"needs about {1e3 * needed:.3g} ms to be answered, its deadline is in {1e3 * left:.3g} ms"
    if reason == "deadline":
        return Refusal(reason, f"deadline below service time: the request {milliseconds}", retry_after)
    return Refusal(reason, f"overloaded: the request {milliseconds}", retry_after, until)


def _microseconds(request: Request) -> int:
    """The request's own `timeout`; 0 for none and for what is no number of microseconds."""
    value = request.parameters.get("timeout", 0)
    return min(value, _LONGEST) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
