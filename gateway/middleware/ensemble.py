"""Ensembles: a request to one runs the models of its steps, each as soon as its inputs are there.

An ensemble has no engine and no queue. Workers check it and publish it as any other version, with its steps in its
configuration; the gateway that has a request runs the steps through `root`, the stack that a client's request takes.
So each step is admitted, queued, batched, cached and counted as a client's own, by whichever workers of a fleet hold
its model, and the tensors between the steps pass a gateway once, as they would if the client made the calls. Were it a
worker that ran the ensemble, each request would wait in one more queue and its tensors would travel twice.

It is no wrapper around the whole endpoint, where every plain request would have to ask whether it is one: it is what
the route of such a version submits to in place of the queue. So the service checks, bounds, counts, drains and times
out an ensemble's request as it does any other, and a plain one pays nothing.

Statistics as in Triton: the ensemble counts one execution for each request, and the sums of what its steps computed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from msgspec.structs import replace

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.middleware.ensemble_plan import Plan, Task, fitted, make_plan
from gateway.middleware.flights import OneAnswer, first
from gateway.queues.base import Lane
from gateway.statistics import Statistics
from gateway.types import Infer, InferRequest, InferResponse, Responses, Tensor, Timings

_PLANS = 64  # of an ensemble, by the outputs asked for


class Ensembles:
    """The ensembles of this gateway, and how many requests of each are under way. `root` runs a step."""

    def __init__(self, statistics: Statistics, root: Infer) -> None:
        self.root = root
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
        self._optional = frozenset(each.name for each in config.inputs if each.optional)
        self._plans: dict[tuple[str, ...], Plan] = {}

    def __call__(self, _: Lane, request: InferRequest) -> Responses:
        """Run the checked request once its answer is asked for."""
        return OneAnswer(self._answer, request)

    async def _answer(self, request: InferRequest) -> InferResponse:
        run = _Run(self._owner.root, self._config.name, request, self._optional)
        self._owner.begin(self._lane)
        try:
            plan = self._plan(request)
            await (_forked(run, plan) if plan.forks else _chained(run, plan))
            outputs = {name: run.output(name, dims, self._config) for name, dims in plan.outputs}
        except errors.GatewayError as error:
            raise _named(error, f"in ensemble '{self._config.name}', ") from None
        finally:
            self._owner.end(self._lane)
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


class _Run:
    """A request on its way through the steps: the tensors that are there, and the sums of where the time went."""

    __slots__ = ("_callers", "_ensemble", "_optional", "_request", "_root", "_tensors", "timings")

    def __init__(self, root: Infer, ensemble: str, request: InferRequest, optional: frozenset[str]) -> None:
        self._root = root
        self._ensemble = ensemble
        self._request = request
        self._optional = optional
        self._callers = (*request.callers, ensemble)
        self._tensors = dict(request.inputs)
        self.timings = Timings()

    async def step(self, task: Task) -> None:
        """Run one step, whose inputs are there."""
        model = task.step.model
        # All that the client said of the request counts for each step; only what was found out about it does not.
        asked = replace(
            self._request,
            model_name=model,
            model_version=task.step.version,
            inputs=self._inputs(task),
            outputs=task.requested,
            callers=self._callers,
            form=None,
            admitted=False,
            idempotency_key="",
        )
        try:
            response = await first(self._root, asked)
        except errors.GatewayError as error:
            # Triton's text says where it happened only if the model's own does.
            raise error if f"'{model}'" in error.message else _named(error, f"step '{model}': ") from None
        for name, tensor in task.outputs:
            if name in response.outputs:
                self._tensors[tensor] = response.outputs[name]
        if (spent := response.timings) is not None:
            self.timings.compute_input_ns += spent.compute_input_ns
            self.timings.compute_infer_ns += spent.compute_infer_ns
            self.timings.compute_output_ns += spent.compute_output_ns

    def output(self, name: str, dims: Sequence[int] | None, config: ModelConfig) -> Tensor:
        """An output of the ensemble, fitted to `dims` if they are given."""
        tensor = self._found(name)
        return tensor if dims is None else fitted(tensor, tuple(dims), batched=config.max_batch_size > 0)

    def _inputs(self, task: Task) -> dict[str, Tensor]:
        inputs = {}
        for name, tensor in task.inputs:
            if tensor not in self._tensors and tensor in self._optional:
                continue
            inputs[name] = self._found(tensor)
        for name in task.refit:
            if name in inputs:
                inputs[name] = fitted(inputs[name], task.step.dims[name], batched=task.step.batched)
        return inputs

    def _found(self, name: str) -> Tensor:
        if (tensor := self._tensors.get(name)) is None:
            raise errors.InvalidArgument(
                errors.request_prefix(self._request.id)
                + "unexpected deadlock, at least one output is not set while no more ensemble steps can be made"
            )
        return tensor


async def _chained(run: _Run, plan: Plan) -> None:
    """Run steps of which one waits for another: no task of their own, which cost as much as a small model."""
    place = plan.first
    while place:
        task = plan.tasks[place[0]]
        await run.step(task)
        place = task.after


async def _forked(run: _Run, plan: Plan) -> None:
    """Run each step as soon as those that it waits for have run. The first error ends them all."""
    waits = [task.waits for task in plan.tasks]

    async def follow(place: int) -> None:
        await run.step(plan.tasks[place])
        for later in plan.tasks[place].after:
            waits[later] -= 1
            if not waits[later]:
                tasks.create_task(follow(later))

    try:
        async with asyncio.TaskGroup() as tasks:
            for place in plan.first:
                tasks.create_task(follow(place))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _named(error: errors.GatewayError, where: str) -> errors.GatewayError:
    """The same error, and where it happened."""
    return type(error)(where + error.message, error.retry_after)
