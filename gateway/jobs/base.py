"""What transports and jobs say to each other; imports nothing of Redis, which a gateway without it need not have read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gateway.jobs.record import Job
from gateway.types import InferResponse

HEARTBEAT = 15.0  # seconds
REMEDY = (
    "async jobs are kept in Redis and this server has none; start it with --queue redis://HOST:PORT or --queue embedded"
)


class Plan(NamedTuple):
    """Which outputs a client wants as binary: those in `listed` as it says, any other if `binary`."""

    binary: bool = True
    listed: Mapping[str, bool] = {}


class Result(NamedTuple):
    """The answer of a job that is done, to be written as `plan` says."""

    response: InferResponse
    plan: Plan


class Event(NamedTuple):
    """A job changed its state. `id` is the event's own and grows; `time` is Redis'."""

    id: bytes
    job: str
    state: str
    time: float


class Change(NamedTuple):
    """A job's state as watched: `event` is None for a heartbeat, which says that nothing happened."""

    job: Job
    event: Event | None
