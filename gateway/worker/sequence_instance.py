"""One instance of a model of sequences while it serves.

A batch that fails is run again in parts if all that a sequence carries on is in our hands, so that a poison request ends its
own sequence only. A model that may keep something itself is asked once: what it kept of a failed run nobody knows, so the
sequences of that batch end; all of its sequences do when its process was lost.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.engines.base import Engine, EngineCrashed
from gateway.queues.base import Job
from gateway.scheduling.base import Run
from gateway.scheduling.sequences import Placed
from gateway.statistics import VersionStatistics
from gateway.telemetry import log_event
from gateway.worker.attempt import Part, Runner
from gateway.worker.retry import isolate
from gateway.worker.sequence_line import SequenceLine
from gateway.worker.sequence_rows import Rows
from gateway.worker.slots import Seat


class SequenceInstance:
    """Runs the batches of one engine, one at a time."""

    def __init__(
        self, engine: Engine, config: ModelConfig, version: str, statistics: VersionStatistics, rows: Rows
    ) -> None:
        assert config.sequences is not None
        self._config = config
        self._version = version
        self._rows = rows
        self._carries = bool(config.sequences.states)  # and so has nothing of its own
        self._runner = Runner(engine, config, version, statistics, "", run=rows.run)

    async def serve(self, index: int, line: SequenceLine, seat: Seat) -> None:
        """Run this instance's batches until cancelled. A batch that has begun is finished first."""
        while True:
            run = await seat.next()
            batch = line.take(index)
            went_well: set[int] = set()
            forgot = False
            try:
                if batch:
                    forgot = await self._run(run, batch, seat, went_well)
            except asyncio.CancelledError:
                for placed in batch:
                    placed.item.job.fail(errors.stopping())
                raise
            finally:
                seat.release(run, learn=False)
                failed = [placed.sequence for placed in batch if id(placed.item.job) not in went_well]
                line.finished(index, failed, forgot=forgot)

    async def _run(self, run: Run[Job], batch: list[Placed[Job]], seat: Seat, went_well: set[int]) -> bool:
        """Answer every request of a batch, and note whose went well. Whether the engine has lost its memory."""
        jobs = [placed.item.job for placed in batch]
        self._rows.place(batch)
        part = Part(
            jobs,
            reason=run.reason,
            cores=run.cores,
            waits=partial(seat.lend, run),
            computed=lambda seconds: seat.release(run, learn=False, seconds=seconds),
        )
        problem = await self._attempt(went_well, part)
        if problem is None:
            return False
        crashed = isinstance(problem, EngineCrashed)
        log_event(
            "batch_failed", logging.WARNING, model=self._config.name, version=self._version, requests=len(jobs),
            reason=str(problem), action="running it in parts" if self._carries and not crashed else "ending its sequences",
        )  # fmt: skip
        if self._carries and not crashed:
            await isolate(part, problem, partial(self._attempt, went_well), self._end)
        else:
            for job in jobs:
                self._end(job, problem)
        return crashed and not self._carries

    async def _attempt(self, went_well: set[int], part: Part) -> Exception | None:
        try:
            await self._runner.run(part)
        except Exception as problem:  # noqa: BLE001 - an engine may raise anything, and every job must be answered
            return problem
        self._rows.commit()
        went_well.update(id(job) for job in part.jobs)
        return None

    def _end(self, job: Job, problem: Exception, *, blamed: bool = False, begun: bool = False) -> None:  # noqa: ARG002 - see `End`
        if job.done:
            return
        if isinstance(problem, errors.GatewayError):
            job.fail(problem)
            return
        log_event("request_failed", logging.ERROR, problem, model=self._config.name, version=self._version)
        job.fail(
            errors.Internal(
                f"model '{self._config.name}' failed to run this request ({type(problem).__name__}), which ended its "
                "sequence; the server's log has the details"
            )
        )
