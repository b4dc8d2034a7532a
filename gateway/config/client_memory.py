"""Clients' tensors in a Redis: which keys are theirs, and what the settings of it must be."""

from __future__ import annotations

CLIENT_KEYS = "lockgate-shm:"
"""Begins every key that a client may name, and none of a queue's."""


def check_client_memory(url: str, queue_prefix: str, *, allowed: bool) -> None:
    """Raise ValueError for a Redis for clients that cannot be; without a `url` there is none."""
    if url and not allowed:
        raise ValueError("--client-shm-redis needs --allow-client-shm")
    if url and f"{queue_prefix}:".startswith(CLIENT_KEYS):
        raise ValueError(
            f"--queue-prefix {queue_prefix} begins as the keys of clients in --client-shm-redis do, '{CLIENT_KEYS}'; "
            "choose another"
        )
