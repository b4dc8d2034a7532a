"""ONNX Runtime: loading, options, elastic threads, and errors that carry no paths."""

from __future__ import annotations

import dataclasses
import os
import re
from contextlib import aclosing, suppress
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from gateway import engines, errors
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines import cores
from gateway.engines import onnxruntime as backend
from gateway.engines.base import EngineSpec
from gateway.engines.isolated.golden import alike
from gateway.types import Batch, DataType, TensorSpec
from tests.support import until

FLOAT, INT64, STRING, BF16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BFLOAT16

LINUX = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux keeps threads on cores")


def value(name: str, kind: int, shape: list[int | str | None] | None):
    return helper.make_tensor_value_info(name, kind, shape)


def write(folder: Path, nodes, inputs, outputs, initializers=()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "model.onnx")
    return folder / "model.onnx"


def lookup(tmp_path: Path) -> Path:
    """A table of three numbers; an index outside it makes the run fail."""
    table = helper.make_tensor("table", FLOAT, [3], [10.0, 20.0, 30.0])
    node = helper.make_node("Gather", ["table", "INDEX"], ["OUT"])
    shape: list[int | str | None] = ["batch", 1]
    return write(tmp_path / "m/1", [node], [value("INDEX", INT64, shape)], [value("OUT", FLOAT, shape)], [table])


def relu(tmp_path: Path) -> Path:
    shape: list[int | str | None] = ["batch", 2]
    node = helper.make_node("Relu", ["IN"], ["OUT"])
    return write(tmp_path / "m/1", [node], [value("IN", FLOAT, shape)], [value("OUT", FLOAT, shape)])


LOOKUP = (
    "max_batch_size: 8 input { name: 'INDEX' data_type: TYPE_INT64 dims: [1] }"
    " output { name: 'OUT' data_type: TYPE_FP32 dims: [1] }"
)
RELU = (
    "max_batch_size: 8 input { name: 'IN' data_type: TYPE_FP32 dims: [2] }"
    " output { name: 'OUT' data_type: TYPE_FP32 dims: [2] }"
)


def spec(path: Path, text: str, threads: int = 1, cores: int = 1, *, device="cpu", **changes):
    source = Source("m/config.pbtxt", f"platform: 'onnxruntime_onnx' backend: 'onnxruntime' name: 'm' {text}")
    config = dataclasses.replace(build(parse_text(source), source), default_model_filename="model.onnx", **changes)
    return EngineSpec(config, "1", path.parent, device, threads, cores)


async def run(engine, rows: int = 1, cores: int = 1, **inputs):
    async with aclosing(engine.run(Batch(rows, lambda: inputs, (), cores))) as results:
        return (await anext(results)).outputs


async def close(created) -> None:
    for engine in created:
        await engine.close()


async def test_a_lone_run_takes_the_wide_session_and_all_engines_share_both(tmp_path: Path) -> None:
    created = await engines.create(spec(relu(tmp_path), RELU, threads=1, cores=2), 2)
    one, other = created
    rows = np.array([[-1, 2]], "<f4")
    assert (await run(one, cores=1, IN=rows))["OUT"].tolist() == [[0, 2]]
    assert one.loaded.wide_runs == 0
    assert (await run(one, cores=2, IN=rows))["OUT"].tolist() == [[0, 2]]
    assert (one.loaded.wide_runs, other.loaded.wide_runs) == (1, 0)
    assert one.loaded._narrow is other.loaded._narrow
    assert one.loaded._wide is other.loaded._wide
    options = [session.get_session_options() for session in (one.loaded._narrow, one.loaded._wide)]
    assert [option.intra_op_num_threads for option in options] == [1, 2]
    assert [option.get_session_config_entry("session.intra_op.allow_spinning") for option in options] == ["0", "1"]
    assert options[1].get_session_config_entry("session.force_spinning_stop") == "1"
    await close(created)


@LINUX
@pytest.mark.parametrize(
    ("usable", "cores", "places"), [({4, 7, 5}, 3, "6;8"), ({4, 7, 5}, 2, ""), ({0, 1}, 2, "2"), ({0, 1}, 1, "")]
)
def test_a_run_on_all_cores_has_a_core_for_each_of_its_threads(
    tmp_path: Path, monkeypatch, usable: set[int], cores: int, places: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable)
    options = backend._options(spec(relu(tmp_path), RELU).config, cores, alone=cores > 1)
    try:
        found = options.get_session_config_entry("session.intra_op_thread_affinities")
    except RuntimeError:  # there is no such entry
        found = ""
    assert found == places


