"""The scheduling of sequences: no state is mixed, order is kept, and no slot is used twice, whatever happens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.scheduling.sequences import Item, Rules, Sequences


@dataclass(eq=False)
class Job:
    name: str
    enqueued: float = 0.0
    done: bool = False
    kind: str = ""


@dataclass
class Bench:
    """Two instances, a clock, and what each request of a sequence was run after."""

    rules: Rules
    now: float = 0.0
    running: dict[int, list] = field(default_factory=dict)
    history: dict[object, list[str]] = field(default_factory=dict)  # what ran, by sequence object

    def __post_init__(self) -> None:
        self.sequences: Sequences[Job] = Sequences(self.rules, 2, lambda _, item: item.job.kind)
        self.lost: list[Job] = []

    def ask(self, id_, name="", *, start=False, end=False, kind=""):
        job = Job(name, self.now, kind=kind)
        return job if self.sequences.add(id_, Item(job, start, end), self.now) else None

    def begin(self, instance=0):
        batch = self.sequences.take(instance)
        self.running[instance] = batch
        self.lost += [job for _, job in self.sequences.take_lost()]
        return [each.item.job.name for each in batch]

    def end(self, instance=0, failed=()):
        broken = [each.sequence for each in self.running.pop(instance) if each.item.job.name in failed]
        self.sequences.finished(instance, broken, self.now)
        self.lost += [job for _, job in self.sequences.take_lost()]

    def run(self, instance=0, failed=()):
        names = self.begin(instance)
        self.end(instance, failed)
        return names


def direct(**more):
    return Bench(Rules(**{"slots": 2, "max_rows": 2, "idle": 1.0, **more}))


def test_a_sequence_runs_one_request_at_a_time_in_order():
    bench = direct()
    bench.ask("a", "a1", start=True)
    bench.ask("a", "a2")
    bench.ask("a", "a3", end=True)
    assert bench.begin() == ["a1"]
    assert bench.sequences.ready_at(0, 0.0) == math.inf
    bench.end()
    assert [bench.run(), bench.run(), bench.run()] == [["a2"], ["a3"], []]


def test_only_a_start_begins_a_sequence_and_after_its_end_nothing_goes_on():
    bench = direct()
    assert bench.ask("a") is None
    assert bench.ask("a", start=True, end=True) is not None
    assert bench.ask("a") is None


def test_slots_are_spread_over_instances_lowest_first_and_the_line_moves_up():
    bench = direct(slots=1, max_rows=1)
    for id_ in "abc":
        bench.ask(id_, id_ + "1", start=True)
    bench.ask("c", "c2", end=True)
    assert (bench.run(0), bench.run(1)) == (["a1"], ["b1"])
    assert bench.run(1) == []
    bench.ask("b", "b2", end=True)
    assert bench.run(1) == ["b2"]
    assert (bench.run(1), bench.run(1)) == (["c1"], ["c2"])


def test_requests_that_are_not_alike_do_not_share_a_batch():
    bench = Bench(Rules(slots=4, max_rows=4, idle=1.0))
    for id_, kind in (("a", "x"), ("b", ""), ("c", "y"), ("d", ""), ("e", "x")):
        bench.ask(id_, id_, start=True, kind=kind)
    assert bench.run(0) == ["a", "e"]
    assert bench.run(0) == ["c"]
    assert bench.run(1) == ["b", "d"]


def test_an_idle_sequence_ends_but_not_while_something_of_it_waits_or_runs():
    bench = direct()
    bench.ask("a", "a1", start=True)
    bench.now = 5.0
    assert bench.sequences.reap(bench.now) == math.inf
    bench.begin()
    assert bench.sequences.reap(bench.now) == math.inf
    bench.end()
    assert bench.sequences.reap(5.5) == 6.0
    assert bench.sequences.reap(6.0) == math.inf
    assert bench.ask("a") is None


def test_a_request_given_up_before_it_ran_ends_its_sequence():
    bench = direct()
    bench.ask("a", "a1", start=True)
    gone = bench.ask("a", "a2")
    bench.ask("a", "a3")
    anew = bench.ask("a", "a4", start=True)
    assert bench.run() == ["a1"]
    gone.done = True
    assert bench.run() == ["a4"]
    assert [job.name for job in bench.lost] == ["a2", "a3"]
    assert not anew.done
    assert bench.ask("a", "a5") is not None
    bench.ask("b", "b1", start=True).done = True
    assert bench.ask("b", "b2") is not None  # nobody has looked yet
    assert bench.run(1) == []
    assert bench.ask("b") is None


def test_a_request_that_failed_ends_its_sequence_and_no_other():
    bench = Bench(Rules(slots=2, max_rows=2, idle=1.0))
    for id_ in "abcd":
        bench.ask(id_, id_ + "1", start=True)
        bench.ask(id_, id_ + "2")
    assert bench.run(0, failed=["a1"]) == ["a1", "c1"]
    assert [job.name for job in bench.lost] == ["a2"]
    assert bench.run(0) == ["c2"]
    assert bench.ask("a") is None


def test_an_instance_that_forgot_ends_its_own_sequences():
    bench = direct()
    for id_ in "ab":
        bench.ask(id_, id_ + "1", start=True)
        bench.ask(id_, id_ + "2")
    bench.run(0)
    bench.sequences.lose(0)
    assert [job.name for _, job in bench.sequences.take_lost()] == ["a2"]
    bench.sequences.finished(0, (), 0.0)
    assert (bench.ask("a"), bench.run(1), bench.run(1)) == (None, ["b1"], ["b2"])


@pytest.mark.parametrize(
    ("rules", "due"),
    [
        ({}, [0.0, 0.0, 0.0]),
        ({"delay": 0.5}, [0.5, 0.5, 0.5]),
        ({"delay": 0.5, "preferred": (2,)}, [0.5, 0.0, 0.5]),
        ({"delay": 0.5, "max_rows": 2}, [0.5, 0.0, 0.0]),
        ({"delay": 0.5, "utilization": 0.5}, [0.5, 0.0, 0.0]),
    ],
)
def test_when_a_batch_begins(rules, due):
    bench = Bench(Rules(**{"slots": 4, "max_rows": 4, "idle": 9.0, **rules}))
    found = []
    for id_ in range(1, 6, 2):
        bench.ask(id_, start=True)
        bench.ask(id_ + 1, start=True)  # the other instance's
        found.append(bench.sequences.ready_at(0, 0.0))
    assert found == due
    assert bench.sequences.ready_at(0, 0.7) == 0.7


STEPS = st.lists(
    st.tuples(st.just("ask"), st.integers(1, 5), st.booleans(), st.integers(0, 3).map(lambda number: number == 0))
    | st.tuples(st.sampled_from(["begin", "end", "fail", "crash"]), st.integers(0, 1))
    | st.tuples(st.just("cancel"), st.integers(0, 60))
    | st.tuples(st.just("wait"), st.floats(0.01, 1.5)),
    max_size=80,
)


@given(STEPS, st.integers(1, 3), st.integers(1, 3))
def test_no_state_is_mixed_and_every_request_has_one_end(steps, slots, max_rows):
    """A model of a client's view: each id's requests numbered since its last START, which must run without a gap."""
    bench = Bench(Rules(slots=slots, max_rows=max_rows, idle=1.0))
    asked: list[tuple[Job, object, int, bool]] = []
    ran: list[Job] = []
    carried: dict[int, int] = {}  # by sequence object: the number of the request whose state it carries
    where = {}
    numbers: dict[int, int] = {}
    for step in steps:
        if step[0] == "ask":
            _, id_, start, end = step
            number = 0 if start else numbers.get(id_, -1) + 1
            job = bench.ask(id_, f"{id_}/{len(asked)}", start=start, end=end)
            if job is not None:
                asked.append((job, id_, number, start))
                where[id(job)] = (id_, number)
                numbers[id_] = number
        elif step[0] == "begin" and step[1] not in bench.running:
            bench.begin(step[1])
            batch = bench.running[step[1]]
            assert len(batch) <= max_rows
            assert all(each.sequence.instance == step[1] and 0 <= each.sequence.slot < slots for each in batch)
            every = [each.sequence for running in bench.running.values() for each in running]
            assert len({(each.instance, each.slot) for each in every}) == len(every)
            for each in batch:
                assert not each.item.job.done
                id_, number = where[id(each.item.job)]
                if not each.item.start:
                    assert carried[id(each.sequence)] == (id_, number - 1)  # exactly what came before it
                carried[id(each.sequence)] = (id_, number)
                bench.history.setdefault(each.sequence, []).append(each.item.job.name)  # and so keep it alive
                ran.append(each.item.job)
        elif step[0] in ("end", "fail", "crash") and step[1] in bench.running:
            names = [each.item.job.name for each in bench.running[step[1]]]
            if step[0] == "crash":
                bench.sequences.lose(step[1])
            bench.end(step[1], names if step[0] != "end" else ())
        elif step[0] == "cancel" and step[1] < len(asked):
            asked[step[1]][0].done = True
        elif step[0] == "wait":
            bench.now += step[1]
            bench.sequences.reap(bench.now)
    for instance in list(bench.running):
        bench.end(instance)
    for _ in range(200):
        if bench.sequences.quiet:
            break
        bench.now += 2.0
        bench.sequences.reap(bench.now)
        for instance in (0, 1):
            bench.begin(instance)
            ran += [each.item.job for each in bench.running[instance]]
            bench.end(instance)
    bench.lost += [job for _, job in bench.sequences.take_lost()]
    assert bench.sequences.quiet
    assert sorted(map(id, ran + bench.lost)) == sorted(id(job) for job, *_ in asked)
