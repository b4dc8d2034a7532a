"""A model repository in an object store, as a `Root`.

A store that cannot be reached takes nothing away: what it had when it was seen last stays known, and what is loaded
stays loaded. The log says so once each time it is looked at, and a metric for as long as it lasts.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from gateway.config.check import plain_name
from gateway.config.locations import Location
from gateway.errors import GatewayError, InvalidArgument, Unavailable
from gateway.repository import layout
from gateway.repository.fingerprint import Fingerprint
from gateway.repository.remote.cache import Cache
from gateway.repository.remote.files import RemoteFiles
from gateway.repository.remote.store import Listing, Store, Unreachable
from gateway.telemetry import Family, log_event

_Read = TypeVar("_Read")


class RemoteRoot:
    """One `s3://` place or its like. Its methods may run in several threads."""

    def __init__(
        self, location: Location, cache: Cache, connect: Callable[[], Store], *, required: bool = False
    ) -> None:
        """`connect` is called at first use. With `required` a store that was never reached is an error, and else empty."""
        self._location = location
        self._cache = cache
        self._connect = connect
        self._required = required
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._opened: Store | None = None
        self._names: Sequence[str] | None = None
        self._prints: Mapping[str, Fingerprint] = {}
        self._tries: Counter[str] = Counter()  # by model, how often its files could not be had
        self._reachable = True
        self._failures = 0
        self._downloaded = 0

    @property
    def name(self) -> str:
        """See `Root.name`."""
        return self._location.name

    def models(self) -> Sequence[str]:
        """See `Root.models`; where the store cannot be reached, those that it had."""
        if not self._asking.acquire(blocking=self._reachable):
            return self._names or ()  # somebody else finds out whether it can be reached again
        try:
            self._names = self._asked(self._top)
        except Unreachable:
            if self._names is None and self._required:
                raise
        finally:
            self._asking.release()
        return self._names or ()

    def fingerprints(self) -> Mapping[str, Fingerprint]:
        """See `Root.fingerprints`; where the store cannot be reached, those that it had."""
        try:
            self._prints = self._asked(self._all)
        except Unreachable:
            if self._names is None and self._required:
                raise
        else:
            self._names = sorted(self._prints)
        return {name: self._again(name, found) for name, found in self._prints.items()}

    def open(self, model: str) -> RemoteFiles | None:
        """See `Root.open`. A store that cannot be reached has no model that it was not known to have."""
        if not plain_name(model) or "/" in model or model[0] in "._":
            return None
        try:
            listing = self._asked(lambda store: store.below(model))
        except Unreachable:
            if model not in (self._names or ()):
                return None
            self._tries[model] += 1
            raise
        return self._files(model, listing) if listing.files or listing.folders else None

    def metrics(self) -> list[Family]:
        """See `Root.metrics`."""
        labels = {"repository": self._location.url}
        reached, failed, loaded = int(self._reachable), self._failures, self._downloaded
        return [
            Family(
                "gateway_repository_reachable", "gauge", "Whether the store could be read last", [(labels, reached)]
            ),
            Family("gateway_repository_failures_total", "counter", "Times that it could not", [(labels, failed)]),
            Family("gateway_repository_downloaded_bytes_total", "counter", "Bytes brought here", [(labels, loaded)]),
        ]

    # --- what the store has

    def _top(self, store: Store) -> Sequence[str]:
        found = store.top()
        if any(each.path == layout.CONFIG for each in found.files):
            raise InvalidArgument(
                f"model repository '{self.name}' is the folder of one model; give the one that holds it"
            )
        return sorted(name for name in found.folders if name[0] not in "._")

    def _all(self, store: Store) -> Mapping[str, Fingerprint]:
        found = store.below()
        parts: dict[str, Listing] = {}
        for entry in found.files:
            name, below, _ = entry.path.partition("/")
            if below and name[0] not in "._":
                parts.setdefault(name, Listing([], [])).files.append(entry)
        for folder in found.folders:
            name, below, _ = folder.partition("/")
            if name[0] not in "._":
                listing = parts.setdefault(name, Listing([], []))
                if below:
                    listing.folders.append(folder)
        return {name: self._files(name, parts[name]).fingerprint() for name in sorted(parts)}

    def _files(self, model: str, listing: Listing) -> RemoteFiles:
        return RemoteFiles(
            model, listing, self._cache, self._location.url, lambda paths: self._download(model, listing, paths)
        )

    def _download(self, model: str, listing: Listing, paths: Mapping[str, Path]) -> None:
        log_event("repository_download", repository=self._location.url, model=model, files=len(paths))
        try:
            self._asked(lambda store: store.get(paths))
            # What was written over meanwhile may be half of each.
            now = set(self._asked(lambda store: store.below(model)).files)
            changed = [each.path for each in listing.files if each.path in paths and each not in now]
            if changed:
                raise Unavailable(f"'{changed[0]}' changed while it was downloaded; load the model again")
        except GatewayError:
            self._tries[model] += 1
            raise
        self._downloaded += sum(path.stat().st_size for path in paths.values())

    def _again(self, model: str, found: Fingerprint) -> Fingerprint:
        """Another one for files that could not be had, so that they are tried once more."""
        tries = self._tries[model]
        return Fingerprint(f"{found.shared}#{tries}", found.versions) if tries else found

    def _asked(self, read: Callable[[Store], _Read]) -> _Read:
        """What the store answers, and whether it does."""
        try:
            with self._lock:
                if self._opened is None:
                    self._opened = self._connect()
            answer = read(self._opened)
        except Unreachable as problem:
            self._failures += 1
            self._reachable = False
            log_event("repository_unreachable", logging.ERROR, repository=self._location.url, reason=problem.cause)
            raise
        if not self._reachable:
            self._reachable = True
            log_event("repository_reachable", repository=self._location.url)
        return answer
