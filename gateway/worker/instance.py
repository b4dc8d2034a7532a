"""One instance's life while it serves: take a slot and a batch, run it, answer every job, again.

A run that fails is run again in parts before the next batch is taken, so that a poison request fails alone, and one that
crashes the engine is put into quarantine. Where the engine itself is not there, other instances of the version do its
work until it is back. Nothing an engine does ends the loop; the batch-mates of a cancelled or expired request never
notice it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from functools import partial

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.engines.base import Engine
from gateway.queues.base import Job
from gateway.scheduling.base import Run
from gateway.statistics import VersionStatistics
from gateway.telemetry import log_event
from gateway.worker.attempt import Part, Runner
from gateway.worker.probe import Probe
from gateway.worker.quarantine import SECONDS
from gateway.worker.retry import is_machines, isolate
from gateway.worker.siblings import Siblings
from gateway.worker.slots import Seat

_WORTH_A_PAUSE = 0.002  # seconds; what a run may lose by waiting for the event loop is up to 5 ms
_LONG = 0.02  # seconds; between two runs of an instance that are not laid out ahead 3 ms pass on two busy cores
_AHEAD = 0.1  # the part of a run that is left when its successor is decided: predictions are as far off as that,
_MOST_AHEAD = 0.01  # or so many seconds
_AWAY = 1.0  # seconds until an engine that is not there is asked again, if it does not say


class Instance:
    """Runs the batches of one engine. One `serve` per run the engine may have open."""

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        version: str,
        statistics: VersionStatistics,
        digest: str = "",
        *,
        siblings: Siblings[Instance] | None = None,
    ) -> None:
        """`digest` tells what the version computes; see `VersionState`."""
        self._config = config
        self._version = version
        self._runner = Runner(engine, config, version, statistics, digest)
        self.engine = engine
        self._siblings = siblings or Siblings()
        self._siblings.join(self)
        self._quarantine = self._siblings.quarantine
        self._away = 0.0  # seconds to stay away, leaving the work to others

    async def serve(self, seat: Seat) -> None:
        """Run batches until cancelled. A batch that has begun is finished first."""
        async with asyncio.TaskGroup() as hands:
            hands.create_task(self._serve(seat, hands))

    async def _serve(self, seat: Seat, hands: asyncio.TaskGroup, before: Run[Job] | None = None) -> None:
        """Until relieved by another hand, which sees to the next batch while the last one of this is about to end.

        `before` is the run that this hand's first one waits for.
        """
        relieved = False
        hand = asyncio.current_task()
        assert hand is not None

        def relieve() -> None:
            nonlocal relieved
            # While the engine lets go of the run of a hand that is being stopped, there are no more hands.
            goes_on = not hand.cancelling()
            # One that has not begun itself, because the last took longer than expected, is no time to lay out a third.
            relieved = goes_on and (before is None or before.ended < math.inf) and seat.relieve(run)
            if relieved:
                hands.create_task(self._serve(seat, hands, run))

        while not relieved:
            if self._away:
                await asyncio.sleep(self._away)
                self._away = 0.0
                self._siblings.enter(self)
            run = await seat.next()
            alarm = self._before_the_end(run, relieve)
            failed = False
            try:
                failed = not await self._run(run, seat, hurry=before is None and not seat.waited)
            except asyncio.CancelledError:
                for job in run.jobs:  # a forced stop: the engine is let go, the callers are told
                    job.fail(errors.stopping())
                raise
            finally:
                if alarm is not None:
                    alarm.cancel()
                seat.release(run, learn=False, failed=failed)
            before = None

    def _before_the_end(self, run: Run[Job], relieve: Callable[[], None]) -> asyncio.TimerHandle | None:
        """Call this when the next batch is to be laid out, if this one runs for so long that it matters."""
        if run.predicted is None or run.predicted < _LONG or not self.engine.ahead:
            return None
        left = run.started + run.predicted - min(_AHEAD * run.predicted, _MOST_AHEAD) - time.monotonic()
        return asyncio.get_running_loop().call_later(max(left, 0.0), relieve)

    async def _run(self, run: Run[Job], seat: Seat, *, hurry: bool) -> bool:
        """Answer every job of a run, and release it as soon as it has been computed. False when the batch failed."""
        jobs = self._wanted(run.jobs)
        if not jobs:
            return True
        part = Part(
            jobs,
            reason=run.reason,
            cores=run.cores,
            predicted=run.predicted,
            # With answers still to be written the event loop would keep the interpreter's lock for milliseconds.
            hurry=hurry and (run.predicted or 0.0) > _WORTH_A_PAUSE,
            waits=partial(seat.lend, run),
            computed=partial(self._computed, run, seat, len(jobs) == len(run.jobs)),
        )
        try:
            await self._runner.run(part)
        except Exception as problem:  # noqa: BLE001 - an engine may raise anything, and every job must be answered
            self._look(problem)
            if len(jobs) > 1 and not is_machines(problem):
                log_event(
                    "batch_failed", logging.WARNING, model=self._config.name, version=self._version,
                    requests=len(jobs), reason=str(problem), action="running it in parts",
                )  # fmt: skip
            await isolate(part, problem, partial(self._again, part), self._end)
            return False
        return True

    def _wanted(self, jobs: list[Job]) -> list[Job]:
        """The jobs to run. Who is in quarantine is told so."""
        if self._quarantine:
            for job in jobs:
                left = None if job.done else self._quarantine.left(job.request)
                if left is not None:
                    job.fail(errors.quarantined(self._config.name, left))
        return [job for job in jobs if not job.done]

    def _computed(self, run: Run[Job], seat: Seat, whole: bool, seconds: float) -> None:
        probe = run.jobs[0]
        if not isinstance(probe, Probe):
            seat.release(run, learn=whole, seconds=seconds)
            return
        seat.release(run, learn=False, seconds=seconds)  # who measures says what is to be learned from it
        probe.ran(run)

    async def _again(self, whole: Part, part: Part) -> Exception | None:
        part.cores, part.predicted = whole.cores, whole.predicted
        part.jobs = self._wanted(part.jobs)  # of two that crash the engine alike, one is enough
        if not part.jobs:
            return None
        try:
            await self._runner.run(part)
        except Exception as problem:  # noqa: BLE001 - an engine may raise anything; some of these jobs are to blame
            self._look(problem)
            return problem
        return None

    def _look(self, problem: Exception) -> None:
        """When the engine is not there, leave the work to those whose engines are, if there are any."""
        if isinstance(problem, errors.Unavailable) and self._siblings.leave(self):
            self._away = problem.retry_after or _AWAY
            log_event(
                "instance_away", logging.WARNING, model=self._config.name, version=self._version,
                seconds=round(self._away, 3), reason=problem.message,
            )  # fmt: skip

    def _end(self, job: Job, problem: Exception, *, blamed: bool = False, begun: bool = False) -> None:
        """Answer a job that is not run again here."""
        if blamed:
            digest = self._quarantine.add(job.request)
            log_event(
                "request_quarantined", logging.ERROR, model=self._config.name, version=self._version,
                digest=digest, seconds=SECONDS, reason=str(problem),
            )  # fmt: skip
            job.fail(errors.crashed(self._config.name, SECONDS))
        elif self._away and isinstance(problem, errors.Unavailable) and not begun and not isinstance(job, Probe):
            job.release()  # to a sibling
        elif not job.done:
            job.fail(self._explain(problem))

    def _explain(self, problem: Exception) -> errors.GatewayError:
        if isinstance(problem, errors.GatewayError):
            return problem
        log_event("request_failed", logging.ERROR, problem, model=self._config.name, version=self._version)
        return errors.Internal(
            f"model '{self._config.name}' failed to run this request ({type(problem).__name__}); "
            "the server's log has the details"
        )
