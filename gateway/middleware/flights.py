"""Requests that wait for an equal one that is under way, and the `Responses` of a request with one answer.

A waiting request keeps its own deadline and can be cancelled; the run it waits for is another's. When that one ends
without an answer, whoever waited runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self, TypeAlias, TypeVar

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.middleware.store import Kept
from gateway.queues.base import Lane
from gateway.statistics import VersionStatistics
from gateway.types import Infer, InferRequest, InferResponse

T = TypeVar("T")


class Flight:
    """A run that equal requests may wait for."""

    __slots__ = ("_certain", "_over", "body", "failed", "request")

    def __init__(self, request: InferRequest, body: bytes) -> None:
        self.request = request
        self.body = body
        self.failed = False  # it ended with an error that was not for the lack of time
        loop = asyncio.get_running_loop()
        self._certain: asyncio.Future[bool] = loop.create_future()
        self._over: asyncio.Future[Kept | None] = loop.create_future()

    def confirm(self) -> None:
        """The key is known to belong to this body."""
        if not self._certain.done():
            self._certain.set_result(True)

    async def confirmed(self, deadline: float | None) -> bool:
        """Whether the key belongs to this body, once that is known; false when the run ended before it was.

        Raises `DeadlineExceeded` when the deadline comes first.
        """
        return await _outcome(self._certain, deadline)

    def land(self, kept: Kept | None) -> None:
        """The run is over or, with None, given up. Only the first call counts."""
        if not self._over.done():
            self._over.set_result(kept)
        if not self._certain.done():
            self._certain.set_result(False)

    async def outcome(self, deadline: float | None) -> Kept | None:
        """What it landed with. Raises `DeadlineExceeded` when the deadline comes first."""
        return await _outcome(self._over, deadline)


async def _outcome(future: asyncio.Future[T], deadline: float | None) -> T:
    left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
    # wait() leaves the future alone when the waiting task is cancelled; it is others' too.
    done, _ = await asyncio.wait([future], timeout=left)
    if not done:
        raise errors.deadline_passed()
    return future.result()


class Flights:
    """The runs under way, by the key of their request."""

    def __init__(self) -> None:
        self._flights: dict[bytes, Flight] = {}

    def of(self, key: bytes) -> Flight | None:
        """The run to wait for."""
        return self._flights.get(key)

    @contextmanager
    def leading(self, key: bytes, request: InferRequest, body: bytes = b"") -> Iterator[Flight]:
        """The caller runs this request, for all that wait for it until the block ends. `body` is the request's digest,
        where the key does not tell.
        """
        flight = self._flights[key] = Flight(request, body)
        try:
            yield flight
        except (errors.DeadlineExceeded, asyncio.CancelledError):
            raise  # it was out of time, or not wanted any more, which others need not be
        except BaseException:
            flight.failed = True
            raise
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
            flight.land(None)


class Prepared(Protocol):
    """A version that can answer a request, and the request fits it."""

    @property
    def lane(self) -> Lane:
        """Model and version, the version as a number."""

    @property
    def config(self) -> ModelConfig:
        """The version's configuration."""

    @property
    def statistics(self) -> VersionStatistics:
        """Where its requests are counted."""

    @property
    def digest(self) -> str:
        """See `VersionState`."""


Prepare: TypeAlias = Callable[[InferRequest], Prepared]
"""Resolves and checks a request and fixes its deadline. Raises `GatewayError`, which is counted already."""


class OneAnswer:
    """The `Responses` of a request that a coroutine function answers, begun when its answer is asked for."""

    __slots__ = ("_ask", "_asked", "_request")

    def __init__(self, ask: Callable[[InferRequest], Awaitable[InferResponse]], request: InferRequest) -> None:
        self._ask = ask
        self._request = request
        self._asked = False

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[InferResponse]:
        """The answer, or the error."""
        if self._asked:
            raise StopAsyncIteration
        self._asked = True
        return self._ask(self._request)

    async def aclose(self) -> None:
        """Nothing is left to close: what waits for the answer is cancelled with its task."""


async def first(infer: Infer, request: InferRequest) -> InferResponse:
    """The first answer to a request, which gives up any others."""
    responses = infer(request)
    try:
        return await anext(responses)
    except StopAsyncIteration:
        raise errors.Internal(f"model '{request.model_name}' ended without an answer") from None
    finally:
        await responses.aclose()


class Counting:
    """Counts a request that ends in this block, with an error or by its caller's leave, as one that failed."""

    __slots__ = ("_started", "_statistics")

    def __init__(self, statistics: VersionStatistics, started: int) -> None:
        """`started` is when the request began, in `time.monotonic_ns`."""
        self._statistics = statistics
        self._started = started

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, errors.GatewayError):
            self._statistics.record_refusal(error, time.monotonic_ns() - self._started)
        elif isinstance(error, asyncio.CancelledError):
            self._statistics.record_failure("CANCELED", time.monotonic_ns() - self._started)
