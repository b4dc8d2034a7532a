"""The order in which a failed batch is run again: who is blamed, how many crashes that takes, and who is left in peace."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import errors
from gateway.engines.base import EngineCrashed
from gateway.worker.attempt import Part
from gateway.worker.retry import SURE, UNSURE, isolate

ERROR = errors.Internal("failed")


@dataclass(eq=False)
class Job:
    name: int
    done: bool = False


@dataclass
class Engine:
    """Runs parts as the poison in them says, and keeps what became of everybody."""

    poison: dict[int, Exception]
    outside: set[int] = field(default_factory=set)  # the runs, by number, that something else puts an end to
    leaves: dict[int, set[int]] = field(default_factory=dict)  # who gives up while a run, by number, lasts
    runs: list[list[int]] = field(default_factory=list)
    crashes: int = 0
    answered: list[int] = field(default_factory=list)
    failed: dict[int, Exception] = field(default_factory=dict)
    blamed: set[int] = field(default_factory=set)

    async def again(self, part: Part) -> Exception | None:
        number = len(self.runs)
        self.runs.append([job.name for job in part.jobs])
        problem = next((self.poison[job.name] for job in part.jobs if job.name in self.poison), None)
        if number in self.outside:
            problem = EngineCrashed("killed", sure=False)
        self.crashes += isinstance(problem, EngineCrashed)
        for job in part.jobs:
            job.done |= problem is None or job.name in self.leaves.get(number, ())
            if problem is None:
                self.answered.append(job.name)
        return problem

    def end(self, job, problem, *, blamed=False, begun=False):
        assert job.name not in self.failed
        assert job.name not in self.answered
        job.done = True
        self.failed[job.name] = problem
        if blamed:
            self.blamed.add(job.name)

    async def take(self, size: int) -> None:
        """What an instance does with a batch."""
        part = Part([Job(name) for name in range(size)])
        problem = await self.again(part)
        if problem is not None:
            await isolate(part, problem, self.again, self.end)


def bound(size: int) -> int:
    """The most crashes of one poison request; one that was by itself from the start runs twice."""
    return max(math.floor(math.log2(size)) + 1, 2)


SIZES = st.integers(1, 70)
POISONED = SIZES.flatmap(lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1), max_size=6)))


@given(POISONED)
async def test_each_poison_costs_at_most_log2_of_the_batch_and_one_crashes(case):
    size, poison = case
    engine = Engine(dict.fromkeys(poison, EngineCrashed("died")))
    await engine.take(size)
    assert engine.crashes <= len(poison) * bound(size)
    assert engine.crashes <= 2 * len(poison) + 1
    assert engine.blamed == set(engine.failed) == poison
    assert sorted(engine.answered) == [name for name in range(size) if name not in poison]


@given(SIZES.flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1))))
async def test_one_poison_of_a_batch_takes_no_more_whatever_its_place(case):
    size, place = case
    engine = Engine({place: EngineCrashed("died")})
    await engine.take(size)
    assert engine.crashes <= bound(size)
    assert len(engine.runs) <= 3 + 2 * math.isqrt(size) + 2


@pytest.mark.parametrize(("size", "crashes"), [(1, 2), (2, 2), (3, 2), (4, 3), (8, 3), (32, 3), (64, 3), (1024, 3)])
async def test_how_often_one_request_crashes_the_engine(size, crashes):
    for place in {0, size // 2, size - 1}:
        engine = Engine({place: EngineCrashed("died")})
        await engine.take(size)
        assert (engine.crashes, engine.blamed) == (crashes, {place})


@given(POISONED)
async def test_an_error_is_isolated_as_a_crash_is_and_nobody_is_blamed(case):
    size, poison = case
    engine = Engine(dict.fromkeys(poison, ERROR))
    await engine.take(size)
    assert engine.failed == dict.fromkeys(poison, ERROR)
    assert engine.blamed == set()
    assert len(engine.answered) == size - len(poison)


async def test_most_neighbours_are_answered_before_the_poison_is_found():
    engine = Engine({0: EngineCrashed("died")})
    await engine.take(8)
    assert [len(run) for run in engine.runs] == [8, 2, 2, 2, 2, 1, 1]
    assert engine.answered == [2, 3, 4, 5, 6, 7, 1]


async def test_what_costs_no_process_is_tried_in_halves():
    engine = Engine({0: ERROR})
    await engine.take(8)
    assert [len(run) for run in engine.runs] == [8, 4, 4, 2, 2, 1, 1]


async def test_what_may_come_from_outside_is_tried_in_halves_and_then_one_by_one():
    engine = Engine({0: EngineCrashed("died")}, outside={0})
    await engine.take(8)
    assert [len(run) for run in engine.runs] == [8, 4, 4, 1, 1, 1, 1]


@given(SIZES, st.sets(st.integers(0, 40), max_size=UNSURE - 1))
async def test_kills_from_outside_cost_nobody_an_answer(size, outside):
    engine = Engine({}, outside)
    await engine.take(size)
    assert sorted(engine.answered) == list(range(size))


@pytest.mark.parametrize("sure", [True, False])
async def test_one_crash_of_a_request_by_itself_costs_it_no_answer(sure):
    engine = Engine({0: EngineCrashed("died", sure=sure)})
    mended = Engine({})
    await isolate(Part([Job(0)]), engine.poison[0], mended.again, mended.end)
    assert mended.answered == [0]
    await engine.take(1)
    assert (engine.crashes, engine.blamed) == (SURE if sure else UNSURE, {0})


async def test_in_a_large_batch_the_crashes_in_company_count_too():
    engine = Engine({0: EngineCrashed("killed", sure=False)})
    await engine.take(8)
    assert (engine.crashes, engine.blamed) == (4, {0})


async def test_who_gave_up_is_left_out_and_blamed_only_when_alone():
    engine = Engine({0: EngineCrashed("died")}, leaves={0: {0, 1}})
    await engine.take(4)
    assert engine.runs == [[0, 1, 2, 3], [2], [3]]
    assert engine.failed == {}
    alone = Engine({0: EngineCrashed("died")}, leaves={0: {0}})
    await alone.take(1)
    assert alone.blamed == {0}


@pytest.mark.parametrize("problem", [EngineCrashed("died"), ERROR])
async def test_when_all_gave_up_nothing_is_run(problem):
    engine = Engine({0: problem}, leaves={0: {0, 1, 2}})
    await engine.take(3)
    assert engine.runs == [[0, 1, 2]]


async def test_what_is_left_of_a_batch_when_one_gave_up_has_not_run_alone():
    engine = Engine({1: EngineCrashed("died")}, leaves={0: {0}})
    await engine.take(2)
    assert engine.runs == [[0, 1], [1]]
    assert engine.blamed == {1}


@pytest.mark.parametrize("error", [errors.Unavailable("restarting", 1.0), errors.ResourceExhausted("busy")])
async def test_what_the_machine_is_to_blame_for_is_not_tried_request_by_request(error):
    engine = Engine({0: error})
    await engine.take(32)
    assert len(engine.runs) == 1
    assert engine.failed == dict.fromkeys(range(32), error)


async def test_an_engine_that_does_not_come_back_ends_what_still_waits():
    gone = errors.Unavailable("it does not start", 1.0)
    engine = Engine({0: EngineCrashed("died"), 2: gone})
    await engine.take(8)
    assert len(engine.runs) == 3
    assert engine.failed == dict.fromkeys(range(8), gone)


async def test_who_was_given_an_answer_is_not_run_again():
    engine = Engine({})
    part = Part([Job(name) for name in range(4)], begun={2})
    await isolate(part, EngineCrashed("died"), engine.again, engine.end)
    assert isinstance(engine.failed[2], EngineCrashed)
    assert engine.blamed == set()
    assert sorted(engine.answered) == [0, 1, 3]


async def test_one_that_crashes_in_the_middle_of_its_answers_is_blamed_if_that_is_sure():
    for sure in (True, False):
        engine = Engine({})
        await isolate(Part([Job(0)], begun={0}), EngineCrashed("died", sure=sure), engine.again, engine.end)
        assert engine.runs == []
        assert engine.blamed == ({0} if sure else set())
