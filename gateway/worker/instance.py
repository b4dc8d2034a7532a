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
from gateway.types import Batch, InferRequest, InferResponse, Tensor, Timings
from gateway.worker.slots import Assignment, Seat

_log = logging.getLogger("gateway.worker")


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
            assignment = await seat.next()
            try:
                await self._run(assignment)
            finally:
                seat.release(assignment)

    async def _run(self, assignment: Assignment) -> None:
        jobs = [job for job in assignment.jobs if not job.done]
        if not jobs:
            return
        try:
            await self._attempt(jobs, assignment)
        except asyncio.CancelledError:
            for job in jobs:  # a forced stop: the engine is let go, the callers are told
                job.fail(errors.Unavailable("Server not ready"))
            raise
        except Exception as problem:  # noqa: BLE001 - an engine may raise anything, and every job must be answered
            if len(jobs) == 1:
                jobs[0].fail(self._explain(problem))
                return
            _log.warning(
                "model '%s' failed a batch of %d requests, running them one by one: %s",
                self._config.name, len(jobs), problem,
            )
            for job in jobs:
                await self._run(Assignment([job], job.request.rows, "retry", assignment.cores))

    async def _attempt(self, jobs: list[Job], assignment: Assignment) -> None:
        begun = time.monotonic_ns()
        requests = [job.request for job in jobs]
        rows = sum(request.rows for request in requests)
        batch = Batch(
            rows=rows,
            stack=lambda: batching.stack(requests, self._config),
            outputs=batching.wanted_outputs(requests),
            cores=assignment.cores,
        )
        async with aclosing(self._engine.run(batch)) as results:
            async for result in results:
                answers = batching.split(result.outputs, requests, self._config)
                spent = (
                    result.stacked_ns - result.started_ns,
                    result.finished_ns - result.stacked_ns,
                    time.monotonic_ns() - result.finished_ns,
                )
                self._statistics.record_batch(rows, *spent, assignment.reason)
                for job, outputs in zip(jobs, answers, strict=True):
                    queued = max(begun - int(job.enqueued * 1e9), 0)
                    job.reply(self._response(job.request, outputs, Timings(queued, *spent, rows)))

    def _response(self, request: InferRequest, outputs: dict[str, Tensor], timings: Timings) -> InferResponse:
        return InferResponse(request.model_name, self._version, outputs, id=request.id, timings=timings)

    def _explain(self, problem: Exception) -> errors.GatewayError:
        if isinstance(problem, errors.GatewayError):
            return problem
        _log.error("model '%s' version %s failed a request", self._config.name, self._version, exc_info=problem)
        return errors.Internal(
            f"model '{self._config.name}' failed to run this request ({type(problem).__name__}); "
            "the server's log has the details"
        )

