"""Where remote files lie on this machine: a folder that several processes may use at once, and that does not grow for ever.

`files/` has each content once, named by its SHA-256; `known/` says which content a file of a store has; `trees/` has
the folders that models are loaded from, whose files are links to the contents. What is made is made in `new/` and
renamed when it is whole. Whoever uses a tree holds a lock on it, which ends with its process; of those that nobody
uses the oldest are removed when there is no room. All of it blocks.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gateway.errors import Unavailable
from gateway.repository.remote.store import Entry
from gateway.telemetry import log_event

Download = Callable[[Mapping[str, Path]], None]
"""Brings files of a store, by their paths there, to where they are wanted."""


class Tree(NamedTuple):
    """A folder to be: files, by where each lies in it, and folders that may have none. `key` is equal for equal ones."""

    key: str
    files: Mapping[str, Entry]
    folders: Collection[str]


class Lease:
    """Keeps a folder where it is for as long as anyone holds this."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        weakref.finalize(self, os.close, descriptor)


class Cache:
    """A folder with at most `limit` bytes, or as many more as are in use."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._ready = False

    def folder(self, tree: Tree, store: str, download: Download) -> Lease:
        """The folder that has what `tree` says. `store` tells stores apart.

        Raises `Unavailable` when a file is not what it should be or the cache cannot be used, and what `download` raises.
        """
        try:
            self._prepare()
            path = self._folder / "trees" / tree.key
            while True:
                lease = _leased(path)
                if lease is not None and _whole(path, tree.files):
                    return lease
                damaged, lease = lease is not None, None
                with self._alone(tree.key):
                    if damaged and not self._removed(path):
                        raise Unavailable("the cache of remote models has a file that is damaged and in use")
                    if not path.exists():
                        self._build(path, tree, store, download)
        except OSError as problem:
            raise Unavailable(
                f"the cache of remote models cannot be used: {problem.strerror}. Check --repository-cache-dir"
            ) from None

    # --- making

    def _prepare(self) -> None:
        if not self._ready:
            for name in ("files", "known", "trees", "new", "locks"):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
            for left in (self._folder / "new").iterdir():  # by processes that died, unless it is locked
                if (lease := _leased(left, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    del lease
            self._ready = True

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """One process makes a tree; others that want it too wait."""
        with (self._folder / "locks" / key[:2]).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _build(self, path: Path, tree: Tree, store: str, download: Download) -> None:
        lease = self._own_folder()
        new = lease.path
        try:
            for name in tree.folders:
                (new / name).mkdir(parents=True, exist_ok=True)
            missing = {name: entry for name, entry in tree.files.items() if not self._placed(new / name, entry, store)}
            if missing:
                self._make_room(sum(entry.size for entry in missing.values()))
                download({entry.path: new / name for name, entry in missing.items()})
            for name, entry in missing.items():
                self._keep(new / name, entry, store)
            new.rename(path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        finally:
            del lease

    def _placed(self, path: Path, entry: Entry, store: str) -> bool:
        """Whether a file is there without a download."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # it was never here, or is removed at this moment
            content = self._known(entry, store).resolve(strict=True)
            if content.stat().st_size == entry.size:
                _link(content, path)
                return True
        return False

    def _keep(self, path: Path, entry: Entry, store: str) -> None:
        """Check a file that was brought here, and have its content known."""
        if path.stat().st_size != entry.size:
            raise Unavailable(f"file '{entry.path}' has {path.stat().st_size} bytes and not {entry.size}; try again")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        path.chmod(0o444)  # it may be linked to from several places
        content, other = self._folder / "files" / digest, self._own_name(digest)
        try:
            if content.stat().st_size != entry.size:
                content.unlink()  # it is damaged
            _link(content, other)
            other.replace(path)
        except FileNotFoundError:  # a content that is new here
            with suppress(OSError):  # else on a file system without links: each tree has files of its own
                os.link(path, content)
        known = self._known(entry, store)
        new = self._own_name(known.name)
        new.symlink_to(Path("..", "files", digest))
        new.rename(known)

    def _own_folder(self) -> Lease:
        """A new folder, which nobody takes for one that was left by a process that died."""
        while (lease := _leased(Path(tempfile.mkdtemp(dir=self._folder / "new")))) is None:
            pass  # somebody did, before it was locked
        return lease

    def _own_name(self, name: str) -> Path:
        """Where this thread alone makes something; not among the files of a store, which may have any names."""
        own = self._folder / "new" / f"{name}.{os.getpid()}.{threading.get_ident()}"
        own.unlink(missing_ok=True)  # left by a process that died, in a container with the same number
        return own

    def _known(self, entry: Entry, store: str) -> Path:
        identity = "\0".join((store, entry.path, str(entry.size), entry.tag))
        return self._folder / "known" / hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()

    # --- making room

    def _make_room(self, needed: int) -> None:
        """Remove what nobody uses, the oldest first, until there is room for so many bytes."""
        excess = self.size() + needed - self._limit
        if excess > 0:
            excess -= self._sweep()
        for tree in sorted((self._folder / "trees").iterdir(), key=_age):
            if excess <= 0:
                return
            own = _alone_bytes(tree)
            if self._removed(tree):
                log_event("repository_cache_removed", tree=tree.name)
                excess -= own + self._sweep()
        if excess > 0:
            log_event("repository_cache_full", logging.WARNING, limit=self._limit, more=excess, reason="all is in use")

    def _removed(self, tree: Path) -> bool:
        """Remove a tree, unless somebody uses it."""
        lease = _leased(tree, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lease is None:
            return not tree.exists()
        gone = self._own_folder()
        tree.rename(gone.path / tree.name)
        shutil.rmtree(gone.path, ignore_errors=True)
        return True

    def size(self) -> int:
        """The bytes of all that is there, each content once."""
        sizes = {}
        for part in ("files", "trees"):
            for folder, _, names in os.walk(self._folder / part):
                for name in names:
                    with suppress(OSError):  # another process removes too
                        status = Path(folder, name).stat()
                        sizes[status.st_ino] = status.st_size
        return sum(sizes.values())

    def _sweep(self) -> int:
        """Remove contents that no tree has; returns their bytes."""
        freed = 0
        for content in (self._folder / "files").iterdir():
            with suppress(OSError):
                status = content.stat()
                if status.st_nlink == 1:
                    content.unlink()
                    freed += status.st_size
        for name in (self._folder / "known").iterdir():
            if not name.exists():
                name.unlink(missing_ok=True)
        return freed


def _leased(folder: Path, how: int = fcntl.LOCK_SH) -> Lease | None:
    """A lock on a folder; None when it is not there, or with `LOCK_NB` when somebody else has a lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    lease = Lease(folder, descriptor)
    try:
        fcntl.flock(descriptor, how)
        if os.fstat(descriptor).st_ino != folder.stat().st_ino:
            return None
        if how == fcntl.LOCK_SH:
            os.utime(folder)
    except (BlockingIOError, FileNotFoundError):
        return None
    return lease


def _age(tree: Path) -> float:
    """When a tree was asked for last."""
    try:
        return tree.stat().st_mtime
    except OSError:
        return 0.0  # gone


def _whole(tree: Path, files: Mapping[str, Entry]) -> bool:
    try:
        return all((tree / name).stat().st_size == entry.size for name, entry in files.items())
    except OSError:
        return False


def _alone_bytes(tree: Path) -> int:
    """The bytes of a tree's files that are nowhere else."""
    total = 0
    for folder, _, names in os.walk(tree):
        for name in names:
            with suppress(OSError):
                status = Path(folder, name).stat()
                total += status.st_size if status.st_nlink == 1 else 0
    return total


def _link(content: Path, path: Path) -> None:
    try:
        os.link(content, path)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(content, path)
