"""A folder in an object store through fsspec: what is in it, and its files brought here.

All calls block. Whatever goes wrong is `Unavailable`; the cause, which may name hosts and buckets, goes to the log.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gateway.config.check import plain_name
from gateway.config.locations import Location
from gateway.errors import InvalidArgument, Unavailable

_DRIVERS = {
    "s3": ("s3fs", "S3FileSystem"),
    "gs": ("gcsfs", "GCSFileSystem"),
    "as": ("adlfs", "AzureBlobFileSystem"),
    "hf": ("huggingface_hub", "HfFileSystem"),
}
# What changes when the content does, by the names of the stores; then what comes near.
_TAGS = ("ETag", "etag", "blob_id", "md5Hash", "generation", "content_md5", "mtime", "created", "LastModified")
# s3fs tries five times on top of this.
_PATIENCE = {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 2, "mode": "standard"}}


class Entry(NamedTuple):
    """A file in a store; equal when its content is. `path` is below the repository."""

    path: str
    size: int
    tag: str


class Listing(NamedTuple):
    """The files and the folders below a folder, by their paths below the repository."""

    files: list[Entry]
    folders: list[str]


class Unreachable(Unavailable):
    """A store that cannot be read now. `cause` is for the log."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


def require_driver(location: Location) -> None:
    """Raise `InvalidArgument` unless the package for this kind of store is installed."""
    package, _ = _DRIVERS[location.scheme]
    if any(importlib.util.find_spec(each) is None for each in ("fsspec", package)):
        raise InvalidArgument(
            f"model repository '{location.url}' needs the package {package}: pip install 'lockgate[remote]'"
        )


def connect(location: Location, credentials: Mapping[str, str]) -> Store:
    """The store of a location; `credentials` are as `config.credentials` reads them.

    Imports its driver; asks the store nothing yet. Raises `Unreachable`.
    """
    package, driver = _DRIVERS[location.scheme]
    options = _options(location, credentials)
    with _reading(location.name):
        file_system = getattr(importlib.import_module(package), driver)
        # Made once and for this process alone: another one's event loop is of no use after a fork.
        made = file_system(**options, skip_instance_cache=True, use_listings_cache=False)
    return Store(made, location.path, location.name)


class Store:
    """A folder of an fsspec file system. `name` is what errors call it."""

    def __init__(self, file_system: Any, path: str, name: str) -> None:
        self._files = file_system
        self._base = file_system._strip_protocol(path).rstrip("/")  # noqa: SLF001 - fsspec has no other word for it
        self._name = name

    def top(self) -> Listing:
        """What lies in the folder itself. Raises `Unreachable`, also when the folder is not there."""
        with _reading(self._name):
            self._files.invalidate_cache()
            return self._listing({info["name"]: info for info in self._files.ls(self._base, detail=True)})

    def below(self, folder: str = "") -> Listing:
        """All that lies below the folder `folder`, or below all. Raises `Unreachable`.

        Nothing at all is taken for a repository that is not there, as most stores do; an empty model has nothing.
        """
        path = f"{self._base}/{folder}" if folder else self._base
        with _reading(self._name):
            self._files.invalidate_cache()
            try:
                found = self._files.find(path, withdirs=True, detail=True)
            except FileNotFoundError:
                found = {}
            if not found and not folder:
                raise FileNotFoundError(path)
            return self._listing(found)

    def get(self, paths: Mapping[str, Path]) -> None:
        """Bring files here: by their paths below the repository, where to. Raises `Unreachable`."""
        with _reading(self._name):
            self._files.get([f"{self._base}/{path}" for path in paths], [str(path) for path in paths.values()])

    def _listing(self, found: Mapping[str, Mapping[str, Any]]) -> Listing:
        files, folders = [], []
        for path, info in found.items():
            relative = path.rstrip("/").removeprefix(f"{self._base}/")
            if relative == path.rstrip("/") or not visible(relative):
                continue  # the folder itself, or what nobody serves
            if info["type"] == "directory":
                folders.append(relative)
            else:
                tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
                files.append(Entry(relative, int(info["size"] or 0), tag))
        return Listing(sorted(files), sorted(folders))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as problem:  # noqa: BLE001 - each driver and each library below it has errors of its own
        why = "it cannot be reached"
        if isinstance(problem, FileNotFoundError | PermissionError):
            why = "it is not there" if isinstance(problem, FileNotFoundError) else "access is denied"
        message = f"model repository '{name}' cannot be read: {why}. The server's log has the cause"
        raise Unreachable(message, f"{type(problem).__name__}: {problem}") from None


def visible(path: str) -> bool:
    """Whether a file counts: nothing hidden, nothing that Python makes, and no name that leads elsewhere."""
    parts = path.split("/")
    return plain_name(path) and not any(part == "__pycache__" or part[:1] in ("", ".") for part in parts)


def _options(location: Location, found: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of the driver. Triton's order for s3: keys, then a profile, then what else there is."""
    if location.scheme == "s3":
        options: dict[str, Any] = {"config_kwargs": dict(_PATIENCE)}
        if location.host:
            options["endpoint_url"] = location.host
            options["config_kwargs"]["s3"] = {"addressing_style": "path"}
        if "key_id" in found and "secret_key" in found:
            options |= {"key": found["key_id"], "secret": found["secret_key"], "token": found.get("session_token")}
        elif "profile" in found:
            options["profile"] = found["profile"]
        if "region" in found:
            options["client_kwargs"] = {"region_name": found["region"]}
        return options
    if location.scheme == "gs":
        return {"access": "read_only", **({"token": found["path"]} if "path" in found else {})}
    if location.scheme == "as":
        return _azure(location, found)
    return {"token": found["token"]} if "token" in found else {}


def _azure(location: Location, found: Mapping[str, str]) -> dict[str, Any]:
    account, _, rest = location.host.partition(".")
    options: dict[str, Any] = {"account_name": account, "anon": False}
    if rest:
        options["account_host"] = location.host
    if "account_key" in found:
        options["account_key"] = found["account_key"]
    return options
