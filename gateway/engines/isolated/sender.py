"""`Sender`: what goes to a child. From any thread, so that a batch need not wait for the event loop's turn."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from contextlib import suppress


class Sender:
    """The writing end of a link's socket, which does not block."""

    def __init__(self, line: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = line
        self._loop = loop
        self._lock = threading.Lock()  # so that nothing is sent where the socket was, once another has its number
        self._open = True
        self._unsent: deque[memoryview] = deque()

    def send(self, header: bytes, payload: bytearray | None = None) -> None:
        """Send this; what does not fit goes when there is room. Raises `OSError` when the child is gone."""
        data = memoryview(header if payload is None else header + payload)
        with self._lock:
            if not self._open:
                raise BrokenPipeError
            if self._unsent:
                self._unsent.append(data)
                return
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                self._unsent.append(data[sent:])
                self._loop.call_soon_threadsafe(self._wait)

    def close(self) -> None:
        """Close the socket. On the event loop."""
        self._loop.remove_writer(self._socket.fileno())
        with self._lock:
            self._open = False
            self._socket.close()

    def _wait(self) -> None:
        if self._open:
            self._loop.add_writer(self._socket.fileno(), self._flush)

    def _flush(self) -> None:
        with self._lock:
            with suppress(OSError):  # it is full, or has ended, which it says next
                self._unsent[0] = self._unsent[0][self._socket.send(self._unsent[0]) :]
            if not self._unsent[0]:
                self._unsent.popleft()
            if not self._unsent:
                self._loop.remove_writer(self._socket.fileno())
