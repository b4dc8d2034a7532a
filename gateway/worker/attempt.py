"""One run of an engine: jobs become a batch, and what is answered to each finds its way back to its job.

An engine answers with rows for the whole batch, or request by request, several times where the model is decoupled; then
an error may be one request's alone. Whatever happens, no job whose run has ended well is left without a last answer. Who is
to be tried again when a run raises, and how, is not decided here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing

import msgspec

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.engines.base import Engine, Results, identity
from gateway.queues.base import Job
from gateway.scheduling import batch as batching
from gateway.statistics import VersionStatistics
from gateway.telemetry import log_event
from gateway.types import NO_PARAMETERS, Answer, Batch, BatchResult, InferRequest, InferResponse, Parameter, Timings
from gateway.worker.probe import Probe


def _nothing(*_: object) -> None:
    """What those are told who need not know."""


_ASKED = "engine"  # the request parameter, a boolean; the response has what `identity` says


class Part(msgspec.Struct, eq=False):
    """Jobs that run together, and how; see `Batch` for what is not said here."""

    jobs: list[Job]
    crashes: int = 0  # of the engine, that all of them were in
    reason: str = "retry"
    cores: int = 1
    predicted: float | None = None
    hurry: bool = False
    waits: Callable[[], None] = _nothing
    computed: Callable[[float], None] = _nothing  # told how many seconds the engine was at work, when it is free again
    # While it runs:
    began_ns: int = 0
    begun: set[int] = set()  # places of those that were given an answer, and not their last


class Runner:
    """Runs batches on one engine."""

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        version: str,
        statistics: VersionStatistics,
        digest: str,
        *,
        run: Callable[[Batch], Results] | None = None,
    ) -> None:
        """`run` does what the engine's does, where more is to be done than that."""
        self._engine = engine
        self._run = run
        self._config = config
        self._version = version
        self._statistics = statistics
        self._digest = digest

    async def run(self, part: Part) -> None:
        """Run the part's jobs as one batch and answer them. Raises whatever the engine does."""
        part.began_ns = time.monotonic_ns()
        jobs = part.jobs
        requests = [job.request for job in jobs]
        batch = Batch(
            sum([request.rows for request in requests]),
            lambda: batching.stack(requests, self._config),
            batching.wanted_outputs(requests),
            part.cores,
            part.hurry,
            () if isinstance(jobs[0], Probe) else requests,
            part.waits,
            part.predicted,
            lambda place: not jobs[place].done,
            lambda: batching.gather(requests, self._config),
        )
        first: BatchResult | None = None  # of those that came request by request, and the last
        last: BatchResult | None = None
        unended = len(jobs)
        self._statistics.executing += len(jobs)
        try:
            async with aclosing((self._run or self._engine.run)(batch)) as results:
                async for result in results:
                    if result.answers is None:
                        self._answer_all(part, requests, batch.rows, result)
                    else:
                        first, last = first or result, result
                        self._answer_each(part, result.answers, batch.rows, result)
                        unended -= sum([answer.final or answer.error is not None for answer in result.answers])
                        if unended and all([job.done for job in jobs]):  # noqa: C419 - a list takes half of the time
                            break  # who has not had the last of its answers does not want it
        finally:
            self._statistics.executing -= len(jobs)
        if first is not None and last is not None:
            self._note(part, batch.rows, first, last)
        if not all([job.done for job in jobs]):  # noqa: C419 - a list takes half of the time
            self._end_silent(part)

    def _answer_all(self, part: Part, requests: list[InferRequest], rows: int, result: BatchResult) -> None:
        answers = batching.split(result.outputs, requests, self._config)
        stacked, ran, split = self._note(part, rows, result, result)
        said = result.parameters or NO_PARAMETERS
        # What was given to the engine ahead still waited there.
        began = max(part.began_ns, result.started_ns)
        version, digest = self._version, self._digest_of(said)
        for job, request, outputs in zip(part.jobs, requests, answers, strict=True):
            timings = Timings(max(began - int(job.enqueued * 1e9), 0), stacked, ran, split, rows)
            parameters = self._told(request, said) if request.parameters else said
            job.reply(
                InferResponse(request.model_name, version, outputs, request.id, parameters, timings, digest=digest)
            )

    def _answer_each(self, part: Part, answers: Sequence[Answer], rows: int, result: BatchResult) -> None:
        spent = _spent(result, result)
        for answer in answers:
            job = part.jobs[answer.request]
            request = job.request
            if answer.error is not None:
                job.fail(answer.error)
                continue
            try:
                outputs = {} if answer.outputs is None else batching.pick(answer.outputs, request, self._config)
            except errors.GatewayError as error:  # this answer is not as the model's configuration says
                job.fail(error)
                continue
            if not answer.final:
                part.begun.add(answer.request)
            timings = Timings(max(part.began_ns - int(job.enqueued * 1e9), 0), *spent, rows)
            said = {**(result.parameters or {}), **(answer.parameters or {})} or NO_PARAMETERS
            parameters = self._told(request, said)
            job.reply(
                InferResponse(
                    request.model_name, self._version, outputs, request.id, parameters, timings, answer.final,
                    self._digest_of(parameters),
                )
            )  # fmt: skip

    def _digest_of(self, parameters: Mapping[str, Parameter]) -> str:
        """What answers with these are answers of; those of another link than the first are not to be kept."""
        return "" if "fallback" in parameters else self._digest

    def _told(self, request: InferRequest, said: Mapping[str, Parameter]) -> Mapping[str, Parameter]:
        """The response's parameters: what the engine said and, where the request asks for it, which engine that is."""
        return {**identity(self._engine), **said} if request.parameters.get(_ASKED) is True else said

    def _end_silent(self, part: Part) -> None:
        for place, job in enumerate(part.jobs):
            if not job.done:
                what = "stopped in the middle of its answers" if place in part.begun else "ran and gave no answer"
                job.fail(errors.Internal(f"model '{self._config.name}' {what}"))

    def _note(self, part: Part, rows: int, first: BatchResult, last: BatchResult) -> tuple[int, int, int]:
        """Count a run that gave these, first and last; returns its nanoseconds of stacking, running, and since."""
        spent = _spent(first, last)
        if not isinstance(part.jobs[0], Probe):
            self._statistics.record_batch(rows, *spent, part.reason)
        log_event(
            "batch", logging.DEBUG, model=self._config.name, version=self._version, requests=len(part.jobs),
            rows=rows, cores=part.cores, reason=part.reason, compute_us=sum(spent) // 1000,
        )  # fmt: skip
        part.computed((last.finished_ns - first.started_ns) / 1e9)
        return spent


def _spent(first: BatchResult, last: BatchResult) -> tuple[int, int, int]:
    return (
        first.stacked_ns - first.started_ns,
        last.finished_ns - first.stacked_ns,
        time.monotonic_ns() - last.finished_ns,
    )
