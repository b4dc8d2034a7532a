"""Traces: which requests are sampled, what is told of them, and the files that Triton's own tools read."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gateway import errors
from gateway.config.trace import TraceConfig, read_trace_config
from gateway.middleware.trace_file import TraceFile
from gateway.middleware.tracing import Sampling, Trace, tracing, tracing_parts
from gateway.middleware.wire_times import WireTimes
from gateway.service.controls import Controls
from gateway.service.trace_settings import TraceSettings
from gateway.types import DataType, Infer, InferRequest, InferResponse, Tensor, Timings
from tests.support import answer, refusal, request, tensor

TIMINGS = Timings(100, 20, 300, 4, 1)
STAGES = [
    "REQUEST_START",
    "QUEUE_START",
    "COMPUTE_START",
    "COMPUTE_INPUT_END",
    "COMPUTE_OUTPUT_START",
    "COMPUTE_END",
    "INFER_RESPONSE_COMPLETE",
    "REQUEST_END",
]


def settings(path: Path, *entries: str) -> TraceSettings:
    return Controls(traces=read_trace_config([f"triton,file={path}", *entries])).traces


async def model(asked: InferRequest) -> AsyncGenerator[InferResponse, None]:
    if asked.id == "bad":
        raise errors.Internal("no")
    yield replace(answer(asked, OUT=tensor([[1.5, 2]])), timings=TIMINGS)


async def ask(infer: Infer, asked: InferRequest) -> None:
    async with aclosing(infer(asked)) as responses:
        async for _ in responses:
            pass


def kept(traces: list[Trace]) -> Callable[[Trace, Sampling], None]:
    return lambda trace, _: traces.append(trace)


def read(path: Path) -> list[Any]:
    return json.loads(path.read_text())


async def test_every_nth_request_is_traced_until_the_count_is_used(tmp_path: Path) -> None:
    traces: list[Trace] = []
    chosen = settings(tmp_path / "t", "level=TIMESTAMPS", "rate=3", "count=2")
    infer = tracing(model, chosen, kept(traces))
    for number in range(1, 13):
        await ask(infer, request(id=str(number)))
    assert [trace.request.id for trace in traces] == ["3", "6"]
    assert (await chosen.read())["trace_count"] == "0"


async def test_what_is_off_costs_nothing_and_what_is_changed_counts_anew(tmp_path: Path) -> None:
    traces: list[Trace] = []
    chosen = settings(tmp_path / "t", "rate=2")
    infer = tracing(model, chosen, kept(traces))
    assert not chosen.on
    await ask(infer, request())
    await chosen.change("", {"trace_level": ["TIMESTAMPS"]})
    for number in range(4):
        await ask(infer, request(id=str(number)))
    assert [trace.request.id for trace in traces] == ["1", "3"]
    await chosen.change("m", {"trace_rate": ["1"]})
    await chosen.change("", {"trace_level": ["OFF"]})
    assert not chosen.on
    await ask(infer, request())
    assert len(traces) == 2


async def test_a_model_may_be_traced_alone(tmp_path: Path) -> None:
    traces: list[Trace] = []
    chosen = settings(tmp_path / "t")
    infer = tracing(model, chosen, kept(traces))
    await chosen.change("m", {"trace_level": ["TIMESTAMPS"], "trace_rate": ["1"]})
    await ask(infer, request(model_name="other"))
    await ask(infer, request())
    assert [trace.request.model_name for trace in traces] == ["m"]
    await chosen.change("m", {"trace_level": None, "trace_rate": None})
    assert not chosen.on


async def test_the_stages_are_as_long_as_they_were() -> None:
    trace = Trace(1, request(), 1000, ended=5000, timings=TIMINGS)
    stamps = trace.timestamps(wanted=True)
    assert [name for name, _ in stamps] == STAGES
    assert [ns for _, ns in stamps] == [1000, 4576, 4676, 4696, 4996, 5000, 5000, 5000]
    assert trace.timestamps(wanted=False) == []


async def test_what_a_model_asks_of_others_is_a_part_of_its_trace(tmp_path: Path) -> None:
    traces: list[Trace] = []

    async def asks(asked: InferRequest) -> AsyncGenerator[InferResponse, None]:
        for name in ("a", "b"):
            await ask(inner, replace(asked, model_name=name, id=""))
        yield answer(asked)

    leaf = tracing_parts(model)

    async def between(asked: InferRequest) -> AsyncGenerator[InferResponse, None]:
        await ask(leaf, replace(asked, model_name=f"under {asked.model_name}"))
        yield answer(asked)

    inner = tracing_parts(between)
    infer = tracing(asks, settings(tmp_path / "t", "level=TIMESTAMPS", "rate=2"), kept(traces))
    await ask(infer, request(id="1"))
    asked = request(id="2")
    await ask(infer, asked)
    (trace,) = traces
    assert asked.trace is None
    seen = [(each.request.model_name, each.number, each.parent) for each in trace.family]
    assert seen == [("m", 1, 0), ("a", 2, 1), ("under a", 3, 2), ("b", 4, 1), ("under b", 5, 4)]
    assert all(each.ended >= each.started for each in trace.family)


async def test_parts_are_told_after_the_whole_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "t"
    part = Trace(2, request(model_name="part"), 5, 6, "1", parent=1)
    whole = Trace(1, request(id="7"), 1, 9, "1", parts=[part], composed=True, timings=TIMINGS)
    async with TraceFile(path) as file:
        file.keep(whole, Controls(traces=TraceConfig(("TIMESTAMPS",), rate=1)).traces.sample("m"))
    told = read(path)
    assert [each for each in told if "model_name" in each] == [
        {"id": 1, "model_name": "m", "model_version": 1, "request_id": "7"},
        {"id": 2, "model_name": "part", "model_version": 1, "parent_id": 1},
    ]
    names = [each["timestamps"][0]["name"] for each in told if each["id"] == 1 and "timestamps" in each]
    assert names == ["REQUEST_START", "QUEUE_START", "INFER_RESPONSE_COMPLETE", "REQUEST_END"]


async def test_a_trace_waits_until_all_is_sent(tmp_path: Path) -> None:
    traces: list[Trace] = []
    infer = tracing(model, settings(tmp_path / "t", "level=TIMESTAMPS", "rate=1"), kept(traces))
    wire = WireTimes("HTTP", 0.000001)
    wire.received()
    await ask(infer, request(trace=wire))
    assert not traces
    wire.sending()
    wire.sent()
    wire.close()
    (trace,) = traces
    names = [name for name, _ in trace.timestamps(wanted=True)]
    assert names == ["HTTP_RECV_START", "HTTP_RECV_END", *STAGES, "HTTP_SEND_START", "HTTP_SEND_END"]
    assert next(ns for _, ns in trace.timestamps(wanted=True)) == 1000
    late = WireTimes("GRPC")
    late.sent()
    late.close()
    await ask(infer, request(trace=late))
    assert [name for name, _ in traces[1].wire] == ["GRPC_WAITREAD_START"]


async def test_a_request_that_fails_is_traced_too(tmp_path: Path) -> None:
    traces: list[Trace] = []
    infer = tracing(model, settings(tmp_path / "t", "level=TIMESTAMPS", "rate=1"), kept(traces))
    assert (await refusal(ask(infer, request(id="bad")))).message == "no"
    assert [(trace.error, trace.timings) for trace in traces] == [("Internal", None)]
    assert [name for name, _ in traces[0].timestamps(wanted=True)] == [STAGES[0], *STAGES[-2:]]


async def test_all_traces_go_to_one_file_that_is_whole_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    chosen = settings(path, "level=TIMESTAMPS", "level=TENSORS", "rate=1")
    async with TraceFile(path) as file:
        infer = tracing(model, chosen, file.keep)
        for number in range(600):
            await ask(infer, request(id=str(number)))
    told = read(path)
    heads = [each for each in told if "model_name" in each]
    assert heads[599] == {"id": 600, "model_name": "m", "model_version": 1, "request_id": "599"}
    assert [each["timestamps"][0]["name"] for each in told if each["id"] == 1 and "timestamps" in each] == STAGES
    tensors = [each for each in told if each["id"] == 1 and "activity" in each]
    assert [each["activity"] for each in tensors] == ["TENSOR_QUEUE_INPUT", "TENSOR_BACKEND_OUTPUT"]
    assert tensors[1]["tensor"] == {"name": "OUT", "data": "1.5,2.0", "shape": "1,2", "dtype": "FP32"}


async def test_a_frequency_makes_a_file_of_each_so_many(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    chosen = settings(path, "level=TIMESTAMPS", "rate=1", "triton,log-frequency=2")
    async with TraceFile(path) as file:
        infer = tracing(model, chosen, file.keep)
        for number in range(5):
            await ask(infer, request(id=str(number)))
    files = [tmp_path / f"trace.json.{index}" for index in range(3)]
    assert [[each["id"] for each in read(path) if "model_name" in each] for path in files] == [[1, 2], [3, 4], [5]]


async def test_a_large_frequency_keeps_no_more_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    chosen = settings(path, "level=TIMESTAMPS", "rate=1", "triton,log-frequency=600")
    most = 0
    async with TraceFile(path) as file:
        infer = tracing(model, chosen, file.keep)
        for number in range(700):
            await ask(infer, request(id=str(number)))
            most = max(most, len(file._waiting))
        await chosen.change("", {"log_frequency": ["0"]})
        await ask(infer, request())
    assert most < 256
    files = [tmp_path / name for name in ("trace.json.0", "trace.json.1", "trace.json")]
    assert [sum("model_name" in each for each in read(path)) for path in files] == [600, 100, 1]


async def test_what_a_client_sends_amiss_is_traced_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "t"
    odd = Tensor(DataType.BYTES, (1, 2), b"\xff\xff\xff\xff\xff")
    async with TraceFile(path) as file:
        infer = tracing(model, settings(path, "level=TENSORS", "rate=1"), file.keep)
        await refusal(ask(infer, request(id="bad", model_version="abc", inputs={"IN": odd})))
    head, told = read(path)
    assert head == {"id": 1, "model_name": "m", "model_version": -1, "request_id": "bad"}
    assert told["tensor"] == {"name": "IN", "shape": "1,2", "dtype": "BYTES"}


async def test_strings_are_quoted(tmp_path: Path) -> None:
    path = tmp_path / "t"
    asked = request(inputs={"IN": tensor([b'a"b', b"c"], DataType.BYTES)})
    async with TraceFile(path) as file:
        await ask(tracing(model, settings(path, "level=TENSORS", "rate=1"), file.keep), asked)
    assert read(path)[1]["tensor"]["data"] == '"a\\"b","c"'


async def test_a_disk_that_fails_loses_traces_and_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    async with TraceFile(path) as file:
        await ask(tracing(model, settings(path, "level=TIMESTAMPS", "rate=1"), file.keep), request())
    assert "traces_lost" in caplog.text


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("speed=1", "is not known; expected one of level, rate"),
        ("rate", "is not known"),
        ("rate=0", "a number of 1 or more, got '0'"),
        ("count=x", "a number of -1 or more, got 'x'"),
        ("level=MOST", "expected OFF, TIMESTAMPS or TENSORS"),
        ("mode=zipkin", "mode=zipkin: expected"),
        ("triton,file=/nowhere/at/all/t.json", "its folder does not exist"),
        ("level=TIMESTAMPS", "needs --trace-config triton,file=PATH"),
    ],
)
def test_bad_configurations_are_refused(entry: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_trace_config([entry])
    assert read_trace_config([]) == TraceConfig()
