"""`Idempotency-Key`: a request that is sent again under its key gets the answer of the first, and runs once.

A repeat while the first is under way waits for it, with its own deadline; if the first is cancelled, expires or fails,
the repeat runs. Answers are kept for five minutes, errors not at all: a request that was refused may be sent again as
it is. A key that comes with another body than before is a `Conflict`. Keys are a tenant's own, for one model and
version as they are named in the request.

Execution is at least once, as everywhere here: a gateway that dies with an answer leaves the next repeat to compute it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time

from gateway import errors
from gateway.middleware.digest import Digests
from gateway.middleware.flights import Counting, Flight, Flights, OneAnswer, Prepare, first
from gateway.middleware.store import ClaimStore, Kept, compact, replay, size_of
from gateway.types import Infer, InferRequest, InferResponse, Responses

_SECONDS = 300.0
_LARGEST = 256 << 10  # bytes of an answer that is kept


def idempotency(infer: Infer, prepare: Prepare, store: ClaimStore) -> Infer:
    """Wrap an endpoint so that requests with an idempotency key are answered once."""
    repeats = _Repeats(infer, prepare, store)

    def endpoint(request: InferRequest) -> Responses:
        return OneAnswer(repeats.answer, request) if request.idempotency_key else infer(request)

    return endpoint


class _Repeats:
    """The requests with a key: those under way in this process, and the store of those that are answered."""

    def __init__(self, infer: Infer, prepare: Prepare, store: ClaimStore) -> None:
        self._infer = infer
        self._prepare = prepare
        self._store = store
        self._flights = Flights()
        self._digests = Digests(classes=True)

    async def answer(self, request: InferRequest) -> InferResponse:
        """The one answer to a request with a key."""
        statistics = self._prepare(request).statistics
        started = time.monotonic_ns()
        with Counting(statistics, started):
            key = _key_of(request)
            body = await self._digests.of(request)
            response = await self._joined(key, body, request)
        if response is None:
            with self._flights.leading(key, request, body) as flight:
                with Counting(statistics, started):
                    response = await self._known(key, flight, request.deadline)
                if response is None:
                    return await self._run(key, flight)
                flight.land(Kept(body, response))
        statistics.record_success(time.monotonic_ns() - started, None, request.rows)
        return replay(response, request.id)

    async def _joined(self, key: bytes, body: bytes, request: InferRequest) -> InferResponse | None:
        """The answer of a run under way in this process; None when there is none any more."""
        while (flight := self._flights.of(key)) is not None:
            if flight.body != body and await flight.confirmed(request.deadline):
                raise errors.key_reused()
            kept = await flight.outcome(request.deadline)
            if kept is not None:
                return _same(kept, body).response
        return None

    async def _known(self, key: bytes, flight: Flight, deadline: float | None) -> InferResponse | None:
        """The answer that is kept, perhaps after a run elsewhere; None if it is for this process to run."""
        if deadline is None:
            return await self._claimed(key, flight)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._claimed(key, flight)
        except TimeoutError:
            raise errors.deadline_passed() from None

    async def _claimed(self, key: bytes, flight: Flight) -> InferResponse | None:
        while (kept := await self._store.claim(key, flight.body)) is not None:
            _same(kept, flight.body)
            flight.confirm()
            if not kept.pending:
                return kept.response  # None if it was too large to be kept: it is computed again
            await self._store.settled(key)
        flight.confirm()
        return None

    async def _run(self, key: bytes, flight: Flight) -> InferResponse:
        try:
            response = await first(self._infer, flight.request)
        except BaseException:
            self._store.release(key)
            raise
        if not response.final:  # one of many, which the transport refuses
            self._store.release(key)
            return response
        kept = Kept(flight.body, response)
        flight.land(kept)
        small = await compact(response) if size_of(kept) <= _LARGEST else None
        # Before the answer leaves: from then on a repeat finds it, whichever gateway it comes to.
        await self._store.put(key, Kept(flight.body, small), _SECONDS)
        return response


def _same(kept: Kept, body: bytes) -> Kept:
    if kept.body != body:
        raise errors.key_reused()
    return kept


def _key_of(request: InferRequest) -> bytes:
    named = (request.tenant, request.model_name, request.model_version, request.idempotency_key)
    return hashlib.sha256(repr(named).encode()).digest()
