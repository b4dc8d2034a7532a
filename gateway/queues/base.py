"""The meeting place of the gateway and its workers: the `Queue`, `Consumer` and `Job` protocols.

The gateway submits requests and never learns who ran them; workers take jobs and never learn who asked.
What every implementation promises (tests/contract/test_queue.py):

- A submitted request is answered at most once, and answering a job nobody waits for is a no-op that
  returns False, so one cancelled or expired caller never disturbs its batch-mates.
- Closing the iterator of `submit` cancels the job: it is `done` from then on and is not run if not begun.
- A request whose deadline passes is answered with `DeadlineExceeded` at that time, even if its worker hangs.
- Jobs of a lane are taken in the order they were submitted. A released job goes back to the front.
- A pool's state is what its workers last published.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec

from gateway.config.model import ModelConfig
from gateway.errors import GatewayError
from gateway.types import InferRequest, InferResponse, Responses


class Lane(NamedTuple):
    """One queue of one model."""

    model: str
    version: str


class Job(Protocol):
    """One request on its way through a worker. `enqueued` is in `time.monotonic` seconds."""

    request: InferRequest
    enqueued: float

    @property
    def done(self) -> bool:
        """True when nobody waits any more: answered, cancelled or expired."""

    def reply(self, response: InferResponse) -> bool:
        """Answer; `response.final` ends the job. Returns False when nobody waits any more."""

    def fail(self, error: GatewayError) -> bool:
        """Answer with an error, which ends the job. Returns False when nobody waits any more."""

    def release(self) -> None:
        """Hand the job back unrun, to the front of its lane."""


class Consumer(Protocol):
    """A worker's end of some lanes."""

    async def take(self, limit: int) -> list[Job]:
        """Wait for at least one job and return up to `limit` of them, oldest first per lane."""

    def close(self) -> None:
        """Take no more; a waiting `take` returns an empty list. Jobs already taken stay the caller's."""


@dataclass(frozen=True, slots=True)
class InstanceState:
    """One loaded copy of a model: its device, what it really runs on, and the file, where there was a choice.

    Where it has a chain of engines, `link` names the one that runs, and `reason` says why it is not the first.
    """

    device: str
    provider: str
    precision: str = ""
    artefact: str = ""
    link: str = ""
    reason: str = ""


NO_WORKER = "no live worker holds it"
"""The reason of a pool whose model the fleet knows, and nobody serves now."""


