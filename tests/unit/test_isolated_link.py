"""A link to a child that is played by the test: what is sent when, and what of it is taken back."""

import asyncio
import socket
import threading
import time

import numpy as np
import pytest

from gateway.engines.base import EngineCrashed
from gateway.engines.isolated.frames import Done, Frames, pack
from gateway.engines.isolated.layout import lay_out
from gateway.engines.isolated.link import Link, NeverSeen
from gateway.engines.isolated.memory import Memory
from gateway.engines.isolated.sender import Sender
from gateway.engines.threads import EngineThread
from gateway.types import Batch
from tests.support import background, settle
from tests.support import until as turn_until

ROWS = np.arange(6, dtype="f4").reshape(3, 2)
PATIENCE = 60.0  # seconds


class Child:
    """The other end of the line, whose `receive` keeps the event loop waiting, as answers to be written would."""

    def __init__(self, line):
        line.settimeout(10)
        self.line = line

    def receive(self):
        frames = Frames()
        while (frame := frames.next()) is None:
            frames.feed(self.line.recv(1 << 16))
        return frame

    def answer(self):
        layout, _ = lay_out({})
        self.line.sendall(pack(Done(time.monotonic_ns(), layout.form)))


class Linked:
    def __init__(self):
        ours, theirs = socket.socketpair()
        self.child = Child(theirs)
        self.thread = EngineThread("test")
        self.lost = []
        self.link = Link(ours, Memory(self.lost.append), self.thread, self.lost.append)

    def compute(self, stack=lambda: {"IN": ROWS}):
        """A batch that is copied by the engine's thread."""
        return self.link.compute(Batch(3, stack), PATIENCE, lambda: None)

    def is_idle(self):
        told = []
        self.link.when_idle(lambda: told.append(True))
        return bool(told)


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
    idle = asyncio.Event()
    linked.link.when_idle(idle.set)
    await settle()
    assert not idle.is_set()
    linked.child.answer()
    await idle.wait()
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
        linked.child.line.setblocking(False)
        with pytest.raises(BlockingIOError):
            linked.child.line.recv(1)
        linked.child.line.settimeout(10)
        linked.child.answer()
        await running


async def crash(running):
    try:
        await running
    except EngineCrashed as problem:
        return problem
    raise AssertionError("it went well")
