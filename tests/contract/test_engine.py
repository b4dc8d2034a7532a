"""What every engine promises (`gateway/engines/base.py`), against the fake, ONNX Runtime, a chain of both, TensorRT on a
fake GPU, and another gateway on real ports.

Each backend serves the same models: every output is the input of the same place, of any type and shape.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gateway import engines, errors
from gateway.app import running
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.config.settings import Settings
from gateway.engines.base import Engine, EngineSpec
from gateway.engines.isolated.children import Children
from gateway.engines.tensorrt.fakes.network import serialize
from gateway.types import Array, Batch, BatchResult, DataType

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}


NOT_IN_TENSORRT = {"UINT16", "UINT32", "UINT64", "INT16", "FP64", "BYTES"}


def identity_model(path: Path, tensors: dict[str, tuple[DataType, tuple[int, ...]]], batched: bool) -> None:
    """Write an ONNX model whose output OUT<i> is its input <name i>."""
    nodes, inputs, outputs = [], [], []
    for index, (name, (datatype, dims)) in enumerate(tensors.items()):
        shape = [f"{name}_{axis}" if dim == -1 else dim for axis, dim in enumerate(dims)]
        shape = ["batch", *shape] if batched else shape
        nodes.append(helper.make_node("Identity", [name], [f"OUT{index}"]))
        inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[datatype.name], shape))
        outputs.append(helper.make_tensor_value_info(f"OUT{index}", ONNX_TYPES[datatype.name], shape))
    graph = helper.make_graph(nodes, "identity", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


class Zoo:
    """Opens engines of one backend in a temporary repository, and closes them; "chain" is ONNX Runtime, then the fake."""

    def __init__(self, name: str, folder: Path, children: Children | None = None) -> None:
        self.name = name
        self.backend = "onnxruntime" if name == "chain" else name
        self.other = "INT64" if name == "tensorrt" else "BYTES"  # a type unlike FP32 that it has
        self._children = children
        self.provider = {"onnxruntime": "CPUExecutionProvider", "tensorrt": "TensorRT-fake"}.get(self.backend, "Fake")
        self.parameters: dict[str, str] = {}
        self._folder = folder

    @asynccontextmanager
    async def identity(
        self,
        *tensors: tuple[str, tuple[int, ...]],
        batched: bool = True,
        count: int = 1,
        threads: int = 1,
        cores: int = 1,
    ):
        """Engines of a model with inputs IN0, IN1, ... of these types and dims, and outputs OUT0, OUT1, ..."""
        named = {f"IN{index}": (DataType[name], dims) for index, (name, dims) in enumerate(tensors)}
        if self.backend == "tensorrt" and (lacking := {name for name, _ in tensors} & NOT_IN_TENSORRT):
            pytest.skip(f"TensorRT has no {', '.join(lacking)}")
        version = self._folder / "identity" / "1"
        version.mkdir(parents=True)
        identity_model(version / "model.onnx", named, batched)
        source = Source("identity/config.pbtxt", config_text(self.backend, named, batched))
        proto = parse_text(source)
        proto.name = "identity"
        proto.default_model_filename = "model.onnx"
        if self.backend == "onnxruntime":
            proto.platform = "onnxruntime_onnx"
        if self.name == "chain":
            proto.parameters["fallback"].string_value = "cpu,fake"
        if self.backend == "tensorrt":
            proto.platform = "tensorrt_plan"
            proto.default_model_filename = "model.plan"
            proto.parameters["tensorrt_package"].string_value = "fake"
            batch = (-1,) if batched else ()
            shapes = {name: (*batch, *dims) for name, (_, dims) in named.items()}
            profile = {name: [_sized(shape, 0), _sized(shape, 1), _sized(shape, 8)] for name, shape in shapes.items()}
            (version / "model.plan").write_bytes(serialize((version / "model.onnx").read_bytes(), [profile]))
        for key, value in self.parameters.items():
            proto.parameters[key].string_value = value
        spec = EngineSpec(build(proto, source), "1", version, "cpu", threads, cores, children=self._children)
        created = await engines.create(spec, count)
        try:
            yield created
        finally:
            for engine in created:
                await engine.close()


class RemoteZoo(Zoo):
    """Engines that ask a gateway of this process, over real ports; it serves the same models by the fake backend."""

    def __init__(self, scheme: str, folder: Path) -> None:
        super().__init__("remote", folder)
        self.scheme = scheme

    @asynccontextmanager
    async def identity(self, *tensors, batched: bool = True, **more):
        named = {f"IN{index}": (DataType[name], dims) for index, (name, dims) in enumerate(tensors)}
        served = self._folder / "there" / "served"
        (served / "1").mkdir(parents=True)
        (served / "config.pbtxt").write_text(config_text("fake", named, batched))
        settings = Settings(
            model_repository=(served.parent,), http_port=0, grpc_port=0, allow_metrics=False, persist_latency=False
        )
        async with running(settings) as gateway:
            await gateway.loaded.wait()
            address = f"127.0.0.1:{gateway.ports[self.scheme]}"
            self.provider = f"remote:{address}"
            self.parameters = {"remote.url": f"{self.scheme}://{address}", "remote.model": "served"}
            async with super().identity(*tensors, batched=batched, **more) as created:
                yield created


def config_text(backend: str, named: dict[str, tuple[DataType, tuple[int, ...]]], batched: bool) -> str:
    lines = [f"backend: '{backend}' max_batch_size: {8 if batched else 0}"]
    for index, (name, (datatype, dims)) in enumerate(named.items()):
        kind = "TYPE_STRING" if datatype is DataType.BYTES else f"TYPE_{datatype.name}"
        shape = f"dims: {list(dims or (1,))}"  # a configuration has no word for a scalar
        lines.append(f"input {{ name: '{name}' data_type: {kind} {shape} }}")
        lines.append(f"output {{ name: 'OUT{index}' data_type: {kind} {shape} }}")
    return "\n".join(lines)


def _sized(shape: tuple[int, ...], size: int) -> list[int]:
    return [size if dim == -1 else dim for dim in shape]


@pytest.fixture(
    params=[
        "fake",
        "onnxruntime",
        "chain",
        "tensorrt",
        pytest.param("remote-grpc", marks=pytest.mark.slow),
        "remote-http",
    ]
)
def zoo(request, tmp_path: Path) -> Zoo:
    kind, _, scheme = request.param.partition("-")
    return RemoteZoo(scheme, tmp_path) if scheme else Zoo(kind, tmp_path)


async def run(engine: Engine, rows: int = 1, outputs: tuple[str, ...] = (), cores: int = 1, **inputs) -> BatchResult:
    batch = Batch(rows, lambda: inputs, outputs, cores)
    async with aclosing(engine.run(batch)) as results:
        given = [result async for result in results]
    assert len(given) == 1
    return given[0]


def sample(name: str, shape: tuple[int, ...]) -> Array:
    """Values that differ from element to element; BF16 as its bits."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    if name == "BYTES":
        texts = np.empty(numbers.size, dtype=object)
        texts[:] = [f"é{number}\0".encode() * number for number in numbers.reshape(-1).tolist()]
        return texts.reshape(shape)
    if name == "BF16":
        return (numbers.astype("<f4").view("<u4") >> 16).astype("<u2").reshape(shape)
    return (numbers % 2 if name == "BOOL" else numbers).astype(DataType[name].dtype)


