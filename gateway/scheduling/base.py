"""The seam between scheduling and whoever has a clock: what a `Scheduler` is told, and what it answers.

The worker and the simulator drive the same implementation through this protocol. A scheduler is pure state:
it reads no clock, starts no task, knows no asyncio. Times are seconds on the caller's monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

LaneKey: TypeAlias = Hashable

RefusalReason: TypeAlias = Literal["overload", "deadline", "shed", "expired", "queue_full", "queue_timeout"]
"""Why a request is not served, and how it is answered:

`overload` refused at admission, its predicted end is past its deadline: 429. `deadline` refused at admission,
even an idle pool could not make it: 504. `shed` accepted, then dropped so that others keep their deadline: 429.
`expired` accepted, and its deadline can no longer be met: 504. `queue_full`, `queue_timeout` Triton's own
queue policy of the model: 503 with Triton's texts.
"""


class Request(Protocol):
    """What scheduling reads of a request; `InferRequest` has it."""

    rows: int
    size: int  # bytes
    deadline: float | None
    priority: int  # Triton's: 1 is the highest, 0 the default
    tenant: str
    signature: Hashable  # requests of one batch have the same
    parameters: Mapping[str, str | int | float | bool]


class Waiting(Protocol):
    """What scheduling sees of a job."""

    enqueued: float

    @property
    def request(self) -> Request:
        """What is asked."""

    @property
    def done(self) -> bool:
        """True for a job nobody waits for any more, which is passed over."""


W = TypeVar("W", bound=Waiting)


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Triton's `ModelQueuePolicy` of a lane, or of one priority level of it; see `model_config.proto`."""

    max_size: int = 0  # requests waiting; 0: any number
    timeout: float = 0.0  # seconds of waiting; 0: for ever
    delays: bool = False  # timeout_action DELAY: a request that waited too long goes behind the others, not out
    allow_override: bool = False  # a request's own `timeout` parameter may shorten the wait


@dataclass(frozen=True, slots=True)
class Limits:
    """A model's own bounds and Triton's knobs, as its configuration sets them."""

    max_rows: int = 1
    joins: bool = False  # requests share batches
    delay: float = 0.0  # max_queue_delay_microseconds, in seconds
    preferred: tuple[int, ...] = ()
    queue: QueuePolicy = QueuePolicy()
    priority_levels: int = 0
    default_priority: int = 0
    priority_queues: Mapping[int, QueuePolicy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where instances of a lane run: `count` of them on one device.

    A run takes `threads` of the device's cores, or up to `widest` when it is alone there.
    """

    device: str
    count: int
    threads: int = 1
    widest: int = 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served; `retry_after` is in seconds, None when trying again makes no sense or no estimate is."""

    reason: RefusalReason
    text: str
    retry_after: float | None = None
    until: float = -math.inf  # as things stand, requests whose deadline is before this are all refused


@dataclass(slots=True)
class Run(Generic[W]):
    """A batch to start now on `cores` of a device. `predicted` is the expected seconds, None when nothing is known."""

    lane: LaneKey
    device: str
    jobs: list[W]
    rows: int
    cores: int
    reason: str  # why the batch closed
    started: float
    predicted: float | None = None
    ended: float = math.inf


@dataclass(slots=True)
class Dispatch(Generic[W]):
    """The answer of `Scheduler.dispatch`: a run to start or none; jobs to refuse now; when to ask again at the latest."""

    run: Run[W] | None = None
    refused: list[tuple[W, Refusal]] = field(default_factory=list)
    ask_at: float | None = None


class Scheduler(Protocol[W]):
    """Decides for all lanes and devices of one worker."""

    def open(self, lane: LaneKey, limits: Limits, places: Sequence[Place]) -> None:
        """A model version is ready to run. Opening a lane again replaces its limits and places and keeps its jobs."""

    def close(self, lane: LaneKey) -> list[W]:
        """The version is gone: forget it and hand back the jobs that still wait."""

    def admit(self, lane: LaneKey, request: Request, now: float) -> Refusal | None:
        """Ask at the gateway whether to accept a request. None accepts it and counts its rows until `settle`."""

    def settle(self, lane: LaneKey, request: Request, now: float) -> None:
        """An admitted request is answered or given up."""

    def add(self, lane: LaneKey, job: W, now: float) -> None:
        """A job has reached the worker and waits."""

    def dispatch(self, device: str, now: float) -> Dispatch[W]:
        """What to do on a device now. Ask on arrivals, on ends of runs and at `ask_at`; again until no run comes."""

    def finished(self, run: Run[W], seconds: float, now: float, *, failed: bool = False) -> None:
        """A run is over: its cores are free, and its duration is learned from unless it failed."""
