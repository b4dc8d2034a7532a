"""The child's end of an instance's line: blocking, one frame after another."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

from gateway.engines.isolated.area import Area, Span
from gateway.engines.isolated.frames import CHUNK, Frame, Frames, Message, pack
from gateway.engines.isolated.layout import Layout, Value, write


class ChildLine:
    """Sends and receives frames on a socket, which it owns."""

    def __init__(self, line: socket.socket) -> None:
        self._socket = line
        self._frames = Frames()

    def receive(self) -> Frame | None:
        """The next frame; None when the gateway has closed the line, or is gone."""
        while (frame := self._frames.next()) is None:
            try:
                data = self._socket.recv(CHUNK)
            except ConnectionError:
                return None
            if not data:
                return None
            self._frames.feed(data)
        return frame

    def send(self, message: Message) -> None:
        """Send a message without arrays."""
        self._put(pack(message))

    def give(self, message: Message, layout: Layout, values: Sequence[Value], area: Area | None, span: Span) -> None:
        """Send a message and its arrays, through this span of shared memory if there is enough."""
        if layout.size and not (area is not None and _fits(area, layout, values, span)):
            payload = bytearray(layout.size)
            write(payload, layout, values)
            self._put(pack(message, layout.size))
            self._put(payload)
        else:
            self._put(pack(message))

    def _put(self, data: bytes | bytearray) -> None:
        with suppress(OSError):  # nobody is there any more, as `receive` will say
            self._socket.sendall(data)

    def close(self) -> None:
        """Tell the gateway that there is no more."""
        self._socket.close()


def _fits(area: Area, layout: Layout, values: Sequence[Value], span: Span) -> bool:
    start, end = span
    try:
        block = area.room(end)
    except OSError:
        return False  # the gateway sees it come by the line, counts it and tells
    write(memoryview(block)[start:], layout, values)
    return True
