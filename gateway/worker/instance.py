"""One instance's life while it serves: take a slot and a batch, run it, answer every job, again.

A run that fails is retried job by job, so that a poison request fails alone. Nothing an engine does ends
the loop; the batch-mates of a cancelled or expired request never notice it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from functools import partial

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.engines.base import Engine
from gateway.queues.base import Job
from gateway.scheduling import batch as batching
from gateway.scheduling.base import Run
from gateway.statistics import VersionStatistics
from gateway.telemetry import log_event
from gateway.types import NO_PARAMETERS, Batch, InferResponse, Timings
from gateway.worker.probe import Probe
from gateway.worker.slots import Seat

_WORTH_A_PAUSE = 0.002  # seconds; what a run may lose by waiting for the event loop is up to 5 ms


class Instance:
    """Runs the batches of one engine. One `serve` per run the engine may have open."""

    def __init__(
        self, engine: Engine, config: ModelConfig, version: str, statistics: VersionStatistics, digest: str = ""
    ) -> None:
        """`digest` tells what the version computes; see `VersionState`."""
        self._engine = engine
        self._digest = digest
        self._config = config
        self._version = version
        self._statistics = statistics

    async def serve(self, seat: Seat) -> None:
        """Run batches until cancelled. A batch that has begun is finished first."""
        while True:
            run = await seat.next()
            failed = False
            try:
                failed = not await self._run(run, seat)
            except asyncio.CancelledError:
                for job in run.jobs:  # a forced stop: the engine is let go, the callers are told
                    job.fail(errors.stopping())
                raise
            finally:
                seat.release(run, learn=False, failed=failed)

    async def _run(self, run: Run[Job], seat: Seat) -> bool:
        """Answer every job of a run, and release it as soon as it has been computed. False when the batch failed."""
        jobs = [job for job in run.jobs if not job.done]
        if not jobs:
            return True
        whole = len(jobs) == len(run.jobs)
        # With answers still to be written the event loop would keep the interpreter's lock for milliseconds.
        hurry = not seat.waited and (run.predicted or 0.0) > _WORTH_A_PAUSE
        try:
            await self._attempt(jobs, run.reason, run.cores, partial(self._computed, run, seat, whole), hurry=hurry)
        except Exception as problem:  # noqa: BLE001 - an engine may raise anything, and every job must be answered
            if len(jobs) == 1:
                jobs[0].fail(self._explain(problem))
                return False
            log_event(
                "batch_failed", logging.WARNING, model=self._config.name, version=self._version, requests=len(jobs),
                reason=str(problem), action="running them one by one",
            )  # fmt: skip
            for job in jobs:
                await self._retry(job, run.cores)
            return False
        return True

    def _computed(self, run: Run[Job], seat: Seat, whole: bool, seconds: float) -> None:
        probe = run.jobs[0]
        if isinstance(probe, Probe):
            probe.ran(run)  # who measures says what is to be learned from it
            whole = False
        seat.release(run, learn=whole, seconds=seconds)

    async def _retry(self, job: Job, cores: int) -> None:
        if job.done:
            return
        try:
            await self._attempt([job], "retry", cores)
        except Exception as problem:  # noqa: BLE001 - an engine may raise anything; this job alone fails
            job.fail(self._explain(problem))

    async def _attempt(
        self,
        jobs: list[Job],
        reason: str,
        cores: int,
        computed: Callable[[float], None] | None = None,
        *,
        hurry: bool = False,
    ) -> None:
        """Run the jobs as one batch and answer them.

        `computed` is told in between, when the engine is free again, how many seconds it was at work.
        """
        begun = time.monotonic_ns()
        requests = [job.request for job in jobs]
        rows = sum([request.rows for request in requests])
        batch = Batch(
            rows=rows,
            stack=lambda: batching.stack(requests, self._config),
            outputs=batching.wanted_outputs(requests),
            cores=cores,
            hurry=hurry,
        )
        self._statistics.executing += len(jobs)
        try:
            async with aclosing(self._engine.run(batch)) as results:
                async for result in results:
                    answers = batching.split(result.outputs, requests, self._config)
                    spent = (
                        result.stacked_ns - result.started_ns,
                        result.finished_ns - result.stacked_ns,
                        time.monotonic_ns() - result.finished_ns,
                    )
                    if not isinstance(jobs[0], Probe):
                        self._statistics.record_batch(rows, *spent, reason)
                    log_event(
                        "batch", logging.DEBUG, model=self._config.name, version=self._version, requests=len(jobs),
                        rows=rows, cores=cores, reason=reason, compute_us=sum(spent) // 1000,
                    )  # fmt: skip
                    if computed is not None:
                        computed((result.finished_ns - result.started_ns) / 1e9)
                    stacked, ran, split = spent
                    for job, request, outputs in zip(jobs, requests, answers, strict=True):
                        timings = Timings(max(begun - int(job.enqueued * 1e9), 0), stacked, ran, split, rows)
                        job.reply(
                            InferResponse(
                                request.model_name,
                                self._version,
                                outputs,
                                request.id,
                                NO_PARAMETERS,
                                timings,
                                digest=self._digest,
                            )
                        )
        finally:
            self._statistics.executing -= len(jobs)
        if not all(job.done for job in jobs):
            raise errors.Internal(f"model '{self._config.name}' ran and gave no answer")

    def _explain(self, problem: Exception) -> errors.GatewayError:
        if isinstance(problem, errors.GatewayError):
            return problem
        log_event("request_failed", logging.ERROR, problem, model=self._config.name, version=self._version)
        return errors.Internal(
            f"model '{self._config.name}' failed to run this request ({type(problem).__name__}); "
            "the server's log has the details"
        )
