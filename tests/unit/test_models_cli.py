"""`gateway models lint`, `config` and `new`: each problem with its place and remedy, and folders that serve."""

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig as Proto

from gateway import cli

TENSORS = """input { name: "INPUT0" data_type: TYPE_FP32 dims: 16 }
input { name: "INPUT1" data_type: TYPE_FP32 dims: 16 }
output { name: "OUTPUT0" data_type: TYPE_FP32 dims: 16 }
output { name: "OUTPUT1" data_type: TYPE_FP32 dims: 16 }
"""
MODEL = Path(__file__).parents[2] / "model_repo" / "add_sub" / "1" / "model.onnx"


def add(repository: Path, config: str, name: str = "m") -> None:
    (repository / name / "1").mkdir(parents=True)
    shutil.copyfile(MODEL, repository / name / "1" / "model.onnx")
    (repository / name / "config.pbtxt").write_text(config)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(*argv: str) -> tuple[int, list[str]]:
        status = cli.main(["models", *argv, "--model-repository", str(tmp_path)])
        told = capsys.readouterr()
        return status, (told.out or told.err).splitlines()

    return run


def lint(run, *models: str) -> list[str]:
    status, lines = run("lint", *models)
    problems = [line for line in lines if not line.endswith("problem(s)")]
    assert status == (1 if problems else 0)
    return problems


def test_every_problem_is_told_at_once_in_the_order_of_the_lines(tmp_path: Path, run):
    add(
        tmp_path,
        """name: "other"
backend: “onnxruntime”
max_batchsize: 8
input { name: "INPUT0" type: TYPE_FP32 dims: [ 1, 16 ] }
input { name: "INPUT1" data_type: FP16 dims: [ 16, ] }
output { name: OUTPUT0 data_type: TYPE_FP32 dims: 16 }
output { name: "OUT1" data_type: TYPE_FP32 dims: 16 }
zzz: 1
instance_group { kind: KIND_CPU count: -1 }
batch_input { kind: BATCH_ELEMENT_COUNT target_name: "X" data_type: TYPE_FP32 source_input: "NONE" }
""",
    )
    places = [
        ("line 1 column 1", 'Write name: "m", or remove it'),
        ("line 2 column 10", "Replace the typographic quotes"),
        ("line 3 column 1", "Did you mean 'max_batch_size'?"),
        ("line 4 column 15", "remove their first number"),
        ("line 4 column 24", "Did you mean 'data_type'?"),
        ("line 5 column 15", "Write data_type: TYPE_FP32"),
        ("line 5 column 35", "Did you mean 'TYPE_FP16'?"),
        ("line 5 column 57", "Remove the comma"),
        ("line 6 column 16", "Put the value in quotes"),
        ("line 7 column 16", "allowed outputs are: OUTPUT0, OUTPUT1"),
        ("line 8 column 1", "Known here: "),
        ("line 9 column 33", "leave it out or use 1 or more"),
        ("line 10 column 93", "There are: INPUT0, INPUT1"),
    ]
    problems = lint(run)
    assert len(problems) >= len(places)
    for place, remedy in places:
        assert [text for text in problems if text.startswith(f"m/config.pbtxt {place}: ") and remedy in text], (
            place,
            problems,
        )


def test_what_takes_a_guess_is_told_and_not_guessed_about(tmp_path: Path, run):
    add(tmp_path, "max_batch_size: ${batch}\ninstance_group { count: {{ count }} kind: KIND_GPUS }\n" + TENSORS)
    problems = lint(run)
    assert len(problems) == 3
    assert "template placeholder" in problems[0]
    assert "template placeholder" in problems[1]
    assert "Did you mean 'KIND_GPU'?" in problems[2]


def test_what_cannot_be_mended_ends_the_list(tmp_path: Path, run):
    add(tmp_path, "import numpy as np\nprint(1)\n")
    (problem,) = lint(run)
    assert "looks like Python" in problem


def test_a_model_that_loads_has_no_problem(tmp_path: Path, run):
    add(tmp_path, "max_batch_size: 8\n" + TENSORS)
    add(tmp_path, "", "empty")
    assert lint(run) == []


def test_only_the_models_that_are_named(tmp_path: Path, run):
    add(tmp_path, "max_batch_size: 8\n" + TENSORS, "good")
    add(tmp_path, "max_batch_size: -1\n" + TENSORS, "bad")
    assert lint(run, "good") == []
    assert lint(run, "bad", "good") == [
        "bad/config.pbtxt line 1 column 1: 'max_batch_size' must be non-negative value for bad; 0 means no batching"
    ]
    assert run("lint", "none") == (1, ["gateway models lint: model 'none' is in no model repository"])


def test_a_problem_of_the_folder_is_told_too(tmp_path: Path, run):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text('backend: "onnxruntime"\n' + TENSORS)
    assert lint(run) == ["m: model 'm' has no version folder; put its model file into m/1/"]


def test_a_missing_input_is_told_with_its_name(tmp_path: Path, run):
    add(tmp_path, "max_batch_size: 8\n" + "".join(TENSORS.splitlines(keepends=True)[i] for i in (0, 2, 3)))
    (problem,) = lint(run)
    assert "wants the input 'INPUT1'" in problem


