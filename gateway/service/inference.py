"""One accepted request on the gateway's side: it is submitted, its answers are counted, and its end is noted once."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol, Self

from gateway import errors
from gateway.queues.answers import Answers
from gateway.service.route import Route
from gateway.statistics.responses import Outcome
from gateway.types import EMPTY_FINAL, InferRequest, InferResponse, Responses


class Submit(Protocol):
    """What an inference needs of the service."""

    def submit(self, request: InferRequest) -> tuple[Responses, Route]:
        """Check and queue a request."""

    def end(self, request: InferRequest, route: Route) -> None:
        """The submitted request is over."""


class Inference:
    """The `Responses` of a request. Each ends in exactly one entry of the statistics: success, failure or cancelled."""

    __slots__ = ("_answered", "_ended", "_index", "_latest", "_request", "_responses", "_route", "_service", "_started")

    def __init__(self, service: Submit, request: InferRequest) -> None:
        self._service = service
        self._request = request
        self._responses: Responses | None = None  # None until begun
        self._answered = False
        self._ended = False
        self._index = 0  # of the next response, of a decoupled model

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> InferResponse:
        """The next answer, or the error."""
        if self._ended:
            raise StopAsyncIteration
        try:
            response = await (self._responses or self._submitted()).__anext__()
        except errors.GatewayError as error:
            self._fail(error)
            raise
        if self._route.config.decoupled:
            self._count("success" if response.outputs else "empty_response")
        if response.final:
            self._answered = True
            took = time.monotonic_ns() - self._started
            self._route.statistics.record_success(took, response.timings, self._request.rows)
        ends = response.final and not response.outputs and self._route.config.decoupled
        if ends and not self._request.parameters.get(EMPTY_FINAL):
            raise StopAsyncIteration
        return response

    async def aclose(self) -> None:
        """Cancel the request if it is not answered."""
        if self._ended:
            return
        self._ended = True
        if self._responses is None:
            return
        if not self._answered:
            self._route.statistics.record_failure("CANCELED", time.monotonic_ns() - self._started)
            if self._route.config.decoupled:
                self._count("cancel")
        self._service.end(self._request, self._route)
        await self._responses.aclose()

    # --- for those who need no task to wait

    def begin(self) -> asyncio.Future[InferResponse]:
        """What the one answer will be in; `finish`, which must be called then, says what it is. Raises `GatewayError`.

        Not for models that are made of others, nor for decoupled ones.
        """
        responses = self._submitted()
        assert isinstance(responses, Answers), "it takes a task to wait for these"
        return responses.__anext__()

    def finish(self, waiter: asyncio.Future[InferResponse]) -> InferResponse:
        """The answer that `begin` gave this for, or the error; the request is over with that, even without either."""
        responses, route = self._responses, self._route
        assert isinstance(responses, Answers)
        self._ended = True
        took = time.monotonic_ns() - self._started
        try:
            response = waiter.result()
        except errors.GatewayError as error:
            route.statistics.record_refusal(error, took)
            raise
        except BaseException:
            route.statistics.record_failure("CANCELED", took)
            raise
        else:
            if response.final:
                route.statistics.record_success(took, response.timings, self._request.rows)
            else:
                route.statistics.record_failure("CANCELED", took)
            return response
        finally:
            del waiter  # which holds the error that holds this frame
            self._service.end(self._request, route)
            responses.close()

    # --- within

    def _submitted(self) -> Responses:
        self._started = self._latest = time.monotonic_ns()
        try:
            self._responses, self._route = self._service.submit(self._request)
        except errors.GatewayError:
            self._ended = True  # refused, and counted, before it began
            raise
        return self._responses

    def _fail(self, error: errors.GatewayError) -> None:
        if self._ended:
            return
        self._answered = True
        self._route.statistics.record_refusal(error, time.monotonic_ns() - self._started)
        if self._route.config.decoupled and not error.reason:  # which those have that no model answered
            self._count("fail")

    def _count(self, outcome: Outcome) -> None:
        now = time.monotonic_ns()
        self._route.statistics.record_response(self._index, outcome, now - self._latest)
        self._index += 1
        self._latest = now
