"""`Memory`: where the arrays of a link lie, one area for each direction, and what is done where there is none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from gateway.engines.isolated.area import Area, Span
from gateway.engines.isolated.layout import Layout, Value, read, write
from gateway.message import BadMessage
from gateway.types import Array


class Memory:
    """Used from the event loop and the engine's thread. `on_shortage` is told why arrays had to go by the line."""

    def __init__(self, on_shortage: Callable[[str], None]) -> None:
        self._on_shortage = on_shortage
        self._lock = threading.Lock()  # so that nothing is closed under a copy
        self._areas: tuple[Area, Area] | None = None
        try:
            self._areas = Area.create(), Area.create()
        except OSError as problem:
            on_shortage(str(problem))

    @property
    def descriptors(self) -> list[int]:
        """What the child needs of it, its inputs' first; none where there is no shared memory."""
        return [area.descriptor for area in self._areas or ()]

    def put(self, layout: Layout, values: Sequence[Value], span: Span) -> bytearray | None:
        """Put a batch's arrays there, where the child finds them; what of it must go by the line."""
        start, end = span
        with self._lock:
            if self._areas is not None:
                try:
                    block = self._areas[0].room(end)
                except OSError as problem:
                    self._on_shortage(str(problem))
                else:
                    write(memoryview(block)[start:], layout, values)
                    return None
        payload = bytearray(max(layout.size, 1))
        write(payload, layout, values)
        return payload

    def take(self, layout: Layout, payload: bytearray, start: int) -> dict[str, Array]:
        """The child's arrays, which begin at `start` if they did not come by the line, as our own. Raises `BadMessage`."""
        if not layout.size or payload:
            if len(payload) < layout.size:
                raise BadMessage(f"{len(payload)} bytes came with a message of {layout.size}")
            return read(payload or bytearray(1), layout, copy=False)
        with self._lock:
            if self._areas is None:
                raise BadMessage("a message says that it is in shared memory, and there is none")
            block = self._areas[1].seen(start + layout.size)
            return read(memoryview(block)[start:], layout, copy=True)

    def close(self) -> None:
        """Give it back."""
        with self._lock:
            for area in self._areas or ():
                area.close()
            self._areas = None
