"""Where answers are kept for requests that come again: the `Store` protocol, and the one in this process's memory.

A store is bounded in bytes and in time, and forgets the least recently used first. What it gives back is what was put
in, tensor for tensor. A fleet of gateways shares one in Redis: `redis_store.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from gateway.telemetry import log_event
from gateway.types import InferResponse, Tensor, wires

_BLOCKING = 1 << 20  # bytes; copying more holds up the event loop
_ENTRY_BYTES = 1000  # what Python's objects of an entry take, and of a tensor in it
_TENSOR_BYTES = 300


class Kept(msgspec.Struct, frozen=True, gc=False):
    """What is known of a request: its answer, or that it is being computed somewhere (`pending`), or neither: it was
    answered, and the answer is too large to keep. `body` is the digest of the request.
    """

    body: bytes
    response: InferResponse | None = None
    pending: bool = False


class Store(Protocol):
    """Answers under keys of 32 bytes. All methods run on the event loop."""

    async def get(self, key: bytes) -> Kept | None:
        """What is kept; None when there is nothing, or it cannot be reached."""

    async def put(self, key: bytes, kept: Kept, seconds: float) -> None:
        """Keep this for so long; its response must be `compact`. What cannot be kept is not, and nothing is raised."""


class ClaimStore(Store, Protocol):
    """A store whose keys one process at a time can have for itself."""

    async def claim(self, key: bytes, body: bytes) -> Kept | None:
        """None if the caller now has the key until it puts or releases; else what is kept, which may be pending.

        `body` is the digest of the caller's request. Raises `Unavailable` when nobody can tell.
        """

    def release(self, key: bytes) -> None:
        """Give up a claim without an answer. A key that is not claimed is left alone."""

    async def settled(self, key: bytes) -> None:
        """Wait until the key is not pending any more, or may not be."""


class _Entry(NamedTuple):
    kept: Kept
    size: int
    until: float


class MemoryStore:
    """A `ClaimStore` in this process. It has no pending entries: its requests wait for each other in `Flights`."""

    def __init__(self, max_bytes: int, now: Callable[[], float] = time.monotonic, *, warns: str = "") -> None:
        """`max_bytes` bounds all entries together; a single one that is larger is not kept. `warns` names the event to
        log, once, when an entry is let go before its time.
        """
        self.bytes = 0
        self._warns = warns
        self._max_bytes = max_bytes
        self._now = now
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    async def get(self, key: bytes) -> Kept | None:
        """See `Store.get`."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.until <= self._now():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.kept

    async def put(self, key: bytes, kept: Kept, seconds: float) -> None:
        """See `Store.put`."""
        self._drop(key)
        size = size_of(kept)
        if size > self._max_bytes:
            return
        now = self._now()
        while self.bytes + size > self._max_bytes:
            oldest = next(iter(self._entries))
            if self._warns and self._entries[oldest].until > now:
                log_event(self._warns, logging.WARNING, entries=len(self._entries), max_bytes=self._max_bytes)
                self._warns = ""
            self._drop(oldest)
        self._entries[key] = _Entry(kept, size, now + seconds)
        self.bytes += size

    async def claim(self, key: bytes, body: bytes) -> Kept | None:  # noqa: ARG002 - who waits here knows the body
        """See `ClaimStore.claim`."""
        return await self.get(key)

    def release(self, key: bytes) -> None:
        """See `ClaimStore.release`."""

    async def settled(self, key: bytes) -> None:
        """See `ClaimStore.settled`."""

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.size


def size_of(kept: Kept) -> int:
    """About how many bytes an entry takes in memory."""
    if kept.response is None:
        return _ENTRY_BYTES
    outputs, parameters = kept.response.outputs.values(), kept.response.parameters
    data = sum(map(len, wires(outputs))) + sum(len(str(value)) for value in parameters.values())
    return _ENTRY_BYTES + (len(outputs) + len(parameters)) * _TENSOR_BYTES + data


async def compact(response: InferResponse) -> InferResponse:
    """The response with tensors of their own bytes: those of a batch are views, and one would keep all of it alive."""
    size = sum(tensor.nbytes for tensor in response.outputs.values())
    outputs = await asyncio.to_thread(_copied, response) if size > _BLOCKING else _copied(response)
    return InferResponse(response.model_name, response.model_version, outputs, "", response.parameters)


def replay(response: InferResponse, request_id: str) -> InferResponse:
    """A kept response as the answer to the request of this id; `timings` is None, because nothing ran for it."""
    # Tensors of its own: what is made of their bytes on first use would otherwise be kept beside them.
    outputs = {name: Tensor(each.datatype, each.shape, each.wire) for name, each in response.outputs.items()}
    return InferResponse(response.model_name, response.model_version, outputs, request_id, response.parameters)


def _copied(response: InferResponse) -> dict[str, Tensor]:
    return {name: Tensor(each.datatype, each.shape, bytes(each.wire)) for name, each in response.outputs.items()}
