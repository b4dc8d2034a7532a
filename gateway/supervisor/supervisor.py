"""`gateway serve --workers 2 --http-workers 2`: gateways that share their ports and workers that share a queue.

Each is a process of its own: this same command, with a role. What dies is started again; when we end, all ends.
Start: the embedded Redis if asked for, then all processes together. Stop: the gateways first, which answer what they
accepted, then the workers, then Redis.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from gateway import placement
from gateway.config.settings import Settings
from gateway.redis_server import EmbeddedServer
from gateway.supervisor.post import Post
from gateway.telemetry import log_event
from gateway.transport.ports import SharedPort, bound

_MARGIN = 10.0  # seconds that a process may take to stop beyond --exit-timeout-secs


@dataclass(frozen=True, slots=True)
class Plan:
    """How many processes of each role to run."""

    gateways: int
    workers: int


def plan(settings: Settings) -> Plan | None:
    """The processes that these settings ask for; None if it is this one alone."""
    gateways = settings.http_workers if settings.role != "worker" else 0
    workers = settings.workers if settings.role != "gateway" else 0
    alone = gateways <= 1 and workers <= 1
    return None if alone else Plan(gateways, workers)


@dataclass(slots=True)
class Ports:
    """The ports that the gateways share: those we hold sockets of, and the number of gRPC's."""

    held: dict[str, SharedPort] = field(default_factory=dict)  # by the setting that takes a descriptor
    grpc: int = 0

    async def open(self, stack: AsyncExitStack, settings: Settings, count: int) -> None:
        """Take the ports. Raises OSError when one is taken."""
        wanted = (
            (settings.allow_metrics, "metrics_fd", settings.metrics_address, settings.metrics_port),
            (settings.allow_http, "http_fd", settings.http_address, settings.http_port),
        )
        for allowed, name, host, port in wanted:
            if allowed:
                shared = SharedPort(host, port, count, backlog=settings.max_connections, joins=settings.share_ports)
                self.held[name] = await stack.enter_async_context(shared)
        if settings.allow_grpc:
            # No gRPC library takes a socket that somebody else has opened. This one keeps the number for us.
            if not settings.share_ports:
                (await bound(settings.grpc_address, settings.grpc_port)).close()
            kept = stack.enter_context(await bound(settings.grpc_address, settings.grpc_port, share=True))
            self.grpc = kept.getsockname()[1]

    def descriptors(self, index: int) -> dict[str, int]:
        """The sockets of one gateway, by the setting that takes each."""
        return {name: port.sockets[index].fileno() for name, port in self.held.items()}


async def supervise(settings: Settings, arguments: Sequence[str], show: Callable[[str], None]) -> int:
    """Run the processes of `plan(settings)` until SIGTERM or SIGINT; returns the exit status.

    `arguments` are the operator's own, which each process is given too. `show` is called once with the table of
    the models, when all processes are ready. A second signal ends everything at once. Raises OSError when a port is
    taken and `GatewayError` when the embedded Redis cannot be started.
    """
    wanted = plan(settings) or Plan(1, 1)
    async with AsyncExitStack() as stack:
        own = list(arguments)
        if settings.queue == "embedded":
            redis = EmbeddedServer(settings.queue_dir, persistent=settings.queue_dir is not None)
            own += ["--queue", (await stack.enter_async_context(redis)).url]
        ports = Ports()
        if wanted.gateways:
            await ports.open(stack, settings, wanted.gateways)
        return await Supervisor(settings, own, wanted, ports, show).run()


class Supervisor:
    """The processes, and the order in which they end."""

    def __init__(
        self, settings: Settings, arguments: Sequence[str], wanted: Plan, ports: Ports, show: Callable[[str], None]
    ) -> None:
        self._ports = ports
        self._show = show
        self._shown = False
        self._patience = settings.exit_timeout_secs + _MARGIN
        self._stop = asyncio.Event()
        self._status = 0
        self._gateways: list[Post] = []
        self._workers: list[Post] = []
        for index in range(wanted.gateways):
            descriptors = ports.descriptors(index)
            given = gateway_arguments(arguments, index, descriptors, ports.grpc)
            self._gateways.append(self._post(f"gateway-{index}", given, list(descriptors.values())))
        cores = cores_each(settings, wanted)
        for index in range(wanted.workers):
            self._workers.append(self._post(f"worker-{index}", worker_arguments(arguments, index, cores), []))

    def _post(self, name: str, arguments: Sequence[str], descriptors: Sequence[int]) -> Post:
        return Post(name, arguments, descriptors, self._changed, self._failed)

    async def run(self) -> int:
        """Run them until a signal or a process that cannot start; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        log_event("supervising", gateways=len(self._gateways), workers=len(self._workers))
        async with asyncio.TaskGroup() as tasks:
            kept = {post: tasks.create_task(post.keep(), name=post.name) for post in self._all()}
            await self._stop.wait()
            for port in self._ports.held.values():
                port.close()
            # To a process that shares its ports SIGTERM says that others go on; this is the end of all of them.
            await self._end({post: kept[post] for post in self._gateways}, signal.SIGINT)
            await self._end({post: kept[post] for post in self._workers}, signal.SIGTERM)
        return self._status

    def _all(self) -> list[Post]:
        return [*self._gateways, *self._workers]

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stop.is_set():
            self._stop.set()
            return
        log_event("stop_forced", logging.WARNING, signal=number.name)
        self._status = 1
        for post in self._all():
            post.kill()

    def _failed(self, status: int) -> None:
        self._status = self._status or status
        self._stop.set()

    async def _end(self, kept: dict[Post, asyncio.Task[None]], number: signal.Signals) -> None:
        for post in kept:
            post.stop(number)
        if not kept:
            return
        _, late = await asyncio.wait(kept.values(), timeout=self._patience)
        for post, task in kept.items():
            if task in late:
                log_event("process_killed", logging.ERROR, name=post.name, reason="it did not stop in time")
                self._status = 1
                post.kill()

    def _changed(self) -> None:
        """A process is ready, or no longer."""
        ready = [index for index, post in enumerate(self._gateways) if post.state == "ready"]
        for port in self._ports.held.values():
            port.send_to(ready)
        if not self._shown and all(post.state == "ready" for post in self._all()):
            self._shown = True
            if self._workers:
                self._show(self._workers[0].table)
            log_event("ready", gateways=len(self._gateways), workers=len(self._workers))


def gateway_arguments(own: Sequence[str], index: int, descriptors: dict[str, int], grpc_port: int) -> list[str]:
    """The command line of a gateway process: the operator's, and what overrules it."""
    more = [word for name, each in descriptors.items() for word in (f"--{name.replace('_', '-')}", str(each))]
    if grpc_port:
        more += ["--grpc-port", str(grpc_port)]
    return [*own, *_alone("gateway", index), "--share-ports", "true", *more]


def worker_arguments(own: Sequence[str], index: int, cores: int) -> list[str]:
    """The command line of a worker process: the operator's, and what overrules it."""
    # Its metrics are in those that the gateways show.
    return [*own, *_alone("worker", index), "--allow-metrics", "false", "--cpu-cores", str(cores)]


def cores_each(settings: Settings, wanted: Plan) -> int:
    """How many cores the models of one worker get: an equal share, and one at least."""
    return max(1, (settings.cpu_cores or placement.cpu_cores()) // max(wanted.workers, 1))


def _alone(role: str, index: int) -> list[str]:
    return ["--role", role, "--workers", "1", "--http-workers", "1", "--process-name", f"{role}-{index}"]