class Capacity(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a worker can do of one version: `places` batches at once, each of best `rows` rows. Times are seconds."""

    per_batch: float
    per_row: float
    tail: float  # a bound over the mean
    rows: int
    places: int

    def seconds(self, rows: int) -> float:
        """The expected time of a batch."""
        return self.per_batch + self.per_row * rows


class Admission(Protocol):
    """Where a gateway asks whether a version can answer a request in time.

    With `asks_all` false nothing can refuse a request that has no deadline, no priority and no tenant, and there is no
    need to ask, nor to tell of its end.
    """

    asks_all: bool

    def admit(self, request: InferRequest) -> None:
        """Accept a checked request, to be settled once it is over. Raises the `GatewayError` to refuse it with."""

    def turn_away(self, deadline: float) -> float | None:
        """Whether a request of which only the deadline is known would be refused: None to look at the rest of it,
        else after how many seconds to try again. Any thread may ask: it changes nothing.
        """

    def turned_away(self, times: int) -> None:
        """So many requests were refused because `turn_away` said so."""

    def settle(self, request: InferRequest) -> None:
        """An accepted request is answered or given up."""

    def capacity(self) -> Capacity | None:
        """What this worker can do; None while nothing is known, and for what is no worker."""

    def explain(self, seconds: float) -> Mapping[str, Any]:
        """What was decided and why, as plain values, and what a request with so long until its deadline would be told;
        0 for one without a deadline. Raises `GatewayError` when the version serves no more.
        """


@dataclass(frozen=True, slots=True)
class VersionState:
    """One version of a model in a pool: READY, LOADING, UNLOADING or UNAVAILABLE, and why.

    Versions of the same `digest` give the same answers; it is empty where the model's responses are not to be cached.
    """

    version: str
    state: str
    reason: str = ""
    config: ModelConfig | None = None  # known once READY
    instances: tuple[InstanceState, ...] = ()
    admission: Admission | None = field(default=None, compare=False, repr=False)
    epoch: int = 0  # when it was unloaded last, see `Statistics.forget`
    digest: str = ""


@dataclass(frozen=True, slots=True)
class PoolState:
    """What the workers hold of one model; `reason` says why when there are no versions at all."""

    model: str
    versions: tuple[VersionState, ...] = ()
    reason: str = ""  # why there are no versions, e.g. a config that does not parse


@dataclass(frozen=True, slots=True)
class Load:
    """Load the model from the repository, or reload it if it changed; `parameters` as Triton's load call."""

    model: str
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unload:
    """Stop routing to the model, answer what was accepted, and drop it; reported when done, or soon if that takes long.

    With `dependents` do so with the models, too, that were loaded along with it because it needs them.
    """

    model: str
    dependents: bool = False


Command = Load | Unload


class Order(Protocol):
    """A command on its way to a worker, to be reported on when carried out.

    `epoch` is when it was sent, in milliseconds since 1970: the same for every worker that gets it.
    """

    command: Command
    epoch: int

    def finish(self, error: GatewayError | None) -> None:
        """Report success (None) or the error for the caller."""


def _nothing() -> None:
    """What nobody needs to be told."""


@dataclass(slots=True)
class Keeps:
    """A consumer to whom all requests of a sequence come, once it was given the first: it has what the others need.

    `places` says how many more sequences it could begin at once, and `freed`, which the queue sets, is to be called when
    that is more than before. A sequence of which nothing came for `idle` seconds is over.
    """

    places: Callable[[], int]
    idle: float
    freed: Callable[[], None] = _nothing


class Queue(Protocol):
    """See the module's promises."""

    def submit(self, lane: Lane, request: InferRequest) -> Responses:
        """Queue a request; its responses come from what is returned, the last with `final` true.

        Close it, whatever happens: until then the request counts as unanswered. Raises `GatewayError`.
        """

    def consumer(
        self, lanes: Sequence[Lane], limit: int = 1 << 30, *, contained: bool = False, keeps: Keeps | None = None
    ) -> Consumer:
        """Open a worker's end of these lanes.

        Where others may take what this one leaves, no more than `limit` jobs of a lane are in its hands. With
        `contained` jobs are run outside this process: one that kills what runs it does not kill the consumer. `keeps` is
        for a lane of sequences.
        """

    async def drained(self, lane: Lane) -> None:
        """Wait until no accepted request of the lane is unanswered."""

    def publish(self, state: PoolState) -> None:
        """Tell every gateway what this worker holds of a model."""

    def withdraw(self, model: str) -> None:
        """Tell every gateway that this worker no longer knows the model."""

    def pool(self, model: str) -> PoolState | None:
        """What the workers hold of a model; None if none ever told."""

    def pools(self) -> list[PoolState]:
        """Every pool, in name order."""

    async def send(self, command: Command, *, everywhere: bool = True) -> None:
        """Have every worker, or the one of this process, carry out a command. Raises what the worker reported."""

    async def wanted(self) -> Sequence[Command]:
        """The last command of each model that was sent everywhere, for a worker that was not there.

        Raises `Unavailable` when it cannot be known.
        """

    def commands(self) -> AsyncIterator[Order]:
        """The commands for this worker, in order, for as long as it iterates."""

    def repository_names(self, own: Collection[str]) -> Collection[str]:
        """The names of every model that could be loaded; `own` are those that this process finds."""

    def healthy(self) -> bool:
        """Whether requests can be queued now."""

    def leave(self) -> None:
        """The worker of this process is about to drain: gateways are to give new requests to others, if there are any."""

    def close(self) -> None:
        """Answer every request and command that still waits with `Unavailable`, and accept no more."""
