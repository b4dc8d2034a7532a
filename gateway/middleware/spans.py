"""Traces as OpenTelemetry spans, for `--trace-config mode=opentelemetry`.

A request is a span `InferRequest`, a child of the caller's span where its W3C `traceparent` says so; under it are the
model's span and under that the span `compute`, with Triton's timestamps as events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from gateway.config.trace import TraceConfig
from gateway.errors import Unsupported
from gateway.middleware.tracing import Sampling, Trace
from gateway.telemetry import Span, Spans

_COMPUTE = ("COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")


def span_of(trace: Trace) -> Span:
    """The span of a request, with those of its parts."""
    stamps = dict(trace.timestamps(wanted=True))
    version = trace.version or "-1"
    attributes = {"triton.model_name": trace.request.model_name, "triton.model_version": version}
    if trace.request.id:
        attributes["triton.request_id"] = trace.request.id
    model = Span(
        trace.request.model_name,
        trace.started,
        trace.ended,
        {**attributes, "triton.trace_id": str(trace.number)},
        {name: ns for name, ns in stamps.items() if name not in _COMPUTE and name != "INFER_RESPONSE_COMPLETE"},
        children=_compute(stamps),
    )
    events = {"INFER_RESPONSE_COMPLETE": trace.ended}
    return Span("InferRequest", trace.started, trace.ended, attributes, events, trace.error, (model,))


def _compute(stamps: Mapping[str, int]) -> tuple[Span, ...]:
    events = {name: stamps[name] for name in _COMPUTE if name in stamps}
    return (Span("compute", events[_COMPUTE[0]], events[_COMPUTE[-1]], {}, events),) if events else ()


@asynccontextmanager
async def span_sink(config: TraceConfig) -> AsyncGenerator[TraceSpans, None]:
    """Where traces go as spans; the last are sent when the block is left. Raises `Unsupported` without the extra."""
    try:
        spans = await asyncio.to_thread(Spans, config.url, dict(config.resource))
    except ModuleNotFoundError:
        raise Unsupported("--trace-config mode=opentelemetry needs the extra: pip install 'lockgate[otel]'") from None
    try:
        yield TraceSpans(spans)
    finally:
        await asyncio.to_thread(spans.close)


class TraceSpans:
    """Hands traces on as spans."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def keep(self, trace: Trace, _: Sampling) -> None:
        """Have a trace sent."""
        self._spans.send(span_of(trace), trace.request.trace_context)
