"""How the process tells people what happens: log lines, metrics in Prometheus' text format, and OpenTelemetry spans.

The only module that knows the log format, Prometheus or OpenTelemetry. It imports nothing of ours: callers hand it an
event with plain fields, or metric families with plain numbers. One event is one line, and a field is a
scalar, so a tensor cannot be logged. Lines go to standard error from the calling thread.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeAlias

Field: TypeAlias = str | int | float | bool | None
LogFormat: TypeAlias = Literal["text", "json"]
_LOGGER = "gateway"
_log = logging.getLogger(_LOGGER)
_MAX_FIELD = 2000


class Event:
    """What one log line says: a name and its fields. As a string it is the text format."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, fields: Mapping[str, Field]) -> None:
        self.name = name
        self.fields = {key: _loggable(value) for key, value in fields.items()}

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={_quoted(value)}" for key, value in self.fields.items())])


def log_event(event: str, level: int = logging.INFO, trace_of: BaseException | None = None, /, **fields: Field) -> None:
    """Log one event, its name in snake_case, with its fields in the order given; `trace_of` adds its traceback.

    DEBUG events appear with `--log-verbose` 1 or more. A field cannot be called time, level, source, event or trace.
    """
    if _log.isEnabledFor(level):
        _log.log(level, Event(event, fields), exc_info=trace_of)


def send_to_file(path: Path) -> None:
    """Have standard error, of this process and of those that it starts, be the end of a file. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)


def configure_logging(log_format: LogFormat, verbose: int, process: str = "", off: Iterable[str] = ()) -> None:
    """Send every log line of the process to standard error in this format; `verbose` > 0 adds DEBUG events.

    `off` are the levels, in lower case, of which no line is written.
    Other libraries' records of WARNING and above become events named `log`. `process` is named in each line,
    for a log that several processes write. Call it again to change it.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_switches)
    handler.setFormatter(_JsonFormatter(process) if log_format == "json" else _TextFormatter(process))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    switch_logging(info="info" not in off, warning="warning" not in off, error="error" not in off, verbose=verbose)


def switch_logging(*, info: bool, warning: bool, error: bool, verbose: int) -> None:
    """Which levels are written from now on; `verbose` > 0 adds DEBUG events, whatever the others say."""
    levels = {logging.INFO: info, logging.WARNING: warning, logging.ERROR: error}
    _switches.off = frozenset(level for level, on in levels.items() if not on)
    logging.getLogger(_LOGGER).setLevel(logging.DEBUG if verbose > 0 else logging.INFO)


class _Switches(logging.Filter):
    """Drops the records of the levels that are off."""

    off: frozenset[int] = frozenset()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno not in self.off


_switches = _Switches()


