"""Whose turn it is on a device, and with which batch: the lanes' state brought to the pure decision of `policy.py`."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Generic

from gateway.scheduling.admission import target
from gateway.scheduling.base import W
from gateway.scheduling.lanes import DEFAULT, SPILL, Device, Entry, Lane, Level, Seat
from gateway.scheduling.latency import LatencyModel
from gateway.scheduling.policy import Decision, Outlook, on_free

_EASE = 2.0  # times the time it takes to run all that waits: with more left, there is no hurry
# Seconds; shorter runs would answer the first of a burst sooner, and cost all throughput: the image classifier on two
# cores had 0.88 of ONNX Runtime's with runs of 0.05, 0.90 with 0.12; laid out ahead, 0.905 with 0.06, 0.912 with this.
_BRIEF = 0.1
_STALE = 1.0  # seconds without a run after which a late job is worth a try


@dataclass(slots=True)
class Head(Generic[W]):
    """The entry whose turn it is, with where it waits and where it would run."""

    lane: Lane[W]
    seat: Seat[W]
    level: Level[W]
    entry: Entry[W]


def level_class(lane: Lane[W], level: Level[W]) -> int:
    """The priority class of a level. Triton's strict levels are within a model; between models they are default."""
    return DEFAULT if lane.limits.priority_levels else level.number % SPILL


def owed(lane: Lane[W]) -> bool:
    """Whether default work waits in a lane, and so is owed a part of what critical work gets."""
    level = lane.levels.get(DEFAULT)
    return not lane.limits.priority_levels and level is not None and level.waiting > 0


def most_urgent(device: Device[W], passed: AbstractSet[Lane[W]]) -> Head[W] | None:
    """The head that should run here next: of the highest class, then of the earliest deadline."""
    if device.credit > 0:
        aged = _first(device, passed, DEFAULT)
        if aged is not None and level_class(aged.lane, aged.level) == DEFAULT:
            model = aged.seat.current
            if device.credit >= model.mean(min(aged.level.waiting, model.cap)):
                return aged
    return _first(device, passed, 0)


def _first(device: Device[W], passed: AbstractSet[Lane[W]], least: int) -> Head[W] | None:
    best: Head[W] | None = None
    best_key = (math.inf, math.inf)
    for lane in device.lanes:
        if not lane.waiting:  # of a thousand models most
            continue
        seat = lane.seats[device.name]
        if seat.running >= seat.count or lane in passed:
            continue
        head = _head(lane, seat, 0 if lane.limits.priority_levels else least)
        if head is not None:
            key = (level_class(lane, head[0]), head[1].rank)
            if key < best_key:
                best, best_key = Head(lane, seat, *head), key
    return best


def _head(lane: Lane[W], seat: Seat[W], least: int) -> tuple[Level[W], Entry[W]] | None:
    """A lane's head for one of its places: the slower pool runs only what was spilled to it."""
    if not lane.slow:
        return lane.head(least)
    if seat in lane.slow:
        return lane.head(least + SPILL)
    head = lane.head(least)
    if head is not None and head[0].number >= SPILL:
        lane.unspill()
        head = lane.head(least)
    return head


def choose(head: Head[W], now: float, overhead: float) -> Decision[Entry[W]]:
    """The batch that begins with a head, or why there is none."""
    lane, seat, level = head.lane, head.seat, head.level
    request = head.entry.request
    contended = _is_contended(seat.device, lane)
    model = seat.latency(request)
    if seat.widest > seat.threads and seat.device.free == seat.device.cores and not contended:
        model = seat.latency(request, seat.widest)
    outlook: Outlook[Entry[W]] = Outlook(
        model,
        overhead,
        level.waiting,
        partial(target, lane, seat.device, now),
        idle=not contended,
        shapes=len(level.lines) > 1,
        probe=now - lane.last_run > _STALE,
    )
    if len(lane.levels) > 1:
        outlook.behind = lane.behind(level, request.signature, SPILL if seat in lane.slow else 0)
    waiting = level.lines[request.signature]
    if len(lane.tenants) > 1:
        # One that has left the middle of the line must not cost its tenant a turn.
        outlook.fill = lambda line: lane.turns.order(entry for entry in line if not entry.done)
    return on_free(waiting, lane.limits, _share(head, model, now), now, outlook)


def is_alone(device: Device[W]) -> bool:
    """Whether nothing runs on a device and nothing that waits could: then a run may have every core."""
    return device.free == device.cores and not any(
        lane.waiting and lane.seats[device.name].running < lane.seats[device.name].count for lane in device.lanes
    )


def _is_contended(device: Device[W], lane: Lane[W]) -> bool:
    return any(other is not lane and other.waiting for other in device.lanes)


def _share(head: Head[W], model: LatencyModel, now: float) -> int:
    """Rows of what waits and runs that are this instance's part, or as many as gain from running together."""
    lane, seat = head.lane, head.seat
    pool = lane.slow if seat in lane.slow else lane.fast
    parallel = sum(each.parallel for each in pool) if len(pool) > 1 else seat.parallel
    share = -(-(lane.waiting + lane.running) // parallel)
    batches = share // max(model.efficient, model.rows(_BRIEF))
    if batches > 1:
        # Larger batches gain little; but that little counts when the last in line is short of time.
        needed = batches * model.mean(min(share // batches, model.cap))
        if head.level.lines[head.entry.request.signature][-1].rank - now > _EASE * needed:
            share = -(-share // batches)
    return share
