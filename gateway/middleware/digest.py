"""What a request asks for, as a SHA-256: equal for equal requests, and for no others.

Every part is written with its size and type, and nobody can make two requests with one digest, so that what is kept
for one caller cannot be got by another who forges it. The id, the deadline and the priority are not part of it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeAlias

from gateway.types import Buffer, InferRequest, Parameter, wires

Context: TypeAlias = tuple[str | None, ...]

_WITHOUT_MEANING = ("timeout", "priority")  # they say when to answer, not what
_BLOCKING = 1 << 20  # bytes; hashing them takes about a millisecond
_REMEMBERED = 512


class _Head(NamedTuple):
    """All of a request but its parameters and values, as bytes, and its inputs in the order of their names."""

    text: bytes
    names: tuple[str, ...]


class Digests:
    """Digests for one event loop. Requests of one form are described once."""

    def __init__(self, *, classes: bool = False) -> None:
        """With `classes` the classifications that are asked for are told apart."""
        self._classes = classes
        self._heads: dict[Hashable, _Head] = {}

    async def of(self, request: InferRequest, context: Context = ()) -> bytes:
        """The digest of a checked request within a context."""
        head = self._head(request, context)
        inputs = request.inputs
        parts: list[Buffer] = [head.text, *wires([inputs[name] for name in head.names])]
        if request.parameters:
            parts.insert(1, _parameters(request.parameters))
        if request.size > _BLOCKING:
            return await asyncio.to_thread(_hash, parts)
        return _hash(parts)

    def _head(self, request: InferRequest, context: Context) -> _Head:
        if request.form is None:
            return self._describe(request, context)
        key = (request.form, context)
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) >= _REMEMBERED:
                self._heads.clear()
            head = self._heads[key] = self._describe(request, context)
        return head

    def _describe(self, request: InferRequest, context: Context) -> _Head:
        inputs = sorted(request.inputs.items())  # by name: in which order they came says nothing
        described = [(name, tensor.datatype.name, tensor.shape, tensor.nbytes) for name, tensor in inputs]
        outputs = [(output.name, output.classification if self._classes else 0) for output in request.outputs]
        # A literal of plain Python values is text that can be read in one way only, and so can what follows it.
        return _Head(repr((context, described, outputs)).encode(), tuple(name for name, _ in inputs))


def _parameters(parameters: Mapping[str, Parameter]) -> bytes:
    meant = sorted((key, repr(value)) for key, value in parameters.items() if key not in _WITHOUT_MEANING)
    return repr(meant).encode() if meant else b""


def _hash(parts: list[Buffer]) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.digest()
