"""Ports that several sockets share: who gets a caller, who is refused, and what is not lost."""

import socket
import sys
from collections import Counter

import pytest

from gateway.transport.ports import SharedPort, hushed, listening, own_listeners, turn_away

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sharing a port is Linux's")

HOST = "127.0.0.1"


def callers(port: SharedPort, count: int) -> Counter[int]:
    """Make this many connections; which of the sockets got how many."""
    found: Counter[int] = Counter()
    for _ in range(count):
        with socket.create_connection((HOST, port.port)):
            for place, each in enumerate(port.sockets):
                try:
                    accepted, _ = each.accept()
                except BlockingIOError:
                    continue
                accepted.close()
                found[place] += 1
    assert found.total() == count
    return found


async def test_callers_are_spread_over_the_sockets() -> None:
    async with SharedPort(HOST, 0, 3) as port:
        assert set(callers(port, 100)) == {0, 1, 2}


async def test_callers_go_where_they_are_sent() -> None:
    async with SharedPort(HOST, 0, 3) as port:
        port.send_to([1])
        assert set(callers(port, 50)) == {1}
        port.send_to([2, 0])
        assert set(callers(port, 100)) == {0, 2}
        port.send_to([])  # nobody to send them to: as before, and they wait
        assert set(callers(port, 100)) == {0, 2}
        port.send_to([0, 1, 2])
        assert set(callers(port, 100)) == {0, 1, 2}


async def test_a_port_in_use_is_refused_unless_it_is_joined() -> None:
    async with SharedPort(HOST, 0, 2) as port:
        taken = f"cannot listen on {HOST}:{port.port}: Address already in use"
        with pytest.raises(OSError, match=taken):
            await SharedPort(HOST, port.port, 2).__aenter__()
        with pytest.raises(OSError, match=taken):
            await listening(HOST, port.port, 1)
        async with SharedPort(HOST, port.port, 1, joins=True) as other:
            assert other.port == port.port
            other.send_to([])  # says nothing about places that are not its own


async def test_a_caller_waits_while_nobody_accepts() -> None:
    async with SharedPort(HOST, 0, 1) as port:
        theirs = socket.socket(fileno=socket.dup(port.sockets[0].fileno()))
        with socket.create_connection((HOST, port.port)) as caller:
            theirs.close()  # the process that was to answer has died
            caller.sendall(b"still there")
            accepted, _ = port.sockets[0].accept()
            accepted.setblocking(True)
            assert accepted.recv(100) == b"still there"
            accepted.close()


async def test_closing_leaves_the_others_their_sockets() -> None:
    async with SharedPort(HOST, 0, 2) as port:
        port.send_to([0])
        with socket.socket(fileno=socket.dup(port.sockets[1].fileno())) as theirs:
            port.close()
            for _ in range(20):
                with socket.create_connection((HOST, port.port)):
                    accepted, _ = theirs.accept()
                    accepted.close()


async def test_callers_are_turned_away_and_those_that_wait_are_not() -> None:
    with await listening(HOST, 0, 10, share=True) as listener:
        address = listener.getsockname()
        with socket.create_connection(address), socket.socket() as late:
            assert own_listeners(address[1]) == [listener.fileno()]
            turn_away(listener.fileno())
            late.setblocking(False)
            assert late.connect_ex(address) != 0
            accepted, _ = listener.accept()
            accepted.close()
            with pytest.raises(BlockingIOError):
                listener.accept()
            assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0  # neither refused nor connected
            with pytest.raises(OSError, match="not connected"):
                late.getpeername()


async def test_what_a_hushed_caller_says_is_heard_later() -> None:
    with await listening(HOST, 0, 10) as listener, socket.create_connection(listener.getsockname()) as caller:
        accepted, _ = listener.accept()
        with accepted:
            with hushed(listener.getsockname()[1]):
                caller.sendall(b"said")
                accepted.sendall(b"answer")
                assert caller.recv(100) == b"answer"
                with pytest.raises(BlockingIOError):
                    accepted.recv(100, socket.MSG_DONTWAIT)
            accepted.setblocking(True)
            assert accepted.recv(100) == b"said"