class Refusals:
    """Logs each class of refusal at its 1st, 10th, 100th ... time with the count so far, so a flood stays readable.

    A class is one of a fixed set of words, never text a client sent: each is remembered.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def note(self, kind: str, times: int = 1, **fields: Field) -> None:
        """Count so many refusals; `fields` describe one of them, as an example of its class."""
        before = self._counts.get(kind, 0)
        count = self._counts[kind] = before + times
        if not before or len(str(count)) > len(str(before)):
            log_event("refused", logging.WARNING, kind=kind, count=count, **fields)


class _TextFormatter(logging.Formatter):
    """`<time> <LEVEL> <event> key=value ...`, a traceback indented below it; after the level the process, if named."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = f"[{process}] " if process else ""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record)} {record.levelname} {self._process}{_event_of(record)}"
        if record.exc_info:
            # Indented, so that no text inside an exception can pass for a line of its own.
            line += "".join(f"\n    {trace}" for trace in self.formatException(record.exc_info).splitlines())
        return line


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, source (the process, if it is named), event, then the fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = {"source": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        event = _event_of(record)
        head = {"time": _timestamp(record), "level": record.levelname, **self._process, "event": event.name}
        line: dict[str, Field] = {**head, **event.fields, **head}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _event_of(record: logging.LogRecord) -> Event:
    if isinstance(record.msg, Event):
        return record.msg
    return Event("log", {"logger": record.name, "message": record.getMessage()})


def _timestamp(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _loggable(value: Field) -> Field:
    if isinstance(value, str) and len(value) > _MAX_FIELD:
        return f"{value[:_MAX_FIELD]}... ({len(value)} characters)"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _quoted(value: Field) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    printable = value.isprintable()
    if value and printable and not any(mark in value for mark in ' "='):
        return value
    return json.dumps(value, ensure_ascii=not printable)


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram's state: `counts[i]` of values <= `bounds[i]`, one more count for larger ones, and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(slots=True)
class Family:
    """One metric: its full name (a counter's `_total` included), help, and a value for each set of labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: list[tuple[Mapping[str, str], float | Buckets]] = field(default_factory=list)


METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def write_metrics(families: Iterable[Family]) -> bytes:
    """The families in Prometheus' text format 0.0.4, names exactly as given.

    Not `prometheus_client`'s writer: there, as in OpenMetrics, a counter's name must end in `_total`, and
    Triton's do not.
    """
    lines: list[str] = []
    for family in families:
        lines.append(f"# HELP {family.name} {family.help}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for labels, value in family.samples:
            text = ",".join(f'{name}="{_escaped(label)}"' for name, label in labels.items())
            if isinstance(value, Buckets):
                lines.extend(_histogram_lines(family.name, text, value))
            else:
                lines.append(f"{family.name}{{{text}}} {value}" if text else f"{family.name} {value}")
    lines.append("")
    return "\n".join(lines).encode()


def _histogram_lines(name: str, labels: str, buckets: Buckets) -> list[str]:
    start = f'{name}_bucket{{{labels}{"," if labels else ""}le="'
    suffix = f"{{{labels}}}" if labels else ""
    reached = list(accumulate(buckets.counts))
    bounds = _bound_labels(buckets.bounds, int in map(type, buckets.bounds))
    return [
        *[f'{start}{bound}"}} {count}' for bound, count in zip(bounds, reached, strict=True)],
        f"{name}_sum{suffix} {buckets.total}",
        f"{name}_count{suffix} {reached[-1]}",
    ]


@lru_cache(
    maxsize=16
)  # every model has the same few bounds, and turning floats into text is slow; 1 and 1.0 are one key
def _bound_labels(bounds: tuple[float, ...], _: bool) -> tuple[str, ...]:
    return (*map(str, bounds), "+Inf")


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def process_metrics(labels: Mapping[str, str]) -> list[Family]:
    """The standard `process_*` metrics of this process, with these labels. Reads /proc: call it off the event loop."""
    from prometheus_client import ProcessCollector

    families = []
    for metric in ProcessCollector(registry=None).collect():
        counter = metric.type == "counter"
        families.append(
            Family(
                f"{metric.name}_total" if counter else metric.name,
                "counter" if counter else "gauge",
                metric.documentation,
                [({**sample.labels, **labels}, sample.value) for sample in metric.samples],
            )
        )
    return families


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work. Times, of events by name too, are `time.monotonic_ns`; `error` is why it failed, if it did."""

    name: str
    started: int
    ended: int
    attributes: Mapping[str, str] = field(default_factory=dict)
    events: tuple[tuple[str, int], ...] = ()
    error: str = ""
    children: tuple[Span, ...] = ()


class Spans:
    """Sends spans to a collector by OTLP over HTTP, in batches from a thread of the SDK. Needs the extra `otel`."""

    def __init__(self, url: str, resource: Mapping[str, str], exporter: Any = None) -> None:
        """Raises ModuleNotFoundError without the extra. An `exporter` of the SDK's goes in place of the one to `url`."""
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint=url)
        self._api = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create(dict(resource)), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_LOGGER)

    def send(self, span: Span, parent: Mapping[str, str]) -> None:
        """Have a span sent, with its children; `parent` are the W3C headers of the caller's. Waits for nobody."""
        # To the spans of other machines these belong by the time of day.
        offset = time.time_ns() - time.monotonic_ns()
        self._send(span, self._propagator.extract(dict(parent)), self._api.SpanKind.SERVER, offset)

    def close(self) -> None:
        """Send what is left. Blocks: call it off the event loop."""
        self._provider.shutdown()

    def _send(self, span: Span, parent: Any, kind: Any, offset: int) -> None:
        sent = self._tracer.start_span(
            span.name, parent, kind=kind, attributes=dict(span.attributes), start_time=span.started + offset
        )
        for name, ns in span.events:
            sent.add_event(name, timestamp=ns + offset)
        if span.error:
            sent.set_status(self._api.Status(self._api.StatusCode.ERROR, span.error))
        context = self._api.set_span_in_context(sent)
        for child in span.children:
            self._send(child, context, self._api.SpanKind.INTERNAL, offset)
        sent.end(end_time=span.ended + offset)
