"""The wrapper that traces requests, and the place where the traces go, as the settings say."""

from __future__ import annotations

from contextlib import AsyncExitStack

from gateway.config.settings import Settings
from gateway.config.trace import read_trace_config
from gateway.middleware.spans import span_sink
from gateway.middleware.trace_file import TraceFile
from gateway.middleware.tracing import Sampler, tracing
from gateway.types import Infer


async def traced(stack: AsyncExitStack, settings: Settings, infer: Infer, sampler: Sampler) -> Infer:
    """Wrap an endpoint, its traces kept until `stack` is closed. Raises `Unsupported` where an extra is missing.

    Without a place for traces nobody can ask for them later, and requests need not pass here.
    """
    config = read_trace_config(settings.trace_config)
    if config.mode == "opentelemetry":
        return tracing(infer, sampler, (await stack.enter_async_context(span_sink(config))).keep)
    path = config.file
    if path is None:
        return infer
    if settings.process_name:  # of a fleet, whose processes may share the folder
        path = path.with_name(f"{path.name}.{settings.process_name}")
    return tracing(infer, sampler, (await stack.enter_async_context(TraceFile(path))).keep)
