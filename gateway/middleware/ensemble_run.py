"""A request on its way through the steps of an ensemble: what has been computed, and running one step after the other.

The last part, from a decoupled step on, is `ensemble_stream.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from msgspec.structs import replace

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.middleware.ensemble_plan import Plan, Task, fitted
from gateway.middleware.flights import first
from gateway.types import EMPTY_FINAL, Infer, InferRequest, InferResponse, Tensor, Timings


class Run:
    """The tensors that are there, and the sums of where the time went."""

    __slots__ = ("_callers", "_request", "_root", "_tensors", "timings")

    def __init__(self, root: Infer, ensemble: str, request: InferRequest) -> None:
        self._root = root
        self._request = request
        self._callers = (*request.callers, ensemble)
        self._tensors = dict(request.inputs)
        self.timings = Timings()

    async def tasks(self, plan: Plan) -> None:
        """Run the tasks of a plan."""
        await (_forked(self, plan) if plan.forks else _chained(self, plan))

    async def step(self, task: Task) -> None:
        """Run one step, whose inputs are there."""
        try:
            response = await first(self._root, self._asked(task))
        except errors.GatewayError as error:
            raise _of_step(error, task.step.model) from None
        self._take(task, response)
        self._count(response.timings)

    async def stream(self, task: Task) -> AsyncGenerator[tuple[Run, bool], None]:
        """Run a decoupled step: for each of its responses that says anything what there is then, and whether it is the
        last.
        """
        asked = self._asked(task)
        asked.parameters = {**asked.parameters, EMPTY_FINAL: True}  # the last tells what all of them took
        responses = self._root(asked)
        spent: Timings | None = None
        try:
            async for response in responses:
                spent = response.timings or spent  # each tells of all that was done so far
                if response.outputs or not response.final:
                    branch = self._branch()
                    branch._take(task, response)  # noqa: SLF001 - it is one of these
                    yield branch, response.final
        except errors.GatewayError as error:
            raise _of_step(error, task.step.model) from None
        finally:
            await responses.aclose()
            self._count(spent)

    def outputs(self, plan: Plan, config: ModelConfig) -> dict[str, Tensor]:
        """The outputs of the ensemble, but for what its models left out."""
        return {name: self._output(name, dims, config) for name, dims in plan.outputs if name in self._tensors}

    def _output(self, name: str, dims: Sequence[int] | None, config: ModelConfig) -> Tensor:
        tensor = self._tensors[name]
        return tensor if dims is None else fitted(tensor, tuple(dims), batched=config.max_batch_size > 0)

    def _branch(self) -> Run:
        branch = Run(self._root, "", self._request)
        branch._callers = self._callers
        branch._tensors = dict(self._tensors)
        branch.timings = self.timings  # they are of the whole request
        return branch

    def _asked(self, task: Task) -> InferRequest:
        # All that the client said of the request counts for each step; only what was found out about it does not.
        return replace(
            self._request,
            model_name=task.step.model,
            model_version=task.step.version,
            inputs=self._inputs(task),
            outputs=task.requested,
            callers=self._callers,
            form=None,
            admitted=False,
            idempotency_key="",
        )

    def _take(self, task: Task, response: InferResponse) -> None:
        for name, tensor in task.outputs:
            if name in response.outputs:
                self._tensors[tensor] = response.outputs[name]

    def _count(self, spent: Timings | None) -> None:
        if spent is not None:
            self.timings.compute_input_ns += spent.compute_input_ns
            self.timings.compute_infer_ns += spent.compute_infer_ns
            self.timings.compute_output_ns += spent.compute_output_ns

    def _inputs(self, task: Task) -> dict[str, Tensor]:
        # As in Triton what no client gave and no model made is not given either: the step's model may do without.
        inputs = {name: self._tensors[tensor] for name, tensor in task.inputs if tensor in self._tensors}
        for name in task.refit:
            if name in inputs:
                inputs[name] = fitted(inputs[name], task.step.dims[name], batched=task.step.batched)
        return inputs


async def _chained(run: Run, plan: Plan) -> None:
    """Run steps of which one waits for another: no task of their own, which cost as much as a small model."""
    place = plan.first
    while place:
        task = plan.tasks[place[0]]
        await run.step(task)
        place = task.after


async def _forked(run: Run, plan: Plan) -> None:
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


def _of_step(error: errors.GatewayError, model: str) -> errors.GatewayError:
    """The same error with its step, which Triton's text has only if the model's own does."""
    return error if f"'{model}'" in error.message else named(error, f"step '{model}': ")


def named(error: errors.GatewayError, where: str) -> errors.GatewayError:
    """The same error, and where it happened."""
    return type(error)(where + error.message, error.retry_after)
