"""Clients' shared memory: the regions that they registered, read from and written to (Triton's `system_shared_memory`).

A region is a stretch of a POSIX shared memory object of this host, held open from its registration on, so that a client
may unlink the name. It is never mapped: a client that shrinks the object under a mapping would end this process with a
SIGBUS, and one that changes it while it is checked would have other bytes run than were looked at. One copy by
`preadv`, within the kernel, costs less than taking the same bytes from a socket.

Errors are Triton's words (server `shared_memory_manager.cc`; PROTOCOL.md section 1).
"""

from __future__ import annotations

import asyncio
import os
import resource
import stat
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gateway import errors
from gateway.shm import errors as texts
from gateway.types import Buffer, Place

FOLDER = Path("/dev/shm")  # noqa: S108 - where shm_open() has its objects

_RESERVED = ("triton_python_backend_shm_region_", "lockgate-")  # Triton's own, and the payloads of our fleets
_LONGEST = 255  # characters of an object's name
_SIZE_MAX = (1 << 64) - 1
_BLOCKING = 4 << 20  # bytes; copying them takes about a millisecond


class Memory(Protocol):
    """A registered stretch of memory of some kind, `users` the requests that use it now; `leaving` once unregistered."""

    name: str
    key: str
    offset: int
    byte_size: int
    users: int
    leaving: bool

    @property
    def kind(self) -> str:
        """`system`, or another that has endpoints."""

    async def load(self, place: Place) -> Buffer:
        """The bytes at a place that was checked. Raises `GatewayError`."""

    async def store(self, place: Place, data: Buffer) -> None:
        """Write at a place that was checked. Raises `GatewayError`."""


@dataclass(slots=True)
class Region:
    """A registered stretch of an object, `users` the requests that use it now; `leaving` once it was unregistered.

    It closes its descriptor when nobody has it any more: a thread may still read for a request that was given up.
    """

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int
    users: int = 0
    leaving: bool = False

    @property
    def kind(self) -> str:
        """See `Memory`."""
        return "system"

    def __del__(self) -> None:
        os.close(self.descriptor)

    async def load(self, place: Place) -> memoryview:
        """See `Memory`: `read`, off the event loop where it takes long."""
        return self.read(place) if place.size <= _BLOCKING else await asyncio.to_thread(self.read, place)

    async def store(self, place: Place, data: Buffer) -> None:
        """See `Memory`: `write`, off the event loop where it takes long."""
        if len(data) <= _BLOCKING:
            self.write(place, data)
        else:
            await asyncio.to_thread(self.write, place, data)

    def read(self, place: Place) -> memoryview:
        """The bytes at a place that was checked. Raises `InvalidArgument` when the object has been cut short."""
        self._check_length(place.offset + place.size)  # before so much memory is asked for
        data = np.empty(place.size, np.uint8).data  # in half the time that a new `bytes` takes
        done = 0
        while done < place.size:
            count = os.preadv(self.descriptor, [data[done:]], self.offset + place.offset + done)
            if not count:
                raise self._cut_short()
            done += count
        return data

    def write(self, place: Place, data: Buffer) -> None:
        """Write at a place that was checked. Raises `InvalidArgument` when the object has been cut short."""
        self._check_length(place.offset + len(data))
        left, at = memoryview(data), self.offset + place.offset
        while left:
            try:
                written = os.pwrite(self.descriptor, left, at)
            except OSError as problem:  # e.g. an object whose pages were never touched, and no memory for them
                raise errors.Internal(
                    f"cannot write to shared memory region '{self.name}': {problem.strerror}"
                ) from None
            left, at = left[written:], at + written

    def _check_length(self, end: int) -> None:
        # Writing behind its end would make the object grow.
        if self.offset + end > os.fstat(self.descriptor).st_size:
            raise self._cut_short()

    def _cut_short(self) -> errors.InvalidArgument:
        return errors.InvalidArgument(
            f"shared memory region '{self.name}' has become smaller than it was registered; register it again"
        )


class Regions:
    """The regions of this process's clients. For one event loop, but for `Region.read` and `Region.write`."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._regions: dict[str, Memory] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Make a stretch of the object `key` known as `name`. Raises `GatewayError`."""
        key_name = key.lstrip("/")
        for prefix in _RESERVED:
            if key_name.startswith(prefix):
                raise texts.reserved_region_key(name, key, prefix)
        self.require_free(name)
        # A half of the files that may be open is left to connections.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        if len(self._regions) >= most:
            raise errors.ResourceExhausted(
                f"{most} shared memory regions are registered, which is as many as there may be; unregister some, or "
                "raise the limit on open files (ulimit -n)"
            )
        descriptor = self._open(key, key_name)
        if not byte_size or offset + byte_size > os.fstat(descriptor).st_size:
            os.close(descriptor)
            raise texts.region_out_of_bounds(name)
        self._regions[name] = Region(name, key, offset, byte_size, descriptor)

    def add(self, region: Memory) -> None:
        """Make memory of another kind known. Raises `AlreadyExists`."""
        self.require_free(region.name)
        self._regions[region.name] = region

    def require_free(self, name: str) -> None:
        """Raise `AlreadyExists` for a name that a region of any kind has."""
        if name in self._regions:
            raise texts.region_exists(name)

    def unregister(self, name: str = "", kind: str = "system") -> None:
        """Forget a region, or without a name all of a kind. One in use is forgotten once its last request has ended."""
        for region in [each for each in self.status(kind=kind) if name in ("", each.name)]:
            region.leaving = True
            self._drop_unused(region)

    def status(self, name: str = "", kind: str = "system") -> list[Memory]:
        """A region, or without a name all of a kind in the order of their names. Raises `NotFound`."""
        found = [self._regions[each] for each in sorted(self._regions) if self._regions[each].kind == kind]
        if not name:
            return found
        if name not in [each.name for each in found]:
            raise texts.unknown_region_of(kind, name)
        return [self._regions[name]]

    @contextmanager
    def using(self, places: Iterable[Place]) -> Generator[dict[str, Memory], None, None]:
        """The regions of these places by name, which stay for the duration of the block. Raises `GatewayError`."""
        used = {place.region: self._checked(place) for place in places}
        for region in used.values():
            region.users += 1
        try:
            yield used
        finally:
            for region in used.values():
                region.users -= 1
                self._drop_unused(region)

    def _checked(self, place: Place) -> Memory:
        region = self._regions.get(place.region)
        if region is None:
            raise texts.unknown_region(place.region)
        if place.offset >= region.byte_size:
            raise texts.bad_region_offset(place.region)
        if place.size > _SIZE_MAX - place.offset:
            raise texts.region_overflow(place.region, place.offset, place.size, _SIZE_MAX)
        if place.offset + place.size > region.byte_size:
            raise texts.bad_region_end(place.region)
        return region

    def _open(self, key: str, key_name: str) -> int:
        """Raises `Internal`, as Triton has it, for a name that no object may have too: nothing outside is opened."""
        unable = errors.Internal(f"Unable to open shared memory region: '{key}'")
        if not key_name or "/" in key_name or "\0" in key_name or key_name in (".", "..") or len(key_name) > _LONGEST:
            raise unable
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self._folder / key_name, flags)
        except (OSError, UnicodeEncodeError):
            raise unable from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise unable
        return descriptor

    def _drop_unused(self, region: Memory) -> None:
        if region.leaving and not region.users and self._regions.get(region.name) is region:
            del self._regions[region.name]


@contextmanager
def registered() -> Generator[Regions, None, None]:
    """What clients register for the duration of the block; requests have ended when it ends."""
    regions = Regions()
    try:
        yield regions
    finally:
        regions.unregister()
