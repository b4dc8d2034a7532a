"""What the code of a model may ask of the gateway while it runs in a child process, and how it answers piece by piece.

The seam between isolation, which carries it over a process boundary, and the backends whose models call other models
or tell the requests of a batch apart. Nothing here knows how it is carried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from gateway import errors
from gateway.types import Answer, Array, Batch, Infer, InferRequest, InferResponse, Responses


class Channel(Protocol):
    """The gateway as the code in a child sees it. Any thread of the child may call; a call blocks that thread only."""

    def infer(self, request: InferRequest) -> Iterator[InferResponse]:
        """Run another model of this gateway, named in the request; `EngineSpec.infer` does so in the parent.

        `request.deadline` is in `time.monotonic` seconds, which all processes of a machine share. Raises
        `GatewayError`, when the first response is asked for at the latest. Closing the iterator cancels the request.
        """

    def cancelled(self, request: InferRequest) -> bool:
        """Whether nobody waits any more for a request of a batch that runs here, one of `Batch.requests`."""


class Answering(Protocol):
    """A `Loaded` that answers request by request. Isolation calls `answer` where there is one, instead of `compute`."""

    def answer(self, inputs: dict[str, Array], batch: Batch, give: Callable[[Sequence[Answer]], None]) -> None:
        """Run the model on the stacked inputs; what it gives becomes a `BatchResult` at once.

        `give` is called on any thread, and by several. `batch.requests` are there in row order, their tensors left out:
        rows, id, parameters, outputs, deadline, tenant. Every request has had a final answer when this returns. Raises
        to have the whole batch fail, which it does not once an answer was given.
        """


def call(infer: Infer, batch: Batch, model: str, request: InferRequest) -> Responses:
    """A request of a model that runs `batch`, made ready for `infer`: what a parent does for `Channel.infer`.

    It is of the tenant of the batch, has to be answered by the time that the last of the batch has, and gives its
    cores away meanwhile. Raises `InvalidArgument` where the model would wait for itself, which may be for ever.
    """
    callers = dict.fromkeys((model, *(each for waiting in batch.requests for each in waiting.callers)))
    if request.model_name in callers:
        raise errors.InvalidArgument(
            f"model '{model}' cannot call '{request.model_name}', which waits for it: their instances could wait for each "
            "other for ever; put the two on one level, or copy the model under another name"
        )
    request.callers = tuple(callers)
    tenants = {waiting.tenant for waiting in batch.requests}
    request.tenant = tenants.pop() if len(tenants) == 1 else ""
    bounds = [request.deadline, _last_deadline(batch)]
    request.deadline = min((bound for bound in bounds if bound is not None), default=None)
    batch.waits()
    return infer(request)


def _last_deadline(batch: Batch) -> float | None:
    """When nobody waits for the batch any more; None if somebody always does."""
    deadlines = [waiting.deadline for waiting in batch.requests]
    known = [deadline for deadline in deadlines if deadline is not None]
    return max(known) if known and len(known) == len(deadlines) else None
