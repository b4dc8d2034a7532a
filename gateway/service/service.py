"""Resolves model and version to a lane, checks and submits requests; answers what clients ask about models.

It knows models only through what workers publish in the `Queue`, so it is the same with workers in this
process or on other machines. It keeps no request: once submitted, a request is the queue's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gateway import __version__, errors
from gateway.config.model import ModelConfig
from gateway.queues.base import Lane, Load, PoolState, Queue, Unload
from gateway.service.check import Checker
from gateway.service.controls import Controls
from gateway.service.inference import Inference
from gateway.service.parameters import apply_parameters
from gateway.service.reports import Reports, count, degraded, running
from gateway.service.route import MakeSubmit, Route, Submit, pick
from gateway.statistics import ModelStatistics, Statistics
from gateway.types import InferRequest, Responses

EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "redis_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
"""The extensions that work here, if they are allowed, in Triton's order (`core/src/server.cc`), which lacks Redis."""


_LET_THROUGH = 16  # at least one in so many is read, and asked for its priority
_READ_EVERY = 0.005  # seconds; as often as this reading one costs next to nothing
_BEHIND = 0.003  # seconds; an event loop this far behind saves its time for requests that can be answered
_FAR_BEHIND = 0.01  # seconds; further behind than this it is the loop that is overloaded,
_TURNS = 8  # if a request would also wait for so many of its turns, and they are all the time there is
_CROWD = 16  # requests on their way to the loop: enough for now, where
_RECENTLY = 0.2  # seconds ago others were refused


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What the operator chose; see the settings of the same names."""

    server_id: str = "triton"
    strict_readiness: bool = True
    explicit_control: bool = False
    max_inflight_bytes: int = 1 << 30
    default_deadline_ms: float = 0.0
    without: Collection[str] = ("system_shared_memory", "redis_shared_memory")  # of the extensions


class Behind(NamedTuple):
    """How far the event loop is behind with the requests that are handed to it."""

    seconds: float
    requests: int


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One version of one model in the repository index; a never-loaded model has a name only."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class Service:
    """The one thing both transports talk to. All methods raise `GatewayError` and run on the event loop."""

    def __init__(
        self,
        queue: Queue,
        statistics: Statistics,
        repository_names: Callable[[], Awaitable[Sequence[str]]],
        options: ServiceOptions,
        *,
        fleet: Callable[[], Awaitable[Statistics]] | None = None,
        reports: Reports | None = None,
        controls: Controls | None = None,
    ) -> None:
        """`statistics` are this process's own. Where there are others, `fleet` gives the sum over all, and `reports`
        what each worker has to say of a version.
        """
        self.controls = controls or Controls()
        self._queue = queue
        self._statistics = statistics
        self._fleet = fleet or statistics.whole
        self._reports = reports
        self._repository_names = repository_names
        self._options = options
        self.composed: Mapping[str, MakeSubmit] = {}  # by platform, what to submit to in place of the queue
        self._routes: dict[tuple[str, str], Route] = {}
        self._inflight_bytes = 0
        self._unread = 0
        self._read_at = 0.0
        self._closed: dict[tuple[str, str], float] = {}  # when `turn_away` said so last, by model and version
        self._open = 0  # submitted and not over
        self._all_over = asyncio.Event()
        self._draining = False
        self._started = False

    # --- inference

    def infer(self, request: InferRequest) -> Inference:
        """Run a request (an `Infer`). It begins when the first answer is asked for; closing cancels it."""
        return Inference(self, request)

    def turn_away(self, target: tuple[str, str], now: float, deadline: float, behind: Behind) -> float | None:
        """Whether a request need not be read, because it would be refused: None, or when to try again, in seconds.

        So it is when one like it was refused a moment ago and nothing has changed since, or when the event loop is
        `behind` by much of the time it has. Its priority is not known yet: some are let through all the time, and
        one of another priority ends this. Changes nothing that others see, so that other threads may ask.
        """
        route = self._routes.get(target)
        if route is None or route.admission is None or route.pool is not self._queue.pool(target[0]):
            return None
        if self._draining or route.config.response_cache is not None:  # where an answer may be found without a run
            return None
        again = route.admission.turn_away(deadline - behind.seconds)
        if again is not None:
            self._closed[target] = now
            if behind.seconds < _BEHIND and now - self._read_at > _READ_EVERY:
                self._read_at, self._unread = now, 0
                return None
        elif behind.seconds > max(_FAR_BEHIND, (deadline - now) / _TURNS) or (
            behind.requests > _CROWD and now - self._closed.get(target, 0.0) < _RECENTLY
        ):
            again = max(behind.seconds, _RECENTLY)
        else:
            return None
        self._unread += 1
        return again if self._unread % _LET_THROUGH else None

    def turned_away(self, target: tuple[str, str], error: errors.GatewayError, times: int) -> None:
        """So many requests were refused with this error because `turn_away` said so."""
        if (route := self._routes.get(target)) is not None and route.admission is not None:
            route.statistics.record_refusal(error, 0, times)
            route.admission.turned_away(times)

    def check(self, request: InferRequest) -> None:
        """Check a request that is to be run later; its `deadline` may be set by its parameters, and by nothing else."""
        if self._draining:
            raise errors.stopping()
        route = self._resolve(request.model_name, request.model_version)
        try:
            if route.config.decoupled:
                raise errors.Unsupported("async jobs don't support models with decoupled transaction policy")
            if request.places is not None:
                raise errors.Unsupported(
                    "a request with tensors in shared memory cannot be an async job, because the client may have taken "
                    "the memory back when it runs; send the data with the request"
                )
            if request.parameters.get("sequence_id"):
                raise errors.Unsupported("a request of a sequence cannot be an async job, because those may run twice")
            apply_parameters(request)
            route.checker.check(request)
        except errors.GatewayError as error:
            route.statistics.record_refusal(error, 0)
            raise

    def prepare(self, request: InferRequest) -> Route:
        """Resolve and check a request, and fix its deadline. Middleware may do so before the request is submitted."""
        if self._draining and not request.callers:  # what an accepted request needs is accepted too
            raise errors.stopping()
        route = self._resolve(request.model_name, request.model_version)
        try:
            if request.one_answer and route.config.decoupled:
                raise errors.one_answer_only()
            if request.parameters:
                apply_parameters(request)
            if request.deadline is None and route.default_deadline:
                request.deadline = time.monotonic() + route.default_deadline
            route.checker.check(request)
        except errors.GatewayError as error:
            route.statistics.record_refusal(error, 0)
            raise
        return route

    def submit(self, request: InferRequest) -> tuple[Responses, Route]:
        """Check, admit and queue a request, its bytes reserved; `end` gives them back. For `Inference`."""
        route = self.prepare(request)
        try:
            # A lone request is always let in, however large: the transport's own limit bounded it.
            if self._inflight_bytes and self._inflight_bytes + request.size > self._options.max_inflight_bytes:
                self._require_room(request)
            if route.admission is not None and (
                request.deadline is not None or request.priority or request.tenant or route.admission.asks_all
            ):
                route.admission.admit(request)
                request.admitted = True
        except errors.GatewayError as error:
            route.statistics.record_refusal(error, 0)
            raise
        self._inflight_bytes += request.size
        self._open += 1
        route.statistics.pending += 1
        try:
            return route.submit(route.lane, request), route
        except errors.GatewayError as error:
            route.statistics.record_refusal(error, 0)
            self.end(request, route)
            raise

    def end(self, request: InferRequest, route: Route) -> None:
        """A submitted request is over, however it ended. For `Inference`."""
        if request.admitted and route.admission is not None:
            route.admission.settle(request)
            counted, deadline = route.statistics, request.deadline
            counted.admitted += 1
            if deadline is not None and time.monotonic() > deadline:
                counted.late += 1
        self._inflight_bytes -= request.size
        self._open -= 1
        if not self._open:
            self._all_over.set()
        route.statistics.pending -= 1

    def _require_room(self, request: InferRequest) -> None:
        if request.callers:
            return  # what an accepted request needs is accepted too, else it would wait for its own end
        limit = self._options.max_inflight_bytes
        raise errors.too_many_bytes(
            f"the gateway holds {self._inflight_bytes} bytes of requests and its limit is {limit}"
        )

    def _resolve(self, name: str, version: str) -> Route:
        pool = self._queue.pool(name)
        if pool is None:
            raise errors.unknown_model(name)
        route = self._routes.get((name, version))
        if route is not None and route.pool is pool:
            return route
        state = pick(pool, version)
        assert state.config is not None
        own, lane = state.config.default_deadline_ms, Lane(name, state.version)
        route = Route(
            pool,
            lane,
            state.config,
            Checker(state.config),
            self._statistics.of(name, state.version, state.epoch),
            state.admission,
            (self._options.default_deadline_ms if own is None else own) / 1000,
            state.digest,
            state.instances,
            self._submit_to(lane, state.config),
        )
        self._routes = {key: kept for key, kept in self._routes.items() if self._queue.pool(key[0]) is kept.pool}
        self._routes[name, version] = route
        return route

    def _submit_to(self, lane: Lane, config: ModelConfig) -> Submit:
        make = self.composed.get(config.platform)
        return self._queue.submit if make is None else make(lane, config)

    # --- health and metadata

    def live(self) -> bool:
        """True while the process serves at all."""
        return not self._draining

    def ready(self) -> bool:
        """True when requests can be served: started, not draining and, if strict, every loaded model ready."""
        if self._draining or not self._started or not self._queue.healthy():
            return False
        if not self._options.strict_readiness:
            return True
        return all(_pool_ready(pool) for pool in self._queue.pools())

    def degraded(self) -> Sequence[Mapping[str, Any]]:
        """The ready versions whose instances do not all run on what they should, and why."""
        return degraded(self._queue.pools())

    def server_metadata(self) -> tuple[str, str, tuple[str, ...]]:
        """Name, version and extensions of this server."""
        told = tuple(each for each in EXTENSIONS if each not in self._options.without)
        return self._options.server_id, __version__, told

    def model_ready(self, name: str, version: str = "") -> bool:
        """True when the version (the newest, if empty) answers. Raises as `infer` would for an unknown model."""
        for step in self._resolve(name, version).config.steps:
            self.model_ready(step.model, step.version)
        return not self._draining

    def model_config(self, name: str, version: str = "") -> ModelConfig:
        """The complete configuration of a ready version."""
        return self._resolve(name, version).config

    def instances(self, name: str, version: str = "") -> Sequence[Mapping[str, Any]]:
        """What a ready version runs on, and from what; see `running`."""
        return running(self._resolve(name, version).instances)

    async def explain(self, name: str, version: str = "") -> Mapping[str, Any]:
        """What was decided about the requests of a ready version and why; see `Admission.explain`.

        Where workers are other processes, what each of them said is in the list `workers`.
        """
        route = self._resolve(name, version)
        told = {} if route.admission is None else dict(route.admission.explain(route.default_deadline))
        if self._reports is not None:
            told["workers"] = await self._reports(*route.lane)
        counted = count((await self._fleet()).of(*route.lane))
        return {"model": name, "version": route.lane.version, "instances": running(route.instances), **counted, **told}

    def ready_versions(self, name: str) -> list[str]:
        """The versions of a model that are ready, oldest first."""
        pool = self._queue.pool(name)
        return [state.version for state in pool.versions if state.state == "READY"] if pool else []

    async def statistics(self, name: str = "", version: str = "") -> list[ModelStatistics]:
        """Triton's `model_stats` entries of one version, one model, or (name empty) every ready model.

        They are sums over the processes.
        """
        if not name:
            targets = [(pool.model, v) for pool in self._queue.pools() for v in self.ready_versions(pool.model)]
        elif version:
            targets = [(name, version)] if version in self.ready_versions(name) else []
        else:
            targets = [(name, ready) for ready in self.ready_versions(name)]
        if name and not targets:
            which = f"{name}' version {version}" if version else f"{name}'"
            raise errors.InvalidArgument(f"requested model '{which} is not available")
        total = await self._fleet()
        return [total.of(*target).to_triton() for target in targets]

    # --- model control

    async def index(self, *, ready: bool = False) -> list[IndexEntry]:
        """Every model of the repositories and the state of its versions; `ready` keeps only the ready."""
        known = {pool.model: pool for pool in self._queue.pools()}
        names = sorted(known.keys() | set(await self._repository_names()))
        entries = [entry for name in names for entry in _index_entries(name, known.get(name))]
        return [entry for entry in entries if entry.state == "READY"] if ready else entries

    async def load(self, name: str, parameters: dict[str, str]) -> None:
        """Load or reload a model and return when it serves, or raise why it does not."""
        self._require_explicit()
        await self._queue.send(Load(name, parameters))

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        """Stop a model once its accepted requests are answered, and with `dependents` what was loaded for it alone."""
        self._require_explicit()
        await self._queue.send(Unload(name, dependents))

    def _require_explicit(self) -> None:
        if not self._options.explicit_control:
            raise errors.Unavailable("explicit model load / unload is not allowed if polling is enabled")

    # --- life

    def start(self) -> None:
        """Readiness may be reported from now on: the first loads have been carried out."""
        self._started = True

    def drain(self) -> None:
        """Refuse new requests; those accepted go on."""
        self._draining = True

    async def finished(self) -> None:
        """Wait until every accepted request is answered, by whichever worker."""
        while self._open:
            self._all_over.clear()
            await self._all_over.wait()


def _pool_ready(pool: PoolState) -> bool:
    if not pool.versions:
        return not pool.reason
    return all(state.state == "READY" or state.reason == "unloaded" for state in pool.versions)


def _index_entries(name: str, pool: PoolState | None) -> list[IndexEntry]:
    if pool is None:
        return [IndexEntry(name)]
    if not pool.versions:
        return [IndexEntry(name, "", "UNAVAILABLE", pool.reason)]
    return [IndexEntry(name, state.version, state.state, state.reason) for state in pool.versions]
