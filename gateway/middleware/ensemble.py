"""Ensembles: a request to one runs the models of its steps, each as soon as its inputs are there.

An ensemble has no engine and no queue. Workers check it and publish it as any other version, with its steps in its
configuration; the gateway that has a request runs the steps through `root`, the stack that a client's request takes.
So each step is admitted, queued, batched, cached and counted as a client's own, by whichever workers of a fleet hold
its model, and the tensors between the steps pass a gateway once, as they would if the client made the calls. Were it a
worker that ran the ensemble, each request would wait in one more queue and its tensors would travel twice.

It is no wrapper around the whole endpoint, where every plain request would have to ask whether it is one: it is what
the route of such a version submits to in place of the queue. So the service checks, bounds, counts, drains and times
out an ensemble's request as it does any other, and a plain one pays nothing.

Where a step is decoupled, so is the ensemble: each response of the step goes through the steps after it and becomes a
response of the ensemble (`ensemble_stream.py`).

Statistics as in Triton: the ensemble counts one execution for each request, and the sums of what its steps computed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.middleware.ensemble_plan import Plan, make_plan
from gateway.middleware.ensemble_run import Run, named
from gateway.middleware.ensemble_stream import Give, Stream, follow
from gateway.middleware.flights import OneAnswer
from gateway.middleware.tracing import compose
from gateway.queues.base import Lane
from gateway.statistics import Statistics
from gateway.types import Infer, InferRequest, InferResponse, Responses, Tensor

_PLANS = 64  # of an ensemble, by the outputs asked for


class Ensembles:
    """The ensembles of this gateway, and how many requests of each are under way. `root` runs a step; those with many
    responses are run by `tasks`.
    """

    def __init__(self, statistics: Statistics, root: Infer, tasks: asyncio.TaskGroup) -> None:
        self.root = root
        self.tasks = tasks
        self.statistics = statistics
        self._open: Counter[Lane] = Counter()
        self._ended = asyncio.Event()

    def route(self, lane: Lane, config: ModelConfig) -> Ensemble:
        """What to submit the requests of this version to."""
        return Ensemble(self, lane, config)

    def begin(self, lane: Lane) -> None:
        """A request is under way."""
        self._open[lane] += 1

    def end(self, lane: Lane) -> None:
        """It is not any more."""
        self._open[lane] -= 1
        if not self._open[lane]:
            del self._open[lane]
            self._ended.set()

    async def drained(self, lane: Lane) -> None:
        """Wait until no request of this version is under way in this process."""
        while lane in self._open:
            self._ended.clear()
            await self._ended.wait()


class Ensemble:
    """One loaded version of an ensemble, as this gateway runs it."""

    def __init__(self, owner: Ensembles, lane: Lane, config: ModelConfig) -> None:
        self._owner = owner
        self._lane = lane
        self._config = config
        self._plans: dict[tuple[str, ...], Plan] = {}

    def __call__(self, _: Lane, request: InferRequest) -> Responses:
        """Run the checked request once its answer is asked for."""
        if self._config.decoupled:
            return Stream(self._stream, request, self._owner.tasks)
        return OneAnswer(self._answer, request)

    async def _answer(self, request: InferRequest) -> InferResponse:
        with self._running(request) as (run, plan):
            await run.tasks(plan)
            outputs = run.outputs(plan, self._config)
        return self._last(request, run, outputs)

    async def _stream(self, request: InferRequest, give: Give) -> None:
        """Give the responses of a decoupled request; the last one, `final`, may say nothing more than that."""
        outputs: dict[str, Tensor] = {}

        async def give_next(branch: Run, plan: Plan, *, last: bool) -> None:
            nonlocal outputs
            if last:
                outputs = branch.outputs(plan, self._config)
                return
            await give(InferResponse(*self._lane, branch.outputs(plan, self._config), id=request.id, final=False))

        with self._running(request) as (run, plan):
            await follow(run, plan, give_next)
        await give(self._last(request, run, outputs))

    @contextmanager
    def _running(self, request: InferRequest) -> Iterator[tuple[Run, Plan]]:
        compose(request)
        run = Run(self._owner.root, self._config.name, request)
        self._owner.begin(self._lane)
        try:
            yield run, self._plan(request)
        except errors.GatewayError as error:
            raise named(error, f"in ensemble '{self._config.name}', ") from None
        finally:
            self._owner.end(self._lane)

    def _last(self, request: InferRequest, run: Run, outputs: dict[str, Tensor]) -> InferResponse:
        """The last response to a request that has run, which is counted."""
        timings = run.timings
        timings.batch_rows = request.rows
        self._owner.statistics.of(*self._lane).record_batch(
            request.rows, timings.compute_input_ns, timings.compute_infer_ns, timings.compute_output_ns, "ensemble"
        )
        return InferResponse(*self._lane, outputs, id=request.id, timings=timings)

    def _plan(self, request: InferRequest) -> Plan:
        wanted = tuple(output.name for output in request.outputs)
        plan = self._plans.get(wanted)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[wanted] = make_plan(self._config, wanted)
        return plan
