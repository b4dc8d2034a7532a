"""A resolved model and version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.queues.base import NO_WORKER, Admission, InstanceState, Lane, PoolState, VersionState
from gateway.service.check import Checker
from gateway.statistics import VersionStatistics
from gateway.types import InferRequest, Responses

Submit: TypeAlias = Callable[[Lane, InferRequest], Responses]
"""`Queue.submit`, or what does the same for a version."""

MakeSubmit: TypeAlias = Callable[[Lane, ModelConfig], Submit]


@dataclass(frozen=True, slots=True)
class Route:
    """Where to submit the requests of a version and what to check; good for as long as `pool` is the one published."""

    pool: PoolState
    lane: Lane
    config: ModelConfig
    checker: Checker
    statistics: VersionStatistics
    admission: Admission | None
    default_deadline: float  # seconds; 0 for none
    digest: str  # see `VersionState`
    instances: tuple[InstanceState, ...]
    submit: Submit  # the queue's, or what runs the version in its place


def pick(pool: PoolState, version: str) -> VersionState:
    """The version asked for, or the newest that is ready. Raises `GatewayError` when it is not ready."""
    if pool.reason == NO_WORKER:
        raise errors.no_worker(pool.model)
    ready = [state for state in pool.versions if state.state == "READY"]
    if not version:
        if not ready:
            raise errors.no_versions(pool.model)
        return max(ready, key=lambda state: int(state.version))
    for state in pool.versions:
        if state.version == version:
            if state.state != "READY":
                raise errors.version_not_ready(pool.model, version)
            return state
    raise errors.unknown_version(pool.model, version)
