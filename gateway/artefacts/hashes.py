"""The hash of a model file, weights beside it included, computed again only when the file has changed.

A file counts as unchanged while its size and modification time are. Blocking: 20 MB take 15 ms of CPU.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


def sha256(path: Path) -> str:
    """The SHA-256 of a model file; of all its parts where an exporter put weights beside it (`model.onnx.data`).

    Raises OSError when it cannot be read.
    """
    parts = [path, *_weights(path)]
    if len(parts) == 1:
        return _hash(path)
    return hashlib.sha256("".join(_hash(part) for part in parts).encode()).hexdigest()


def _weights(path: Path) -> list[Path]:
    """Files that belong to a model file, by the names that PyTorch and Optimum give them."""
    return sorted(other for end in (".data", "_data") if (other := path.with_name(path.name + end)).is_file())


def _hash(path: Path) -> str:
    status = path.stat()
    return _cached(path, status.st_size, status.st_mtime_ns)


@lru_cache(256)
def _cached(path: Path, _size: int, _modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
