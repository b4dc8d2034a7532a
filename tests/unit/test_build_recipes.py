"""Each recipe: what it makes of small models, that it makes the same bytes again, and why it leaves others out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gateway import errors
from gateway.build import data, layers, measure
from gateway.build.builder import choose
from gateway.build.gate import drift
from gateway.build.recipes import CATALOGUE, Job
from gateway.build.source import Source
from tests import build_support as support
from tests.build_support import classifier, encoder, put, source

CNN = ["int8", "int8-full", "int8-s8s8", "fp16", "bf16", "trt-fp16", "trt-int8"]
TRANSFORMER = ["int8-rowwise", "int8-dynamic", "fp16", "bf16"]


@pytest.fixture
def cnn(tmp_path: Path) -> Source:
    put(tmp_path, "cnn", classifier(), labels=True)
    return source(tmp_path, "cnn")


@pytest.fixture
def transformer(tmp_path: Path) -> Source:
    put(tmp_path, "encoder", encoder())
    return source(tmp_path, "encoder")


def rows_of(of: Source, count: int, seed: int = 0) -> list[data.Row]:
    if of.config.name == "cnn":
        return support.rows(count, seed)
    return [data.Row({"tokens": row[None]}) for row in support.tokens(count, seed)]


def make(name: str, of: Source, **more) -> Path:
    file = of.version / f"{name}.onnx"
    CATALOGUE[name].make(Job(of, rows_of(of, 20), file, of.version, lambda _count: None, **more))
    return file


def answers(model: Path | bytes, rows: list[data.Row], **more) -> np.ndarray:
    return measure.answers(measure.load(model, **more), rows, 16)[0]


@pytest.mark.parametrize("name", CNN)
def test_a_convolutional_network_answers_about_the_same(cnn: Source, name: str):
    file = make(name, cnn)
    rows = rows_of(cnn, 64, 1)
    expected = answers(cnn.file, rows)
    simulate = CATALOGUE[name].simulate
    found = answers(simulate(cnn) if simulate else file, rows, simulated=True)
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.85
    assert not np.array_equal(found, expected)


@pytest.mark.parametrize("name", TRANSFORMER)
def test_a_transformer_answers_about_the_same(transformer: Source, name: str):
    file = make(name, transformer)
    rows = rows_of(transformer, 32, 1)
    expected = answers(transformer.file, rows)
    simulate = CATALOGUE[name].simulate
    # One scale for rows as different as these fits few of them, so it is alone that they are compared.
    runner = measure.load(simulate(transformer) if simulate else file, simulated=True)
    (found,) = measure.answers(runner, rows, 1)
    assert np.median((found * expected).sum(axis=1)) > 0.98


@pytest.mark.parametrize(("name", "moves"), [("int8-rowwise", False), ("int8-dynamic", True)])
def test_who_else_is_in_the_batch_matters_to_dynamic_quantization_only(transformer: Source, name: str, moves: bool):
    runner = measure.load(make(name, transformer))
    rows = rows_of(transformer, 16, 1)
    found = drift(measure.answers(runner, rows, 1), measure.answers(runner, rows, 16))
    assert (found > 0.01) is moves


@pytest.mark.parametrize("bits", [4, 8])
def test_large_matrices_are_kept_in_few_bits(tmp_path: Path, bits: int):
    pytest.importorskip("onnx_ir", reason="ONNX Runtime's weight-only quantizer needs onnx-ir, of the extra build")
    put(tmp_path, "encoder", encoder(512))
    large = source(tmp_path, "encoder")
    file = large.version / "weights.onnx"
    CATALOGUE[f"int{bits}-weights"].make(Job(large, [], file, large.version, lambda _count: None))
    assert sum(node.op_type == "MatMulNBits" for node in onnx.load(file).graph.node) == 4
    assert file.stat().st_size < large.file.stat().st_size * (bits + 2) / 32 + 20_000


def test_an_integer_kernel_that_saturates_is_given_seven_bits_and_a_depthwise_one_eight(cnn: Source):
    def peak(name: str) -> list[int]:
        tensors = onnx.load(make(name, cnn)).graph.initializer
        found = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
        return [int(abs(found[f"{weight}_quantized"].astype(int)).max()) for weight in ("w1", "w2", "w3")]

    assert peak("int8") == [64, 127, 64]
    assert peak("int8-full") == [127, 127, 127]


def test_tensorrt_gets_signed_symmetric_values_and_no_quantized_bias(cnn: Source):
    graph = onnx.load(make("trt-int8", cnn)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(dequantized) >= 6
    for node in dequantized:
        zero = tensors[node.input[2]]
        assert zero.data_type == TensorProto.INT8
        assert not numpy_helper.to_array(zero).any()
        if node.input[0] in tensors:
            assert tensors[node.input[0]].data_type == TensorProto.INT8
    assert tensors["b1"].data_type == TensorProto.FLOAT


def test_bf16_rounds_once_to_the_nearest(cnn: Source):
    model = onnx.load(make("bf16", cnn))
    assert TensorProto.FLOAT16 not in {tensor.data_type for tensor in model.graph.initializer}
    bits = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    exact = numpy_helper.to_array(next(t for t in cnn.load().graph.initializer if t.name == "w1"))
    assert abs(numpy_helper.to_array(bits).astype(np.float64) / exact - 1).max() <= 2**-8
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), [("cnn", name) for name in CNN] + [("encoder", n) for n in TRANSFORMER])
def test_the_same_inputs_give_the_same_bytes_in_another_process(tmp_path: Path, model: str, name: str):
    made = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        put(folder, model, classifier() if model == "cnn" else encoder())
        program = (
            "import sys; from pathlib import Path; from tests.unit import test_build_recipes as t; "
            f"print(t.make({name!r}, t.source(Path({str(folder)!r}), {model!r})))"
        )
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        made.append(Path(done.stdout.strip()).read_bytes())
    assert made[0] == made[1]


def test_kept_ranges_give_the_same_bytes_as_measured_ones(cnn: Source):
    first = make("int8", cnn).read_bytes()
    assert list(cnn.version.glob(".ranges-*.json"))
    assert make("int8", cnn).read_bytes() == first


def test_what_does_not_suit_a_model_is_left_out_with_the_reason(cnn: Source, transformer: Source):
    chosen, skipped = choose(cnn, ["cpu"], [])
    assert [recipe.name for recipe in chosen] == ["int8", "int8-full"]
    assert "named" in skipped["int8-s8s8"]
    assert "no matrix of 262,144" in skipped["int4-weights"]
    chosen, skipped = choose(transformer, ["cpu"], [])
    assert [recipe.name for recipe in chosen] == ["int8-rowwise", "int8-dynamic"]
    assert "attention" in skipped["int8"]
    assert [recipe.name for recipe in choose(cnn, ["cpu"], ["int8-s8s8"])[0]] == ["int8-s8s8"]
    with pytest.raises(errors.InvalidArgument, match="no recipe 'int9'; there are: int8,"):
        choose(cnn, ["cpu"], ["int9"])


def test_a_quantized_model_is_no_source(cnn: Source):
    file = make("int8", cnn)
    with pytest.raises(errors.Unsupported, match="quantized already"):
        choose(Source(cnn.config, cnn.version, file), ["cpu"], [])


def test_the_worst_layers_are_named(cnn: Source):
    found = layers.worst(cnn, make("int8", cnn), rows_of(cnn, 20, 1))
    assert {name for name, _ in found} == {"r1", "r2", "logits"}
    assert [error for _, error in found] == sorted((error for _, error in found), reverse=True)
    assert all(0 < error < 0.2 for _, error in found)


def test_modelopt_is_run_as_a_command_and_its_absence_has_a_remedy(cnn: Source):
    with pytest.raises(errors.Unavailable, match="give --modelopt-python"):
        make("trt-fp8", cnn)
    with pytest.raises(errors.Unavailable, match=r"cannot run modelopt.*nvidia-modelopt"):
        make("trt-fp8", cnn, modelopt_python=cnn.version / "absent")
    with pytest.raises(errors.Unavailable, match=r"has no package modelopt.*nvidia-modelopt"):
        make("trt-fp8", cnn, modelopt_python=Path(sys.executable))


def test_modelopt_is_given_the_rows_and_its_file_is_taken(cnn: Source):
    fake = cnn.version / "python"
    fake.write_text(
        f"""#!{sys.executable}
import shutil, sys
import numpy as np
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1:3] == ["-m", "modelopt.onnx.quantization"]
assert options["--quantize_mode"] == "fp8" and options["--calibration_eps"] == "cpu"
assert np.load(options["--calibration_data_path"])["image"].shape == (20, 3, 8, 8)
shutil.copy(options["--onnx_path"], options["--output_path"])
"""
    )
    fake.chmod(0o755)
    file = make("trt-fp8", cnn, modelopt_python=fake)
    assert onnx.load(file).producer_name == "gateway build"


def test_batch_normalisation_is_folded_before_it_is_quantized(tmp_path: Path):
    proto = classifier()
    for name, value in (("scale", 2.0), ("shift", 0.5), ("mean", 0.1), ("variance", 4.0)):
        proto.graph.initializer.append(numpy_helper.from_array(np.full(8, value, np.float32), name))
    proto.graph.node[0].output[0] = "raw"
    norm = helper.make_node("BatchNormalization", ["raw", "scale", "shift", "mean", "variance"], ["c1"])
    proto.graph.node.insert(1, norm)
    put(tmp_path, "cnn", proto)
    made = onnx.load(make("int8", source(tmp_path, "cnn")))
    assert "BatchNormalization" not in {node.op_type for node in made.graph.node}
