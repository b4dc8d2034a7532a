"""What a simulation showed, as figures; and several seeds of it, as a median and a range."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.scheduling.base import LaneKey
from gateway.scheduling.simulator.simulation import Job, Record


@dataclass(frozen=True, slots=True)
class Measures:
    """One simulation in figures. A call is a request and its retries, in time when one of them was. Times in seconds."""

    seconds: float
    offered: int  # calls
    attempts: int  # calls and their retries
    in_time: float  # share of the calls
    goodput: float  # calls answered in time per second
    worst_model: float  # the least share in time of the models that the scenario judges
    by_model: dict[str, float]
    p50: float  # of the answered
    p99: float
    late: float  # answered late, as a share of the accepted
    shed: float  # accepted and then refused, as a share of the accepted
    cancelled: float  # share of the attempts
    refused: dict[str, int] = field(default_factory=dict)  # attempts by reason
    refusal_p99: float = 0.0  # from sending to the refusal
    mean_batch: float = 0.0  # rows
    busy: float = 0.0  # of the slots' time


def measure(record: Record) -> Measures:
    """The figures of one simulation."""
    jobs = record.jobs
    calls: dict[int, bool] = {}
    lanes: dict[int, LaneKey] = {}
    for job in jobs:
        calls[job.call] = calls.get(job.call, False) or job.outcome == "in_time"
        lanes[job.call] = job.lane
    models: dict[str, list[bool]] = defaultdict(list)
    for call, good in calls.items():
        models[str(lanes[call])].append(good)
    by_model = {name: _share(sum(goods), len(goods)) for name, goods in sorted(models.items())}
    judged = record.scenario.judged or tuple(by_model)
    answered = sorted(job.answered - job.enqueued for job in jobs if job.outcome in ("in_time", "late"))
    refused = [job for job in jobs if job.outcome == "refused"]
    accepted = sum(job.admitted for job in jobs)
    return Measures(
        seconds=record.scenario.seconds,
        offered=len(calls),
        attempts=len(jobs),
        in_time=_share(sum(calls.values()), len(calls)),
        goodput=sum(calls.values()) / record.scenario.seconds,
        worst_model=min((share for name, share in by_model.items() if name in judged), default=1.0),
        by_model=by_model,
        p50=_quantile(answered, 0.5),
        p99=_quantile(answered, 0.99),
        late=_count("late", jobs) / max(accepted, 1),
        shed=sum(job.admitted for job in refused) / max(accepted, 1),
        cancelled=_count("cancelled", jobs) / max(len(jobs), 1),
        refused=dict(Counter(job.reason for job in refused)),
        refusal_p99=_quantile(sorted(job.answered - job.enqueued for job in refused), 0.99),
        mean_batch=_share(sum(run.rows for run in record.runs), len(record.runs)),
        busy=_busy(record),
    )


def _busy(record: Record) -> float:
    end = max([record.scenario.seconds, *(run.ended for run in record.runs)])
    slots = sum(device.slots for device in record.scenario.devices)
    return sum(run.ended - run.started for run in record.runs) / (end * slots)


def _count(outcome: str, jobs: Sequence[Job]) -> int:
    return sum(job.outcome == outcome for job in jobs)


def _share(part: float, whole: float) -> float:
    """Of nothing, everything went well."""
    return part / whole if whole else 1.0


def _quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share `q` of the sorted values does not exceed; 0 of none."""
    return values[max(0, math.ceil(q * len(values)) - 1)] if values else 0.0
