"""OpenTelemetry spans: what a trace becomes, whose child it is, and that a collector gets it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway import errors, telemetry
from gateway.config.trace import TraceConfig, read_trace_config
from gateway.middleware.spans import span_of, span_sink
from gateway.middleware.tracing import Trace
from gateway.service.controls import Controls
from gateway.service.trace_settings import Sampling
from gateway.types import Timings
from tests.support import refusal, request

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TIMINGS = Timings(100, 20, 300, 4, 1)
SAMPLING = Sampling(("TIMESTAMPS",), 1, -1, 0)


def trace(**more: Any) -> Trace:
    asked = request(id="7", trace_context={"traceparent": PARENT})
    return Trace(3, asked, 1000, 5000, "2", TIMINGS, **more)


def test_a_trace_is_three_spans() -> None:
    root = span_of(trace(error="Internal"))
    (model,) = root.children
    (compute,) = model.children
    assert [(span.name, span.started, span.ended) for span in (root, model, compute)] == [
        ("InferRequest", 1000, 5000),
        ("m", 1000, 5000),
        ("compute", 4676, 5000),
    ]
    assert root.error == "Internal"
    assert root.attributes == {
        "triton.model_name": "m",
        "triton.model_version": "2",
        "triton.request_id": "7",
    }
    assert [name for name, _ in model.events] == ["REQUEST_START", "QUEUE_START", "REQUEST_END"]
    assert dict(compute.events) == {
        "COMPUTE_START": 4676,
        "COMPUTE_INPUT_END": 4696,
        "COMPUTE_OUTPUT_START": 4996,
        "COMPUTE_END": 5000,
    }


def test_the_models_that_a_model_asked_are_under_it() -> None:
    step = Trace(4, request(model_name="step"), 2000, 3000, "1", TIMINGS, parent=3)
    whole = trace(parts=[step], composed=True, wire=[("GRPC_WAITREAD_START", 900), ("GRPC_SEND_END", 6000)])
    root = span_of(whole)
    assert (root.started, root.ended) == (900, 6000)
    assert root.events == (*whole.wire, ("INFER_RESPONSE_COMPLETE", 5000))
    (model,) = root.children
    (asked,) = model.children  # and no compute of its own
    assert (model.started, model.ended) == (1000, 5000)
    assert (asked.name, asked.attributes["triton.trace_parent_id"], model.attributes["triton.trace_parent_id"]) == (
        "step", "3", "0",
    )  # fmt: skip
    assert [child.name for child in asked.children] == ["compute"]


def test_what_never_ran_has_no_compute() -> None:
    (model,) = span_of(Trace(1, request(), 1, 2)).children
    assert model.children == ()


async def test_the_settings_of_this_mode() -> None:
    mode = ("mode=opentelemetry", "opentelemetry,url=http://c/v1/traces", "level=TIMESTAMPS", "rate=2")
    config = read_trace_config((*mode, "opentelemetry,resource=service.name=mine", "opentelemetry,resource=zone=b"))
    assert dict(config.resource) == {"service.name": "mine", "zone": "b"}
    traces = Controls(traces=config).traces
    assert await traces.read() == {
        "trace_level": ["TIMESTAMPS"],
        "trace_rate": "2",
        "trace_count": "-1",
        "trace_mode": "opentelemetry",
        "url": "http://c/v1/traces",
    }
    assert "spans have no tensors" in (await refusal(traces.change("", {"trace_level": ["TENSORS"]}))).message


@pytest.mark.parametrize("entry", ["level=TENSORS", "opentelemetry,resource=zone"])
def test_what_spans_cannot_do_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="--trace-config"):
        read_trace_config(["mode=opentelemetry", entry])


async def test_without_the_extra_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'opentelemetry'")

    monkeypatch.setattr(telemetry.Spans, "__init__", missing)
    with pytest.raises(errors.Unsupported, match=r"pip install 'lockgate\[otel\]'"):
        async with span_sink(TraceConfig(mode="opentelemetry")):
            pass


@asynccontextmanager
async def collector(bodies: list[bytes]) -> AsyncIterator[str]:
    """An OTLP endpoint that keeps what it is sent."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(line for line in head.splitlines() if line.startswith("content-length:"))
        body = await reader.readexactly(int(length.partition(":")[2]))
        bodies.append(body)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/traces"


async def test_a_collector_gets_the_spans_under_the_callers() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs pip install 'lockgate[otel]'")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies: list[bytes] = []
    async with collector(bodies) as url, span_sink(TraceConfig(mode="opentelemetry", url=url)) as sink:
        sink.keep(trace(error="Internal"), SAMPLING)
    (body,) = bodies
    (resource,) = ExportTraceServiceRequest.FromString(_plain(body)).resource_spans
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert {span.trace_id.hex() for span in spans.values()} == {PARENT.split("-")[1]}
    assert spans["InferRequest"].parent_span_id.hex() == PARENT.split("-")[2]
    assert spans["m"].parent_span_id == spans["InferRequest"].span_id
    assert spans["compute"].parent_span_id == spans["m"].span_id
    assert spans["compute"].end_time_unix_nano - spans["compute"].start_time_unix_nano == 324
    assert spans["compute"].events[0].name == "COMPUTE_START"
    assert spans["InferRequest"].status.message == "Internal"
    told = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert told["service.name"] == "triton-inference-server"


def _plain(body: bytes) -> bytes:
    import gzip

    return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
