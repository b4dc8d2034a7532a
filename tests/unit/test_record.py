"""Recordings: what is written, what is left out, and that nothing a disk does harms a request."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway import __version__, errors
from gateway.middleware.record import Recorder, RecordOptions, recording
from gateway.scheduling.simulator.replay import read
from gateway.types import DataType, InferRequest, InferResponse, Tensor
from tests.support import answer, request, tensor


async def served(of: InferRequest) -> AsyncGenerator[InferResponse, None]:
    """As the service: size and deadline are known when the first answer is."""
    of.size = sum(each.nbytes for each in of.inputs.values())
    if of.parameters.get("timeout"):
        of.deadline = time.monotonic() + 1.5
    if isinstance(error := FAILURES.get(of.id), Exception):
        raise error
    yield answer(of, OUT=tensor([1, 2]))


FAILURES: dict[str, Exception] = {
    "invalid": errors.InvalidArgument("wrong shape"),
    "unknown": errors.unknown_model("m"),
    "stopping": errors.stopping(),
    "overload": errors.Overloaded("too much"),
    "queue_full": errors.queue_full("", None),
    "broken": errors.Internal("the model failed"),
}


async def record(folder: Path, *asked: InferRequest, **options: Any) -> Recorder:
    async with Recorder(RecordOptions(folder, **options)) as recorder:
        infer = recording(served, recorder)
        for each in asked:
            assert await ended(infer(each)) is FAILURES.get(each.id)
    return recorder


async def ended(responses: AsyncGenerator[InferResponse, None]) -> errors.GatewayError | None:
    try:
        assert len([response async for response in responses]) == 1
    except errors.GatewayError as error:
        return error
    return None


def sizes(folder: Path) -> list[int]:
    return [file.stat().st_size for file in folder.iterdir()]


def lines(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("arrivals-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


async def test_a_recording(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    asked = [
        request(rows=3, model_version="2", priority=1, tenant="acme"),
        request(parameters={"timeout": 1_500_000}),
    ]
    recorder = await record(folder, *asked)
    assert (recorder.written, recorder.dropped) == (2, 0)
    header, first, second = lines(folder)
    assert header.pop("started").endswith("Z")
    assert header == {"lockgate_recording": 1, "version": __version__, "sample": 1.0}
    assert 0 <= first.pop("t") <= second.pop("t")
    assert first == {
        "model": "m", "version": "2", "rows": 3, "bytes": 24, "deadline_ms": None, "priority": 1, "tenant": "acme",
    }  # fmt: skip
    assert second.pop("deadline_ms") >= 1500
    assert second == {"model": "m", "version": "", "rows": 1, "bytes": 8, "priority": 0, "tenant": ""}
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


async def test_the_simulator_reads_it(tmp_path: Path) -> None:
    await record(tmp_path, request(rows=3, model_version="2", priority=1, tenant="acme"), inputs=True)
    (arrival,) = read(tmp_path)
    assert (arrival.model, arrival.rows, arrival.size, arrival.deadline) == ("m:2", 3, 24, None)
    assert (arrival.priority, arrival.tenant) == (1, "acme")


async def test_refusals_are_load_and_requests_no_model_could_serve_are_not(tmp_path: Path) -> None:
    await record(tmp_path, *(request(id=name, tenant=name) for name in FAILURES))
    assert [line["tenant"] for line in lines(tmp_path)[1:]] == ["overload", "queue_full", "broken"]


async def test_a_caller_who_leaves_was_there(tmp_path: Path) -> None:
    async with Recorder(RecordOptions(tmp_path)) as recorder:
        responses = recording(served, recorder)(request())
        await anext(responses)
        await responses.aclose()
    assert recorder.written == 1


async def test_inputs_are_kept_as_arrays_without_pickle(tmp_path: Path) -> None:
    text = Tensor.from_array(DataType.BYTES, np.array([[b"a", b""]], dtype=object))
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    named = {"file": tensor(numbers), "a/../b": tensor([7], DataType.INT64), "text": text}
    await record(tmp_path, request(inputs=named), request(2.0), inputs=True)
    first, second = lines(tmp_path)[1:]
    with np.load(tmp_path / first["inputs"], allow_pickle=False) as kept:
        np.testing.assert_array_equal(kept["file"], numbers)
        np.testing.assert_array_equal(kept["a/../b"], [7])
        assert kept["text"].tobytes() == b"\x01\0\0\0a\0\0\0\0"
    assert first["strings"] == {"text": [1, 2]}
    with np.load(tmp_path / second["inputs"], allow_pickle=False) as kept:
        np.testing.assert_array_equal(kept["IN"], np.full((1, 2), 2, np.float32))
    assert second["strings"] == {}
    assert (tmp_path / first["inputs"]).stat().st_mode & 0o777 == 0o600


async def test_a_sample_is_a_share(tmp_path: Path) -> None:
    recorder = await record(tmp_path, *(request() for _ in range(2000)), sample=0.25)
    assert 350 < recorder.written < 650  # 500, give or take eight deviations
    assert recorder.dropped == 0
    assert lines(tmp_path)[0]["sample"] == 0.25


async def test_it_stops_at_its_bytes_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway")
    recorder = await record(tmp_path, *(request() for _ in range(50)), max_bytes=1000)
    (size,) = sizes(tmp_path)
    assert 800 < size <= 1000
    assert len(lines(tmp_path)) == recorder.written + 1
    assert recorder.dropped == 50 - recorder.written > 0
    events = [each.msg for each in caplog.records]
    assert [each.name for each in events] == ["recording_full", "recording_closed"]
    assert events[1].fields["dropped"] == recorder.dropped


async def test_inputs_count_as_bytes(tmp_path: Path) -> None:
    recorder = await record(tmp_path, *(request() for _ in range(5)), inputs=True, max_bytes=1500)
    assert 0 < recorder.written < 5
    assert sum(sizes(tmp_path)) <= 1500


async def test_a_disk_that_fails_ends_the_recording_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async with Recorder(RecordOptions(tmp_path, inputs=True)) as recorder:
        monkeypatch.setattr(Recorder, "_create", full)
        infer = recording(served, recorder)
        for _ in range(5):
            assert len([response async for response in infer(request())]) == 1
    assert (recorder.written, recorder.dropped) == (0, 5)
    (event,) = [each.msg for each in caplog.records if each.msg.name == "recording_failed"]
    assert "No space left on device" in event.fields["reason"]


async def test_what_cannot_be_written_down_is_dropped_alone(tmp_path: Path) -> None:
    recorder = await record(tmp_path, request(tenant="a"), request(priority=1 << 64), request(tenant="b"))
    assert (recorder.written, recorder.dropped) == (2, 1)
    assert [line["tenant"] for line in lines(tmp_path)[1:]] == ["a", "b"]


async def test_what_the_writer_has_no_time_for_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.middleware.record._MAX_WAITING", 3)
    async with Recorder(RecordOptions(tmp_path)) as recorder:
        await asyncio.to_thread(recorder._close)  # nobody writes any more
        for _ in range(5):
            recorder.note(request(), time.monotonic())
        assert recorder.dropped == 2
        recorder._waiting.get()  # leave room for the end
    assert recorder.written == 0


async def test_tensors_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.middleware.record._MAX_WAITING_BYTES", 10)
    async with Recorder(RecordOptions(tmp_path, inputs=True)) as recorder:
        await asyncio.to_thread(recorder._close)
        for size in (1000, 1):
            recorder.note(request(size=size), time.monotonic())
        assert recorder.dropped == 1  # the first was alone


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.InvalidArgument, match=r"--record: .*file cannot be written to: .*Give another folder"):
        async with Recorder(RecordOptions(tmp_path / "file")):
            pass
