"""The committed models answer real questions right, alone and in a batch, and match their configs and recipes."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from gateway.build import zoo
from gateway.build.zoo import __main__ as command
from gateway.build.zoo import add_sub, digits, efficientnet, minilm
from gateway.build.zoo.files import package_file

REPOSITORY = Path(__file__).parents[2] / "model_repo"
CONFIGS = {
    add_sub.NAME: add_sub.CONFIG,
    digits.NAME: digits.CONFIG,
    efficientnet.NAME: efficientnet.CONFIG,
    minilm.NAME: minilm.config(minilm.NAME),
}
WITH_REQUEST = sorted(set(CONFIGS) - {efficientnet.NAME})
DTYPES: dict[str, tuple[type[np.generic], str, str]] = {
    "TYPE_FP32": (np.float32, "FP32", "tensor(float)"),
    "TYPE_INT64": (np.int64, "INT64", "tensor(int64)"),
}

Tensors = Mapping[str, NDArray[Any]]


@functools.cache
def session(name: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(REPOSITORY / name / "1/model.onnx", options, providers=["CPUExecutionProvider"])


def run(name: str, inputs: Tensors) -> NDArray[np.float32]:
    output: NDArray[np.float32] = session(name).run(None, dict(inputs))[0]
    return output


def config(name: str) -> Any:
    return text_format.Parse((REPOSITORY / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def request_body(name: str) -> Any:
    return json.loads((REPOSITORY / name / "sample_request.json").read_text())


def sample(name: str) -> dict[str, NDArray[Any]]:
    types = {wire: kind for kind, wire, _ in DTYPES.values()}
    return {
        t["name"]: np.array(t["data"], types[t["datatype"]]).reshape(t["shape"]) for t in request_body(name)["inputs"]
    }


def held_out() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    with np.load(REPOSITORY / "digits/held_out.npz") as data:
        return data["images"].astype(np.float32), data["labels"]


@functools.cache
def client() -> ModuleType:
    pytest.importorskip("PIL")
    spec = importlib.util.spec_from_file_location("zoo_client", REPOSITORY / "efficientnet_lite0/client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photo() -> NDArray[np.float32]:
    image: NDArray[np.float32] = client().preprocess(REPOSITORY / "efficientnet_lite0/sample.jpg")
    return image


# --- the files ---


def test_what_git_holds_of_the_repository_is_small_and_complete() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "."]
    listed = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    committed = {name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()}
    assert sum((REPOSITORY / name).stat().st_size for name in committed) < 50_000_000
    assert set(CONFIGS) == set(zoo.RECIPES)
    assert {f"{name}/{file}" for name in CONFIGS for file in ("config.pbtxt", "1/model.onnx")} <= committed
    assert not [name for name in committed if name.startswith(minilm.FP32_NAME)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_the_one_of_the_recipe_and_says_what_the_model_is(name: str) -> None:
    parsed = config(name)
    assert (REPOSITORY / name / "config.pbtxt").read_text() == CONFIGS[name]
    assert (parsed.name, parsed.backend) == (name, "onnxruntime")
    assert parsed.HasField("dynamic_batching")
    described = [(parsed.input, session(name).get_inputs()), (parsed.output, session(name).get_outputs())]
    for declared, actual in described:
        expected = [(value.name, value.type, value.shape) for value in actual]
        for tensor, (tensor_name, onnx_type, shape) in zip(declared, expected, strict=True):
            assert tensor.name == tensor_name
            assert DTYPES[model_config_pb2.DataType.Name(tensor.data_type)][2] == onnx_type
            assert list(tensor.dims) == [size if isinstance(size, int) else -1 for size in shape[1:]]
            assert isinstance(shape[0], str), "the batch dimension must be dynamic"


@pytest.mark.parametrize(("name", "classes"), [(digits.NAME, 10), (efficientnet.NAME, 1000)])
def test_a_label_file_has_one_label_a_class(name: str, classes: int) -> None:
    labels = (REPOSITORY / name / config(name).output[0].label_filename).read_text().splitlines()
    assert len(labels) == classes
    assert all(labels)


@pytest.mark.parametrize("name", WITH_REQUEST)
def test_a_sample_request_fits_its_config(name: str) -> None:
    body, parsed = request_body(name), config(name)
    assert [tensor["name"] for tensor in body["inputs"]] == [tensor.name for tensor in parsed.input]
    assert [tensor["name"] for tensor in body["outputs"]] == [tensor.name for tensor in parsed.output]
    for tensor, declared in zip(body["inputs"], parsed.input, strict=True):
        assert tensor["datatype"] == DTYPES[model_config_pb2.DataType.Name(declared.data_type)][1]
        rows, *dims = tensor["shape"]
        assert 1 <= rows <= parsed.max_batch_size
        assert len(tensor["data"]) == np.prod(tensor["shape"])
        assert all(want in {-1, size} for want, size in zip(declared.dims, dims, strict=True))


# --- the answers ---


def test_add_sub_is_exact() -> None:
    inputs = sample("add_sub")
    total, difference = session("add_sub").run(None, inputs)
    assert np.array_equal(total, inputs["INPUT0"] + inputs["INPUT1"])
    assert np.array_equal(difference, inputs["INPUT0"] - inputs["INPUT1"])
    assert total[0, :3].tolist() == [1, 2, 3]


def test_digits_reads_the_sample_request() -> None:
    truth = held_out()[1][: digits.SAMPLE_ROWS]
    assert run("digits", sample("digits")).argmax(1).tolist() == truth.tolist()


def test_digits_is_right_on_the_held_out_digits() -> None:
    images, labels = held_out()
    right = int((run("digits", {"image": images}).argmax(1) == labels).sum())
    assert (len(labels), np.bincount(labels).min()) == (digits.HELD_OUT, 52)
    assert right >= 536, f"{right} of 540; 537 when it was built"


def test_efficientnet_sees_the_espresso() -> None:
    label, probability = client().top1(run("efficientnet_lite0", {"image": photo()})[0])
    assert label == "espresso"
    assert probability > 0.9


def test_minilm_puts_a_paraphrase_nearer_than_another_subject() -> None:
    one, same, other = run("minilm", sample("minilm"))
    assert one @ same > 0.6
    assert max(one @ other, same @ other) < 0.2
    assert np.allclose([one @ one, same @ same, other @ other], 1, atol=1e-5)


def test_minilm_request_is_its_texts_through_its_tokenizer() -> None:
    pytest.importorskip("tokenizers")
    tokens = minilm.tokens(REPOSITORY / "minilm/tokenizer.json", minilm.SAMPLE_TEXTS)
    assert {name: array.tolist() for name, array in tokens.items()} == {
        name: array.tolist() for name, array in sample("minilm").items()
    }
    assert tokens["attention_mask"].min() == 0, "a sample without padding would not show that padding is ignored"


# --- an answer does not depend on its batch ---


def batch_of(name: str) -> dict[str, NDArray[Any]]:
    if name == efficientnet.NAME:
        image = photo()
        return {"image": np.concatenate([image, image[..., ::-1], -image, image * 0.5])}
    if name == digits.NAME:
        return {"image": held_out()[0][:32]}
    inputs = sample(name)
    return (
        inputs
        if name == minilm.NAME
        else {key: np.repeat(array, 5, 0) + np.eye(5, 16) for key, array in inputs.items()}
    )


@pytest.mark.parametrize(
    ("name", "limit"), [("add_sub", 0), ("digits", 1e-4), ("efficientnet_lite0", 1e-4), ("minilm", 1e-5)]
)
def test_a_row_is_answered_in_a_batch_as_alone(name: str, limit: float) -> None:
    inputs = {
        key: array.astype(array.dtype if array.dtype == np.int64 else np.float32)
        for key, array in batch_of(name).items()
    }
    together = run(name, inputs)
    for row in range(len(together)):
        alone = run(name, {key: array[row : row + 1] for key, array in inputs.items()})
        assert np.abs(alone[0] - together[row]).max() <= limit


def test_minilm_ignores_padding() -> None:
    inputs = sample("minilm")
    length = int(inputs["attention_mask"][2].sum())
    assert length < inputs["attention_mask"].shape[1]
    unpadded = run("minilm", {key: array[2:, :length] for key, array in inputs.items()})
    assert np.allclose(unpadded[0], run("minilm", inputs)[2], atol=1e-5)


# --- the recipes ---


def test_add_sub_rebuilds_to_the_committed_bytes_wherever_onnx_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    assert command.main(["add_sub", "--out", str(tmp_path)]) == 0
    built = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(built) == 3
    assert built == {name: (REPOSITORY / name).read_bytes() for name in built}


def test_row_wise_int8_is_close_to_fp32_and_the_same_in_any_batch() -> None:
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    from gateway.build.zoo import export, rowwise

    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.standard_normal((64, 8)).astype(np.float32), "weight")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", n]) for name, n in (("x", 64), ("y", 8))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", export.OPSET)])
    full, small = export.runner(export.to_bytes(model)), export.runner(export.to_bytes(rowwise.quantize(model)))

    rows = random.standard_normal((9, 64)).astype(np.float32)
    rows[1] *= 1000  # a loud neighbour, which would take all the steps of a shared scale
    rows[2] = 0
    expected, found = full({"x": rows}), small({"x": rows})
    assert np.abs(found - expected)[0].max() < 0.02 * np.abs(expected[0]).max()
    assert not found[2].any()
    assert all(np.array_equal(small({"x": rows[i : i + 1]})[0], found[i]) for i in range(9))


def test_a_missing_package_is_answered_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def without_torch() -> tuple[list[zoo.Model], str]:
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setitem(zoo.RECIPES, "digits", without_torch)
    assert command.main(["digits", "--out", str(tmp_path)]) == 2
    assert "'torch' is not installed: pip install 'lockgate[models]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_fails_its_own_check_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def worse() -> tuple[list[zoo.Model], str]:
        raise zoo.BuildError("only 3 of 540 held-out digits are right")

    monkeypatch.setitem(zoo.RECIPES, "digits", worse)
    assert command.main(["digits", "--out", str(tmp_path)]) == 1
    assert "not written: only 3 of 540" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_is_refused_with_the_list_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["resnet"])
    assert "choose from add_sub, digits, efficientnet_lite0, minilm" in capsys.readouterr().err


def test_source_weights_that_are_not_the_expected_bytes_are_refused() -> None:
    with pytest.raises(zoo.BuildError, match="sha256 is"):
        package_file("gateway", "__init__.py", "0" * 64)
    with pytest.raises(zoo.BuildError, match="has no file"):
        package_file("gateway", "weights.bin", "0" * 64)
