"""What granian hands over on its thread is taken on the event loop: all of it, in order, and in few turns."""

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any

import pytest

from gateway.transport.http.handover import _Handover

HEAD = (("m", ""), {}.get)


class Loop:
    """Keeps what it is to call, and the tasks that it is to run."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.tasks: list[Any] = []

    def call_soon_threadsafe(self, call: Callable[[], None], *, context: Context) -> None:
        assert context is CONTEXT
        self.calls.append(call)

    def create_task(self, work: Any) -> Any:
        self.tasks.append(work)
        work.close()
        return work

    def turn(self) -> None:
        self.calls.pop(0)()


CONTEXT = copy_context()


class Watcher:
    """A request of granian's. Its scope says whether its body is asked for."""

    def __init__(self, number: int, asked: bool = True) -> None:
        self.scope = asked
        self.number = number
        self.task: Any = None

    def proto(self) -> str:
        return f"body {self.number}"

    def taskref(self, task: Any) -> None:
        self.task = task


class App:
    """Notes what begins; says no to what has these numbers."""

    shut_until = 0.0

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.refused: set[str] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    def reads(self, scope: bool) -> Any:
        return HEAD if scope else None

    def begin(self, _scope: Any, _protocol: Any, head: Any, _arrived: float, body: str) -> bool:
        assert head is HEAD
        self.begun.append(body)
        self.meanwhile()
        return body not in self.refused

    async def __rsgi__(self, *_: Any) -> None:
        """Never run here."""


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def way(app: App, loop: Loop) -> _Handover:
    return _Handover(app, app, loop, CONTEXT)  # type: ignore[arg-type]


def test_what_comes_together_is_taken_in_one_turn_and_in_order(way: _Handover, app: App, loop: Loop) -> None:
    for number in range(5):
        way.hand_over(Watcher(number))
    assert len(loop.calls) == 1
    loop.turn()
    assert app.begun == [f"body {number}" for number in range(5)]
    assert not loop.calls
    assert way._lag.behind(0.0).requests == 0


def test_who_comes_meanwhile_waits_for_the_next_turn(way: _Handover, app: App, loop: Loop) -> None:
    app.meanwhile = lambda: way.hand_over(Watcher(9))
    way.hand_over(Watcher(0))
    loop.turn()
    assert app.begun == ["body 0"]
    app.meanwhile = lambda: None
    loop.turn()
    assert app.begun == ["body 0", "body 9"]
    assert not loop.calls


def test_a_turn_with_nothing_to_take_does_nothing(way: _Handover, app: App, loop: Loop) -> None:
    """Granian's thread tells of a request that the loop, which had just begun to look, takes already."""
    way.hand_over(Watcher(0))
    way._told = False  # the loop begins to look
    way.hand_over(Watcher(1))
    assert len(loop.calls) == 2
    loop.turn()
    assert len(app.begun) == 2
    loop.turn()
    assert len(app.begun) == 2
    assert way._lag.behind(0.0).requests == 0


def test_who_cannot_begin_so_gets_a_task_that_granian_knows(way: _Handover, app: App, loop: Loop) -> None:
    app.refused.add("body 1")
    watchers = [Watcher(0), Watcher(1), Watcher(2, asked=False)]
    for watcher in watchers:
        way.hand_over(watcher)
    loop.turn()
    assert app.begun == ["body 0", "body 1"]
    assert loop.tasks == [watchers[1].task, watchers[2].task]
    assert watchers[0].task is None


async def test_a_door_that_fails_lets_everybody_in(way: _Handover, app: App, loop: Loop) -> None:
    app.reads = lambda _scope: 1 / 0  # type: ignore[method-assign,return-value,assignment]
    way.hand_over(Watcher(0))
    loop.turn()
    await asyncio.sleep(0)
    assert not app.begun
    assert len(loop.tasks) == 1


def test_whatever_becomes_of_one_the_others_are_taken(way: _Handover, app: App, loop: Loop) -> None:
    def failing() -> None:
        app.meanwhile = lambda: None
        raise RuntimeError("a fault")

    app.meanwhile = failing
    for number in range(3):
        way.hand_over(Watcher(number))
    with pytest.raises(RuntimeError):
        loop.turn()
    assert app.begun == ["body 0"]
    loop.turn()
    assert app.begun == ["body 0", "body 1", "body 2"]
    assert not loop.calls
