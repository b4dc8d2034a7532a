"""`Home`: one child process as the gateway sees it: the instances that live there, its heartbeat, and how it ended."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress

from gateway.engines.isolated.frames import Beat, Host, encode
from gateway.engines.isolated.nursery import ChildProcess, Nursery

_PACKET = 1 << 12
_A_MOMENT = 2.0  # seconds
_SIGNALS = {
    signal.SIGSEGV: "segfault",
    signal.SIGBUS: "segfault",
    signal.SIGABRT: "abort",
    signal.SIGKILL: "killed",
}


class Home:
    """A child. `shared` says whether others may live in it too.

    `at_work` are the instances that have something to do or were at it when the child ended; `guilty` is the one it was
    ended for.
    """

    def __init__(self, child: ChildProcess, nursery: Nursery, line: socket.socket, *, shared: bool) -> None:
        self.child = child
        self.shared = shared
        self.names: set[str] = set()  # of the instances
        self.at_work: set[str] = set()
        self.guilty = ""
        self._nursery = nursery
        self._line = line
        self._why = ""  # we ended it
        self._beats = 0
        self._heard = 0
        self._loop = asyncio.get_running_loop()
        line.setblocking(False)
        self._loop.add_reader(line.fileno(), self._read)

    @property
    def alive(self) -> bool:
        """Whether it can take in another instance, as far as is known."""
        return self._line.fileno() >= 0 and not self._why and not self.child.exited.done()

    def innocent(self, name: str) -> bool:
        """Whether, as far as is known, another instance may be why it ended while this one was at work."""
        return self.guilty != name if self.guilty else len(self.at_work) > 1

    def host(self, name: str, descriptors: Sequence[int], *, areas: bool, calls: bool) -> None:
        """Take in an instance, which gets these descriptors: its line, its areas, a line for calls.

        Raises OSError when the child is gone.
        """
        socket.send_fds(self._line, [encode(Host(name, areas, calls))], list(descriptors))

    def kill(self, why: str, guilty: str = "") -> None:
        """End it now; `why` is one word for the statistics."""
        if not self._why:
            self._why, self.guilty = why, guilty
        self._nursery.kill(self.child)

    def leave(self, name: str) -> None:
        """An instance has ended. With the last one the child ends."""
        self.names.discard(name)
        self.at_work.discard(name)
        if not self.names:
            self.close()

    def close(self) -> None:
        """Ask the child to end."""
        if self._line.fileno() >= 0:
            self._loop.remove_reader(self._line.fileno())
            self._line.close()

    async def cause(self) -> str:
        """Why it ended, in one word; waits until it has. One that let an instance go and lives on is ended."""
        for _ in range(2):
            await asyncio.wait([self.child.exited], timeout=_A_MOMENT)
            if not self.child.exited.done():
                self.kill("silent")
        status = self.child.exited.result() if self.child.exited.done() else None
        if self._why:
            return self._why
        if status is None or status >= 0:
            return "exit"
        return _SIGNALS.get(signal.Signals(-status), "signal")

    def beat(self) -> bool:
        """Ask whether it is there; False when it has not answered since it was last asked, though nothing runs in it.

        A model at work may keep the interpreter to itself for as long as its watchdog lets it.
        """
        if self.at_work:
            self._heard = self._beats
            return True
        if self._heard < self._beats:
            return False
        self._beats += 1
        with suppress(OSError):
            self._line.send(encode(Beat(self._beats)))
        return True

    def _read(self) -> None:
        try:
            packet = self._line.recv(_PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self.close()
        self._heard = self._beats


def least_crowded(homes: Iterable[Home]) -> Home | None:
    """The home to share that has the fewest instances."""
    return min((home for home in homes if home.shared and home.alive), key=lambda home: len(home.names), default=None)