def test_config_prints_what_serves_alike(tmp_path: Path, run):
    add(tmp_path, "")
    status, lines = run("config", "m")
    assert status == 0
    proto = text_format.Parse("\n".join(lines), Proto())
    assert proto.max_batch_size == 4
    assert [tensor.name for tensor in proto.input] == ["INPUT0", "INPUT1"]
    assert not proto.instance_group[0].count
    (tmp_path / "m" / "config.pbtxt").write_text("\n".join(lines))
    assert run("config", "m") == (0, lines)
    assert run("config", "none") == (1, ["gateway models config: model 'none' is in no model repository"])


def test_new_makes_a_folder_without_problems(tmp_path: Path, run):
    status, (line,) = run("new", str(MODEL), "--name", "sums")
    assert status == 0
    assert line.startswith(f"{tmp_path / 'sums'}: serve it with gateway serve")
    assert (tmp_path / "sums" / "1" / "model.onnx").read_bytes() == MODEL.read_bytes()
    assert 'backend: "onnxruntime"' in (tmp_path / "sums" / "config.pbtxt").read_text()
    assert lint(run) == []
    status, (line,) = run("new", str(MODEL))
    assert (tmp_path / "model").is_dir()


def test_new_takes_the_weights_that_lie_beside(tmp_path: Path, run):
    source = tmp_path / ".source"
    source.mkdir()
    weight = onnx.numpy_helper.from_array(np.ones((1, 2), np.float32), "W")
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 2]) for n in ("X", "Y")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["X", "W"], ["Y"])], "g", value[:1], value[1:], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, source / "net.onnx", save_as_external_data=True, location="net.weights", size_threshold=0)
    (source / "unrelated.txt").write_text("x")
    assert run("new", str(source / "net.onnx"))[0] == 0
    assert sorted(path.name for path in (tmp_path / "net" / "1").iterdir()) == ["model.onnx", "net.weights"]
    assert lint(run) == []


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["new", "none.onnx"], "'none.onnx' is not a file"),
        (["new", str(MODEL), "--name", "../x"], "'../x' cannot be the name of a model"),
        (["new", str(MODEL), "--name", "there"], "'there' is in the repository already"),
        (["new", __file__, "--name", "x"], "model.onnx"),
    ],
)
def test_new_writes_all_or_nothing(tmp_path: Path, run, argv: list[str], text: str):
    (tmp_path / "there").mkdir()
    status, lines = run(*argv)
    assert status == 1
    assert text in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_plain_command_stays(tmp_path: Path, run):
    add(tmp_path, "max_batch_size: 8\n" + TENSORS)
    status, lines = run()
    assert status == 0
    assert lines[0] == "m: version 1, backend onnxruntime, max_batch_size 8, 2 instance(s)"


@pytest.mark.parametrize(
    "backend", ["pytorch", "tensorflow", "openvino", "dali", "vllm", "tensorrtllm", "fil", "unheard_of"]
)
def test_a_model_of_another_backend_says_how_to_serve_it(tmp_path: Path, run, backend: str):
    add(tmp_path, f'backend: "{backend}"\n' + TENSORS)
    status, (line, *_) = run()
    assert status == 1
    head, remedy = line.split(
        f"backend '{backend}' is not supported by this version, which has: fake, onnxruntime, remote, tensorrt. "
    )
    assert head == "m: UNAVAILABLE: m/config.pbtxt line 1: "
    assert re.search("onnx|model.py|serve", remedy)
    assert lint(run) == [line.removeprefix("m: UNAVAILABLE: ").replace("line 1:", "line 1 column 1:")]


def test_nothing_is_filled_in_where_that_is_not_wanted(tmp_path: Path, run):
    add(tmp_path, "max_batch_size: 8\n", "bare")
    add(tmp_path, "max_batch_size: 8\n" + TENSORS, "whole")
    status, lines = run("--disable-auto-complete-config")
    assert status == 1
    assert "bare: UNAVAILABLE: " in lines[0]
    assert "model 'bare' must specify 'input' and 'output'" in lines[0]
    assert lines[1].startswith("whole: version 1")


def test_a_model_file_that_cannot_be_read_hides_nothing(tmp_path: Path, run):
    add(tmp_path, "max_batch_size: 8\ninstance_group { kind: KIND_CPU count: -1 }\n" + TENSORS)
    add(tmp_path, "max_batch_size: 8\n", "bare")
    add(tmp_path, 'backend: "onnxruntime" default_model_filename: "x.onnx"\n', "other")
    for name in ("m", "bare"):
        (tmp_path / name / "1" / "model.onnx").write_bytes(b"not a model")
    told = lint(run)
    assert [text.partition(" ")[0] for text in told] == [
        "bare/1/model.onnx:",
        "m/1/model.onnx:",
        "m/config.pbtxt",
        "other/config.pbtxt",
    ]
    assert "'other/1/x.onnx' is not there" in told[-1]


def test_labels_and_parameters_are_told_beside_the_rest(tmp_path: Path, run):
    labelled = TENSORS.replace('"OUTPUT1"', '"OUTPUT1" label_filename: "none.txt"')
    deadline = 'parameters { key: "default_deadline_ms" value { string_value: "soon" } }\n'
    add(tmp_path, "max_batch_size: -8\n" + deadline + labelled)
    problems = lint(run)
    for text in ("must be non-negative", "must be a number of milliseconds", "'none.txt' is not in folder"):
        assert [problem for problem in problems if text in problem], problems