def places() -> dict[str, str]:
    """The cores that each thread of this process may use."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it may end meanwhile
            found[task.name] = re.search(r"Cpus_allowed_list:\s*(\S+)", (task / "status").read_text())[1]
    return found


@LINUX
async def test_the_threads_of_a_run_on_all_cores_stay_where_they_are_put(tmp_path: Path, monkeypatch) -> None:
    mine, before = sorted(os.sched_getaffinity(0)), places()
    (engine,) = await engines.create(spec(relu(tmp_path), RELU, threads=1, cores=len(mine)), 1)

    def placed() -> bool:
        new = {cores for thread, cores in places().items() if thread not in before}
        return {str(core) for core in mine[1:]} <= new

    await until(placed)  # each thread goes to its core when it first gets to run, which may be later
    moves, move = [], os.sched_setaffinity
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, to: moves.append(to) or move(thread, to))
    await run(engine, cores=len(mine), IN=np.zeros((1, 2), "<f4"))
    assert moves == ([{mine[0]}, {*mine}] if mine[1:] else [])
    await run(engine, cores=len(mine) - 1, IN=np.zeros((1, 2), "<f4"))
    assert len(moves) in (0, 2)
    await engine.close()


@LINUX
def test_a_thread_stays_on_a_core_for_a_while_if_it_may() -> None:
    before = os.sched_getaffinity(0)
    with suppress(KeyError), cores.stay(min(before)):
        assert os.sched_getaffinity(0) == {min(before)}
        raise KeyError
    with cores.stay(None), cores.stay(1 << 12):  # nobody has so many
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(("threads", "cores", "parameter"), [(2, 2, ""), (1, 2, "1"), (1, 4, "3")])
async def test_nothing_is_wide_without_cores_to_gain_or_with_a_number_of_threads_in_the_config(
    tmp_path: Path, threads: int, cores: int, parameter: str
) -> None:
    chosen = f"parameters {{ key: 'intra_op_thread_count' value {{ string_value: '{parameter}' }} }}"
    (engine,) = await engines.create(spec(relu(tmp_path), RELU + (chosen if parameter else ""), threads, cores))
    await run(engine, cores=cores, IN=np.zeros((1, 2), "<f4"))
    assert engine.loaded.wide_runs == 0
    assert engine.loaded._narrow.get_session_options().intra_op_num_threads == int(parameter or threads)
    await engine.close()


async def test_tritons_parameters_reach_the_session(tmp_path: Path) -> None:
    given = {
        "inter_op_thread_count": "2", "execution_mode": "1", "enable_mem_arena": "0", "enable_mem_pattern": "1",
        "memory.enable_memory_arena_shrinkage": "cpu:0", "session.intra_op.allow_spinning": "1",
    }  # fmt: skip
    text = " ".join(f"parameters {{ key: '{k}' value {{ string_value: '{v}' }} }}" for k, v in given.items())
    (engine,) = await engines.create(spec(relu(tmp_path), f"{RELU} {text} optimization {{ graph {{ level: -1 }} }}"))
    options = engine.loaded._narrow.get_session_options()
    assert options.inter_op_num_threads == 2
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (False, True)
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    run_options = engine.loaded._options
    assert run_options.get_run_config_entry("memory.enable_memory_arena_shrinkage") == "cpu:0"
    await engine.close()


@pytest.mark.parametrize(
    ("batches", "tensor", "parameter", "kept"),
    [
        ("8", "dims: [1]", "", True),
        ("64", "dims: [1]", "", True),
        ("65", "dims: [1]", "", False),
        ("8", "dims: [-1]", "", False),
        ("8", "dims: [1] allow_ragged_batch: true", "", False),
        ("8", "dims: [1]", "0", False),
        ("8", "dims: [-1]", "1", True),
    ],
)
def test_patterns_of_memory_are_kept_where_there_are_few(
    tmp_path: Path, batches: str, tensor: str, parameter: str, kept: bool
) -> None:
    text = LOOKUP.replace("8", batches, 1).replace("dims: [1]", tensor, 1)
    if parameter:
        text += f" parameters {{ key: 'enable_mem_pattern' value {{ string_value: '{parameter}' }} }}"
    assert backend._options(spec(lookup(tmp_path), text).config, 1).enable_mem_pattern == kept


@pytest.mark.parametrize(("level", "name"), [(0, "ALL"), (1, "EXTENDED")])
async def test_graph_levels(tmp_path: Path, level: int, name: str) -> None:
    (engine,) = await engines.create(spec(relu(tmp_path), f"{RELU} optimization {{ graph {{ level: {level} }} }}"))
    options = engine.loaded._narrow.get_session_options()
    assert options.graph_optimization_level == getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{name}")
    await engine.close()


async def test_a_parameter_that_is_no_number(tmp_path: Path) -> None:
    text = RELU + " parameters { key: 'intra_op_thread_count' value { string_value: 'two' } }"
    with pytest.raises(errors.InvalidArgument, match="'intra_op_thread_count' of model 'm' must be a whole number"):
        await engines.create(spec(relu(tmp_path), text))


async def test_a_provider_that_fell_back_is_recorded(tmp_path: Path) -> None:
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    (engine,) = await engines.create(spec(relu(tmp_path), RELU, device="gpu:0", execution_providers=wanted))
    assert engine.provider == "CPUExecutionProvider"
    (warning,) = engine.warnings
    assert "runs on cpu, not on cuda: it does not load" in warning
    assert "lockgate[gpu]" in warning
    await engine.close()


async def test_an_input_the_model_refuses_is_the_clients_error_and_the_next_one_works(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (engine,) = await engines.create(spec(lookup(tmp_path), LOOKUP))
    with pytest.raises(errors.InvalidArgument) as caught:
        await run(engine, INDEX=np.array([[7]]))
    assert caught.value.message.startswith("model 'm' failed: Non-zero status code returned while running Gather")
    assert "idx=7" in caught.value.message
    assert (await run(engine, INDEX=np.array([[1]])))["OUT"].tolist() == [[20.0]]
    await engine.close()
    assert capfd.readouterr().err == ""  # a client's bad input writes no line


async def test_a_failure_inside_the_model_shows_no_source_files(tmp_path: Path) -> None:
    shape: list[int | str | None] = ["n"]
    node = helper.make_node("Reshape", ["IN", "SHAPE"], ["OUT"])
    inputs = [value("IN", FLOAT, shape), value("SHAPE", INT64, shape)]
    path = write(tmp_path / "m/1", [node], inputs, [value("OUT", FLOAT, [None, None])])
    text = (
        "input { name: 'IN' data_type: TYPE_FP32 dims: [-1] } input { name: 'SHAPE' data_type: TYPE_INT64 dims: [-1] }"
        " output { name: 'OUT' data_type: TYPE_FP32 dims: [-1, -1] }"
    )
    (engine,) = await engines.create(spec(path, text))
    with pytest.raises(errors.Internal) as caught:
        await run(engine, IN=np.zeros(3, "<f4"), SHAPE=np.array([2, 2]))
    assert caught.value.message == (
        "model 'm' failed: Non-zero status code returned while running Reshape node. Name:'' Status Message: "
        "input_shape_size == requested_shape_size was false. The input tensor cannot be reshaped to the requested "
        "shape. Input shape:{3}, requested shape:{2,2}"
    )
    assert (await run(engine, IN=np.zeros(4, "<f4"), SHAPE=np.array([2, 2])))["OUT"].shape == (2, 2)
    await engine.close()


async def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    shape: list[int | str | None] = ["batch", 1]
    node = helper.make_node("Identity", ["IN"], ["OUT"])
    path = write(tmp_path / "m/1", [node], [value("IN", STRING, shape)], [value("OUT", STRING, shape)])
    text = (
        "max_batch_size: 8 input { name: 'IN' data_type: TYPE_STRING dims: [1] }"
        " output { name: 'OUT' data_type: TYPE_STRING dims: [1] }"
    )
    (engine,) = await engines.create(spec(path, text))
    with pytest.raises(errors.InvalidArgument, match="input 'IN' of model 'm' holds a string that is not UTF-8"):
        await run(engine, IN=np.array([[b"\xff"]], dtype=object))
    assert (await run(engine, IN=np.array([[b"ok"]], dtype=object)))["OUT"].tolist() == [[b"ok"]]
    await engine.close()


async def test_bytes_beside_bf16_is_refused_at_load(tmp_path: Path) -> None:
    shape: list[int | str | None] = ["batch", 1]
    nodes = [helper.make_node("Identity", ["A"], ["X"]), helper.make_node("Identity", ["B"], ["Y"])]
    inputs = [value("A", STRING, shape), value("B", BF16, shape)]
    path = write(tmp_path / "m/1", nodes, inputs, [value("X", STRING, shape), value("Y", BF16, shape)])
    text = "max_batch_size: 8 " + " ".join(
        f"{kind} {{ name: '{name}' data_type: TYPE_{type_} dims: [1] }}"
        for kind, name, type_ in (
            ("input", "A", "STRING"), ("input", "B", "BF16"), ("output", "X", "STRING"), ("output", "Y", "BF16"),
        )
    )  # fmt: skip
    with pytest.raises(errors.Unsupported, match="cast BF16 to FP32"):
        await engines.create(spec(path, text))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "m/1/model.onnx is missing; put the model there"), (b"junk", "m/1/model.onnx does not load in ONNX")],
)
async def test_a_file_that_does_not_load_is_unavailable_and_named_without_its_folder(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = relu(tmp_path)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.Unavailable) as caught:
        await engines.create(spec(path, RELU), 2)
    assert words in caught.value.message
    assert str(tmp_path) not in caught.value.message


async def test_a_configuration_that_does_not_fit_the_file(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="unexpected inference input 'INDEX'"):
        await engines.create(spec(relu(tmp_path), LOOKUP))


def test_describe_reads_every_kind_of_dimension(tmp_path: Path) -> None:
    inputs = [value("IN", FLOAT, ["batch", None, "?", "p2o.DynamicDimension.0", 3, 0]), value("S", FLOAT, [])]
    nodes = [helper.make_node("Identity", ["IN"], ["OUT"]), helper.make_node("Identity", ["S"], ["T"])]
    path = write(tmp_path, nodes, inputs, [value("OUT", FLOAT, None), value("T", FLOAT, None)])
    io = engines.describe(path)
    shape = (-1, -1, -1, -1, 3, 0)
    assert io.inputs == (TensorSpec("IN", DataType.FP32, shape), TensorSpec("S", DataType.FP32, ()))
    assert io.outputs == (TensorSpec("OUT", DataType.FP32, shape), TensorSpec("T", DataType.FP32, ()))


async def test_an_initializer_among_the_inputs_is_an_optional_input(tmp_path: Path) -> None:
    shape: list[int | str | None] = ["batch", 2]
    inputs = [value("IN", FLOAT, shape), value("MORE", FLOAT, shape)]
    node = helper.make_node("Add", ["IN", "MORE"], ["OUT"])
    start = helper.make_tensor("MORE", FLOAT, [1, 2], [10.0, 20.0])
    path = write(tmp_path / "m/1", [node], inputs, [value("OUT", FLOAT, shape)], [start])
    assert engines.describe(path).inputs[1] == TensorSpec("MORE", DataType.FP32, (-1, 2), optional=True)
    more = RELU + " input { name: 'MORE' data_type: TYPE_FP32 dims: [2] optional: true }"
    created = await engines.create(spec(path, more))
    array = np.array([[1, 2], [3, 4]], np.float32)
    assert (await run(created[0], 2, IN=array))["OUT"].tolist() == [[11, 22], [13, 24]]
    assert (await run(created[0], 2, IN=array, MORE=array))["OUT"].tolist() == [[2, 4], [6, 8]]
    await close(created)


def test_describe_refuses_what_is_no_tensor(tmp_path: Path) -> None:
    node = helper.make_node("SequenceConstruct", ["IN"], ["OUT"])
    output = helper.make_tensor_sequence_value_info("OUT", FLOAT, None)
    path = write(tmp_path, [node], [value("IN", FLOAT, ["n"])], [output])
    with pytest.raises(errors.Unsupported, match=r"output 'OUT' is a seq\(tensor\(float\)\)"):
        engines.describe(path)


def test_describe_refuses_junk_and_other_formats_without_paths(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"junk")
    with pytest.raises(errors.Unavailable, match="does not load") as caught:
        engines.describe(path)
    assert str(tmp_path) not in caught.value.message
    with pytest.raises(errors.Unsupported, match=r"'model.plan' does not say"):
        engines.describe(tmp_path / "model.plan")


def test_two_builds_of_onnxruntime_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = relu(tmp_path)
    info = tmp_path / "site" / "onnxruntime_gpu-1.31.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(errors.Unavailable, match="onnxruntime and onnxruntime-gpu are installed together"):
        engines.describe(path)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("[ONNXRuntimeError] : 1 : FAIL : matmul_helper.h:59 Compute MatMul mismatch", "Compute MatMul mismatch"),
        (
            "[ONNXRuntimeError] : 1 : FAIL : /src/core/arena.cc:36 void* ort::Arena::Raw(size_t, Stream*) Failed to\n go",
            "Failed to go",
        ),
        ("Load model from /home/me/repo/m.onnx failed", "Load model from <path> failed"),
        ("1/2 of N/A", "1/2 of N/A"),
    ],
)
def test_messages_without_places(text: str, plain: str) -> None:
    assert backend._plain(text) == plain


# --- depth-first batches


IMAGES = (
    "max_batch_size: 8 input { name: 'IN' data_type: TYPE_FP32 dims: [3, 96, 96] }"
    " output { name: 'OUT' data_type: TYPE_FP32 dims: [4] }"
)
OFF = " parameters { key: 'depth_first' value { string_value: '0' } }"


def network(folder: Path, factor: float = 1.0, answers: int = 4) -> Path:
    """A convolutional network, 5 MB of activations a row."""
    random = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array((random.normal(0, factor, shape)).astype("<f4"), name)
        for name, shape in (
            ("a", (32, 3, 3, 3)),
            ("b", (32, 1, 3, 3)),
            ("c", (32, 1, 3, 3)),
            ("d", (answers, 32, 1, 1)),
        )
    ]
    nodes = [
        helper.make_node("Conv", ["IN", "a"], ["1"], pads=[1] * 4),
        helper.make_node("Conv", ["1", "b"], ["2"], pads=[1] * 4, group=32),
        helper.make_node("Conv", ["2", "c"], ["3"], pads=[1] * 4, group=32),
        helper.make_node("Conv", ["3", "d"], ["4"]),
        helper.make_node("ReduceMean", ["4"], ["OUT"], axes=[2, 3], keepdims=0),
    ]
    shapes = value("IN", FLOAT, ["batch", 3, 96, 96]), value("OUT", FLOAT, ["batch", answers])
    return write(folder, nodes, [shapes[0]], [shapes[1]], weights)


@pytest.fixture
def small_cache(monkeypatch) -> None:
    monkeypatch.setattr(backend, "core_cache", lambda: 1 << 20)


def depth_first(engine) -> bool:
    return engine.loaded._narrow._model_path is None


@pytest.mark.usefixtures("small_cache")
async def test_a_convolutional_network_takes_its_first_layers_row_by_row_and_answers_the_same(tmp_path: Path) -> None:
    path = network(tmp_path / "m/1")
    (engine,) = await engines.create(spec(path, IMAGES, cores=2))
    (plain,) = await engines.create(spec(path, IMAGES + OFF))
    assert (depth_first(engine), depth_first(plain)) == (True, False)
    assert engine.loaded._wide._model_path is not None
    assert engine.loaded._narrow._model_bytes is None  # nor is it kept twice
    assert engine.warnings == ()
    for rows in (1, 3, 8):
        images = np.random.default_rng(rows).normal(size=(rows, 3, 96, 96)).astype("<f4")
        one, other = [(await run(each, rows, IN=images))["OUT"] for each in (engine, plain)]
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    await close([engine, plain])


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize(
    ("text", "threads"),
    [
        (IMAGES.replace("max_batch_size: 8", "max_batch_size: 1"), 1),
        (IMAGES + " optimization { graph { level: 0 } }", 1),
        (IMAGES, 2),
    ],
)
async def test_where_it_would_not_pay_or_the_graph_is_the_operators_nothing_is_changed(
    tmp_path: Path, text: str, threads: int
) -> None:
    (engine,) = await engines.create(spec(network(tmp_path / "m/1"), text, threads, 2))
    assert not depth_first(engine)
    await engine.close()


@pytest.mark.usefixtures("small_cache")
async def test_answers_that_differ_are_not_served(tmp_path: Path, monkeypatch) -> None:
    other = network(tmp_path / "other", factor=1.1).read_bytes()
    monkeypatch.setattr(backend.depth_first, "rewritten", lambda *_: other)
    (engine,) = await engines.create(spec(network(tmp_path / "m/1"), IMAGES))
    assert not depth_first(engine)
    assert engine.warnings == (
        "runs without depth-first batches, with which its answers differ; report this with the model",
    )
    await engine.close()


def with_noise(graph) -> None:
    """The same network, with answers that are others each time."""
    graph.node[-1].output[0] = "sure"
    graph.node.append(helper.make_node("RandomNormalLike", ["sure"], ["random"], dtype=FLOAT))
    graph.node.append(helper.make_node("Add", ["sure", "random"], ["OUT"]))


def with_nothing_found(graph) -> None:
    """What a detector says of noise."""
    graph.node[-1].output[0] = "scores"
    graph.initializer.append(helper.make_tensor("threshold", FLOAT, [], [1e30]))
    graph.node.append(helper.make_node("Greater", ["scores", "threshold"], ["high"]))
    graph.node.append(helper.make_node("NonZero", ["high"], ["found"]))
    graph.node.append(helper.make_node("Transpose", ["found"], ["places"]))
    graph.node.append(helper.make_node("Cast", ["places"], ["OUT"], to=FLOAT))
    del graph.output[:]
    graph.output.append(value("OUT", FLOAT, ["found", 2]))


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize(("change", "done"), [(with_noise, False), (with_nothing_found, True)])
async def test_models_whose_answers_tell_little_are_no_reason_to_warn(tmp_path: Path, change, done) -> None:
    path = network(tmp_path / "m/1", answers=2)
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    (engine,) = await engines.create(spec(path, IMAGES.replace("dims: [4]", "dims: [2]")))
    assert (depth_first(engine), engine.warnings) == (done, ())
    await engine.close()


@pytest.mark.usefixtures("small_cache")
async def test_a_process_whose_memory_is_limited_is_not_asked_for_more(tmp_path: Path) -> None:
    limit = " parameters { key: 'memory_limit_mb' value { string_value: '400' } }"
    (engine,) = await engines.create(spec(network(tmp_path / "m/1"), IMAGES + limit))
    assert not depth_first(engine)
    await engine.close()


async def test_where_nobody_tells_of_a_cache_nothing_is_changed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(backend, "core_cache", lambda: 0)
    (engine,) = await engines.create(spec(network(tmp_path / "m/1"), IMAGES))
    assert not depth_first(engine)
    await engine.close()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([1.0, 2.0], [1.0, 2.0015], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([-np.inf, 1.0, 2.0], [-np.inf, 1.0, 2.0], True),
        ([-np.inf, 1.0, 2.0], [-np.inf, -77.0, 2.0], False),
        ([np.nan, 1.0, 2.0], [np.nan, 1.0000001, 2.0], True),
        ([[1.0], [1.0]], [[1.0]], False),
        ([999, 3], [998, 3], False),
        ([b"a", b"b"], [b"a", b"b"], True),
        ([b"a", b"b"], [b"a", b"c"], False),
        ([], [], True),
    ],
)
def test_answers_are_alike_but_for_rounding(one, other, same) -> None:
    arrays = [np.array(each, object) if one[:1] == [b"a"] else np.array(each) for each in (one, other)]
    assert alike(*arrays) is same


@pytest.mark.usefixtures("small_cache")
async def test_a_model_that_cannot_be_rewritten_runs_as_it_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(backend.depth_first, "rewritten", lambda *_: b"no model")
    (engine,) = await engines.create(spec(network(tmp_path / "m/1"), IMAGES))
    assert not depth_first(engine)
    assert engine.warnings[0].startswith("runs without depth-first batches: ")
    assert (await run(engine, 1, IN=np.zeros((1, 3, 96, 96), "<f4")))["OUT"].shape == (1, 4)
    await engine.close()


@pytest.mark.usefixtures("small_cache")
async def test_without_the_package_onnx_models_run_as_they_are(tmp_path: Path, monkeypatch) -> None:
    def missing(*_):
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    monkeypatch.setattr(backend.depth_first, "rewritten", missing)
    (engine,) = await engines.create(spec(network(tmp_path / "m/1"), IMAGES))
    assert (depth_first(engine), engine.warnings) == (False, ())
    await engine.close()
