"""The requests of one version that crashed its engine, by a digest of their inputs, so that none of them does it twice.

They are kept for ten minutes, a thousand at most, the latest. While there are none, asking costs nothing; while there are
some, a request is first compared by its size and some of its bytes, and hashed only where those agree.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from gateway.types import InferRequest, wires

SECONDS = 600.0
_MOST = 1000
_SAMPLES = 64  # bytes that are looked at of each input


class Quarantine:
    """True while something is in it. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: dict[bytes, tuple[float, int]] = {}  # by digest: until when, and the sketch; the first to end first
        self._sketches: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._ends)

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, request: InferRequest) -> str:
        """Keep it from now on; returns its digest, in hexadecimal."""
        digest, sketch = _digest(request), _sketch(request)
        self._ends.pop(digest, None)
        self._ends[digest] = self._clock() + SECONDS, sketch
        self._sketches.add(sketch)
        self._forget(self._clock())
        return digest.hex()

    def left(self, request: InferRequest) -> float | None:
        """How many seconds more the request is not to be run; None for one that may."""
        now = self._clock()
        self._forget(now)
        if _sketch(request) not in self._sketches:
            return None
        found = self._ends.get(_digest(request))
        return None if found is None else found[0] - now

    def _forget(self, now: float) -> None:
        over = 0
        for end, _ in self._ends.values():
            if end > now and len(self._ends) - over <= _MOST:
                break
            over += 1
        if over:
            self._ends = dict(list(self._ends.items())[over:])
            self._sketches = {sketch for _, sketch in self._ends.values()}


def _sketch(request: InferRequest) -> int:
    """Equal for equal inputs, and seldom for others."""
    parts = [(name, memoryview(tensor.wire)) for name, tensor in request.inputs.items()]
    return hash(frozenset((name, len(part), bytes(part[:: len(part) // _SAMPLES + 1])) for name, part in parts))


def _digest(request: InferRequest) -> bytes:
    inputs = sorted(request.inputs.items())  # by name: in which order they came says nothing
    described = [(name, tensor.datatype.name, tensor.shape, tensor.nbytes) for name, tensor in inputs]
    state = hashlib.blake2b(repr(described).encode(), digest_size=16)
    for wire in wires(tensor for _, tensor in inputs):
        state.update(wire)
    return state.digest()