@pytest.mark.parametrize("shape", [(3, 2), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("name", [datatype.name for datatype in DataType])
async def test_every_type_comes_back_as_it_went_in(zoo: Zoo, name: str, shape: tuple[int, ...]) -> None:
    given = sample(name, shape)
    async with zoo.identity((name, (2,))) as (engine,):
        if zoo.backend == "remote" and not shape[0]:  # the other gateway refuses what this one would refuse
            with pytest.raises(errors.InvalidArgument, match="batch-size must be >= 1"):
                await run(engine, 0, IN0=given)
            return
        result = await run(engine, shape[0], IN0=given)
    out = result.outputs["OUT0"]
    assert out.dtype == DataType[name].dtype
    assert out.shape == shape
    assert out.tolist() == given.tolist()


@pytest.mark.parametrize("name", [datatype.name for datatype in DataType])
async def test_a_scalar_is_one_element_to_clients(zoo: Zoo, name: str) -> None:
    given = sample(name, (3,))[2:]
    async with zoo.identity((name, ()), batched=False) as (engine,):
        out = (await run(engine, IN0=given)).outputs["OUT0"]
    assert out.dtype == DataType[name].dtype
    assert out.shape == (1,)
    assert out.tolist() == given.tolist()


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 0, 3), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("name", ["FP32", "BF16", "BYTES"])
async def test_open_dimensions_take_any_size(zoo: Zoo, name: str, shape: tuple[int, ...]) -> None:
    given = sample(name, shape)
    async with zoo.identity((name, (-1, 3))) as (engine,):
        out = (await run(engine, shape[0], IN0=given)).outputs["OUT0"]
    assert out.shape == shape
    assert out.tolist() == given.tolist()


async def test_arrays_in_any_memory_layout(zoo: Zoo) -> None:
    whole = sample("FP32", (2, 6))
    unaligned = np.frombuffer(b"\0" + whole[:, :2].tobytes(), np.uint8)[1:].view("<f4").reshape(2, 2)
    assert not unaligned.flags.aligned
    async with zoo.identity(("FP32", (2,))) as (engine,):
        assert (await run(engine, 2, IN0=whole[:, ::3])).outputs["OUT0"].tolist() == whole[:, ::3].tolist()
        assert (await run(engine, 2, IN0=unaligned)).outputs["OUT0"].tolist() == whole[:, :2].tolist()


async def test_only_the_outputs_asked_for(zoo: Zoo) -> None:
    inputs = {"IN0": sample("FP32", (1, 2)), "IN1": sample(zoo.other, (1, 2)), "IN2": sample("INT8", (1, 2))}
    async with zoo.identity(("FP32", (2,)), (zoo.other, (2,)), ("INT8", (2,))) as (engine,):
        assert list((await run(engine, **inputs)).outputs) == ["OUT0", "OUT1", "OUT2"]
        result = await run(engine, outputs=("OUT2", "OUT1"), **inputs)
    assert set(result.outputs) == {"OUT2", "OUT1"}
    assert result.outputs["OUT2"].tolist() == inputs["IN2"].tolist()
    assert result.outputs["OUT1"].tolist() == inputs["IN1"].tolist()


async def test_stacking_and_running_stay_off_the_event_loop_and_are_timed(zoo: Zoo) -> None:
    threads: list[str] = []

    def stack() -> dict[str, Array]:
        threads.append(threading.current_thread().name)
        return {"IN0": sample("FP32", (1, 2))}

    async with zoo.identity(("FP32", (2,))) as (engine,), aclosing(engine.run(Batch(1, stack))) as results:
        marks = [(r.started_ns, r.stacked_ns, r.finished_ns) async for r in results]
    assert threads == ["identity/1#0"]
    assert list(marks[0]) == sorted(marks[0])


async def test_engines_of_one_version_run_at_the_same_time_and_keep_their_rows_apart(zoo: Zoo) -> None:
    together = threading.Barrier(2)

    async def many(engine: Engine, start: int) -> None:
        for number in range(start, start + 50):
            given = np.full((2, 2), number, "<f4")

            def stack(given: Array = given) -> dict[str, Array]:
                together.wait()  # passes only while the other engine's thread is here as well
                return {"IN0": given}

            async with aclosing(engine.run(Batch(2, stack))) as results:
                async for result in results:
                    assert result.outputs["OUT0"].tolist() == given.tolist()

    async with zoo.identity(("FP32", (2,)), count=2) as (one, other), asyncio.TaskGroup() as tasks:
        tasks.create_task(many(one, 0))
        tasks.create_task(many(other, 1000))


async def test_a_batch_more_may_be_given_while_one_is_at_work(zoo: Zoo) -> None:
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    first, second = sample("FP32", (3, 2)), sample("FP32", (5, 2)) + 100

    def held() -> dict[str, Array]:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        return {"IN0": first}

    async def result(engine: Engine) -> BatchResult:
        async with aclosing(engine.run(Batch(3, held))) as results:
            return await anext(results)

    async with zoo.identity(("FP32", (2,))) as (engine,), asyncio.TaskGroup() as tasks:
        assert engine.ahead or engine.concurrency > 1
        running = tasks.create_task(result(engine))
        await begun.wait()
        waiting = tasks.create_task(run(engine, 5, IN0=second))
        await asyncio.sleep(0)  # one turn, in which it is given
        go_on.set()
        one, other = await running, await waiting
    assert one.outputs["OUT0"].tolist() == first.tolist()
    assert other.outputs["OUT0"].tolist() == second.tolist()
    assert other.started_ns <= other.stacked_ns <= other.finished_ns


async def test_a_failed_run_leaves_the_engine_usable(zoo: Zoo) -> None:
    def broken() -> dict[str, Array]:
        raise KeyError("IN0")

    def stopped() -> dict[str, Array]:
        raise StopIteration

    good = sample("FP32", (1, 2))
    async with zoo.identity(("FP32", (2,))) as (engine,):
        for stack, kind in ((broken, KeyError), (stopped, RuntimeError)):
            with pytest.raises(kind):
                async with aclosing(engine.run(Batch(1, stack))) as results:
                    [result async for result in results]
        assert (await run(engine, IN0=good)).outputs["OUT0"].tolist() == good.tolist()


async def test_a_cancelled_caller_disturbs_nobody(zoo: Zoo) -> None:
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    stacked: list[str] = []
    good = sample("FP32", (1, 2))

    def held() -> dict[str, Array]:
        stacked.append("held")
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        return {"IN0": good}

    def queued() -> dict[str, Array]:
        stacked.append("queued")
        return {"IN0": good}

    async def consume(engine: Engine, stack) -> list[BatchResult]:
        async with aclosing(engine.run(Batch(1, stack))) as results:
            return [result async for result in results]

    async with zoo.identity(("FP32", (2,))) as (engine,), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(consume(engine, held))
        await begun.wait()
        waiting = tasks.create_task(consume(engine, queued))
        await asyncio.sleep(0)  # one turn, in which it queues its batch
        running.cancel()
        waiting.cancel()
        await asyncio.wait([running, waiting])
        go_on.set()
        assert (await run(engine, IN0=good)).outputs["OUT0"].tolist() == good.tolist()
    assert stacked == ["held"]


async def test_close_is_idempotent_and_frees_threads(zoo: Zoo) -> None:
    def threads() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name.startswith("identity/")}

    async with zoo.identity(("FP32", (2,)), count=3, threads=1, cores=2) as created:
        assert len(threads()) == 3
        await run(created[0], cores=2, IN0=sample("FP32", (1, 2)))
        await created[0].close()
        await run(created[1], cores=2, IN0=sample("FP32", (1, 2)))
        async with asyncio.TaskGroup() as tasks:
            for engine in (*created, *created):
                tasks.create_task(engine.close())
        assert not threads()
        with pytest.raises(errors.Unavailable, match="closed"):
            await run(created[0], IN0=sample("FP32", (1, 2)))
        if zoo.name != "chain":
            assert all(getattr(engine, "loaded", None) is None for engine in created)


async def test_says_what_it_runs_on(zoo: Zoo) -> None:
    async with zoo.identity(("FP32", (2,))) as (engine,):
        assert engine.provider == zoo.provider
        assert engine.warnings == ()
        assert engine.concurrency == (64 if zoo.backend == "remote" else 1)
