"""From attempts to figures, the same for a real server and for the simulation of it; and what the figures should be.

A request is judged by its attempts: in time when one of them was answered with 200 within the deadline, counted from when it was due.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from gateway.scheduling.simulator.policies import OURS, POLICIES
from gateway.scheduling.simulator.scenario import Interval, Latency, Retry, Scenario
from gateway.scheduling.simulator.simulation import Job, Record, Simulation
from gateway.scheduling.simulator.workloads import DEVICE, Setup, build
from loadtest.bench.statistics import percentile
from loadtest.overload_client import (
    ANSWERED,
    DEADLINE,
    EXPIRED,
    LOST,
    OVERLOAD,
    SHED,
    UNANSWERED,
    UNAVAILABLE,
    WRONG,
    Attempt,
    Attempts,
)

MAX_ROWS = 64
SLOWER = 10.0
RETRIES = 5

STATUS = {OVERLOAD: "429", SHED: "429", DEADLINE: "504", EXPIRED: "504", UNAVAILABLE: "503"}
AT_ADMISSION = (OVERLOAD, DEADLINE, UNAVAILABLE)
BROKEN = (WRONG, LOST, UNANSWERED)


@dataclass(frozen=True, slots=True)
class Pace:
    """What a batch takes, and a request's deadline in seconds."""

    latency: Latency
    deadline: float

    @property
    def capacity(self) -> float:
        """Requests a second."""
        return self.latency.rate(MAX_ROWS, self.deadline)

    def slower(self, times: float) -> Pace:
        """The same proportions at a part of the requests a second, for a host that is slow itself."""
        latency = Latency(times * self.latency.base, times * self.latency.per_row)
        return Pace(latency, times * self.deadline)


PUBLISHED = Pace(Latency(0.016, 0.001), 0.2)  # 800 requests a second


@dataclass(frozen=True, slots=True)
class Figures:
    """What happened to the requests due in a window. Shares are from 0 to 1, times in milliseconds."""

    seconds: float
    offered: int  # requests
    attempts: int  # requests and their retries
    goodput: float  # share of the requests of which an attempt was answered in time
    at_once: float  # share of the requests answered in time counted from their first attempt
    per_second: float  # requests answered in time
    late: float  # answered too late, or accepted and then expired, as a share of the accepted
    shed: float  # accepted and then dropped, as a share of the accepted
    accepted: int
    p50_ms: float  # of the answered
    p99_ms: float
    kinds: dict[str, int] = field(default_factory=dict)  # attempts
    statuses: dict[str, int] = field(default_factory=dict)
    refusal_p50_ms: float = math.nan  # of those refused at admission
    refusal_p99_ms: float = math.nan
    without_retry_after: int = 0  # answers with 429
    lag_p99_ms: float = math.nan  # from due to sent
    broken: int = 0  # attempts with no answer or a wrong one


