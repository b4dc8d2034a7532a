"""A link to a child that is played by the test: what is sent when, and what of it is taken back."""

import asyncio
import contextlib
import socket
import threading
import time

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.base import EngineCrashed
from gateway.engines.isolated.area import NOWHERE, beside
from gateway.engines.isolated.desks import NeverSeen
from gateway.engines.isolated.frames import Done, Failed, Frames, Run, pack
from gateway.engines.isolated.layout import lay_out
from gateway.engines.isolated.link import Link
from gateway.engines.isolated.memory import Memory
from gateway.engines.isolated.sender import Sender
from gateway.engines.threads import EngineThread
from gateway.types import Batch
from tests.support import background, settle
from tests.support import request as row
from tests.support import until as turn_until

ROWS = np.arange(6, dtype="f4").reshape(3, 2)
PATIENCE = 60.0  # seconds
DECODE = msgspec.msgpack.Decoder(Run).decode


class Child:
    """The other end of the line, whose `receive` keeps the event loop waiting, as answers to be written would."""

    def __init__(self, line):
        line.settimeout(10)
        self.line = line
        self.frames = Frames()

    def receive(self):
        while (frame := self.frames.next()) is None:
            self.frames.feed(self.line.recv(1 << 16))
        return frame

    def has_nothing(self):
        self.line.setblocking(False)
        try:
            self.line.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.line.settimeout(10)
        return False

    def answer(self):
        layout, _ = lay_out({})
        self.line.sendall(pack(Done(time.monotonic_ns(), layout.form, 0)))


class Linked:
    def __init__(self):
        ours, theirs = socket.socketpair()
        self.child = Child(theirs)
        self.thread = EngineThread("test")
        self.lost = []
        self.works = []
        self.link = Link(ours, Memory(self.lost.append), self.thread, self.lost.append, self.works.append)

    def compute(self, stack=lambda: {"IN": ROWS}):
        """A batch that is copied by the engine's thread."""
        return self.link.compute(Batch(3, stack), PATIENCE, lambda: None)

    def told(self, frame):
        return DECODE(frame.header)

    def is_idle(self):
        return not self.link.running


class Copies:
    """Has the engine's thread stay in the middle of a batch."""

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()

    def stack(self):
        self.begun.set()
        self.go_on.wait(10)
        return {"IN": ROWS}


@pytest.fixture
async def linked():
    made = Linked()
    yield made
    made.link.close()
    made.child.line.close()
    await made.thread.close()


async def test_the_child_has_its_batch_while_the_event_loop_is_busy(linked):
    copies = Copies()
    async with background(linked.compute(copies.stack)) as (running,):
        await turn_until(copies.begun.is_set)
        copies.go_on.set()
        message = linked.child.receive()  # nothing else runs on the event loop until it is here
        assert b"run" in message.header
        linked.child.answer()
        result = await running
    assert result.outputs == {}
    assert result.started_ns <= result.stacked_ns <= result.finished_ns


async def test_a_batch_that_is_given_up_before_its_turn_is_never_sent(linked):
    goes_on = threading.Event()
    async with background(linked.thread.call(lambda: goes_on.wait(10)), linked.compute()) as (_, given_up):
        await settle()
        assert linked.link.running
        given_up.cancel()
        await asyncio.wait([given_up])
        assert linked.is_idle()
        goes_on.set()
        await linked.thread.call(lambda: None)
    await next_is_answered(linked)


async def test_a_batch_that_is_given_up_while_it_is_copied_is_never_sent(linked):
    copies = Copies()
    async with background(linked.compute(copies.stack)) as (given_up,):
        await turn_until(copies.begun.is_set)
        given_up.cancel()
        await asyncio.wait([given_up])
        assert linked.is_idle()
        copies.go_on.set()
        await linked.thread.call(lambda: None)
    await next_is_answered(linked)


async def test_a_batch_that_is_given_up_when_it_was_sent_is_waited_for(linked):
    async with background(linked.compute()) as (given_up,):
        await settle()
        linked.child.receive()
        given_up.cancel()
        await asyncio.wait([given_up])
    await settle()
    assert not linked.is_idle()
    linked.child.answer()
    await turn_until(linked.is_idle)
    assert linked.works == [True, False]
    await next_is_answered(linked)


async def test_a_batch_that_cannot_be_stacked_is_never_sent(linked):
    def stack():
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        await linked.compute(stack)
    assert linked.is_idle()
    assert not linked.lost
    await next_is_answered(linked)


async def test_a_child_that_ends_while_a_batch_is_copied_has_never_seen_it(linked):
    copies = Copies()
    async with background(crash(linked.compute(copies.stack))) as (running,):
        await turn_until(copies.begun.is_set)
        linked.child.line.close()
        await turn_until(lambda: bool(linked.lost))
        copies.go_on.set()
        assert isinstance(await running, NeverSeen)
    assert linked.lost == ["ended"]
    assert linked.is_idle()
    assert isinstance(await crash(linked.compute()), NeverSeen)


