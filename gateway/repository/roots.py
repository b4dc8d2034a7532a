"""Where models are: what a repository asks of a place that holds some, and the answer for a folder of this machine.

The rest of the gateway sees folders of this machine only. A place that is elsewhere brings a version's files here when
it is fetched. All of it is blocking work: call it in a thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from gateway.config.check import plain_name
from gateway.repository import layout
from gateway.repository.fingerprint import Fingerprint, fingerprint
from gateway.telemetry import Family


class ModelFiles(Protocol):
    """The files of one model at one moment."""

    @property
    def folder(self) -> Path:
        """Where what the versions share lies here. May raise `Unavailable`."""
        ...

    @property
    def numbers(self) -> Sequence[int]:
        """The versions, lowest first."""
        ...

    @property
    def ignored(self) -> Sequence[str]:
        """A warning for each folder that is no version."""
        ...

    @property
    def lease(self) -> object:
        """Keeps here what was fetched for as long as anyone holds it."""
        ...

    def contents(self, number: int) -> list[str]:
        """The names in a version's folder."""
        ...

    def fetch(self, numbers: Collection[int]) -> Mapping[int, Path]:
        """The folders of these versions, which are here from now on; each is in a folder with what they share.

        Raises `Unavailable` when they cannot be had.
        """
        ...

    def fingerprint(self, override: str) -> Fingerprint:
        """What the files are; `override` is configuration text used in place of its file."""
        ...


class Root(Protocol):
    """One place that holds models. Every method raises `GatewayError` when it cannot be read."""

    @property
    def name(self) -> str:
        """What errors call it, which says little of where it is."""
        ...

    def models(self) -> Sequence[str]:
        """The names of the models, in order."""
        ...

    def fingerprints(self) -> Mapping[str, Fingerprint]:
        """What every model is now."""
        ...

    def open(self, model: str) -> ModelFiles | None:
        """The files of a model; None where there is none of this name."""
        ...

    def metrics(self) -> list[Family]:
        """What there is to tell of the place itself."""
        ...


class LocalFiles:
    """The `ModelFiles` of a folder of this machine."""

    def __init__(self, folder: Path, lease: object = None) -> None:
        self.folder = folder
        self.lease = lease
        self._versions, self.ignored = layout.versions(folder)
        self.numbers = tuple(self._versions)

    def contents(self, number: int) -> list[str]:
        """See `ModelFiles.contents`."""
        return layout.names(self._versions[number])

    def fetch(self, numbers: Collection[int]) -> Mapping[int, Path]:
        """See `ModelFiles.fetch`."""
        return {number: self._versions[number] for number in numbers}

    def fingerprint(self, override: str = "") -> Fingerprint:
        """See `ModelFiles.fingerprint`."""
        return fingerprint(self.folder, self._versions, override)


class LocalRoot:
    """The `Root` that is a folder of this machine. Holds no state: every call reads the files as they are."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()

    @property
    def name(self) -> str:
        """See `Root.name`."""
        return self._path.name

    def models(self) -> Sequence[str]:
        """See `Root.models`."""
        return [folder.name for folder in layout.models(self._path)]

    def fingerprints(self) -> Mapping[str, Fingerprint]:
        """See `Root.fingerprints`."""
        return {folder.name: LocalFiles(folder).fingerprint() for folder in layout.models(self._path)}

    def open(self, model: str) -> ModelFiles | None:
        """See `Root.open`."""
        layout.require_repository(self._path)
        folder = self._path / model
        if plain_name(model) and "/" not in model and model[0] not in "._" and folder.is_dir():
            return LocalFiles(folder)
        layout.models(self._path)  # which says so when it cannot be read
        return None

    def metrics(self) -> list[Family]:
        """See `Root.metrics`."""
        return []
