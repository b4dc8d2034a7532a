"""What an ensemble has to run for the outputs that a request asks for, and in which order; pure, made once.

As in Triton (core `EnsembleContext`), a step that none of these outputs needs is left out, a step asks its model for all
outputs that it maps, and a batch meets a model without batches as one tensor with a dimension more or, where that does
not fit and it has one row, without the dimension. Each response of a decoupled step is the beginning of a plan of its
own: whatever comes after such a step depends on it, because no step takes the tensors of different decoupled models.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from gateway.config.ensemble import alike, in_order
from gateway.config.model import ModelConfig, Step
from gateway.types import RequestedOutput, Tensor


@dataclass(frozen=True, slots=True)
class Task:
    """One step that has to run. `after` are the places of the steps that wait for it, `waits` how many it waits for.

    `inputs` are the model's names and the ensemble's; for those in `refit` their batch dimension may have to change.
    """

    step: Step
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    requested: tuple[RequestedOutput, ...]
    refit: Collection[str]
    after: tuple[int, ...]
    waits: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The tasks, `first` those that wait for none; with `forks` some may run at the same time.

    `outputs` are the ensemble's names, each with the dims to fit it to where its batch dimension may have to change.
    Where there are decoupled steps, `stream` is the first of them, which runs after the tasks, and `rest` the plan for
    each of its responses.
    """

    tasks: tuple[Task, ...]
    first: tuple[int, ...]
    forks: bool
    outputs: tuple[tuple[str, tuple[int, ...] | None], ...]
    stream: Task | None = None
    rest: Plan | None = None


def make_plan(config: ModelConfig, wanted: Collection[str]) -> Plan:
    """The plan for some outputs of an ensemble, all if there are none."""
    own = config.max_batch_size > 0
    asked = [each for each in config.outputs if not wanted or each.name in wanted]
    steps = in_order(_needed(config.steps, [each.name for each in asked]), [each.name for each in config.inputs])
    batched = dict.fromkeys((each.name for each in config.inputs), own)
    for step in steps:
        batched.update(dict.fromkeys(step.outputs.values(), step.batched))
    outputs = tuple((each.name, None if batched[each.name] is own else each.dims) for each in asked)
    *streams, last = _parts(steps)
    plan = _part(last, batched, outputs)
    for *part, stream in reversed(streams):
        task = _task(0, stream, [set()], batched)
        plan = replace(_part(part, batched, outputs), stream=task, rest=plan)
    return plan


def _part(
    steps: Sequence[Step], batched: dict[str, bool], outputs: tuple[tuple[str, tuple[int, ...] | None], ...]
) -> Plan:
    before = _before(steps)
    tasks = tuple(_task(place, step, before, batched) for place, step in enumerate(steps))
    first = tuple(place for place, needs in enumerate(before) if not needs)
    return Plan(tasks, first, len(first) > 1 or any(len(task.after) > 1 for task in tasks), outputs)


def _parts(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps in order, cut after each decoupled one."""
    depth: dict[str, int] = {}  # of the tensors: how many decoupled steps they come from
    parts: list[list[Step]] = [[] for _ in range(1 + sum(step.decoupled for step in steps))]
    for step in steps:
        place = max(depth.get(tensor, 0) for tensor in step.inputs.values())
        parts[place].append(step)
        depth.update(dict.fromkeys(step.outputs.values(), place + step.decoupled))
    return parts


def _before(steps: Sequence[Step]) -> list[set[int]]:
    """The places of the steps whose outputs each step takes."""
    writer = {tensor: place for place, step in enumerate(steps) for tensor in step.outputs.values()}
    return [{writer[tensor] for tensor in step.inputs.values() if tensor in writer} for step in steps]


def _task(place: int, step: Step, before: Sequence[set[int]], batched: dict[str, bool]) -> Task:
    after = tuple(other for other, needs in enumerate(before) if place in needs)
    return Task(
        step,
        tuple(step.inputs.items()),
        tuple(step.outputs.items()),
        tuple(RequestedOutput(name) for name in step.outputs),
        {name for name, tensor in step.inputs.items() if batched[tensor] is not step.batched},
        after,
        len(before[place]),
    )


def _needed(steps: Sequence[Step], wanted: Collection[str]) -> list[Step]:
    """The steps that these tensors need, themselves or by what they are made from."""
    needed: list[Step] = []
    open_tensors = set(wanted)
    while more := [step for step in steps if step not in needed and not open_tensors.isdisjoint(step.outputs.values())]:
        needed += more
        open_tensors = {tensor for step in more for tensor in step.inputs.values()}
    return [step for step in steps if step in needed]


def fitted(tensor: Tensor, dims: tuple[int, ...], *, batched: bool) -> Tensor:
    """The tensor for a model of these dims, where only one of the model and the tensor's maker takes batches."""
    alone = alike(dims, tensor.shape)
    if batched and alone:
        return Tensor(tensor.datatype, (1, *tensor.shape), tensor.wire)
    if not batched and not alone and tensor.shape[:1] == (1,):
        return Tensor(tensor.datatype, tensor.shape[1:], tensor.wire)
    return tensor
