"""Ragged batches, shape tensors and inputs with defaults as clients meet them: over both wires, in memory and over Redis.

What NVIDIA tests of them (server/qa/L0_batch_input, onnxruntime_backend/test/initializer_as_input), and that each answer is
what ONNX Runtime gives to the request alone.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc.aio
import tritonclient.http.aio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from gateway import cli
from gateway.app import Gateway, running
from gateway.config.settings import Settings
from tests import ragged_support as models
from tests.python_support import write as write_code
from tests.support import until

LIBRARIES = {"http": tritonclient.http.aio, "grpc": tritonclient.grpc.aio}
CODE = """
def execute(self, requests):
    count = len(requests)
    return [
        pb_utils.InferenceResponse([pb_utils.Tensor("OUT", each.inputs()[0].as_numpy() * 10 + count)]) for each in requests
    ]
"""
CODE_CONFIG = """backend: "python" max_batch_size: 4
input { name: "IN" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
output { name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] }
dynamic_batching { max_queue_delay_microseconds: 60000000 }"""


def told(folder: Path) -> None:
    for kind, datatype in TOLD.items():
        models.told(folder, kind, kind, datatype)


TOLD = dict(zip(models.KINDS, ("TYPE_INT32", "TYPE_FP32") * 3, strict=True))


def echoes(folder: Path) -> None:
    models.identity(folder)
    models.identity(folder, "whole_numbers", kind=models.INT64)
    models.identity(folder, "texts", kind=models.STRING)
    models.sums(folder)


def defaulted(folder: Path) -> None:
    models.defaulted(folder)
    models.defaulted(folder, "defaulted_rows", batched=True)


def code(folder: Path) -> None:
    write_code(folder / "code", CODE, CODE_CONFIG)


@dataclass
class App:
    """The whole gateway, and a client of it."""

    gateway: Gateway
    client: Any
    wire: str

    async def infer(self, model: str, *, binary: bool = True, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        library = LIBRARIES[self.wire]
        inputs = []
        for name, array in arrays.items():
            made = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            more = {} if self.wire == "grpc" else {"binary_data": binary}
            made.set_data_from_numpy(array, **more)
            inputs.append(made)
        (config,) = [version.config for version in self.gateway.service._queue.pool(model).versions]
        names = [tensor.name for tensor in config.outputs]
        more = {} if self.wire == "grpc" else {"binary_data": binary}
        wanted = [library.InferRequestedOutput(name, **more) for name in names]
        result = await self.client.infer(model, inputs, outputs=wanted)
        return {name: result.as_numpy(name) for name in names}

    async def executions(self, model: str) -> int:
        (entry,) = await self.gateway.service.statistics(model)
        return entry["execution_count"]


@asynccontextmanager
async def serving(folder: Path, wire: str, redis: str | None, **more: Any) -> AsyncIterator[App]:
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    settings: dict[str, Any] = {"model_repository": (folder,), "allow_python_models": True, **more}
    async with AsyncExitStack() as stack:
        if redis is not None:
            settings |= {"queue": redis, "queue_prefix": f"test-{secrets.token_hex(8)}"}
            worker = await stack.enter_async_context(running(Settings(role="worker", metrics_port=0, **settings)))
            await worker.loaded.wait()
            settings["role"] = "gateway"
        gateway = await stack.enter_async_context(running(Settings(**ports, **settings)))
        await gateway.loaded.wait()
        await until(lambda: all(gateway.service.ready_versions(path.name) for path in folder.iterdir()))
        url = f"127.0.0.1:{gateway.ports[wire]}"
        client = await stack.enter_async_context(LIBRARIES[wire].InferenceServerClient(url))
        yield App(gateway, client, wire)


Start = Callable[[Callable[[Path], object]], Awaitable[App]]


@pytest.fixture(
    params=[
        pytest.param((queue, wire), marks=[pytest.mark.slow] if queue == "redis" else [], id=f"{queue}-{wire}")
        for queue in ("memory", "redis")
        for wire in ("http", "grpc")
    ]
)
async def start(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a gateway of the models that are written to a folder, or a gateway and a worker."""
    queue, wire = request.param
    redis = request.getfixturevalue("redis_url") if queue == "redis" else None
    async with AsyncExitStack() as stack:

        async def start(write: Callable[[Path], object]) -> App:
            write(tmp_path)
            return await stack.enter_async_context(serving(tmp_path, wire, redis))

        yield start


