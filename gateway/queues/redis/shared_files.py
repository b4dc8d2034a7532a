"""Payloads in /dev/shm: files that the processes of one user on one host hand each other by name.

A file belongs to the process that made it, and its name says which: process namespace, pid and the pid's start time,
so that whoever sweeps can tell the dead from the living. A name is used once. What the owner is done with it keeps for
its next payload, because new pages cost more than all else (0.5 ms of 0.6 for 600 KB). The lock decides whether a file
may be written again: a reader holds it shared for as long as its mapping lives, also when it has outlived its request.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from gateway import errors
from gateway.message import BadMessage
from gateway.types import Buffer

FOLDER = Path("/dev/shm")  # noqa: S108 - the host's shared memory, every file made with O_EXCL and mode 0600

_NAME = re.compile(r"lockgate-([0-9]+)\.([0-9]+)\.([0-9]+)\.[0-9A-Za-z_-]{1,64}\.[0-9A-Za-z_-]{1,64}\.[0-9a-f]{1,16}")
_SPARE_BYTES = 32 << 20
_SPARE_SECONDS = 10.0
_TRIES = 4  # spare files to look at; the one longest unused is the likeliest to have no reader
_GRACE_SECONDS = 10.0  # for the last answers of a process that has ended
_MOST_PARTS = 1024  # of one writev: IOV_MAX


class Missing(errors.Unavailable):
    """A payload that is no longer there: its owner has ended, or has given the request up."""


class SharedFiles:
    """This process's files in the shared folder, and its view of others'. Raises `OSError` where that is no use."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files: dict[str, tuple[int, float]] = {}  # name to size and the moment it is of no use any more
        self._spare: deque[tuple[str, int, float]] = deque()  # name, size, since when; the longest unused first
        try:
            self._owner = (_namespace(), os.getpid(), _started(os.getpid()))
            self.host = self._token()
        except OSError:
            os.close(self._folder)
            raise

    @property
    def held(self) -> int:
        """The bytes of this process's files, spare ones too."""
        return sum(size for size, _ in self._files.values()) + sum(size for _, size, _ in self._spare)

    def create(self, identity: str, size: int, ttl: float) -> tuple[str, int]:
        """A file for `size` bytes: its name, and a descriptor for `fill`. Raises `OSError`.

        `identity` is three words with dots between, the last in hexadecimal digits, and never the same twice.
        """
        name = f"lockgate-{'.'.join(map(str, self._owner))}.{identity}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"'{identity}' cannot be part of a file's name")
        descriptor = self._respare(name, size)
        if descriptor is None:
            self._want(size)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o600, dir_fd=self._folder)
        self._files[name] = (size, time.monotonic() + ttl)
        return name, descriptor

    def read(self, name: str, size: int) -> memoryview:
        """A view of a file, read-only and good for as long as anyone has it.

        Raises `Missing`, and `BadMessage` for a name or size that no owner gave a file.
        """
        if not _NAME.fullmatch(name):
            raise BadMessage(f"'{name[:200]}' is not the name of a payload")
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._folder)
        except FileNotFoundError:
            raise _missing() from None
        except OSError as problem:
            raise BadMessage(f"the payload '{name}' cannot be opened: {problem.strerror}") from None
        try:
            found = os.fstat(descriptor)
            if not _private(found) or found.st_size != size or not size:
                raise BadMessage(f"'{name}' is not a file of this user with {size} bytes")
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # The mapping has the descriptor, and so the lock, to itself until it ends. Another file under this name
            # there cannot be; none at all means that the owner was done with it before it was locked.
            os.stat(name, dir_fd=self._folder, follow_symlinks=False)
            return memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
        except (BlockingIOError, FileNotFoundError):
            raise _missing() from None
        finally:
            os.close(descriptor)

    def done(self, name: str) -> None:
        """Nobody needs the file any more, its owner's or another's."""
        if not _NAME.fullmatch(name):
            raise BadMessage(f"'{name[:200]}' is not the name of a payload")
        size, _ = self._files.pop(name, (0, 0.0))
        if not size or size + sum(spare for _, spare, _ in self._spare) > _SPARE_BYTES:
            self._unlink(name)
            return
        spare = f"lockgate-{'.'.join(map(str, self._owner))}.spare.{secrets.token_hex(8)}.0"
        with suppress(FileNotFoundError):
            os.rename(name, spare, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._spare.append((spare, size, time.monotonic()))

    def discard(self, name: str) -> None:
        """Remove a file of this process that may be half written."""
        self._files.pop(name, None)
        self._unlink(name)

    def sweep(self) -> int:
        """Remove what is left of processes that have ended, and what this one needs no more. Returns how many files."""
        now = time.monotonic()
        stale = [name for name, (_, until) in self._files.items() if until <= now]
        while self._spare and self._spare[0][2] <= now - _SPARE_SECONDS:
            stale.append(self._spare.popleft()[0])
        for name in stale:
            self.discard(name)
        gone = [name for name in self._files if not self._exists(name)]  # their readers were the last to need them
        for name in gone:
            del self._files[name]
        orphans = self._orphans()
        for name in orphans:
            self._unlink(name)
        return len(stale) + len(orphans)

    def close(self) -> None:
        """Remove this process's files. Those that another has a view of live as long as the view."""
        for name in [*self._files, *(name for name, _, _ in self._spare)]:
            self._unlink(name)
        self._files.clear()
        self._spare.clear()
        os.close(self._folder)
        self._folder = -1

    def _want(self, size: int) -> None:
        """Raise `OSError` unless there is room for so much more."""
        if size > 0:
            room = os.fstatvfs(self._folder)
            # The rest is for others: who maps more shared memory than there is gets killed.
            if (room.f_bavail - room.f_blocks // 8) * room.f_frsize < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _respare(self, name: str, size: int) -> int | None:
        """Give a spare file that nobody looks at any more this name, and open it; None if there is none."""
        for _ in range(min(len(self._spare), _TRIES)):
            spare, had, since = self._spare.popleft()
            try:
                descriptor = os.open(spare, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._want(size - had)
                os.ftruncate(descriptor, size)
                os.rename(spare, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            except BlockingIOError:
                os.close(descriptor)
                self._spare.append((spare, had, since))
            except OSError:  # no room to grow in, so that its own is wanted too
                os.close(descriptor)
                self._unlink(spare)
            else:
                return descriptor
        return None

    def _token(self) -> str:
        """What processes that share this folder and user have in common, made by the first of them."""
        name = f"lockgate-host-{os.geteuid()}"
        with suppress(FileExistsError):
            draft = f"{name}-{secrets.token_hex(8)}"
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(draft, flags, 0o600, dir_fd=self._folder)
            try:
                fill(descriptor, [secrets.token_hex(16).encode()])
                # Whoever finds the file finds it complete.
                os.link(draft, name, src_dir_fd=self._folder, dst_dir_fd=self._folder, follow_symlinks=False)
            finally:
                self._unlink(draft)
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._folder)
        try:
            token = os.read(descriptor, 64)
            if not _private(os.fstat(descriptor)) or len(token) != 32:
                raise OSError(errno.EPERM, f"{name} was not made by this user's gateway; remove it")
        finally:
            os.close(descriptor)
        return token.decode("ascii", "replace")

    def _orphans(self) -> list[str]:
        """Files of this user whose owner lived among the processes that this one can see, and is dead."""
        namespace, *_ = self._owner
        latest = time.time() - _GRACE_SECONDS
        alive: dict[tuple[int, int], bool] = {}
        orphans: list[str] = []
        for name in os.listdir(self._folder):  # noqa: PTH208 - the folder is a descriptor
            parts = _NAME.fullmatch(name)
            if parts is None or int(parts[1]) != namespace:
                continue
            process = int(parts[2]), int(parts[3])
            if process not in alive:
                alive[process] = _started(process[0]) == process[1]
            with suppress(FileNotFoundError):
                found = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
                if not alive[process] and _private(found) and found.st_mtime <= latest:
                    orphans.append(name)
        return orphans

    def _exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _unlink(self, name: str) -> None:
        # Another has removed it, or will: the sweep of whoever finds it.
        with suppress(OSError):
            os.unlink(name, dir_fd=self._folder)


def fill(descriptor: int, parts: Iterable[Buffer]) -> None:
    """Write all and close, come what may. Raises `OSError`. To be called on any thread."""
    try:
        views = deque(memoryview(part) for part in parts if len(part))
        while views:
            written = os.writev(descriptor, _first(views))
            while views and written >= len(views[0]):
                written -= len(views.popleft())
            if written:
                views[0] = views[0][written:]
    finally:
        os.close(descriptor)


def _first(views: deque[memoryview]) -> Sequence[memoryview]:
    return [views[index] for index in range(min(len(views), _MOST_PARTS))]


def _private(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _missing() -> Missing:
    return Missing("the data of this request is no longer there; send it again")


def _namespace() -> int:
    """Which processes this one can see: those of other containers may have the same pids."""
    return Path("/proc/self/ns/pid").stat().st_ino


def _started(pid: int) -> int:
    """When a process began, in ticks since the machine did; -1 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return int(text[text.rindex(b")") + 2 :].split()[19])
