"""TCP ports: one process listens on a port of its own, or several of this machine on the same one and nothing is lost.

Sharing is Linux's SO_REUSEPORT: each process has a socket, and with it a queue of callers that wait to be accepted.
When the last descriptor of a socket is closed, its queue is reset. So whoever starts the processes holds every
socket as well, and while a process is away or about to leave the kernel is told to choose among the others.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_SO_ATTACH_REUSEPORT_CBPF, _SO_DETACH_REUSEPORT_BPF = 51, 68  # asm-generic/socket.h
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
# Classic BPF, from linux/filter.h: what to do, and whether with a number or with what was loaded.
_LOAD_WORD, _LOAD_BYTE, _LOAD_LENGTH, _RETURN = 0x20, 0x30, 0x80, 0x06
_AND, _MODULO, _RIGHT, _LEFT = 0x54, 0x94, 0x74, 0x64
_KEEP, _IF_EQUAL, _IF_EQUAL_KEPT = 0x07, 0x15, 0x1D
_RANDOM = (-0x1000 + 56) & 0xFFFFFFFF  # the "address" of a random number
_OFFSET, _FLAGS, _SYN, _SYN_OR_ACK = 12, 13, 0x02, 0x12  # of a TCP header
_ALL = 0xFFFFFFFF

_Instruction = tuple[int, int, int, int]  # code, how far to jump if true, if false, number


async def listening(host: str, port: int, backlog: int, *, share: bool = False) -> socket.socket:
    """A socket that listens. With `share` others of this user may listen on the port too, if they share it.

    Raises OSError when the address cannot be bound.
    """
    listener = await bound(host, port, share=share)
    try:
        listener.listen(backlog)
    except OSError as problem:
        listener.close()
        raise _cannot_listen(host, port, problem) from None
    return listener


async def bound(host: str, port: int, *, share: bool = False) -> socket.socket:
    """A socket that has the address and does not listen yet; see `listening`."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted sockets inherit it; with Nagle's algorithm a response can wait 40 ms for an acknowledgement.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setblocking(False)
        made.bind(address)
    except OSError as problem:
        made.close()
        raise _cannot_listen(host, port, problem) from None
    return made


def _cannot_listen(host: str, port: int, problem: OSError) -> OSError:
    return OSError(problem.errno, f"cannot listen on {host}:{port}: {problem.strerror}")


class SharedPort:
    """A context manager that holds the sockets of a port that `count` processes will listen on, one for each.

    They listen from the start, so that callers wait for the processes and are not refused. Entering raises OSError
    when the port is taken, unless `joins`, by others who share it.
    """

    def __init__(self, host: str, port: int, count: int, *, backlog: int = 1000, joins: bool = False) -> None:
        self.port = port
        self.sockets: list[socket.socket] = []
        self._host = host
        self._count = count
        self._backlog = backlog
        self._joins = joins
        self._sockets = ExitStack()

    async def __aenter__(self) -> Self:
        with ExitStack() as stack:
            if not self._joins:
                (await bound(self._host, self.port)).close()  # this one fails where sharing would not
            for _ in range(self._count):
                each = stack.enter_context(await listening(self._host, self.port, self._backlog, share=True))
                self.port = each.getsockname()[1]
                self.sockets.append(each)
            self._sockets = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send_to(self, places: Collection[int]) -> None:
        """Have new callers sent to these of the sockets only. Where the kernel cannot, they go to all as before."""
        if self._joins or not places or not self.sockets:
            return  # the places of others' sockets are not known
        with suppress(OSError):
            if len(places) == self._count:
                self.sockets[0].setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
            else:
                _attach(self.sockets[0], _SO_ATTACH_REUSEPORT_CBPF, _one_of(sorted(places)))

    def close(self) -> None:
        """Hold them no longer: the processes alone have them."""
        self.send_to(range(self._count))  # their places change when one is closed
        self._sockets.close()
        self.sockets.clear()


def turn_away(descriptor: int) -> None:
    """Have the kernel ignore new callers of this listening socket; those that wait in its queue can be accepted.

    A caller tries again after a second, and reaches another process if this one has closed by then. Nothing
    happens where there is no such filter.
    """
    with socket.socket(fileno=os.dup(descriptor)) as listener, suppress(OSError):
        _attach(
            listener,
            _SO_ATTACH_FILTER,
            [
                (_LOAD_BYTE, 0, 0, _FLAGS),
                (_AND, 0, 0, _SYN_OR_ACK),
                (_IF_EQUAL, 0, 1, _SYN),
                (_RETURN, 0, 0, 0),
                (_RETURN, 0, 0, _ALL),
            ],
        )


def own_listeners(port: int) -> list[int]:
    """The descriptors of this process's sockets that listen on `port`, whichever library opened them."""
    return _own_sockets(port, listening=True)


@contextmanager
def hushed(port: int) -> Iterator[None]:
    """Have the kernel ignore what callers on `port` send to this process, but not that they got our answers.

    To them it is as if the network lost it: they send it again, after a fifth of a second at first, to whoever has
    the connection then. Nothing happens where there is no such filter.
    """
    program = [
        (_LOAD_BYTE, 0, 0, _OFFSET),
        (_RIGHT, 0, 0, 4),
        (_LEFT, 0, 0, 2),
        (_KEEP, 0, 0, 0),
        (_LOAD_LENGTH, 0, 0, 0),
        (_IF_EQUAL_KEPT, 0, 1, 0),
        (_RETURN, 0, 0, _ALL),
        (_RETURN, 0, 0, 0),
    ]
    with ExitStack() as stack:
        for descriptor in _own_sockets(port, listening=False):
            with suppress(OSError):
                each = stack.enter_context(socket.socket(fileno=os.dup(descriptor)))
                _attach(each, _SO_ATTACH_FILTER, program)
                stack.callback(_attach_nothing, each)
        yield


def _attach_nothing(to: socket.socket) -> None:
    with suppress(OSError):
        to.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _own_sockets(port: int, *, listening: bool) -> list[int]:
    found = []
    with suppress(FileNotFoundError):
        for entry in Path("/proc/self/fd").iterdir():
            descriptor = int(entry.name)
            with suppress(OSError):  # it may have been closed meanwhile
                if stat.S_ISSOCK(os.fstat(descriptor).st_mode) and _is_of(descriptor, port, listening=listening):
                    found.append(descriptor)
    return found


def _is_of(descriptor: int, port: int, *, listening: bool) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as each:
        if each.type != socket.SOCK_STREAM or each.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        listens = bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        return listens == listening and each.getsockname()[1] == port


def _one_of(places: list[int]) -> list[_Instruction]:
    """A program that returns one of these numbers, each as often."""
    program = [(_LOAD_WORD, 0, 0, _RANDOM), (_MODULO, 0, 0, len(places))]
    for index, place in enumerate(places):
        program += [(_IF_EQUAL, 0, 1, index), (_RETURN, 0, 0, place)]
    return [*program, (_RETURN, 0, 0, places[0])]


def _attach(to: socket.socket, option: int, program: list[_Instruction]) -> None:
    code = b"".join(struct.pack("=HBBI", *each) for each in program)
    kept = ctypes.create_string_buffer(code, len(code))
    to.setsockopt(socket.SOL_SOCKET, option, struct.pack("@HP", len(program), ctypes.addressof(kept)))
