"""The jobs of one model version that were taken from the queue and are not running yet.

All instances of the version choose their batches here. The stage knows no device and no engine; it applies
the policy and keeps count.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable

from gateway.config.model import ModelConfig
from gateway.queues.base import Job
from gateway.scheduling.policy import Decision, Limits, on_free

_SWEEP = 1024  # staged jobs, below which cancelled ones among them are not worth looking for
_NEWS = 0.2  # weight of the newest measurement
_PATIENCE = 10.0  # seconds; ranks a request without a deadline, so that those with one never starve it


class Stage:
    """Staged jobs, oldest first, and the rows that are staged and running."""

    def __init__(self, config: ModelConfig, instances: int, long_run: float = math.inf) -> None:
        """A run of `long_run` seconds gains nothing from more rows."""
        batching = config.batching
        preferred = batching.preferred_batch_sizes if batching else ()
        self._limits = Limits(
            max_rows=max(config.max_batch_size, 1),
            joins=batching is not None and config.max_batch_size > 1,
            delay=batching.max_queue_delay_us / 1e6 if batching else 0.0,
            # Triton's default, the largest batch, asks for nothing: a batch grows to that size anyway.
            preferred=() if preferred == (config.max_batch_size,) else preferred,
        )
        self._instances = instances
        self._long_run = long_run
        self._row_seconds = 0.0
        self._jobs: deque[Job] = deque()
        self._staged_rows = 0
        self._running_rows = 0
        self._sweep_at = _SWEEP
        self._quiet = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    def extend(self, jobs: Iterable[Job]) -> None:
        """Add jobs at the end of the line."""
        for job in jobs:
            self._jobs.append(job)
            self._staged_rows += job.request.rows
        if len(self._jobs) >= self._sweep_at:
            self._sweep()

    def urgency(self) -> float | None:
        """What lanes on one device are ordered by, least first: the head's deadline. None if empty."""
        while self._jobs and self._jobs[0].done:
            self._staged_rows -= self._jobs.popleft().request.rows
        if not self._jobs:
            self._note_quiet()
            return None
        head = self._jobs[0]
        deadline = head.request.deadline
        return head.enqueued + _PATIENCE if deadline is None else deadline

    def choose(self, now: float) -> Decision[Job]:
        """Take out the batch that a free instance should run now, or learn when to ask again."""
        share = math.ceil((self._staged_rows + self._running_rows) / self._instances)
        if self._row_seconds and share * self._row_seconds > self._long_run:
            share = math.ceil(self._long_run / self._row_seconds)
        decision = on_free(self._jobs, self._limits, share, now)
        if decision.jobs:
            self._remove(decision.jobs)
            self._running_rows += decision.rows
        return decision

    def finished(self, rows: int, seconds: float) -> None:
        """A batch of this many rows no longer runs; it took so long."""
        self._running_rows -= rows
        row_seconds = seconds / rows
        self._row_seconds += (row_seconds - self._row_seconds) * (_NEWS if self._row_seconds else 1.0)
        self._note_quiet()

    async def settled(self) -> None:
        """Wait until nothing is staged or running."""
        while self.urgency() is not None or self._running_rows:
            self._quiet.clear()
            await self._quiet.wait()

    def release(self) -> None:
        """Hand every staged job back to the queue."""
        while self._jobs:
            self._jobs.pop().release()
        self._staged_rows = 0

    def _note_quiet(self) -> None:
        if not self._jobs and not self._running_rows:
            self._quiet.set()

    def _sweep(self) -> None:
        # While a run hangs, requests go on expiring; what they hold must not pile up behind it.
        self._jobs = deque(job for job in self._jobs if not job.done)
        self._staged_rows = sum(job.request.rows for job in self._jobs)
        self._sweep_at = max(_SWEEP, 2 * len(self._jobs))

    def _remove(self, chosen: list[Job]) -> None:
        left = {id(job) for job in chosen}
        kept: list[Job] = []
        while left:
            job = self._jobs.popleft()
            if id(job) in left:
                left.remove(id(job))
                self._staged_rows -= job.request.rows
            elif job.done:
                self._staged_rows -= job.request.rows
            else:
                kept.append(job)
        self._jobs.extendleft(reversed(kept))
