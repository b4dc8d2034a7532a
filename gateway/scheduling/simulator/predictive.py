"""Baselines that predict: BentoML's adaptive batching, and Clockwork with a perfect static profile.

Sources: `CorkDispatcher` and `Optimizer` in bentoml/_internal/marshal/dispatcher.py (1.0); Gujarati et al., "Serving
DNNs like Clockwork: Performance Predictability from the Bottom Up", OSDI 2020, sections 4 and 5.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gateway.scheduling.base import Dispatch, LaneKey, Refusal, Request, Run, W
from gateway.scheduling.simulator.fifo import Greedy, Line

_KEPT = 50  # runs in BentoML's regression
_TICK = 0.001  # seconds between two looks of its controller
_DECAY = 0.95

Profile = Callable[[LaneKey, str, int], float]


@dataclass(slots=True)
class _Regression:
    """Seconds of a batch, `per_row * rows + base`, by least squares over the last runs; and the usual wait."""

    per_row: float
    base: float
    wait: float = 0.01
    runs: deque[tuple[int, float, float]] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def learn(self, rows: int, seconds: float, wait: float) -> None:
        self.runs.append((rows, seconds, wait))
        count = len(self.runs)
        mean_rows = sum(run[0] for run in self.runs) / count
        mean_seconds = sum(run[1] for run in self.runs) / count
        self.wait = sum(run[2] for run in self.runs) / count
        spread = sum((run[0] - mean_rows) ** 2 for run in self.runs)
        if spread > 0:
            slope = sum((run[0] - mean_rows) * (run[1] - mean_seconds) for run in self.runs) / spread
            self.per_row = max(1e-6, slope)
            self.base = max(0.0, mean_seconds - self.per_row * mean_rows)


class Bento(Greedy[W]):
    """BentoML's batcher: drops the head once the whole line as one batch would end past the head's deadline, and holds
    a batch that is not full back while that pays by the usual wait.

    It is told the `deadline` that all requests have. It refits after every run instead of every five seconds, which
    suits it better in a short simulation.
    """

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline
        self._fits: dict[LaneKey, _Regression] = {}

    def refusal(self, lane: LaneKey, line: Line[W], now: float) -> Refusal | None:
        """Refuses the head of more than one when its predicted latency is too long."""
        fit, count = self._fit(lane), len(line.waiting)
        predicted = now - line.waiting[0].enqueued + fit.per_row * count + fit.base
        if count > 1 and predicted >= self._deadline:
            return Refusal("shed", "the batch would end too late")
        return None

    def patience(self, lane: LaneKey, line: Line[W]) -> float:
        """Until the sum of waits that one more would cause is the usual one."""
        fit = self._fit(lane)
        return line.waiting[-1].enqueued + fit.wait * _DECAY / len(line.waiting) - _TICK - fit.per_row

    def learn(self, run: Run[W], seconds: float) -> None:
        """Refit."""
        self._fit(run.lane).learn(run.rows, seconds, run.started - run.jobs[-1].enqueued)

    def _fit(self, lane: LaneKey) -> _Regression:
        return self._fits.setdefault(lane, _Regression(self._deadline * 2 / 30, self._deadline / 30))


class Clockwork(Greedy[W]):
    """Earliest deadline first with admission by a profile that is exactly right for a healthy device.

    A request is accepted when all that waits, then it, would end in time; a batch is the largest that ends by its
    head's deadline; a head that can no longer make it is dropped. The profile never changes, whatever runs take.
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self._profile = profile
        self._free_at: dict[str, float] = {}
        self._rows: dict[LaneKey, int] = {}

    def admit(self, lane: LaneKey, request: Request, now: float) -> Refusal | None:
        """Accepts what is predicted to end in time."""
        if request.deadline is None:
            return None
        places = self._lines[lane].places
        idle = min((max(0.0, self._free_at.get(device, now) - now) for device in places), default=0.0)
        work = sum(self._work(other, rows) for other, rows in self._rows.items() if other != lane)
        work += self._work(lane, self._rows.get(lane, 0) + request.rows)
        end = now + idle + work / max(1, len(places))
        if end > request.deadline:
            return Refusal("overload", "would be answered too late", retry_after=end - request.deadline)
        return None

    def add(self, lane: LaneKey, job: W, now: float) -> None:
        """A job waits, in order of deadlines."""
        del now
        self._rows[lane] = self._rows.get(lane, 0) + job.request.rows
        bisect.insort(self._lines[lane].waiting, job, key=self.urgency)

    def dispatch(self, device: str, now: float) -> Dispatch[W]:
        """As the others, and notes until when the device is busy."""
        answer = super().dispatch(device, now)
        if answer.run is not None:
            self._free_at[device] = now + self._profile(answer.run.lane, device, answer.run.rows)
        if answer.run is not None or answer.refused:
            self._rows = {
                lane: sum(job.request.rows for job in line.waiting if not job.done)
                for lane, line in self._lines.items()
            }
        return answer

    def refusal(self, lane: LaneKey, line: Line[W], now: float) -> Refusal | None:
        """Refuses a head that would be late even alone."""
        request = line.waiting[0].request
        if request.deadline is not None and now + self._least(lane, request.rows) > request.deadline:
            return Refusal("expired", "the deadline can no longer be met")
        return None

    def most_rows(self, lane: LaneKey, line: Line[W], device: str, now: float) -> int:
        """The largest batch that ends by the head's deadline."""
        deadline = line.waiting[0].request.deadline
        sizes: Sequence[int] = range(1, line.limits.max_rows + 1)
        if deadline is None:
            return len(sizes)
        return max(1, bisect.bisect_right(sizes, deadline - now, key=lambda rows: self._profile(lane, device, rows)))

    def _least(self, lane: LaneKey, rows: int) -> float:
        return min((self._profile(lane, device, rows) for device in self._lines[lane].places), default=0.0)

    def _work(self, lane: LaneKey, rows: int) -> float:
        most = self._lines[lane].limits.max_rows
        full, rest = divmod(rows, most)
        return full * self._least(lane, most) + (self._least(lane, rest) if rest else 0.0)
