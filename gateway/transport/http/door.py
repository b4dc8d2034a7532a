"""Which infer requests are refused before they are read, what they are told, and which are read on the way.

Reading a request to refuse it costs as much as a third of answering it, and those who are refused may come back at
once. So requests like others that were refused a moment ago are answered on granian's thread, where they come in, and
the event loop is left to those that can be answered. It only hears how many there were.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from functools import lru_cache
from typing import Any

from gateway.errors import GatewayError, Overloaded
from gateway.service import Behind, Service
from gateway.telemetry import Refusals
from gateway.transport.auth import Callers
from gateway.transport.http.endpoint import seconds_left
from gateway.transport.http.handover import Head
from gateway.transport.http.replies import Reply, error_reply
from gateway.transport.idempotency import HEADER

_ARRIVED = 1 << 16  # such a body came with its head; a client that still sends a larger one might not read an answer
_WARY = 1.0  # seconds
_WHY = "overloaded: too much waits for the request to be answered by its deadline"
_MODELS = "/v2/models/"
_INFER = "/infer"


class InferDoor:
    """A `Door` for the infer requests to a service. To be made on the event loop, which counts those turned away.

    It is open to all until somebody was refused inside, and then for a while asks who would be too.
    """

    def __init__(self, service: Service, callers: Callers, refusals: Refusals, small: int = -1) -> None:
        """`small` is how many bytes a body may have that is asked for before the event loop has its request; -1: none."""
        self._service = service
        self._small = small
        self._callers = callers
        self._refusals = refusals
        self._away: deque[tuple[str, str]] = deque()  # those that the loop has not heard of
        self._telling = False
        self.shut_until = 0.0
        self._loop = asyncio.get_running_loop()

    def refused(self, error: GatewayError) -> None:
        """A request that was let in got this answer."""
        if isinstance(error, Overloaded):
            self.shut_until = time.monotonic() + _WARY

    def turn_away(self, scope: Any, now: float, behind: Behind) -> Reply | None:
        """See `Door`."""
        if scope.query_string:  # it asks for a job, which has time
            return None
        # A tenant's share is its own: whose request it is would have to be found out first.
        if not self._callers.anonymous or scope.method != "POST" or (target := infer_target(scope.path)) is None:
            return None
        header = scope.headers.get
        timeout = header("x-request-timeout-ms")
        # A request that was made before may have its answer waiting.
        if timeout is None or header(HEADER) is not None or not _within(header("content-length"), _ARRIVED):
            return None
        try:
            left = seconds_left(timeout)
        except GatewayError:
            return None
        again = self._service.turn_away(target, now, now + left, behind)
        if again is None:
            return None
        self._away.append(target)
        if not self._telling:
            # Before the answer is sent: who has seen the answer sees it counted.
            self._telling = True
            self._loop.call_soon_threadsafe(self._tell)
        return _refusal(math.ceil(1e3 * again))

    def reads(self, scope: Any) -> Head | None:
        """See `Door`. Where there are tokens, a body is read when it is known who sends it."""
        if not self._callers.welcome or scope.method != "POST" or (target := infer_target(scope.path)) is None:
            return None
        header = scope.headers.get
        return (target, header) if _within(header("content-length"), self._small) else None

    def _tell(self) -> None:
        """On the event loop: count them."""
        self._telling = False  # whoever comes from now on is told of anew
        away = Counter[tuple[str, str]]()
        while self._away:
            away[self._away.popleft()] += 1
        for target, times in away.items():
            self._service.turned_away(target, _refused(0), times)
            self._refusals.note(Overloaded.__name__, times, wire="http", reason=_WHY)


@lru_cache(1024)
def _refusal(milliseconds: int) -> Reply:
    return error_reply(_refused(milliseconds))


def _refused(milliseconds: int) -> Overloaded:
    return Overloaded(_WHY, milliseconds / 1e3)


@lru_cache(1024)
def infer_target(path: str) -> tuple[str, str] | None:
    """Model and version of an infer path, or None for another path."""
    if not (path.startswith(_MODELS) and path.endswith(_INFER)):
        return None
    model, slash, rest = path[len(_MODELS) : -len(_INFER)].partition("/")
    if not slash:
        return (model, "") if model else None
    word, _, version = rest.partition("/")
    return (model, version) if model and word == "versions" and version.isascii() and version.isdecimal() else None


def _within(length: str | None, most: int) -> bool:
    return length is not None and length.isdecimal() and int(length) <= most
