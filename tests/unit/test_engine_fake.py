"""The fake backend does what its parameters say, and its gate holds runs."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import aclosing, suppress
from pathlib import Path

import numpy as np
import pytest

from gateway import engines, errors
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines.base import EngineCrashed, EngineSpec
from gateway.engines.fake import FakeModel, Gate
from gateway.types import Batch

ECHO = "input { name: 'IN' data_type: TYPE_FP32 dims: [2] } output { name: 'OUT' data_type: TYPE_FP32 dims: [2] }"


def spec(tensors: str = ECHO, max_batch_size: int = 8, **parameters: str) -> EngineSpec:
    text = f"name: 'm' backend: 'fake' max_batch_size: {max_batch_size} {tensors} " + " ".join(
        f"parameters {{ key: '{key}' value {{ string_value: '{value}' }} }}" for key, value in parameters.items()
    )
    source = Source("m/config.pbtxt", text)
    return EngineSpec(build(parse_text(source), source), "1", Path(), "cpu")


def compute(made: EngineSpec, rows: int = 1, **inputs):
    return FakeModel(made.config).compute(inputs, Batch(rows, lambda: inputs))


async def run(engine, rows: int, **inputs):
    async with aclosing(engine.run(Batch(rows, lambda: inputs))) as results:
        return (await anext(results)).outputs


def row(*values: float):
    return np.array([values], "<f4")


def texts(*values: bytes):
    return np.array([[value] for value in values], dtype=object)


@pytest.mark.parametrize(
    ("kind", "dims", "expected"),
    [
        ("FP32", "[2]", [[1.5, 2], [3, 4]]),
        ("FP32", "[-1]", [[1.5, 2], [3, 4]]),
        ("FP32", "[3]", [[1.5] * 3, [3] * 3]),
        ("INT64", "[2, 1]", [[[1], [1]], [[3], [3]]]),
        ("FP16", "[-1, -1]", [[[1.5]], [[3]]]),
        ("STRING", "[1]", [[b"1.5"], [b"3.0"]]),
    ],
)
def test_outputs_have_the_configured_type_and_shape_and_show_their_row(kind: str, dims: str, expected) -> None:
    made = spec(
        "input { name: 'IN' data_type: TYPE_FP32 dims: [2] }"
        f" output {{ name: 'OUT' data_type: TYPE_{kind} dims: {dims} }}"
    )
    out = compute(made, 2, IN=np.array([[1.5, 2], [3, 4]], "<f4"))["OUT"]
    assert out.dtype == made.config.outputs[0].datatype.dtype
    assert out.tolist() == expected


def test_text_becomes_its_length_in_a_number_and_stays_in_text() -> None:
    made = spec(
        "input { name: 'IN' data_type: TYPE_STRING dims: [1] }"
        " output { name: 'N' data_type: TYPE_INT32 dims: [1] } output { name: 'T' data_type: TYPE_STRING dims: [2] }"
    )
    outputs = compute(made, 2, IN=texts(b"abc", b""))
    assert outputs["N"].tolist() == [[3], [0]]
    assert outputs["T"].tolist() == [[b"abc", b"abc"], [b"", b""]]


def test_an_input_of_no_elements_gives_zeros() -> None:
    made = spec(
        "input { name: 'IN' data_type: TYPE_FP32 dims: [-1] } output { name: 'OUT' data_type: TYPE_INT8 dims: [2] }"
    )
    assert compute(made, 1, IN=np.empty((1, 0), "<f4"))["OUT"].tolist() == [[0, 0]]


def test_without_batching_the_whole_input_is_one_row() -> None:
    made = spec(
        "input { name: 'IN' data_type: TYPE_FP32 dims: [-1] } output { name: 'OUT' data_type: TYPE_FP32 dims: [-1] }", 0
    )
    assert compute(made, 1, IN=np.array([1, 2, 3], "<f4"))["OUT"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("delta", "rows"), [("1", 3), ("-1", 1), ("-2", 0)])
def test_rows_delta(delta: str, rows: int) -> None:
    assert compute(spec(rows_delta=delta), 2, IN=np.zeros((2, 2), "<f4"))["OUT"].shape == (rows, 2)


def test_a_parameter_that_is_no_number() -> None:
    with pytest.raises(errors.InvalidArgument, match="parameter 'a_us' of model 'm' must be a number, got 'soon'"):
        FakeModel(spec(a_us="soon").config)


def test_the_slow_file_multiplies_each_run_from_when_it_is_there_until_it_is_gone(tmp_path: Path, monkeypatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("gateway.engines.fake.time.sleep", slept.append)
    slow = tmp_path / "slow"
    model = FakeModel(spec(a_us="1000", b_us="100", slow_file=str(slow)).config)

    def compute_two() -> None:
        model.compute({"IN": np.zeros((2, 2), "<f4")}, Batch(2, dict))

    compute_two()
    for text in ("10", "0.5\n", "soon", "-1"):
        slow.write_text(text)
        compute_two()
    slow.unlink()
    compute_two()
    assert slept == pytest.approx([0.0012, 0.012, 0.0006, 0.0012, 0, 0.0012])


async def test_poison_fails_and_the_engine_goes_on() -> None:
    (engine,) = await engines.create(spec(poison="13"))
    with pytest.raises(errors.Internal, match="poison"):
        await run(engine, 2, IN=np.array([[1, 1], [1, 13]], "<f4"))
    assert (await run(engine, 1, IN=row(1, 2)))["OUT"].tolist() == [[1, 2]]
    assert list(engine.loaded.runs) == [2, 1]
    await engine.close()


def test_poison_in_text() -> None:
    text = (
        "input { name: 'IN' data_type: TYPE_STRING dims: [1] } output { name: 'OUT' data_type: TYPE_STRING dims: [1] }"
    )
    made = spec(text, poison="bad")
    assert compute(made, 1, IN=texts(b"bad?"))["OUT"].tolist() == [[b"bad?"]]
    with pytest.raises(errors.Internal, match="poison"):
        compute(made, 2, IN=texts(b"good", b"bad"))


async def test_a_hang_ends_when_its_engine_closes(tmp_path: Path) -> None:
    (engine,) = await engines.create(spec(hang="1", gate=str(tmp_path / "gate")))
    async with Gate(tmp_path / "gate") as gate:

        async def close() -> None:
            (await gate.arrival()).release()
            await engine.close()

        hung, closed = await asyncio.gather(run(engine, 1, IN=row(1, 0)), close(), return_exceptions=True)
    assert isinstance(hung, errors.Unavailable)
    assert "hung until" in hung.message
    assert closed is None


async def test_a_crash_in_a_thread_raises() -> None:
    (engine,) = await engines.create(spec(crash="1"))
    with pytest.raises(SystemError, match="crashed"):
        await run(engine, 1, IN=row(1, 0))
    await engine.close()


def _fail(parameters: dict[str, str]) -> None:
    compute(spec(**parameters), 1, IN=row(1, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameters", "number"),
    [
        ({"crash": "1", "allow_crash": "true"}, signal.SIGKILL),
        ({"segfault": "1"}, signal.SIGSEGV),
        ({"abort": "1"}, signal.SIGABRT),
    ],
)
def test_a_fault_that_ends_the_process(parameters: dict[str, str], number: int) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_fail, args=(parameters,))
    process.start()
    process.join()
    assert process.exitcode == -number


def _hang_beside(parameter: str, beats) -> None:
    beats.send(None)
    threading.Thread(target=_fail, args=({parameter: "1"},), daemon=True).start()
    for _ in range(_BEATS - 1):
        beats.send(None)
        time.sleep(0.01)  # with the interpreter's lock kept, it is never to be had again
    os._exit(0)


_BEATS = 50


@pytest.mark.slow
@pytest.mark.parametrize("parameter", ["hang", "hang_gil"])
def test_a_hang_keeps_the_interpreter_only_if_it_is_that_kind(parameter: str) -> None:
    context = multiprocessing.get_context("spawn")
    beats, child = context.Pipe(duplex=False)
    process = context.Process(target=_hang_beside, args=(parameter, child))
    process.start()
    child.close()
    heard = 0
    with suppress(EOFError):
        while beats.poll(60 if heard == 0 or parameter == "hang" else 2):
            beats.recv()
            heard += 1
    assert (heard == _BEATS) == (parameter == "hang")
    process.kill()
    process.join()


def test_memory_that_no_machine_has() -> None:
    with pytest.raises(MemoryError):
        compute(spec(oom="1"), 1, IN=row(1, 0))


def test_a_broken_device_stays_broken() -> None:
    model = FakeModel(spec(sticky="1", lost="2").config)
    batch = Batch(1, dict)
    with pytest.raises(EngineCrashed):
        model.compute({"IN": row(2, 0)}, batch)
    assert model.compute({"IN": row(0, 0)}, batch)["OUT"].tolist() == [[0, 0]]
    for value in (1, 0):
        with pytest.raises(EngineCrashed):
            model.compute({"IN": row(value, 0)}, batch)


def test_nan_is_in_its_own_row_only_and_the_inputs_stay_as_they_are() -> None:
    given = np.array([[1, 2], [13, 3], [4, 5]], "<f4")
    out = compute(spec(nan="13"), 3, IN=given)["OUT"]
    assert np.isnan(out[1]).all()
    assert out[[0, 2]].tolist() == [[1, 2], [4, 5]]
    assert given.tolist() == [[1, 2], [13, 3], [4, 5]]
    assert compute(spec(nan="13"), 1, IN=row(1, 2))["OUT"].tolist() == [[1, 2]]


def test_one_row_too_few() -> None:
    assert compute(spec(short="13"), 2, IN=np.full((2, 2), 13, "<f4"))["OUT"].shape == (1, 2)
    assert compute(spec(short="13"), 2, IN=np.zeros((2, 2), "<f4"))["OUT"].shape == (2, 2)


async def test_the_gate_holds_each_run_and_says_its_rows(tmp_path: Path) -> None:
    created = await engines.create(spec(gate=str(tmp_path / "gate")), 2)
    async with Gate(tmp_path / "gate") as gate, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(run(created[0], 1, IN=row(1, 1)))
        one = await gate.arrival()
        second = tasks.create_task(run(created[1], 2, IN=np.zeros((2, 2), "<f4")))
        two = await gate.arrival()
        assert (one.rows, two.rows) == (1, 2)
        two.release()
        await second
        assert not first.done()
        one.release()
        assert (await first)["OUT"].tolist() == [[1, 1]]
    for engine in created:
        await engine.close()


async def test_leaving_the_gate_releases_all_and_no_gate_holds_nothing(tmp_path: Path) -> None:
    (engine,) = await engines.create(spec(gate=str(tmp_path / "gate")))
    await run(engine, 1, IN=row(0, 0))
    async with asyncio.TaskGroup() as tasks:
        async with Gate(tmp_path / "gate") as gate:
            held = tasks.create_task(run(engine, 1, IN=row(1, 1)))
            await gate.arrival()
        assert (await held)["OUT"].tolist() == [[1, 1]]
    await run(engine, 1, IN=row(0, 0))
    assert list(engine.loaded.runs) == [1, 1, 1]
    await engine.close()


@pytest.mark.parametrize("turns", range(5))
async def test_who_comes_to_a_gate_as_it_opens_is_not_held_for_ever(tmp_path: Path, turns: int) -> None:
    """asyncio takes a connection in one turn of the loop and tells of it in another."""
    with socket.socket(socket.AF_UNIX) as line:
        async with Gate(tmp_path / "gate"):
            line.connect(str(tmp_path / "gate"))
            line.setblocking(False)
            for _ in range(turns):
                await asyncio.sleep(0)
        with suppress(ConnectionResetError):  # it was still the kernel's
            async with asyncio.timeout(5):
                assert await asyncio.get_running_loop().sock_recv(line, 1) == b""
