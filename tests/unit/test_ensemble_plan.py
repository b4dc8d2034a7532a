"""Which steps run for which outputs, in which order; and what of a worker's ensembles needs what."""

from dataclasses import replace

import numpy as np
import pytest

from gateway.config.model import ModelConfig, Step
from gateway.errors import InvalidArgument
from gateway.middleware.ensemble_plan import Plan, fitted, make_plan
from gateway.types import Tensor
from gateway.worker.needs import Needs
from tests.support import model_config, tensor, tensor_config


def ensemble(*steps: Step, outputs: tuple[str, ...] = ("OUT",), name: str = "e", rows: int = 8) -> ModelConfig:
    made = tuple(tensor_config(output) for output in outputs)
    return replace(model_config(name=name, outputs=made, max_batch_size=rows), steps=steps)


def step(model: str, *given: str, made: str, batched: bool = True) -> Step:
    inputs = {f"I{place}": tensor for place, tensor in enumerate(given)}
    return Step(model, "", inputs, {f"O{place}": tensor for place, tensor in enumerate(made.split())}, batched)


def stream(model: str, *given: str, made: str) -> Step:
    return replace(step(model, *given, made=made), decoupled=True)


def models(plan: Plan) -> list[str]:
    return [task.step.model for task in plan.tasks]


def test_a_chain_runs_in_the_order_of_its_tensors() -> None:
    plan = make_plan(ensemble(step("c", "y", made="OUT"), step("a", "IN", made="x"), step("b", "x", made="y")), ())
    order, place = [], plan.first
    while place:
        order.append(plan.tasks[place[0]].step.model)
        place = plan.tasks[place[0]].after
    assert order == ["a", "b", "c"]
    assert not plan.forks


def test_steps_fork_and_join() -> None:
    sides = step("l", "x", made="l"), step("r", "x", made="r")
    plan = make_plan(ensemble(step("a", "IN", made="x"), *sides, step("join", "l", "r", made="OUT")), ())
    assert plan.forks
    assert [(task.waits, task.after) for task in plan.tasks] == [(0, (1, 2)), (1, (3,)), (1, (3,)), (2, ())]


def test_what_takes_two_tensors_of_one_step_waits_for_it_once() -> None:
    plan = make_plan(ensemble(step("a", "IN", made="x y"), step("b", "x", "y", "IN", made="OUT")), ())
    assert [task.waits for task in plan.tasks] == [0, 1]
    assert not plan.forks


def test_only_what_the_outputs_need_runs() -> None:
    config = ensemble(
        step("a", "IN", made="x spare"), step("b", "x", made="B"), step("c", "spare", made="C"), outputs=("B", "C")
    )
    assert models(make_plan(config, ("B",))) == ["a", "b"]
    assert models(make_plan(config, ())) == ["a", "b", "c"]
    plan = make_plan(config, ("C",))
    assert [name for name, _ in plan.outputs] == ["C"]
    assert [output.name for output in plan.tasks[0].requested] == ["O0", "O1"]  # all that are mapped, as Triton asks


def test_batch_dimensions_are_looked_at_where_they_may_differ() -> None:
    config = ensemble(step("a", "IN", made="x", batched=False), step("b", "x", "IN", made="OUT"))
    plan = make_plan(config, ())
    assert [task.refit for task in plan.tasks] == [{"I0"}, {"I0"}]
    assert plan.outputs == (("OUT", None),)
    last = make_plan(ensemble(step("a", "IN", made="OUT", batched=False)), ())
    assert last.outputs == (("OUT", (2,)),)


def test_what_follows_a_decoupled_step_is_a_plan_of_its_own() -> None:
    sides = step("l", "y", made="l"), step("r", "y", made="r")
    last = step("join", "l", "r", made="OUT")
    plan = make_plan(ensemble(last, stream("s", "x", made="y"), *sides, step("a", "IN", made="x")), ())
    assert plan.stream is not None
    assert plan.rest is not None
    assert (models(plan), plan.stream.step.model, models(plan.rest)) == (["a"], "s", ["l", "r", "join"])
    assert plan.rest.forks
    assert [task.waits for task in plan.rest.tasks] == [0, 0, 2]
    assert plan.rest.stream is plan.rest.rest is None


def test_one_decoupled_step_may_follow_the_other() -> None:
    plan = make_plan(ensemble(stream("s", "IN", made="x"), stream("t", "x", made="OUT")), ())
    found = []
    rest: Plan | None = plan
    while rest is not None:
        found.append((models(rest), rest.stream and rest.stream.step.model))
        rest = rest.rest
    assert found == [([], "s"), ([], "t"), ([], None)]


@pytest.mark.parametrize(
    ("shape", "dims", "batched", "expected"),
    [
        ((2,), (2,), True, (1, 2)),
        ((3, 2), (2,), True, (3, 2)),
        ((1, 2), (2,), False, (2,)),
        ((1, 2), (-1, 2), False, (1, 2)),
        ((3, 2), (2,), False, (3, 2)),
    ],
)
def test_a_batch_dimension_comes_or_goes(
    shape: tuple[int, ...], dims: tuple[int, ...], batched: bool, expected: tuple[int, ...]
) -> None:
    made: Tensor = fitted(tensor(np.ones(shape)), dims, batched=batched)
    assert made.shape == expected
    assert made.array.shape == expected


def test_needs_know_users_and_cycles() -> None:
    needs = Needs()
    assert needs.note(ensemble(step("b", "IN", made="x"), step("c", "x", made="OUT"), name="a")) == ("b", "c")
    needs.note(ensemble(step("d", "IN", made="OUT"), name="b"))
    needs.note(model_config(name="d"))
    needs.refuse_cycle("a")
    assert list(needs.users("d")) == ["b"]
    needs.note(ensemble(step("a", "IN", made="OUT"), name="d"))
    with pytest.raises(InvalidArgument, match=r"^circular dependency between ensembles: a -> b -> d -> a$"):
        needs.refuse_cycle("a")
    needs.refuse_cycle("a", lambda name: name != "d")
    needs.forget("b")
    needs.refuse_cycle("a")
    assert not list(needs.users("d"))
