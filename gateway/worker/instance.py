"""One instance's life while it serves: take a slot and a batch, run it, answer every job, again.

A run that fails is retried job by job, so that a poison request fails alone. Nothing an engine does ends
the loop; the batch-mates of a cancelled or expired request never notice it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.engines.base import Engine
from gateway.queues.base import Job
from gateway.scheduling import batch as batching
from gateway.statistics import VersionStatistics
from gateway.telemetry import log_event
from gateway.types import NO_PARAMETERS, Batch, InferResponse, Timings
from gateway.worker.probe import Probe
from gateway.worker.slots import Seat


class Instance:
    """Runs the batches of one engine. One `serve` per run the engine may have open."""

    def __init__(self, engine: Engine, config: ModelConfig, version: str, statistics: VersionStatistics) -> None:
        self._engine = engine
        self._config = config
        self._version = version
        self._statistics = statistics

    async def serve(self, seat: Seat) -> None:
        """Run batches until cancelled. A batch that has begun is finished first."""
        while True:
            run = await seat.next()
            whole = False
            try:
                whole = await self._run(run.jobs, run.reason, run.cores)
            except asyncio.CancelledError:
                for job in run.jobs:  # a forced stop: the engine is let go, the callers are told
                    job.fail(errors.stopping())
                raise
            finally:
                seat.release(run, learn=whole)

    async def _run(self, taken: list[Job], reason: str, cores: int) -> bool:
        """Answer every job. True when all that was taken ran as one batch and well."""
        jobs = [job for job in taken if not job.done]
        if not jobs:
            return False
        try:
            await self._attempt(jobs, reason, cores)
        except Exception as problem:  # noqa: BLE001 - an engine may raise anything, and every job must be answered
            if len(jobs) == 1:
                jobs[0].fail(self._explain(problem))
                return False
            log_event(
                "batch_failed", logging.WARNING, model=self._config.name, version=self._version, requests=len(jobs),
                reason=str(problem), action="running them one by one",
            )  # fmt: skip
            for job in jobs:
                await self._run([job], "retry", cores)
            return False
        return len(jobs) == len(taken)

    async def _attempt(self, jobs: list[Job], reason: str, cores: int) -> None:
        begun = time.monotonic_ns()
        requests = [job.request for job in jobs]
        rows = sum([request.rows for request in requests])
        batch = Batch(
            rows=rows,
            stack=lambda: batching.stack(requests, self._config),
            outputs=batching.wanted_outputs(requests),
            cores=cores,
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
                    stacked, ran, split = spent
                    for job, request, outputs in zip(jobs, requests, answers, strict=True):
                        timings = Timings(max(begun - int(job.enqueued * 1e9), 0), stacked, ran, split, rows)
                        job.reply(
                            InferResponse(
                                request.model_name, self._version, outputs, request.id, NO_PARAMETERS, timings
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
