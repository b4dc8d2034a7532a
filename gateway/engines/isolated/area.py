"""`Area`: memory that two processes share, written by one and read by the other.

It grows as its writer needs and never shrinks, which a seal makes sure of: a reader could else be killed by its
view (SIGBUS). Its pages are taken when it grows, so that what the machine does not have is an OSError there and
nothing worse later.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Self, TypeAlias

from gateway.message import BadMessage

Span: TypeAlias = tuple[int, int]
"""Where in an area something lies: from here to there, in bytes."""

NOWHERE: Span = (0, 0)

_LEAST = 1 << 16  # bytes
_ALIGNMENT = 64


class Area:
    """One end of the memory behind a descriptor, which it owns."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._block: mmap.mmap | None = None
        self._size = 0

    @classmethod
    def create(cls) -> Self:
        """An empty one. Raises OSError where there is no such memory."""
        descriptor = os.memfd_create("lockgate", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor)

    @property
    def size(self) -> int:
        """Bytes that are mapped here."""
        return self._size

    def room(self, size: int) -> mmap.mmap:
        """The memory, for its writer, at least so many bytes of it. Raises OSError when there is not as much."""
        if self._block is None or size > self._size:
            grown = _rounded(size)
            os.posix_fallocate(self.descriptor, 0, grown)
            return self._map(grown)
        return self._block

    def seen(self, size: int) -> mmap.mmap:
        """The memory, for its reader. Raises `BadMessage` when it has fewer bytes than the writer says, and MemoryError
        when this process has no room for it.
        """
        if self._block is None or size > self._size:
            there = os.fstat(self.descriptor).st_size
            if size > there:
                raise BadMessage(f"a message of {size} bytes is said to be in {there} bytes of shared memory")
            try:
                return self._map(min(there, _rounded(size)))
            except OSError as problem:
                raise MemoryError(f"{size} bytes of shared memory cannot be mapped: {problem.strerror}") from problem
        return self._block

    def close(self) -> None:
        """Let go of it; views of it stay good."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self._block, self._size = -1, None, 0

    def _map(self, size: int) -> mmap.mmap:
        # An old block stays for as long as somebody has a view of it.
        self._block = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._size = size
        return self._block


def beside(size: int, other: Span) -> Span:
    """Where so many bytes may lie beside what is there already: before it, or else behind it.

    Of two that take turns at this, neither ever lies beyond three times the size of the largest.
    """
    start = 0 if size <= other[0] else -(-other[1] // _ALIGNMENT) * _ALIGNMENT
    return start, start + size


def _rounded(size: int) -> int:
    """A little more than asked for, so that batches that grow row by row do not map it anew each time."""
    step = max(_LEAST, 1 << max(0, size.bit_length() - 3))
    return -(-max(size, 1) // step) * step
