"""The TensorRT backend with fakes of TensorRT and CUDA: buffers, order of calls, graphs, errors. No GPU is involved."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import numpy as np
import pytest

from gateway import engines, errors
from gateway.engines.base import DeviceOutOfMemory, EngineCrashed
from gateway.engines.tensorrt import backend, execution
from gateway.engines.tensorrt.fakes.cuda import GPU, cudaError_t
from tests.tensorrt_support import WIDE, left_over, opened, pair, right, run, spec, write_plan

GRAPHS = "optimization { cuda { graphs: true } }"


@pytest.fixture(autouse=True)
def gpu():
    """A fake GPU that nobody uses, before and after."""
    GPU.reset()
    yield
    gc.collect()
    GPU.reset()


async def test_answers_are_right_at_every_shape_and_memory_is_taken_once_and_given_back(tmp_path: Path) -> None:
    async with opened(spec(write_plan(tmp_path))) as (engine,):
        taken = GPU.calls.count("cudaMalloc"), GPU.calls.count("cudaHostAlloc")
        assert taken == (5, 4)  # four tensors, and the activations
        for shape in ((1, 1), (8, 16), (3, 5), (1, 16), (3, 5)):
            inputs = pair(*shape)
            assert right(inputs, await run(engine, **inputs))
        assert (GPU.calls.count("cudaMalloc"), GPU.calls.count("cudaHostAlloc")) == taken
        assert {len(block) for block in GPU.host.values()} == {8 * 16 * 4}
    assert left_over() == {}


async def test_what_a_run_calls_and_in_what_order(tmp_path: Path) -> None:
    async with opened(spec(write_plan(tmp_path))) as (engine,):
        GPU.calls.clear()
        await run(engine, ("SUM",), **pair(2, 3))
        assert GPU.calls == ["cudaSetDevice", *["cudaMemcpyAsync"] * 3, "cudaStreamSynchronize"]


async def test_answers_outlive_the_next_run(tmp_path: Path) -> None:
    async with opened(spec(write_plan(tmp_path))) as (engine,):
        first, second = pair(2, 3), pair(2, 3, 500.0)
        given = await run(engine, **first)
        assert right(second, await run(engine, **second))
        assert right(first, given)


async def test_engines_share_the_plan_and_have_streams_of_their_own(tmp_path: Path) -> None:
    async with opened(spec(write_plan(tmp_path)), 2) as (one, other):
        assert len(GPU.streams) == 2
        assert one.loaded.execution._plan is other.loaded.execution._plan
        for engine, start in ((one, 1.0), (other, 700.0)):
            inputs = pair(4, 4, start)
            assert right(inputs, await run(engine, **inputs))
    assert left_over() == {}


async def test_a_shape_that_comes_again_runs_as_a_graph(tmp_path: Path) -> None:
    async with opened(spec(write_plan(tmp_path), GRAPHS)) as (engine,):
        captures, launches = [], []
        for number in range(5):
            inputs = pair(2, 3, 10.0 * number)
            assert right(inputs, await run(engine, **inputs))
            captures.append(GPU.calls.count("cudaStreamBeginCapture"))
            launches.append(GPU.calls.count("cudaGraphLaunch"))
        assert (captures, launches) == ([0, 1, 1, 1, 1], [0, 0, 1, 2, 3])
        # A change of shape between launches of a graph must not disturb it.
        for shape in ((4, 4), (2, 3), (4, 4), (2, 3), (4, 4), (1, 1)):
            inputs = pair(*shape)
            assert right(inputs, await run(engine, **inputs))
        assert GPU.calls.count("cudaStreamBeginCapture") == 2
        assert GPU.calls.count("cudaGraphLaunch") == 6
    assert left_over() == {}


async def test_only_so_many_shapes_have_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "MOST_GRAPHS", 2)
    async with opened(spec(write_plan(tmp_path), GRAPHS)) as (engine,):
        for _ in range(3):
            for size in range(1, 6):
                inputs = pair(2, size)
                assert right(inputs, await run(engine, **inputs))
        assert GPU.calls.count("cudaStreamBeginCapture") == 2
        assert len(engine.loaded.execution._seen) <= 3


async def test_without_graphs_nothing_is_captured(tmp_path: Path) -> None:
    async with opened(spec(write_plan(tmp_path))) as (engine,):
        for _ in range(4):
            await run(engine, **pair(2, 3))
        assert "cudaStreamBeginCapture" not in GPU.calls


@pytest.mark.parametrize("call", ["cudaStreamEndCapture", "cudaMalloc"])
async def test_a_shape_that_cannot_be_captured_runs_without(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(spec(write_plan(tmp_path), GRAPHS)) as (engine,):
        if call == "cudaMalloc":  # no more contexts
            monkeypatch.setattr(engine.loaded.execution._plan, "context", _no_memory)
        for number in range(4):
            GPU.fail = {call: cudaError_t.cudaErrorStreamCaptureUnsupported}
            inputs = pair(2, 3, 10.0 * number)
            assert right(inputs, await run(engine, **inputs))
        assert "cudaGraphLaunch" not in GPU.calls
        assert GPU.calls.count("cudaStreamBeginCapture") <= 1
    assert left_over() == {}


def _no_memory() -> None:
    raise DeviceOutOfMemory("no memory for a context")


async def test_profiles_are_changed_as_shapes_demand(tmp_path: Path) -> None:
    small = {"A": [[1, 1], [1, 4], [1, 4]], "B": [[1, 1], [1, 4], [1, 4]]}
    async with opened(spec(write_plan(tmp_path, [small, WIDE]), GRAPHS)) as (engine,):
        for shape in ((1, 4), (8, 16), (1, 4), (1, 4), (8, 16), (1, 4), (8, 16), (2, 2)):
            inputs = pair(*shape)
            assert right(inputs, await run(engine, **inputs))
    assert left_over() == {}


async def test_a_shape_outside_all_profiles_is_the_clients_error_and_reaches_no_memory(tmp_path: Path) -> None:
    async with opened(spec(write_plan(tmp_path))) as (engine,):
        GPU.calls.clear()
        with pytest.raises(errors.InvalidArgument) as caught:
            await run(engine, **pair(2, 17))
        assert caught.value.message == (
            "input 'A' has shape [2, 17], and the plan was built for [1, 1] to [8, 16]; send such shapes, or build it for "
            "more with the parameters trt_profile_min_shapes and trt_profile_max_shapes"
        )
        assert GPU.calls == ["cudaSetDevice"]
        assert right(pair(2, 16), await run(engine, **pair(2, 16)))


# --- faults


async def test_a_sticky_error_ends_the_use_of_the_gpu(tmp_path: Path) -> None:
    async with opened(spec(write_plan(tmp_path, faults={"sticky": 7.0}), GRAPHS)) as (engine,):
        assert right(pair(1, 2), await run(engine, **pair(1, 2)))
        with pytest.raises(EngineCrashed, match=r"an illegal memory access \(CUDA error 700\): cudaStreamSynchronize"):
            await run(engine, **pair(1, 2, 7.0))
        GPU.calls.clear()
        with pytest.raises(EngineCrashed, match=r"model 'm': .*; this process can use the GPU no more"):
            await run(engine, **pair(1, 2))
        assert GPU.calls == []


@pytest.mark.parametrize(
    ("faults", "inputs"),
    [({"memory": 7.0}, pair(1, 2, 7.0)), ({"memory_rows": 4}, pair(5, 2))],
    ids=["stream", "enqueue"],
)
async def test_a_run_without_memory_is_told_as_that_and_a_smaller_one_goes_on(tmp_path: Path, faults, inputs) -> None:
    async with opened(spec(write_plan(tmp_path, faults=faults))) as (engine,):
        with pytest.raises(DeviceOutOfMemory, match="is out of memory: "):
            await run(engine, **inputs)
        assert right(pair(4, 2, 20.0), await run(engine, **pair(4, 2, 20.0)))


async def test_a_plan_that_does_not_fit_into_memory_leaves_nothing_behind(tmp_path: Path) -> None:
    GPU.reset(memory=4096 + 3 * 512)  # the activations and three of four tensors
    with pytest.raises(DeviceOutOfMemory, match="the GPU is out of memory: cudaMalloc: cudaErrorMemoryAllocation"):
        await engines.create(spec(write_plan(tmp_path)))
    gc.collect()
    assert left_over() == {}


LOADING = ["cudaSetDevice", "cudaStreamCreateWithFlags", "cudaMalloc", "cudaHostAlloc"]
RUNNING = ["cudaSetDevice", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGraphLaunch"]


@pytest.mark.parametrize("call", LOADING)
async def test_every_call_of_a_load_is_checked(tmp_path: Path, call: str) -> None:
    GPU.fail = {call: cudaError_t.cudaErrorInvalidValue}
    with pytest.raises(errors.Internal, match=rf"{call}: cudaErrorInvalidValue \(CUDA error 1\)"):
        await engines.create(spec(write_plan(tmp_path)))
    gc.collect()
    assert left_over() == {}


@pytest.mark.parametrize("call", RUNNING)
async def test_every_call_of_a_run_is_checked_and_the_next_run_is_right(tmp_path: Path, call: str) -> None:
    async with opened(spec(write_plan(tmp_path), GRAPHS)) as (engine,):
        for _ in range(3):
            await run(engine, **pair(2, 2))
        GPU.fail = {call: cudaError_t.cudaErrorInvalidValue}
        with pytest.raises(errors.Internal, match=rf"{call}: cudaErrorInvalidValue \(CUDA error 1\)"):
            await run(engine, **pair(2, 2))
        assert right(pair(2, 2, 9.0), await run(engine, **pair(2, 2, 9.0)))


# --- plans that cannot be run


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        (
            {"written_by": "9.3"},
            errors.Unavailable,
            "expecting library version 10.0 got 9.3. Build it on this machine: gateway build --plan",
        ),
        ({"A": {"location": "HOST"}}, errors.Unsupported, "m/1/model.plan: 'A' is a shape tensor"),
        (
            {"A": {"kind": "FP8"}},
            errors.Unsupported,
            "m/1/model.plan: 'A' is of type FP8, which the protocol cannot carry",
        ),
        (
            {"SUM": {"depends_on_data": True}},
            errors.Unsupported,
            "the shape of output 'SUM' depends on what is computed",
        ),
        ({"A": {"kind": "HALF"}}, errors.InvalidArgument, "the model has data type FP16 and the configuration FP32"),
    ],
)
async def test_a_plan_that_cannot_be_run_says_why(tmp_path: Path, options, kind, text: str) -> None:
    with pytest.raises(kind) as caught:
        await engines.create(spec(write_plan(tmp_path, **options)))
    assert text in caught.value.message


async def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    write_plan(tmp_path)
    (tmp_path / "model.plan").write_bytes(b"no plan")
    with pytest.raises(errors.Unavailable) as caught:
        await engines.create(spec(tmp_path))
    assert "magicTag failed. Trying to load an engine in <path>" in caught.value.message


async def test_more_rows_than_the_plan_was_built_for(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable, match="it takes at most 8 rows and max_batch_size is 9; build it again"):
        await engines.create(spec(write_plan(tmp_path), "max_batch_size: 9"))


async def test_a_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable, match=r"m/1/model.plan is missing; put the model there"):
        await engines.create(spec(tmp_path))


# --- what is installed


async def test_without_tensorrt_and_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = spec(write_plan(tmp_path), "parameters { key: 'tensorrt_package' value { string_value: 'tensorrt' } }")

    def no_driver() -> None:
        raise errors.Unavailable("no NVIDIA driver: libcuda.so.1 is missing")

    monkeypatch.setattr(backend.driver, "probe", no_driver)
    with pytest.raises(errors.Unavailable, match=r"^no NVIDIA driver"):
        await engines.create(given)
    assert GPU.calls == []


async def test_what_is_placed_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "parameters { key: 'tensorrt_package' value { string_value: 'tensorrt' } }"
    given = dataclasses.replace(spec(write_plan(tmp_path), text), device="cpu")
    monkeypatch.setattr(backend.driver, "probe", lambda: None)
    with pytest.raises(errors.Unavailable, match="this instance is placed on the CPU; remove KIND_CPU"):
        await engines.create(given)


async def test_an_unknown_package(tmp_path: Path) -> None:
    text = "parameters { key: 'tensorrt_package' value { string_value: 'magic' } }"
    with pytest.raises(errors.InvalidArgument, match="must be one of tensorrt, tensorrt_rtx, fake, got 'magic'"):
        await engines.create(spec(write_plan(tmp_path), text))


def test_the_answer_is_not_the_memory_of_the_next(tmp_path: Path) -> None:
    """The fake is as strict as we need: what is not waited for is not there."""
    from gateway.engines.tensorrt.fakes import cuda

    _, stream = cuda.cudaStreamCreateWithFlags(1)
    _, device = cuda.cudaMalloc(8)
    _, host = cuda.cudaHostAlloc(8, 0)
    memory = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * 8).from_address(host))
    memory[:] = 1
    assert cuda.cudaMemcpyAsync(device, host, 8, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream) == (0,)
    assert set(bytes(GPU.device[device])) == {0xA5}
    assert cuda.cudaStreamSynchronize(stream) == (0,)
    assert set(bytes(GPU.device[device])) == {1}
    kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    assert cuda.cudaMemcpyAsync(device, host, 9, kind, stream) == (cudaError_t.cudaErrorInvalidValue,)
