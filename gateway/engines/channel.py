"""What the code of a model may ask of the gateway while it runs in a child process, and how it answers piece by piece.

The seam between isolation, which carries it over a process boundary, and the backends whose models call other models
or tell the requests of a batch apart. A backend finds its channel in `EngineSpec.channel`. Nothing here knows how it
is carried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from gateway.engines.measures import Measure
from gateway.types import Answer, Array, Batch, InferRequest, InferResponse


class Channel(Protocol):
    """The gateway as the code in a child sees it. Any thread of the child may call; a call blocks that thread only."""

    def infer(self, request: InferRequest) -> Iterator[InferResponse]:
        """Run another model of this gateway, named in the request; `EngineSpec.infer` does so in the parent.

        `request.deadline` is in `time.monotonic` seconds, which all processes of a machine share. Raises
        `GatewayError`, when the first response is asked for at the latest. Closing the iterator cancels the request.
        """

    def cancelled(self, request: InferRequest) -> bool:
        """Whether nobody waits any more for a request of the batch that runs here, one of `Batch.requests`. Asks the
        gateway, unless it is known that its deadline has passed or the whole run was given up.
        """

    def measure(self, measure: Measure, *, wait: bool = True) -> float:
        """Do something to a metric of the model's code; gives the value that was read.

        What is not to `wait` for must be allowed, because nobody hears of an error. Raises `GatewayError`.
        """


class Answering(Protocol):
    """A `Loaded` that answers request by request. Isolation calls `answer` where there is one, instead of `compute`."""

    def answer(self, inputs: dict[str, Array], batch: Batch) -> Iterator[Sequence[Answer]]:
        """Run the model on the stacked inputs; each item becomes a `BatchResult` as soon as it is given.

        The arrays are the model's own, to keep or to change. `batch.requests` are there in row order, their tensors left
        out: rows, id, parameters, outputs, deadline, tenant. The next item is asked for when the last has been taken in.
        Every request has had a final answer when it ends. Raises to have the whole batch fail, which must not happen
        once an answer was given.
        """

    def close(self) -> None:
        """No run comes any more: let the model's code finish up. Called on the thread that ran it."""
