"""The response cache: models with `response_cache { enable: true }` answer equal requests out of memory.

Two requests are equal when tenant (unless the model is marked public), model, resolved version, what that version
computes, inputs, requested outputs and parameters are. A version that is loaded anew with other files or another
configuration has other keys, so nothing needs to be cleared. Equal requests at the same time run once; each keeps its
own deadline and can be cancelled, and where that run fails, the others run by themselves.

Counts as Triton does: a hit is a success without an inference, a miss the time that the cache took in vain. A request
that waited for an equal one is a hit, and its wait is not in the time of the lookup.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.middleware.digest import Digests
from gateway.middleware.flights import Counting, Flight, Flights, OneAnswer, Prepare, Prepared, first
from gateway.middleware.store import Kept, Store, compact, replay
from gateway.types import Infer, InferRequest, InferResponse, Responses

ConfigOf = Callable[[str, str], ModelConfig]
"""The configuration of a model's version, the newest if empty. Raises `GatewayError` when none is ready."""

_SECONDS = 3600.0


def response_cache(infer: Infer, prepare: Prepare, config_of: ConfigOf, store: Store) -> Infer:
    """Wrap an endpoint so that models which ask for it have their responses cached."""
    cache = _Cache(infer, prepare, config_of, store)

    def endpoint(request: InferRequest) -> Responses:
        return OneAnswer(cache.answer, request) if cache.serves(request) else infer(request)

    return endpoint


class _Cache:
    """The requests to models with a response cache: those under way, and the store of responses."""

    def __init__(self, infer: Infer, prepare: Prepare, config_of: ConfigOf, store: Store) -> None:
        self._infer = infer
        self._prepare = prepare
        self._config_of = config_of
        self._store = store
        self._flights = Flights()
        self._digests = Digests()

    def serves(self, request: InferRequest) -> bool:
        """Whether the request is for a model whose responses are cached."""
        try:
            return self._config_of(request.model_name, request.model_version).response_cache is not None
        except errors.GatewayError:
            return False  # the endpoint says what is wrong, and counts it

    async def answer(self, request: InferRequest) -> InferResponse:
        """The answer to a request, kept or computed."""
        started = time.monotonic_ns()
        target = self._prepare(request)
        options = target.config.response_cache
        if options is None or not target.digest:
            return await first(self._infer, request)
        with Counting(target.statistics, started):
            tenant = None if options.public else request.tenant
            key = await self._digests.of(request, (tenant, *target.lane, target.digest))
            kept = await self._store.get(key)
            lookup_ns = time.monotonic_ns() - started
            if kept is None:
                kept = await self._joined(key, request)
        if kept is None:
            with self._flights.leading(key, request) as flight:
                return await self._run(key, flight, target, lookup_ns)
        assert kept.response is not None
        target.statistics.record_cache_hit(time.monotonic_ns() - started, lookup_ns, request.rows)
        return replay(kept.response, request.id)

    async def _joined(self, key: bytes, request: InferRequest) -> Kept | None:
        """The answer of a run under way; None when there is none to wait for."""
        while (flight := self._flights.of(key)) is not None and _as_urgent(flight.request, request):
            kept = await flight.outcome(request.deadline)
            if kept is not None or flight.failed:
                return kept
        return None

    async def _run(self, key: bytes, flight: Flight, target: Prepared, lookup_ns: int) -> InferResponse:
        response = await first(self._infer, flight.request)
        answered = time.monotonic_ns()
        if response.final:
            flight.land(Kept(b"", response))
            # Another may have run it: one that was loaded meanwhile, here or where this gateway has not heard of it.
            if (response.model_version, response.digest) == (target.lane.version, target.digest):
                await self._store.put(key, Kept(b"", await compact(response)), _SECONDS)
        target.statistics.record_cache_miss(lookup_ns + time.monotonic_ns() - answered)
        return response


def _as_urgent(flying: InferRequest, request: InferRequest) -> bool:
    """Whether waiting for one request costs the other no time that it would be given by itself."""
    sooner = (flying.deadline or math.inf) <= (request.deadline or math.inf)
    return sooner and flying.priority == request.priority
