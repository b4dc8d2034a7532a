"""Variables that are not the gateway's own, and that it keeps to."""

from __future__ import annotations

import os


def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES: which GPUs CUDA shows to this process, in which order; None when it is not set: all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")
