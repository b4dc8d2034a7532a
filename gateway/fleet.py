"""This process's end of the queue that the settings name, and what it knows of the others if there are any."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from gateway import errors
from gateway.config.log_levels import levels_off
from gateway.config.settings import Settings
from gateway.config.trace import read_trace_config
from gateway.engines.measures import Measures
from gateway.queues.base import Queue
from gateway.queues.figures import FleetFigures
from gateway.queues.memory import MemoryQueue
from gateway.service.controls import Controls
from gateway.service.measures import QUESTION as MEASURES
from gateway.service.measures import FleetMeasures
from gateway.service.registers import QUESTION as SETTINGS
from gateway.service.reports import QUESTION as EXPLAIN
from gateway.service.reports import WorkerReports
from gateway.statistics import Statistics

if TYPE_CHECKING:
    from gateway.queues.redis.queue import RedisQueue
    from gateway.redis_client import RedisClient, RedisOptions

Explain: TypeAlias = Callable[[str, str], bytes]
"""`Worker.explain`."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """A queue, and how to ask after the other processes on it."""

    queue: Queue
    statistics: Callable[[], Awaitable[Statistics]]  # of all processes
    redis: RedisQueue | None = None  # the queue, where there are others
    client: RedisClient | None = None

    @property
    def process(self) -> str:
        """This process's name among the others; empty where there are none."""
        return "" if self.redis is None else self.redis.process

    @property
    def host(self) -> str:
        """Equal for processes that share memory; empty where there are no others."""
        return "" if self.redis is None else self.redis.host

    @property
    def figures(self) -> Callable[[], Awaitable[FleetFigures]] | None:
        """What the queue tells operators of itself."""
        return None if self.redis is None else self.redis.figures

    def controls(self, settings: Settings) -> Controls:
        """What clients may change, the same in all processes."""
        traces = read_trace_config(settings.trace_config)
        ask = None if self.redis is None else self.redis.ask
        file = "" if settings.log_file is None else str(settings.log_file)
        logs: dict[str, str | int | bool] = {"log_verbose_level": settings.log_verbose, "log_file": file}
        logs |= {f"log_{level}": False for level in levels_off(settings)}
        controls = Controls(self.process, ask, logs=logs, traces=traces)
        if self.redis is not None:
            self.redis.answers[SETTINGS] = controls.registers.answer
        return controls

    def measures(self, own: Measures) -> FleetMeasures:
        """The metrics of models' code in all processes; `own` are this one's."""
        if self.redis is None:
            return FleetMeasures(own)
        measures = FleetMeasures(own, self.process, self.redis.ask, self.queue.pools)
        self.redis.answers[MEASURES] = measures.answer
        return measures

    def reports(self, explain: Explain | None) -> WorkerReports | None:
        """What all workers say of a version; `explain` is this process's own, if it has one."""
        if self.redis is None:
            return None
        own = None if explain is None else partial(explain, self.redis.process)
        if own is not None:
            self.redis.answers[EXPLAIN] = own
        return WorkerReports(self.redis.ask, own)


@asynccontextmanager
async def joined(settings: Settings, statistics: Statistics) -> AsyncGenerator[Fleet, None]:
    """Be part of the fleet for the duration of the block.

    Raises `GatewayError` for a Redis that refuses us, and for settings that cannot work.
    """
    if settings.queue == "memory":
        yield Fleet(MemoryQueue(), statistics.whole)
        return
    from gateway.redis_client import RedisClient
    from gateway.statistics.fleet import QUESTION, FleetStatistics

    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(RedisClient(await _options(stack, settings)))
        queue = await stack.enter_async_context(_queue(settings, client))
        statistics.refreshers.append(lambda: statistics.totals.update(asdict(queue.counts)))
        whole = await stack.enter_async_context(
            FleetStatistics(statistics, queue.process, queue.ask, redis=client, key=client.keys.stats)
        )
        queue.answers[QUESTION] = lambda _: whole.answer()
        yield Fleet(queue, whole, queue, client)


async def _options(stack: AsyncExitStack, settings: Settings) -> RedisOptions:
    """Which Redis; the embedded one is started."""
    from gateway.redis_client import RedisOptions

    url = settings.queue
    if url == "embedded":
        from gateway.redis_server import EmbeddedServer

        server = EmbeddedServer(settings.queue_dir, persistent=settings.queue_dir is not None)
        url = (await stack.enter_async_context(server)).url
    return RedisOptions(
        url,
        prefix=settings.queue_prefix,
        username=settings.queue_username,
        password_file=settings.queue_password_file,
        ca_file=settings.queue_ca_file,
    )


def _queue(settings: Settings, client: RedisClient) -> RedisQueue:
    from gateway.queues.redis.queue import RedisQueue

    key = None if settings.queue_key_file is None else settings.queue_key_file.read_bytes().strip()
    try:
        return RedisQueue(client, settings.role, key=key, shares=settings.queue_shared_memory)
    except ValueError as problem:
        raise errors.InvalidArgument(f"--queue-key-file: {problem}") from None
