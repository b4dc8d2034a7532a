"""A resolved model and version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from gateway.config.model import ModelConfig
from gateway.queues.base import Admission, InstanceState, Lane, PoolState
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
