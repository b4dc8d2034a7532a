"""The wrapper that records arrivals, where the settings ask for it."""

from __future__ import annotations

from contextlib import AsyncExitStack

from gateway.config.settings import Settings
from gateway.types import Infer


async def recorded(stack: AsyncExitStack, settings: Settings, infer: Infer) -> Infer:
    """Wrap an endpoint. To be entered before the listeners, so that what they answer last is recorded too."""
    if settings.record is None:
        return infer
    from gateway.middleware.record import Recorder, RecordOptions, recording

    options = RecordOptions(settings.record, settings.record_inputs, settings.record_sample, settings.record_max_bytes)
    return recording(infer, await stack.enter_async_context(Recorder(options)))
