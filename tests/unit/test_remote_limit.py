"""How many requests may be on their way to a server, and how many may be sent again."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.remote.budget import RetryBudget
from gateway.engines.remote.limit import Gate, GradientLimit
from tests.support import settle


def serve(limit: GradientLimit, seconds: float, answers: int, capacity: int = 10**6) -> None:
    """So many answers of a server that does `capacity` requests at once, and queues the others."""
    for _ in range(answers):
        sent = limit.limit
        limit.answered(seconds * max(1.0, sent / capacity), sent)


@given(
    st.integers(1, 500),
    st.lists(st.one_of(st.none(), st.tuples(st.floats(0, 100), st.integers(1, 500)))),
)
def test_it_stays_between_one_and_the_most(most: int, events: list[tuple[float, int] | None]) -> None:
    limit = GradientLimit(most)
    for event in events:
        limit.dropped() if event is None else limit.answered(*event)
        assert 1 <= limit.limit <= most


@given(st.floats(1e-4, 10.0), st.integers(30, 400))
def test_it_grows_to_the_most_while_nothing_queues(seconds: float, most: int) -> None:
    limit = GradientLimit(most)
    serve(limit, seconds, 3 * most)
    assert limit.limit == most


@given(st.integers(4, 100), st.floats(1e-3, 1.0))
def test_it_settles_near_what_the_server_can_do(capacity: int, seconds: float) -> None:
    limit = GradientLimit(1000)
    serve(limit, seconds, 200, capacity)
    assert capacity * 0.9 <= limit.limit <= 2.2 * capacity + 10


@given(st.floats(1e-3, 1.0))
def test_answers_that_come_later_shrink_it(seconds: float) -> None:
    limit = GradientLimit(100)
    serve(limit, seconds, 400)
    before = limit.limit
    for _ in range(20):
        limit.answered(3 * seconds, limit.limit)
    assert limit.limit < 0.4 * before


def test_it_does_not_move_while_it_does_not_limit() -> None:
    limit = GradientLimit(100)
    before = limit.limit
    for seconds in (0.01, 1.0, 0.01, 0.001):
        for _ in range(50):
            limit.answered(seconds, 1)
    assert limit.limit == before


def test_a_refusal_halves_it() -> None:
    limit = GradientLimit(100)
    serve(limit, 0.01, 400)
    limit.dropped()
    assert limit.limit == 50


def test_after_long_trouble_it_soon_knows_what_is_usual_again() -> None:
    limit = GradientLimit(100)
    serve(limit, 0.01, 100)
    serve(limit, 1.0, 1000)
    serve(limit, 0.01, 60)  # while the long average would take hundreds
    for _ in range(20):
        limit.answered(0.05, limit.limit)
    assert limit.limit < 60


async def test_the_gate_lets_in_as_many_as_the_limit_says_in_order() -> None:
    gate = Gate(GradientLimit(2))
    inside: deque[int] = deque()
    leave = [asyncio.Event() for _ in range(6)]

    async def visit(number: int) -> None:
        async with gate.enter():
            inside.append(number)
            await leave[number].wait()
            inside.remove(number)

    async with asyncio.TaskGroup() as tasks:
        visits = [tasks.create_task(visit(number)) for number in range(6)]
        await settle()
        assert list(inside) == [0, 1]
        visits[2].cancel()
        leave[0].set()
        await settle()
        assert list(inside) == [1, 3]
        gate.limit.dropped()  # to one
        leave[1].set()
        await settle()
        assert list(inside) == [3]
        for event in leave:
            event.set()
    assert gate.open == gate.waiting == 0
    assert gate.free


async def test_one_who_goes_in_the_turn_he_is_let_in_leaves_room() -> None:
    gate = Gate(GradientLimit(1))

    async def visit() -> None:
        async with gate.enter():
            pass

    async with asyncio.TaskGroup() as tasks:
        async with gate.enter():
            waiting = tasks.create_task(visit())
            await settle()
        waiting.cancel()  # it was let in when the other left, and has not run since
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        async with asyncio.timeout(5):
            await visit()


@given(st.integers(0, 1000), st.floats(0, 1e6))
def test_one_request_in_ten_may_be_sent_again_and_ten_in_any_case(requests: int, now: float) -> None:
    budget = RetryBudget()
    for _ in range(requests):
        budget.sent(now)
    assert sum(budget.withdraw(now) for _ in range(2000)) == 10 + requests // 10


@pytest.mark.parametrize(("later", "allowed"), [(5.0, 0), (11.0, 10)])
def test_what_was_sent_and_repeated_long_ago_counts_no_more(later: float, allowed: int) -> None:
    budget = RetryBudget()
    for _ in range(100):
        budget.sent(50.0)
    assert sum(budget.withdraw(50.0) for _ in range(100)) == 20
    assert sum(budget.withdraw(50.0 + later) for _ in range(100)) == allowed