async def together(*calls: Any) -> list[Any]:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(call) for call in calls]
    return [task.result() for task in running]


async def apart(app: App, calls: Sequence[Any], last: Any) -> list[Any]:
    """The answers to calls that would wait for company; `last` is a full batch, that ends their waiting."""
    service = app.gateway.service
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(call) for call in calls]
        await until(lambda: service._open + sum(task.done() for task in running) == len(calls))
        await last
    return [task.result() for task in running]


# --- one batch of requests of different shapes

SHAPES = ((1, 2, 1), (1, 1, 4), (1, 3, 1), (1, 1, 1))


def expected(kind: str, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    counts = [prod(shape) for shape in shapes]
    return {
        "BATCH_ELEMENT_COUNT": counts,
        "BATCH_ACCUMULATED_ELEMENT_COUNT": [*accumulate(counts)],
        "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO": [0, *accumulate(counts)],
        "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE": [0] * max(counts),
        "BATCH_ITEM_SHAPE": [size for shape in shapes for size in shape[1:]],
        "BATCH_ITEM_SHAPE_FLATTEN": [size for shape in shapes for size in shape[1:]],
    }[kind]


async def test_the_model_is_told_of_the_batch_in_every_way(start: Start) -> None:
    app = await start(told)
    row = np.zeros((1, 1), np.float32)
    for kind, datatype in TOLD.items():
        given = [np.full(shape, place, np.float32) for place, shape in enumerate(SHAPES)]
        answers = await together(*(app.infer(kind, IN=array, ROWS=row) for array in given))
        (joined,) = answers[0]["ALL"].tolist()
        order = list(dict.fromkeys(map(int, joined)))  # in which the requests came
        assert sorted(order) == [0, 1, 2, 3]
        assert joined == [place for place in order for _ in range(prod(SHAPES[place]))]
        for answer in answers:
            assert answer["OUT"].dtype == {"TYPE_INT32": np.int32, "TYPE_FP32": np.float32}[datatype]
            assert answer["OUT"].tolist() == [expected(kind, [SHAPES[place] for place in order])]


async def test_python_models_get_each_request_in_its_shape_and_in_one_batch(start: Start) -> None:
    app = await start(code)
    given = [np.full((1, size), size, np.float32) for size in (1, 3, 2, 5)]
    answers = await together(*(app.infer("code", IN=array) for array in given))
    for array, answer in zip(given, answers, strict=True):
        assert np.array_equal(answer["OUT"], array * 10 + 4)


# --- each request gets its own


def alone(folder: Path, model: str, **arrays: np.ndarray) -> list[np.ndarray]:
    """What ONNX Runtime gives to one request."""
    session = onnxruntime.InferenceSession(folder / model / "1" / "model.onnx")
    return session.run(None, arrays)


async def test_every_answer_is_that_of_the_request_alone(start: Start, tmp_path: Path) -> None:
    app = await start(echoes)
    generator = np.random.default_rng(7)
    asked: list[tuple[str, np.ndarray, bool]] = []
    for _ in range(60):
        shape = (int(generator.integers(1, 4)), *generator.integers(0, 5, 2))
        numbers = generator.integers(-9, 9, shape)
        texts = np.array([b"%d" % number for number in numbers.flat] + [b""], dtype=object)[:-1].reshape(shape)
        model, array = [
            ("identity", numbers.astype(np.float32)),
            ("whole_numbers", numbers.astype(np.int64)),
            ("texts", texts),
            ("sums", numbers[:1].reshape(1, -1).astype(np.float32)),
        ][int(generator.integers(4))]
        asked.append((model, array, bool(generator.integers(2))))
    answers = await together(*(app.infer(model, binary=binary, IN=array) for model, array, binary in asked))
    for (model, array, _), answer in zip(asked, answers, strict=True):
        if model == "sums":
            ends = np.array([0, array.size], np.int32)
            assert np.array_equal(answer["SUM"], alone(tmp_path, model, IN=array.reshape(-1), ENDS=ends)[0])
        else:
            assert answer["OUT"].shape == array.shape
            assert [_plain(value) for value in answer["OUT"].flat] == [_plain(value) for value in array.flat]


def _plain(value: Any) -> Any:
    """JSON has strings of characters where there are bytes otherwise."""
    return value.encode() if isinstance(value, str) else value


async def test_shared_memory_in_and_out(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    models.identity(tmp_path)
    for wire, library in LIBRARIES.items():
        key = f"/gwtest-{secrets.token_hex(8)}"
        region = shm.create_shared_memory_region("r", key, 48)
        try:
            async with serving(tmp_path, wire, None, allow_client_shm=True) as app:
                shm.set_shared_memory_region(region, [array])
                await app.client.register_system_shared_memory("r", key, 48)
                given = library.InferInput("IN", [1, 2, 3], "FP32")
                given.set_shared_memory("r", 24)
                wanted = library.InferRequestedOutput("OUT")
                wanted.set_shared_memory("r", 24, offset=24)
                await app.client.infer("identity", [given], outputs=[wanted])
                assert np.array_equal(shm.get_contents_as_numpy(region, np.float32, [1, 2, 3], offset=24), array)
        finally:
            shm.destroy_shared_memory_region(region)


def ensemble(folder: Path, name: str, model: str, given: str, made: str, io: str) -> None:
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(f"""platform: "ensemble" max_batch_size: 4 {io}
    ensemble_scheduling {{ step {{ model_name: "{model}" {given} output_map {{ key: "{made}" value: "{made}" }} }} }}""")


async def test_a_step_of_an_ensemble_may_be_ragged(start: Start) -> None:
    def write(folder: Path) -> None:
        models.sums(folder)
        io = """input { name: "IN" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
        output { name: "SUM" data_type: TYPE_FP32 dims: [ 1 ] }"""
        ensemble(folder, "added", "sums", 'input_map { key: "IN" value: "IN" }', "SUM", io)

    app = await start(write)
    answers = await together(*(app.infer("added", IN=np.ones((1, size), np.float32)) for size in range(1, 5)))
    assert [answer["SUM"].tolist() for answer in answers] == [[[1.0]], [[2.0]], [[3.0]], [[4.0]]]


async def test_sequences_may_be_ragged(start: Start) -> None:
    app = await start(lambda folder: models.sums(folder, "carried", carried=True))
    library = LIBRARIES[app.wire]

    async def follow(sequence: int) -> None:
        for place in range(3):
            given = library.InferInput("IN", [1, sequence + place], "FP32")
            given.set_data_from_numpy(np.full((1, sequence + place), sequence, np.float32))
            more = {"sequence_id": sequence, "sequence_start": place == 0, "sequence_end": place == 2}
            result = await app.client.infer("carried", [given], **more)
            expected = sequence * sum(sequence + each for each in range(place + 1))
            assert result.as_numpy("SUM").tolist() == [[expected]]

    await together(*map(follow, range(1, 5)))


async def test_fewer_rows_than_the_requests_have_are_nobodys(start: Start) -> None:
    app = await start(models.sums)
    with pytest.raises(InferenceServerException) as caught:
        await app.infer("sums", IN=np.zeros((2, 3), np.float32))
    assert "model 'sums' gave 1 rows in output 'SUM' for a batch of 2" in caught.value.message()


# --- shape tensors


async def test_requests_share_a_batch_only_with_equal_shape_tensors(start: Start) -> None:
    app = await start(models.reshaper)

    def ask(value: float, shape: list[int], rows: int = 2) -> Any:
        return app.infer("reshaper", X=np.full((rows, 4), value, np.float32), SHAPE=np.array(shape))

    await together(ask(0, [2, 2]), ask(0, [2, 2]))
    assert await app.executions("reshaper") == 1
    shapes = [[2, 2], [4, 1], [2, 2], [4, 1]]
    asked = [ask(place, shape) for place, shape in enumerate(shapes)]
    answers = await apart(app, asked, ask(9, [1, 4], rows=4))
    for place, (shape, answer) in enumerate(zip(shapes, answers, strict=True)):
        assert np.array_equal(answer["Y"], np.full((2, *shape), place))
        assert answer["OF"].tolist() == shape


async def test_a_shape_tensor_has_no_batch_dimension(start: Start) -> None:
    app = await start(models.reshaper)
    with pytest.raises(InferenceServerException) as caught:
        await app.infer("reshaper", X=np.zeros((4, 4), np.float32), SHAPE=np.array([[2, 2]] * 4))
    assert (
        "unexpected shape for input 'SHAPE' for model 'reshaper'. Expected [-1], got [4,2]." in caught.value.message()
    )


async def test_a_shape_tensor_in_an_ensemble_is_refused(tmp_path: Path) -> None:
    models.reshaper(tmp_path)
    io = """input { name: "X" data_type: TYPE_FP32 dims: [ 4 ] } input { name: "SHAPE" data_type: TYPE_INT64 dims: [ -1 ] }
    output { name: "Y" data_type: TYPE_FP32 dims: [ -1, -1 ] }"""
    given = " ".join(f'input_map {{ key: "{name}" value: "{name}" }}' for name in ("X", "SHAPE"))
    ensemble(tmp_path, "e", "reshaper", given, "Y", io)
    async with running(Settings(model_repository=(tmp_path,), http_port=0, grpc_port=0, metrics_port=0)) as gateway:
        await gateway.loaded.wait()
        (version,) = gateway.service._queue.pool("e").versions
        assert version.state == "UNAVAILABLE"
        assert "in ensemble 'e', model 'reshaper' has the shape tensor 'SHAPE'" in version.reason


# --- inputs that may be absent


async def test_the_file_has_a_value_for_what_is_absent(start: Start) -> None:
    app = await start(defaulted)
    zeros = np.zeros((1, 3), np.float32)
    assert (await app.infer("defaulted", INPUT=zeros))["OUTPUT"].tolist() == [[1.0] * 3]
    assert (await app.infer("defaulted", INPUT=zeros, INITIALIZER=zeros + 5))["OUTPUT"].tolist() == [[5.0] * 3]


async def test_requests_with_and_without_it_share_no_batch(start: Start) -> None:
    app = await start(defaulted)

    def ask(value: float, *, given: bool, rows: int = 2) -> Any:
        array = np.full((rows, 3), value, np.float32)
        return app.infer("defaulted_rows", INPUT=array, **({"INITIALIZER": array} if given else {}))

    await together(ask(0, given=False), ask(0, given=False))
    assert await app.executions("defaulted_rows") == 1
    asked = [ask(place, given=bool(place % 2)) for place in range(4)]
    answers = await apart(app, asked, ask(9, given=True, rows=4))
    for place, answer in enumerate(answers):
        assert np.array_equal(answer["OUTPUT"], np.full((2, 3), place * 2 if place % 2 else place + 1))


# --- the tools


def test_lint_finds_nothing_wrong_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for write in (told, echoes, models.reshaper, defaulted, code):
        write(tmp_path)
    status = cli.main(["models", "lint", "--model-repository", str(tmp_path), "--allow-python-models"])
    assert (status, capsys.readouterr().out) == (0, "")
