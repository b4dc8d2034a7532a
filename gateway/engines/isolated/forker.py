"""The nursery's own process: imports what children need once, and forks one whenever it is told to.

It has one thread, always, which is what makes forking safe, and a fork of it is a Python with numpy in 2 ms. It runs
no model. It ends with the gateway, and its children end with it, however each of them ends.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from gateway.engines.isolated import child
from gateway.engines.isolated.frames import Exited, Kill, Spawn, Spawned, encode
from gateway.telemetry import configure_logging, log_event

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_PACKET = 1 << 16
_decode = msgspec.msgpack.Decoder(Spawn | Kill).decode


def main(arguments: Sequence[str]) -> None:
    """Fork on request until the gateway's end of the socket is closed; the arguments are ours, from `nursery.py`."""
    descriptor, log_format, verbose, off = arguments
    configure_logging("json" if log_format == "json" else "text", int(verbose), "nursery", off.split(","))
    control = socket.socket(fileno=int(descriptor))
    Forker(control, log_format, int(verbose), off.split(",")).run()


class Forker:
    """The children, by the gateway's numbers for them."""

    def __init__(self, control: socket.socket, log_format: str, verbose: int, off: Sequence[str]) -> None:
        self._control = control
        self._logging = log_format, verbose, off
        self._pids: dict[int, int] = {}
        self._libc = ctypes.CDLL(None)
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = os.pipe()
        for each in (self._wake, self._waker):
            os.set_blocking(each, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the wake-up is written
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def run(self) -> None:
        """Wait for requests and for children that end."""
        _name(self._libc, "lockgate-nursery")
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in self._selector.select()}
            if self._wake in ready:
                self._reap()
            if self._control in ready and not self._obey():
                return

    def _obey(self) -> bool:
        packet, descriptors, _, _ = socket.recv_fds(self._control, _PACKET, 1)
        if not packet:
            return False
        message = _decode(packet)
        if isinstance(message, Kill):
            if message.child in self._pids:  # it is not reaped, so the number is still its own
                os.kill(self._pids[message.child], signal.SIGKILL)
            return True
        home = socket.socket(fileno=descriptors[0])
        for module in message.preload:
            # What is missing or broken is told by the child that needs it.
            with suppress(Exception):
                importlib.import_module(module)
        gc.collect()
        gc.freeze()  # what all children share is not touched by their garbage collectors, so stays shared
        pid = os.fork()
        if pid == 0:
            self._become(message.name, home)
        home.close()
        self._pids[message.child] = pid
        self._control.send(encode(Spawned(message.child, pid)))
        return True

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake, _PACKET)
        numbers = {pid: number for number, pid in self._pids.items()}
        while self._pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            number = numbers[pid]
            del self._pids[number]
            self._control.send(encode(Exited(number, os.waitstatus_to_exitcode(status))))

    def _become(self, name: str, home: socket.socket) -> None:
        """In the child: be one, to the end."""
        status = 1
        try:
            parent = os.getppid()
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if parent != os.getppid():
                os._exit(status)
            _name(self._libc, name)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            self._control.close()
            os.close(self._wake)
            os.close(self._waker)
            log_format, verbose, off = self._logging
            configure_logging("json" if log_format == "json" else "text", verbose, name, off)
            status = child.live(home)
        except BaseException as problem:  # noqa: BLE001 - nothing may run on into the nursery's own code
            log_event("child_failed", 40, problem, child=name)
        finally:
            os._exit(status)


def _name(libc: ctypes.CDLL, name: str) -> None:
    """What `ps` and `top` call the process; Linux keeps 15 bytes."""
    libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
