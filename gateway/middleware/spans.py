"""Traces as OpenTelemetry spans, for `--trace-config mode=opentelemetry`.

A request is a span `InferRequest`, a child of the caller's span where its W3C `traceparent` says so; under it are the
model's span and under that the span `compute`, with Triton's timestamps as events, and the spans of the models that it asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from gateway.config.trace import TraceConfig
from gateway.errors import Unsupported
from gateway.middleware.tracing import Sampling, Trace
from gateway.telemetry import Span, Spans

_COMPUTE = ("COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")


def span_of(trace: Trace) -> Span:
    """The span of a request, with those of its parts."""
    stamps = trace.timestamps(wanted=True)
    attributes = _attributes(trace)
    events = (*trace.wire, ("INFER_RESPONSE_COMPLETE", trace.ended))
    began, ended = stamps[0][1], stamps[-1][1]
    return Span("InferRequest", began, ended, attributes, events, trace.error, (_model(trace),))


def _model(trace: Trace) -> Span:
    """The span of a model that was asked, under it those that it asked."""
    stamps = [stamp for stamp in trace.timestamps(wanted=True) if stamp not in trace.wire]
    attributes = {"triton.trace_id": str(trace.number), "triton.trace_parent_id": str(trace.parent)}
    return Span(
        trace.request.model_name,
        trace.started,
        trace.ended,
        {**_attributes(trace), **attributes},
        tuple(stamp for stamp in stamps if stamp[0] not in _COMPUTE and stamp[0] != "INFER_RESPONSE_COMPLETE"),
        trace.error if trace.parent else "",
        (*_compute(stamps), *map(_model, trace.parts)),
    )


def _attributes(trace: Trace) -> dict[str, str]:
    told = {"triton.model_name": trace.request.model_name, "triton.model_version": trace.version or "-1"}
    return told | ({"triton.request_id": trace.request.id} if trace.request.id else {})


def _compute(stamps: Sequence[tuple[str, int]]) -> tuple[Span, ...]:
    events = tuple(stamp for stamp in stamps if stamp[0] in _COMPUTE)
    return (Span("compute", events[0][1], events[-1][1], {}, events),) if events else ()


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
