"""The files of a model in a store: which there are, and those of a version brought here when it is wanted.

A version's folder here has the files that versions share beside it, as in a repository, and no other version: so what
it is loaded from stays the same when another version comes or goes, and versions that no policy chooses stay where
they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from gateway.repository import layout
from gateway.repository.fingerprint import Fingerprint
from gateway.repository.remote.cache import Cache, Download, Lease, Tree
from gateway.repository.remote.store import Entry, Listing


class RemoteFiles:
    """A `ModelFiles`. `listing` has what lies in the model's folder, by paths that begin with the model's name."""

    def __init__(self, model: str, listing: Listing, cache: Cache, store: str, download: Download) -> None:
        self.lease: list[Lease] = []
        self._model = model
        self._cache = cache
        self._store = store
        self._download = download
        self._files = listing.files
        head = f"{model}/"
        paths = [f"{each}/" for each in listing.folders] + [each.path for each in listing.files]
        below = [path.removeprefix(head) for path in paths if path.startswith(head)]
        folders = {path.partition("/")[0] for path in below if "/" in path}
        self.numbers, self.ignored = layout.numbers(model, sorted(each for each in folders if each[0] not in "._"))

    @cached_property
    def folder(self) -> Path:
        """See `ModelFiles.folder`."""
        return self._here(self._shared)

    def contents(self, number: int) -> list[str]:
        """See `ModelFiles.contents`."""
        head = f"{self._model}/{number}/"
        return sorted({each.path.removeprefix(head).partition("/")[0] for each in self._of(number)})

    def fetch(self, numbers: Collection[int]) -> Mapping[int, Path]:
        """See `ModelFiles.fetch`."""
        return {number: self._here([*self._shared, *self._of(number)], number) / str(number) for number in numbers}

    def fingerprint(self, override: str = "") -> Fingerprint:
        """See `ModelFiles.fingerprint`."""
        return Fingerprint(
            _digest(self._shared, override), {number: _digest(self._of(number)) for number in self.numbers}
        )

    @cached_property
    def _shared(self) -> list[Entry]:
        heads = tuple(f"{self._model}/{number}/" for number in self.numbers)
        return [each for each in self._files if not each.path.startswith(heads)]

    def _of(self, number: int) -> list[Entry]:
        return [each for each in self._files if each.path.startswith(f"{self._model}/{number}/")]

    def _here(self, files: Sequence[Entry], number: int | None = None) -> Path:
        own = self._model if number is None else f"{self._model}/{number}"
        tree = Tree(_digest(files, f"{self._store}\0{own}"), {each.path: each for each in files}, [own])
        self.lease.append(self._cache.folder(tree, self._store, self._download))
        return self.lease[-1].path / self._model


def _digest(files: Iterable[Entry], more: str = "") -> str:
    lines = [more, *(f"{each.path}\0{each.size}\0{each.tag}" for each in files)]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
