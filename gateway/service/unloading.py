"""Unloads a model as clients of Triton expect it: the answer does not wait for requests that take their time."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from gateway.queues.base import Queue, Unload

_SECONDS = 0.5  # nearly every model is gone by then, and whoever asks finds it gone


async def unload(queue: Queue, command: Unload) -> None:
    """Have a model stop once its accepted requests are answered; if that takes long it goes on by itself."""
    with suppress(TimeoutError):
        await asyncio.wait_for(queue.send(command), _SECONDS)
