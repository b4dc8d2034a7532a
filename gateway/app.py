"""The composition root: builds the parts, starts them in order and stops them in reverse.

Start: queue, repository, worker, service, listeners, then the models, each answering as soon as it is ready.
Stop: readiness off and no new requests, accepted ones answered, listeners closed, worker ended. This is the
only file that knows all the parts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from gateway import engines, placement
from gateway.config.ensemble import PLATFORM
from gateway.config.settings import Settings
from gateway.devices.cpu import CpuMeter
from gateway.devices.monitor import Monitor
from gateway.devices.nvml import open_nvml
from gateway.engines.isolated.children import Children
from gateway.fleet import Fleet, joined
from gateway.jobs.parameters import by_parameter
from gateway.middleware.access_log import access_log
from gateway.middleware.cache import response_cache
from gateway.middleware.classification import classification
from gateway.middleware.ensemble import Ensembles
from gateway.middleware.idempotency import idempotency
from gateway.middleware.recorded import recorded
from gateway.middleware.shared_memory import Limits, shared_memory
from gateway.middleware.store import ClaimStore, MemoryStore, Store
from gateway.middleware.traced import traced
from gateway.middleware.tracing import tracing_parts
from gateway.models import keep_models, open_repository
from gateway.queues.base import Queue
from gateway.repository import Repository
from gateway.service import Service
from gateway.service.client_memory import client_memory, without_memory
from gateway.service.measures import FleetMeasures
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.telemetry import Family, log_event
from gateway.transport import configured
from gateway.transport.auth import Callers
from gateway.transport.device_metrics import DeviceMetrics
from gateway.transport.grpc import GrpcServer
from gateway.transport.http import Counted, HttpApp, HttpServer
from gateway.transport.http.control import health
from gateway.transport.metrics import MetricsApp, Own
from gateway.types import Infer
from gateway.worker import Worker, open_worker

if TYPE_CHECKING:
    from gateway.jobs.jobs import Jobs
    from gateway.jobs.runner import JobRunner
    from gateway.queues.redis.queue import RedisQueue


@dataclass(slots=True)
class Gateway:
    """A running gateway: where it listens, and its models. `loaded` is set once the first loads have ended."""

    service: Service
    queue: Queue
    repository: Repository
    ensembles: Ensembles
    monitor: Monitor  # of the GPUs
    ports: dict[str, int] = field(default_factory=dict)  # "http", "grpc", "metrics"
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    jobs: Jobs | None = None  # where there is a Redis to keep them
    runner: JobRunner | None = None
    children: Children | None = None
    measures: FleetMeasures | None = None  # of models' code
    listeners: list[HttpServer | GrpcServer] = field(default_factory=list)

    async def leave(self) -> None:
        """Leave the ports to the other processes that listen on them; what is accepted goes on."""
        async with asyncio.TaskGroup() as tasks:
            for listener in self.listeners:
                if isinstance(listener, HttpServer):
                    tasks.create_task(listener.leave())
            for listener in self.listeners:
                if isinstance(listener, GrpcServer):
                    await listener.leave()  # it may end here, so in the task that began it

    def metrics(self) -> list[Family]:
        """What this process has to tell beside its models. Reads files: call it off the event loop."""
        return [*(self.children.metrics() if self.children is not None else ()), *self.repository.metrics()]

    def failures(self) -> list[str]:
        """The models that did not load, each with its reason."""
        return [
            f"{pool.model}: {pool.reason or '; '.join(state.reason for state in pool.versions if state.reason)}"
            for pool in self.queue.pools()
            if pool.reason
            or any(state.state == "UNAVAILABLE" and state.reason != "unloaded" for state in pool.versions)
        ]


@asynccontextmanager
async def running(settings: Settings) -> AsyncGenerator[Gateway, None]:
    """Run a gateway for the duration of the block; leaving it drains and stops.

    Raises `OSError` when a port is taken and `GatewayError` when a repository cannot be read.
    """
    statistics = Statistics()
    gpus = [] if settings.role == "gateway" else await asyncio.to_thread(engines.gpus)
    repository = open_repository(settings, gpus)
    names = list(await asyncio.to_thread(repository.scan))
    monitor = await _monitor(settings)
    async with (
        joined(settings, statistics) as fleet,
        monitor.running(),
        Children.of(settings, statistics) as children,
        asyncio.TaskGroup() as tasks,
    ):
        queue = fleet.queue
        queue.repository_names(names)
        worker = open_worker(settings, queue, repository.read, placement.devices(settings.cpu_cores, gpus), statistics)
        worker.children = children
        works = settings.role != "gateway"
        service = Service(
            queue,
            statistics,
            lambda: _names(queue, repository),
            _options(settings),
            fleet=fleet.statistics,
            reports=fleet.reports(worker.explain if works else None),
            controls=fleet.controls(settings),
        )
        children.infer = tracing_parts(service.infer)
        ensembles = _ensembles(statistics, service, worker, tasks)
        measures = fleet.measures(children.measures)
        gateway = Gateway(service, queue, repository, ensembles, monitor, children=children, measures=measures)
        working = tasks.create_task(worker.run()) if works else None
        async with AsyncExitStack() as listeners:
            await _listen(listeners, settings, gateway, fleet)
            models = tasks.create_task(_keep(settings, repository, gateway, names))
            try:
                yield gateway
            finally:
                log_event("draining")
                service.drain()
                queue.leave()
                models.cancel()
                try:
                    await _drain(worker, gateway, settings.exit_timeout_secs)
                finally:
                    queue.close()
        if working is not None:
            working.cancel()


def _ensembles(statistics: Statistics, service: Service, worker: Worker, tasks: asyncio.TaskGroup) -> Ensembles:
    ensembles = Ensembles(statistics, service.infer, tasks)
    service.composed = {PLATFORM: ensembles.route}
    worker.ensembles_drained = ensembles.drained
    return ensembles


async def _monitor(settings: Settings) -> Monitor:
    nvml = await asyncio.to_thread(open_nvml) if settings.allow_gpu_metrics else None
    return Monitor(nvml, settings.metrics_interval_ms / 1000)


def _device_metrics(settings: Settings, monitor: Monitor) -> DeviceMetrics:
    return DeviceMetrics(monitor, CpuMeter() if settings.allow_cpu_metrics else None)


async def _names(queue: Queue, repository: Repository) -> list[str]:
    """The names of the models in every repository of the fleet."""
    return sorted(queue.repository_names(await asyncio.to_thread(repository.scan)))


async def _drain(worker: Worker, gateway: Gateway, seconds: int) -> None:
    if gateway.jobs is not None:
        gateway.jobs.end_watches()
    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
            tasks.create_task(worker.drain())
            tasks.create_task(gateway.service.finished())
            if gateway.runner is not None:
                tasks.create_task(gateway.runner.drain())
    except TimeoutError:
        log_event("drain_timed_out", logging.WARNING, seconds=seconds)


def _options(settings: Settings) -> ServiceOptions:
    return ServiceOptions(
        server_id=settings.server_id,
        strict_readiness=settings.strict_readiness,
        explicit_control=settings.model_control_mode == "explicit",
        max_inflight_bytes=settings.max_inflight_bytes,
        default_deadline_ms=settings.default_deadline_ms,
        without=without_memory(settings),
    )


async def _endpoint(stack: AsyncExitStack, settings: Settings, gateway: Gateway, fleet: Fleet) -> Infer:
    """The whole stack that both transports call."""
    service = gateway.service
    repeats, responses = await _stores(stack, settings, fleet.redis)
    infer: Infer = service.infer
    if settings.response_cache_bytes:
        infer = response_cache(infer, service.prepare, service.model_config, responses)
    gateway.ensembles.root = tracing_parts(
        infer
    )  # a step is no client's request: nothing to log, to record or to know again
    infer = classification(infer, service.model_config)
    infer = idempotency(infer, service.prepare, repeats)
    infer = await traced(stack, settings, infer, service.controls.traces)
    return await recorded(stack, settings, access_log(infer) if settings.log_access else infer)


async def _stores(stack: AsyncExitStack, settings: Settings, queue: RedisQueue | None) -> tuple[ClaimStore, Store]:
    """Where answers are kept for requests that come again: where the queue is."""
    if queue is None:
        keys = MemoryStore(settings.idempotency_bytes, warns="idempotency_keys_forgotten")
        return keys, MemoryStore(settings.response_cache_bytes)
    from gateway.middleware.redis_store import RedisStore, SharedStore

    client, seal = queue.client, queue.seal
    shared = RedisStore(client, client.keys.idempotency, seal, settings.idempotency_bytes)
    return await stack.enter_async_context(shared), SharedStore(
        client, client.keys.cached, seal, settings.response_cache_bytes
    )


# --- listeners


async def _listen(stack: AsyncExitStack, settings: Settings, gateway: Gateway, fleet: Fleet) -> None:
    """Open the ports, metrics first and so closed last."""
    tokens = configured.tokens(settings)
    callers = Callers(tokens, settings.tenant_header)
    service = gateway.service
    regions = await client_memory(stack, settings, service.controls.registers, fleet.host)
    infer = await _endpoint(stack, settings, gateway, fleet)
    limits = Limits(settings.max_request_bytes, settings.max_inflight_bytes)
    infer = shared_memory(infer, None if regions is None else regions.regions, limits, service.model_config)
    if fleet.client is not None and settings.role != "worker":
        from gateway.jobs.start import open_jobs, run_jobs

        gateway.jobs = await stack.enter_async_context(open_jobs(settings, fleet.client, service.check))
        runner = run_jobs(settings, gateway.jobs, infer, service.model_config, gateway.loaded)
        gateway.runner = await stack.enter_async_context(runner)
    if settings.allow_metrics:
        metrics = HttpServer(
            Counted(
                MetricsApp(
                    fleet.statistics,
                    tokens,
                    process=fleet.process,
                    figures=fleet.figures,
                    health=partial(health, gateway.service),
                    own=Own(
                        _device_metrics(settings, gateway.monitor),
                        gateway.queue.pools,
                        gateway.metrics,
                        gateway.measures,
                    ),
                ).__rsgi__
            ),
            settings.metrics_address,
            settings.metrics_port,
            share=settings.share_ports,
            listener=configured.inherited(settings.metrics_fd),
        )
        await _open(stack, gateway, "metrics", metrics)
    if settings.allow_grpc:
        authenticate = None if callers.anonymous else callers.tenant
        grpc = GrpcServer(
            service, by_parameter(infer, gateway.jobs), authenticate, configured.grpc_options(settings), regions
        )
        await _open(stack, gateway, "grpc", grpc)
    if settings.allow_http:
        http_limits, rules = configured.http_limits(settings), configured.http_rules(settings)
        app = HttpApp(service, infer, http_limits, callers, gateway.jobs, rules=rules, regions=regions)
        await stack.enter_async_context(app)
        http = HttpServer(
            app,
            settings.http_address,
            settings.http_port,
            tls=configured.http_tls(settings),
            max_connections=settings.max_connections,
            share=settings.share_ports,
            listener=configured.inherited(settings.http_fd),
        )
        await _open(stack, gateway, "http", http)
    if gateway.ports:
        log_event("listening", **gateway.ports)


async def _open(stack: AsyncExitStack, gateway: Gateway, name: str, listener: HttpServer | GrpcServer) -> None:
    await stack.enter_async_context(listener)
    gateway.ports[name] = listener.port
    gateway.listeners.append(listener)


# --- models


async def _keep(settings: Settings, repository: Repository, gateway: Gateway, names: list[str]) -> None:
    def loaded() -> None:
        gateway.service.start()
        gateway.loaded.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(gateway.service.controls.informed())
        await keep_models(settings, repository, gateway.queue, names, loaded)