async def test_the_next_batch_is_there_before_the_one_that_runs_has_ended(linked):
    async with background(linked.compute(), linked.compute(), linked.compute()) as (first, second, third):
        await settle()
        one, other = [linked.told(linked.child.receive()) for _ in range(2)]
        assert (one.desk, other.desk) == (0, 1)
        assert other.start >= one.start + ROWS.nbytes
        await settle()
        assert linked.child.has_nothing(), "the third waits until a desk is free"
        linked.child.answer()
        result = await first
        await settle()
        again = linked.told(linked.child.receive())
        assert (again.desk, again.start) == (0, 0)
        linked.child.answer()
        following = await second
        assert following.stacked_ns >= result.finished_ns, "waiting for its turn is no part of its run"
        assert following.started_ns <= following.stacked_ns <= following.finished_ns
        linked.child.answer()
        await third
    assert linked.works == [True, False]


async def test_what_waits_behind_a_batch_at_which_the_child_ends_has_never_been_seen(linked):
    async with background(*(crash(linked.compute()) for _ in range(3))) as tasks:
        await settle()
        for _ in range(2):
            linked.child.receive()
        linked.child.line.close()
        crashes = await asyncio.gather(*tasks)
    assert [isinstance(each, NeverSeen) for each in crashes] == [False, True, True]
    assert linked.works == [True], "it was at work when it ended"


async def test_one_given_up_while_it_waits_its_turn_leaves_its_desk_when_it_was_answered(linked):
    async with background(linked.compute(), linked.compute()) as (first, given_up):
        await settle()
        for _ in range(2):
            linked.child.receive()
        given_up.cancel()
        await asyncio.wait([given_up])
        async with background(linked.compute()) as (third,):
            linked.child.answer()
            await first
            await settle()
            linked.child.receive()
            linked.child.answer()  # to what was given up
            await settle()
            assert not third.done()
            linked.child.answer()
            await third
    await next_is_answered(linked)


async def test_the_run_of_one_begins_when_what_was_given_up_before_it_fails(linked):
    async with background(linked.compute(), linked.compute()) as (given_up, second):
        await settle()
        for _ in range(2):
            linked.child.receive()
        given_up.cancel()
        await asyncio.wait([given_up])
        await asyncio.sleep(0.02)
        failed = time.monotonic_ns()
        linked.child.line.sendall(pack(Failed(b"", "ValueError", "no")))
        await settle()
        linked.child.answer()
        assert (await second).stacked_ns >= failed, "waiting for its turn is no part of its run"


async def test_an_answer_that_is_there_counts_though_the_child_has_ended(linked):
    async with background(linked.compute()) as (first,):
        await settle()
        linked.child.receive()
        linked.child.answer()
        linked.child.line.close()
        given = linked.link.compute(Batch(3, lambda: {"IN": ROWS}, requests=(row(),)), PATIENCE, lambda: None)
        with contextlib.suppress(NeverSeen):
            given.send(None)  # before the event loop reads
        given.close()
        assert (await first).outputs == {}


async def test_the_watchdog_looks_after_what_runs_and_not_after_what_waits(linked):
    told = []
    slow = linked.link.compute(Batch(3, lambda: {"IN": ROWS}), PATIENCE, lambda: told.append("first"))
    waits = linked.link.compute(Batch(3, lambda: {"IN": ROWS}), 0.0, lambda: told.append("second"))
    async with background(slow, waits) as (first, second):
        await settle()
        for _ in range(2):
            linked.child.receive()
        await settle()
        assert told == []
        linked.child.answer()
        await first
        await turn_until(lambda: bool(told))
        assert told == ["second"]
        linked.child.answer()
        await second


@given(st.lists(st.integers(0, 1 << 20), min_size=2, max_size=60))
def test_two_beside_each_other_never_touch_and_stay_near(sizes):
    spans = [NOWHERE, NOWHERE]
    for number, size in enumerate(sizes):
        start, end = spans[number % 2] = beside(size, spans[1 - number % 2])
        other = spans[1 - number % 2]
        assert end - start == size
        assert end <= other[0] or start >= other[1]
        assert end <= 3 * (max(sizes) + 64)


async def test_what_is_sent_while_something_waits_to_be_goes_after_it():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    sender = Sender(ours, asyncio.get_running_loop())
    payload = bytearray(8 << 20)
    sender.send(b"first", payload)
    sender.send(b"second", payload)
    reader, writer = await asyncio.open_connection(sock=theirs)
    assert await reader.readexactly(2 * len(payload) + 11) == b"first" + payload + b"second" + payload
    sender.close()
    writer.close()


async def test_what_does_not_fit_goes_when_there_is_room():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    payload = bytearray(np.random.default_rng(1).bytes(8 << 20))
    sender = Sender(ours, asyncio.get_running_loop())
    sender.send(b"head", payload)
    reader, writer = await asyncio.open_connection(sock=theirs)
    assert await reader.readexactly(4 + len(payload)) == b"head" + payload
    sender.send(b"next")
    assert await reader.readexactly(4) == b"next"
    sender.close()
    with pytest.raises(OSError):  # noqa: PT011 - whatever the system says
        sender.send(b"too late")
    assert await reader.read() == b""
    writer.close()


async def next_is_answered(linked):
    """Nothing is on the line, and what comes next is all there is."""
    async with background(linked.compute()) as (running,):
        await settle()
        assert b"run" in linked.child.receive().header
        assert linked.child.has_nothing()
        linked.child.answer()
        await running


async def crash(running):
    try:
        await running
    except EngineCrashed as problem:
        return problem
    raise AssertionError("it went well")
