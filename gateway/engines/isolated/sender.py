"""`Sender`: what goes to a child. From any thread, so that a batch need not wait for the event loop's turn."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress


class Sender:
    """The writing end of a link's socket, which does not block. One message at a time: the child answers each."""

    def __init__(self, line: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = line
        self._loop = loop
        self._lock = threading.Lock()  # so that nothing is sent where the socket was, once another has its number
        self._open = True
        self._unsent = memoryview(b"")

    def send(self, header: bytes, payload: bytearray | None = None) -> None:
        """Send this; what does not fit goes when there is room. Raises `OSError` when the child is gone."""
        data = header if payload is None else header + payload
        with self._lock:
            if not self._open:
                raise BrokenPipeError
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
        if sent < len(data):
            self._loop.call_soon_threadsafe(self._wait, memoryview(data)[sent:])

    def close(self) -> None:
        """Close the socket. On the event loop."""
        self._loop.remove_writer(self._socket.fileno())
        with self._lock:
            self._open = False
            self._socket.close()

    def _wait(self, unsent: memoryview) -> None:
        if self._open:
            self._unsent = unsent
            self._loop.add_writer(self._socket.fileno(), self._flush)

    def _flush(self) -> None:
        with suppress(OSError):  # it is full, or has ended, which it says next
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        if not self._unsent:
            self._loop.remove_writer(self._socket.fileno())
