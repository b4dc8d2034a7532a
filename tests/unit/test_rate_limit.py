"""Triton's rate limiter: what there is of a resource, whose turn it is, and that a wait holds nothing and ends by events."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from gateway.config.build import build
from gateway.config.model import Batching, RateLimiter, Resource
from gateway.config.parse import Source, parse_text
from gateway.config.rate_limit import read_resources
from gateway.config.settings import Settings
from gateway.errors import InvalidArgument
from gateway.placement import Device, Placement, plan
from gateway.queues.base import Lane
from gateway.scheduling.base import Place
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.worker.lane import limits
from gateway.worker.limited_slots import LimitedSlots
from gateway.worker.resources import Claim, Resources, claim
from tests.support import Callers, background, model_config, request, settle

CPU, GPU = Device("cpu", "cpu", 4), Device("gpu:1", "gpu", 1)


def limiter(priority=1, everywhere=False, **needs):
    return RateLimiter(tuple(Resource(name, count, everywhere) for name, count in needs.items()), priority)


# --- configuration


def test_resources_are_read_from_the_configuration():
    text = """name: "m" backend: "fake" max_batch_size: 4
    input { name: "IN" data_type: TYPE_FP32 dims: 2 } output { name: "OUT" data_type: TYPE_FP32 dims: 2 }
    instance_group [
      { kind: KIND_CPU count: 1 rate_limiter { resources [ { name: "R" count: 4 }, { name: "S" global: true count: 2 } ] } },
      { kind: KIND_CPU count: 2 rate_limiter { resources { name: "R" count: 1 } priority: 3 } },
      { kind: KIND_CPU count: 1 rate_limiter { priority: 7 } }
    ]"""
    config = build(parse_text(Source("m/config.pbtxt", text)), Source("m/config.pbtxt", text))
    groups = [RateLimiter((Resource("R", 4), Resource("S", 2, True))), limiter(3, R=1), None]
    assert [group.limiter for group in config.instance_groups] == groups
    assert [(each.count, each.threads, each.limiter) for each in plan(config, [CPU])] == [
        (1, 1, groups[0]), (2, 1, groups[1]), (1, 1, None),
    ]  # fmt: skip


def test_the_operators_counts_are_read_in_tritons_form():
    counts = {("R1", None): 10, ("R2", 0): 5, ("R2", 1): 8, ("R3", None): 2}
    assert read_resources(["R1:10", "R2:5:0", "R2:8:1", "R3:2"]) == counts
    given = Settings(model_repository=("m",), rate_limit="EXECUTION_COUNT", rate_limit_resource="R1:10,R3:2")
    assert (given.rate_limit, given.rate_limit_resource) == ("execution_count", ("R1:10", "R3:2"))


@pytest.mark.parametrize("entry", ["R", "R:x", "R:1:2:3", ":1", "R:1:", "R:-1"])
def test_another_form_is_refused_in_tritons_words(entry):
    with pytest.raises(ValidationError, match=f"format is '<resource_name>:<count>:<device>' or .* Got {entry}"):
        Settings(model_repository=("m",), rate_limit_resource=(entry,))


def test_two_workers_cannot_limit_rates_together():
    with pytest.raises(ValidationError, match="needs one worker process"):
        Settings(model_repository=("m",), queue="embedded", workers=2, rate_limit="execution_count")


# --- what there is


def opened(resources, **models):
    claims = {name: claim(each, "cpu") for name, each in models.items()}
    for name, each in claims.items():
        resources.open(name, [each])
    return claims


def names(claims, chosen):
    return [name for each in chosen for name, known in claims.items() if known is each]


def test_by_default_there_is_as_much_as_the_largest_need():
    # The example of Triton's user guide.
    resources = Resources({})
    claims = opened(
        resources, A=limiter(R1=4, R2=4), B=limiter(R2=5, R3=10, R4=5), C=limiter(R1=1, R3=7, R4=2), D=limiter(R2=1)
    )
    assert names(claims, resources.in_turn([[claims["A"]], [claims["D"]]])) == ["A", "D"]
    resources.take(claims["D"])
    assert names(claims, resources.in_turn([[claims["A"]], [claims["B"]]])) == ["A"]
    resources.take(claims["C"])
    assert names(claims, resources.in_turn([[claims["A"]]])) == []
    resources.give_back(claims["C"])
    assert names(claims, resources.in_turn([[claims["A"]]])) == ["A"]


def test_it_shrinks_when_who_needs_most_is_gone():
    resources = Resources({})
    claims = opened(resources, small=limiter(R=1), twin=limiter(R=1), large=limiter(R=2))
    both = [[claims["small"]], [claims["twin"]]]
    assert len(resources.in_turn(both)) == 2
    resources.close("large")
    assert len(resources.in_turn(both)) == 1


def test_a_count_that_the_operator_gives_is_kept():
    resources = Resources(read_resources(["R:3"]))
    claims = opened(resources, a=limiter(R=1), b=limiter(R=1), c=limiter(R=1), d=limiter(R=1))
    assert len(resources.in_turn([[each] for each in claims.values()])) == 3


@pytest.mark.parametrize(
    ("given", "needs", "name", "there", "least"),
    [
        (["R:3"], {"R": 4}, "R", 3, 4),
        (["R:4"], {"R": 4, "S": 1}, "S", 0, 1),  # of what is left out there is none
        (["R:9:1", "R:1"], {"R": 2}, "R", 1, 2),
    ],
)
def test_an_instance_that_could_never_run_is_refused_and_leaves_nothing(given, needs, name, there, least):
    resources = Resources(read_resources(given))
    with pytest.raises(InvalidArgument) as caught:
        resources.open("m", [claim(limiter(**needs), "cpu")])
    assert caught.value.message == (
        f'Resource count for "{name}" is limited to {there} which will prevent scheduling of one or more model '
        f"instances, the minimum required count is {least}"
    )
    resources.open("m", [claim(limiter(R=1), "cpu")])


def test_a_resource_is_of_each_device_or_of_all():
    resources = Resources({})
    resources.open("a", [claim(limiter(R=1), "cpu")])
    with pytest.raises(InvalidArgument) as caught:
        resources.open("b", [claim(limiter(everywhere=True, R=1), "cpu")])
    assert caught.value.message == (
        'Resource "R" is present as both global and device-specific resource in the model configuration.'
    )


@pytest.mark.parametrize(("everywhere", "together"), [(False, 2), (True, 1)])
def test_devices_have_their_own_and_a_global_one_is_one(everywhere, together):
    # The count of a global resource is the most given for any device.
    resources = Resources(read_resources(["R:1", "R:1:1"]))
    claims = [claim(limiter(everywhere=everywhere, R=1), device) for device in ("cpu", "gpu:1")]
    for number, each in enumerate(claims):
        resources.open(number, [each])
    assert len(resources.in_turn([[each] for each in claims])) == together


# --- whose turn it is


def turns(resources, claims, times):
    """Who runs, one after another, when all of them always wait."""
    ran = []
    for _ in range(times):
        (each,) = resources.in_turn([[each] for each in claims.values()])
        resources.take(each)
        resources.give_back(each)
        ran += names(claims, [each])
    return ran


def test_turns_are_inverse_to_priorities():
    resources = Resources({})
    claims = opened(resources, first=limiter(1, R=1), second=limiter(2, R=1), fourth=limiter(4, R=1))
    assert Counter(turns(resources, claims, 70)) == {"first": 40, "second": 20, "fourth": 10}


def test_who_comes_later_has_not_waited_all_the_time():
    resources = Resources({})
    old = opened(resources, old=limiter(1, R=1))
    turns(resources, old, 1000)
    claims = old | opened(resources, new=limiter(1, R=1))
    assert Counter(turns(resources, claims, 10)) == {"old": 5, "new": 5}


def test_many_small_needs_do_not_starve_a_large_one():
    resources = Resources({})
    claims = opened(resources, large=limiter(R=2, S=1), small=limiter(5, R=1), other=limiter(5, T=1))
    resources.take(claims["small"])
    waiting = [[each] for each in claims.values()]
    assert names(claims, resources.in_turn(waiting)) == ["other"], "what is free of R is kept for the large one"
    resources.give_back(claims["small"])
    assert names(claims, resources.in_turn(waiting)) == ["large", "other"]


def test_of_a_models_instances_one_that_can_run_does():
    greedy, modest = Claim({("R", 0): 2}, 1), Claim({("R", 0): 1}, 1, paid=9)
    resources = Resources({})
    resources.open("m", [greedy, modest])
    resources.take(busy := Claim({("R", 0): 1}, 1))
    assert resources.in_turn([[greedy, modest]]) == [modest]
    resources.give_back(busy)
    assert resources.in_turn([[greedy, modest]]) == [greedy]


# --- the slots


class Model:
    """A model with callers, a lane on one device, and a seat for each of its limiters."""

    def __init__(self, slots, callers, *limiters, device=CPU, batching=None):
        self.callers, self.lane, self._slots = callers, object(), slots
        engines = [(SimpleNamespace(), Placement(device, 1, 1, 1, limiter=each)) for each in limiters]
        slots.require(self.lane, engines)
        place = Place(device.name, len(engines))
        slots.open(self.lane, limits(model_config(batching=batching or Batching())), [place])
        self.seats = [slots.seat(self.lane, device.name, engine) for engine, _ in engines]

    async def add(self, *requests):
        self._slots.add(self.lane, await self.callers.jobs(*requests))


@pytest.fixture
async def new_model():
    """Makes models, each with a lane of its own in one queue."""
    async with (
        Callers() as first,
        Callers(first.queue, Lane("n", "1")) as second,
        Callers(first.queue, Lane("o", "1")) as third,
    ):
        free = [third, second, first]
        yield lambda slots, *more, **named: Model(slots, free.pop(), *more, **named)


def slots_of(cores=4, *given):
    return LimitedSlots(DeadlineScheduler({"cpu": cores, "gpu:1": 1}), Resources(read_resources(given)))


def ran(tasks):
    return [task.done() for task in tasks]


async def test_an_instance_waits_for_resources_and_holds_no_slot(new_model):
    slots = slots_of(2)
    models = [new_model(slots, limiter(R=1)), new_model(slots, limiter(R=1)), new_model(slots, None)]
    async with background(*(model.seats[0].next() for model in models)) as tasks:
        await settle()
        await models[0].add(request(id="a"))
        run = await tasks[0]
        await models[1].add(request(id="b"))
        await settle()
        assert ran(tasks) == [True, False, False]
        await models[2].add(request(id="c"))  # for the second slot
        assert [job.request.id for job in (await tasks[2]).jobs] == ["c"]
        assert not tasks[1].done()
        models[0].seats[0].release(run, learn=False)
        assert [job.request.id for job in (await tasks[1]).jobs] == ["b"]


async def test_who_claims_nothing_never_has_the_claim_of_another(new_model):
    """An engine that is gone could leave its identity to the next."""
    slots = slots_of()
    limited = new_model(slots, *[limiter(R=1)] * 100)  # Model keeps no engine of its own
    assert all(seat.claim for seat in limited.seats)
    assert not any(seat.claim for seat in new_model(slots, *[None] * 100).seats)


async def test_what_is_freed_on_one_device_is_waited_for_on_another(new_model):
    slots = slots_of()
    near, far = (new_model(slots, limiter(everywhere=True, R=1), device=device) for device in (CPU, GPU))
    async with background(near.seats[0].next(), far.seats[0].next()) as tasks:
        await settle()
        await near.add(request())
        run = await tasks[0]
        await far.add(request())
        await settle()
        assert not tasks[1].done()
        near.seats[0].release(run, learn=False)
        assert (await tasks[1]).device == "gpu:1"


async def test_a_run_that_comes_to_nothing_gives_its_resources_back(new_model):
    slots = slots_of()
    one, other = new_model(slots, limiter(R=1)), new_model(slots, limiter(R=1))
    async with background(one.seats[0].next(), other.seats[0].next()) as tasks:
        await settle()
        jobs = [await model.callers.jobs(request()) for model in (one, other)]
        slots.add(one.lane, jobs[0])
        slots.add(other.lane, jobs[1])
        tasks[0].cancel()  # in the turn in which it is chosen
        await tasks[1]


async def test_a_batch_that_may_still_grow_holds_up_nobody(new_model):
    slots = slots_of()
    patient = new_model(slots, limiter(R=1), batching=Batching(max_queue_delay_us=50_000, preferred_batch_sizes=(4,)))
    hasty = new_model(slots, limiter(9, R=1))
    async with background(patient.seats[0].next(), hasty.seats[0].next()) as tasks:
        await settle()
        await patient.add(request())
        await hasty.add(request())
        run = await tasks[1]
        assert not tasks[0].done()
        hasty.seats[0].release(run, learn=False)
        assert (await tasks[0]).reason == "delay"


async def test_of_two_instances_of_a_model_one_runs_at_a_time(new_model):
    slots = slots_of()
    model = new_model(slots, limiter(R=1), limiter(R=1), batching=Batching(preferred_batch_sizes=(1,)))
    async with background(*(seat.next() for seat in model.seats)) as tasks:
        await settle()
        await model.add(request(rows=8))
        await model.add(request(rows=8))
        await settle()
        assert sum(ran(tasks)) == 1
        first = tasks[0] if tasks[0].done() else tasks[1]
        slots.finished(await first, learn=False)
        await asyncio.gather(*tasks)


async def test_a_run_waits_for_an_instance_that_is_about_to_sit_down(new_model):
    slots = slots_of()
    model = new_model(slots, limiter(R=1))
    await model.add(request(id="a"))
    run = await model.seats[0].next()
    await model.add(request(id="b"))
    model.seats[0].release(run, learn=False)
    await settle()
    assert [job.request.id for job in (await model.seats[0].next()).jobs] == ["b"]


async def test_a_version_that_is_closed_claims_nothing_any_more(new_model):
    slots = slots_of(4, "R:2")
    gone, stays = new_model(slots, limiter(R=2)), new_model(slots, limiter(R=2))
    async with background(gone.seats[0].next(), stays.seats[0].next()) as tasks:
        await settle()
        await gone.add(request())
        run = await tasks[0]
        await stays.add(request())
        await settle()
        slots.close(gone.lane)
        await settle()
        assert not tasks[1].done(), "the run goes on"
        slots.finished(run, learn=False)
        await tasks[1]
