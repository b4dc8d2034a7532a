"""What one way of talking to a server must offer, gRPC or HTTP, and what is sent over it and comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from gateway.types import Array, Buffer, Parameter, Tensor

WAY = 0.003  # seconds that a server is told to be earlier, so that it says that the time is over before we give up
LARGE = 64 * 1024  # bytes; more is not decoded on the event loop

Raw: TypeAlias = Any  # an answer as its client's `decode` takes it


@dataclass(frozen=True, slots=True)
class Question:
    """One request to a server. Empty `outputs` ask for all; `seconds` is what is left of its deadline."""

    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    parameters: Mapping[str, Parameter]
    id: str = ""
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Payload:
    """A question as it goes over the wire. `head` is the number of bytes before the tensors, where that is told apart."""

    parts: Sequence[Buffer]
    head: int = 0


class Client(Protocol):
    """One server, over connections that are kept. `encode` and `decode` may be called on any thread."""

    def encode(self, question: Question) -> Payload:
        """The wire bytes of a question. May take long for large tensors."""

    async def send(self, payload: Payload, seconds: float) -> Raw:
        """Ask, and return the answer as it came; who answers is told how many seconds are left.

        Raises `Failure`, and TimeoutError when nothing came until then.
        """

    def size(self, raw: Raw) -> int:
        """The bytes of an answer."""

    def decode(self, raw: Raw) -> dict[str, Array]:
        """The outputs of an answer. Raises ValueError for one that makes no sense."""

    async def live(self) -> None:
        """Return when the server has answered anything. Raises `Failure` when it has not within the time to connect."""

    async def renew(self) -> None:
        """Use a new connection from now on: the server is silent on this one."""

    async def close(self) -> None:
        """Close every connection. Idempotent."""
