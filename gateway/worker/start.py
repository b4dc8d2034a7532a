"""The worker as the settings describe it."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.config.rate_limit import read_resources
from gateway.config.settings import Settings
from gateway.placement import Device
from gateway.queues.base import Queue
from gateway.statistics import Statistics
from gateway.worker.worker import ReadModel, Worker


def open_worker(
    settings: Settings, queue: Queue, read: ReadModel, devices: Sequence[Device], statistics: Statistics
) -> Worker:
    """A worker that loads nothing yet."""
    worker = Worker(
        queue,
        read,
        devices,
        statistics,
        settings.model_load_thread_count,
        measures=True,
        persists=settings.persist_latency,
    )
    if settings.rate_limit == "execution_count":
        worker.limit_rates(read_resources(settings.rate_limit_resource))
    return worker
