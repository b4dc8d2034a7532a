"""Runs a batch that failed again in parts, until each of its requests is answered or has failed alone.

A failure that cost nothing but the run is followed by halves. One that cost the engine's process is dear, a hang most of all,
so the first is followed by parts of the square root of the batch, and the next by single requests: `p` requests that surely
crash the engine do so `2p + 1` times at most, which is never more than `p * (log2(B) + 1)` in a batch of `B > 1`, and where
halves would take 6 crashes in a batch of 32 it takes 3, at 2 more runs. The largest parts go first: after one more crash most
neighbours are answered.

Nobody is blamed for one crash, because a process may die of what was done to it before: a request that was by itself from
the start runs once more, and until it was in `UNSURE` crashes where they may have come from outside. What the machine is to
blame for ends all of it at once. This module knows neither engines nor clocks; jobs that nobody waits for any more are left
out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from gateway.engines.base import EngineCrashed
from gateway.errors import GatewayError
from gateway.queues.base import Job
from gateway.worker.attempt import Part

SURE, UNSURE = 2, 3  # crashes that one request is to blame for

Again = Callable[[Part], Awaitable[Exception | None]]
"""Runs a part, and returns why that failed."""


class End(Protocol):
    """Answers a job that is not run again."""

    def __call__(self, job: Job, problem: Exception, *, blamed: bool = False, begun: bool = False) -> None:
        """`problem` is why. With `blamed` it crashed the engine by itself; `begun`, it has been given an answer before."""


async def isolate(part: Part, problem: Exception, again: Again, end: End) -> None:
    """Run what failed with `problem` in parts, until every job of it has its answer."""
    waiting: deque[Part] = deque()
    failed: Exception | None = problem
    while True:
        if failed is not None and is_machines(failed):
            for each in (part, *waiting):
                _end_all(each, failed, end)
            return
        if failed is not None:
            waiting.extend(_parts(part, failed, end))
        if not waiting:
            return
        part = waiting.popleft()
        part.jobs = [job for job in part.jobs if not job.done]
        failed = await again(part) if part.jobs else None


def is_machines(problem: Exception) -> bool:
    """Whether no request is to blame: the engine is not there now, or has too much to do."""
    return isinstance(problem, GatewayError) and problem.retryable


def _parts(part: Part, problem: Exception, end: End) -> list[Part]:
    """What to run again of a part that failed; who is not in it is ended."""
    crashed = isinstance(problem, EngineCrashed)
    crashes = part.crashes + crashed
    if len(part.jobs) > 1:
        for place in part.begun:
            end(part.jobs[place], problem, begun=True)  # its answers would come twice
        left = [job for job in part.jobs if not job.done]
        size = max(_size(len(left), problem, crashes), 1)
        return [Part(left[at : at + size], crashes) for at in range(0, len(left), size)]
    (job,) = part.jobs
    final = job.done or bool(part.begun)  # it is not run again
    blamed = isinstance(problem, EngineCrashed) and _is_blamed(problem, crashes, final=final)
    if crashed and not blamed and not final:
        return [Part([job], crashes)]
    # Though nobody may wait for it any more: who asks again must not crash the engine again.
    end(job, problem, blamed=blamed, begun=bool(part.begun))
    return []


def _size(jobs: int, problem: Exception, crashes: int) -> int:
    """How many of the jobs of a part that failed are run together next, at most."""
    if not (isinstance(problem, EngineCrashed) and problem.sure):
        return (jobs + 1) // 2
    return math.isqrt(jobs) if crashes == 1 else 1


def _is_blamed(crash: EngineCrashed, crashes: int, *, final: bool) -> bool:
    return crashes >= (SURE if crash.sure else UNSURE) or (crash.sure and final)


def _end_all(part: Part, problem: Exception, end: End) -> None:
    for place, job in enumerate(part.jobs):
        end(job, problem, begun=place in part.begun)