def figures(attempts: Attempts, window: Interval, deadline: float = PUBLISHED.deadline) -> Figures:
    """The figures of the requests whose first attempt was due in a window; each attempt has a deadline in seconds."""
    first: dict[int, float] = {}
    good: dict[int, bool] = {}
    once: dict[int, bool] = {}
    rows: list[int] = []
    for row, call in enumerate(attempts.call):
        due = attempts.due[row]
        begun = first.setdefault(call, due)
        if not window[0] <= begun < window[1]:
            continue
        rows.append(row)
        answered = attempts.kind[row] == ANSWERED
        good[call] = good.get(call, False) or (answered and attempts.answered[row] - due <= deadline)
        once[call] = once.get(call, False) or (answered and attempts.answered[row] - begun <= deadline)
    kinds = Counter(attempts.kind[row] for row in rows)
    taken = [1e3 * (attempts.answered[row] - attempts.due[row]) for row in rows if attempts.kind[row] == ANSWERED]
    refusals = [
        1e3 * (attempts.answered[row] - attempts.due[row]) for row in rows if attempts.kind[row] in AT_ADMISSION
    ]
    accepted = kinds[ANSWERED] + kinds[EXPIRED] + kinds[SHED]
    late = sum(milliseconds > 1e3 * deadline for milliseconds in taken) + kinds[EXPIRED]
    statuses: Counter[str] = Counter()
    for kind, count in kinds.items():
        statuses["200" if kind == ANSWERED else STATUS.get(kind, kind)] += count
    return Figures(
        seconds=window[1] - window[0],
        offered=len(good),
        attempts=len(rows),
        goodput=_share(sum(good.values()), len(good)),
        at_once=_share(sum(once.values()), len(once)),
        per_second=_share(sum(good.values()), window[1] - window[0]),
        late=_share(late, accepted),
        shed=_share(kinds[SHED], accepted),
        accepted=accepted,
        p50_ms=_rank(taken, 50),
        p99_ms=_rank(taken, 99),
        kinds=dict(sorted(kinds.items())),
        statuses=dict(sorted(statuses.items())),
        refusal_p50_ms=_rank(refusals, 50),
        refusal_p99_ms=_rank(refusals, 99),
        without_retry_after=sum(
            attempts.kind[row] in (OVERLOAD, SHED) and attempts.retry_after_ms[row] < 0 for row in rows
        ),
        lag_p99_ms=_rank([1e3 * (attempts.sent[row] - attempts.due[row]) for row in rows], 99),
        broken=sum(kinds[kind] for kind in BROKEN),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _rank(values: Iterable[float], rank: float) -> float:
    return round(percentile(sorted(value for value in values if math.isfinite(value)), rank), 3)


# --- the simulation


def scenario(
    load: float, seconds: float, *, retries: bool = False, slow: Interval | None = None, pace: Pace = PUBLISHED
) -> Scenario:
    """What is offered: Poisson arrivals at a load, the same to the server and to the simulation of it."""
    setup = Setup(pace.latency, MAX_ROWS, pace.deadline, seconds)
    made = build("poisson", setup, load)
    if slow is not None:
        made = replace(made, devices=(replace(DEVICE, slow=slow, slow_factor=SLOWER),))
    return replace(made, retry=Retry(RETRIES)) if retries else made


def arrivals(made: Scenario, seed: int) -> list[float]:
    """The moments when a simulation of this seed sends its requests."""
    return [arrival.time for arrival in made.arrivals(random.Random(f"{seed} arrivals"))]


def simulated(made: Scenario, seed: int) -> Record:
    """What the scheduler does with the same arrivals when nothing else takes any time."""
    return Simulation(made, POLICIES[OURS](made), seed).run()


def attempts_of(record: Record) -> Attempts:
    """A simulation's attempts, as the generator writes down its own."""
    found = Attempts()
    for job in record.jobs:
        found.add(Attempt(job.call, job.attempt, job.enqueued, job.enqueued, job.answered, _kind(job), 0))
    return found


def _kind(job: Job) -> str:
    if job.outcome == "refused":
        return job.reason
    # The server answers at the deadline, whatever still runs.
    return EXPIRED if job.outcome == "late" else ANSWERED


def mean_batch(record: Record, window: Interval) -> float:
    """Rows of the runs that started in a window."""
    rows = [run.rows for run in record.runs if window[0] <= run.started < window[1]]
    return statistics.mean(rows) if rows else 0.0


# --- a device that slows down


@dataclass(frozen=True, slots=True)
class SlowDown:
    """What became of the requests when the device slowed down and recovered. Seconds count from those moments."""

    before: Figures
    first_batches: Figures  # due while the first 20 slow batches ran
    settled: Figures  # due after them, while the device is slow
    after: Figures
    settled_after: float  # seconds of the first 20 slow batches
    batches: int  # while the device was slow
    recovered_after: float  # seconds until goodput was back


SETTLING = 20
_BIN = 0.25
_BACK = 0.9  # of the goodput before


def slow_down(
    attempts: Attempts,
    slow: Interval,
    window: Interval,
    batches: Sequence[float],
    deadline: float = PUBLISHED.deadline,
) -> SlowDown:
    """Judge it by the requests due in a window; `batches` are the moments when batches ended."""
    ended = sorted(moment for moment in batches if slow[0] <= moment < slow[1])
    settled = ended[SETTLING - 1] if len(ended) >= SETTLING else slow[1]
    # A request that was due before the device recovered may have been answered by the recovered device.
    before = figures(attempts, (window[0], slow[0] - deadline), deadline)
    back, end = slow[1], window[1]
    while back < end:
        part = figures(attempts, (back, min(back + _BIN, end)), deadline)
        if part.goodput >= _BACK * before.goodput:
            break
        back += _BIN
    return SlowDown(
        before,
        figures(attempts, (slow[0] - deadline, settled), deadline),
        figures(attempts, (settled, slow[1]), deadline),
        figures(attempts, (slow[1], end), deadline),
        settled - slow[0],
        len(ended),
        back - slow[1],
    )
