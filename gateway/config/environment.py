"""Variables that are not the gateway's own, and that it keeps to."""

from __future__ import annotations

import os
from pathlib import Path

from gateway.errors import InvalidArgument


def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES: which GPUs CUDA shows to this process, in which order; None when it is not set: all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def cache_folder() -> Path:
    """The folder for what this program keeps of other places: `lockgate` in the user's cache folder.

    Raises `InvalidArgument` for a user who has no folder at all.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given, "lockgate")
    try:
        return Path.home() / ".cache" / "lockgate"
    except RuntimeError:
        raise InvalidArgument("this user has no home folder; give --repository-cache-dir DIR") from None
