"""When a transport received a request and sent its responses, for the trace of the request if one is made.

Made by a transport only while requests may be traced, and put where the trace will be (`InferRequest.trace`). What is
traced ends when the transport has sent all there is to send.
"""

from __future__ import annotations

import time
from collections.abc import Callable

RECEIVE = {"HTTP": ("HTTP_RECV_START", "HTTP_RECV_END"), "GRPC": ("GRPC_WAITREAD_START", "GRPC_WAITREAD_END")}


class WireTimes:
    """The timestamps of one request on the wire, by Triton's names, in `time.monotonic_ns`."""

    __slots__ = ("_closed", "_kind", "_told", "stamps")

    def __init__(self, kind: str, began: float | None = None) -> None:
        """A request that began to come now or then, in `time.monotonic` seconds, over HTTP or GRPC."""
        self._kind = kind
        self.stamps = [(RECEIVE[kind][0], time.monotonic_ns() if began is None else int(began * 1e9))]
        self._closed = False
        self._told: Callable[[], None] | None = None

    def received(self) -> None:
        """It is there as a whole."""
        self.stamps.append((RECEIVE[self._kind][1], time.monotonic_ns()))

    def sending(self) -> None:
        """A response goes out."""
        self.stamps.append((f"{self._kind}_SEND_START", time.monotonic_ns()))

    def sent(self) -> None:
        """It went out, if it did."""
        if self.stamps[-1][0].endswith("_SEND_START"):
            self.stamps.append((f"{self._kind}_SEND_END", time.monotonic_ns()))

    def close(self) -> None:
        """No more is sent."""
        self._closed = True
        if self._told is not None:
            told, self._told = self._told, None
            told()

    def when_closed(self, told: Callable[[], None]) -> None:
        """Call this at the end, which may have been."""
        if self._closed:
            told()
        else:
            self._told = told
