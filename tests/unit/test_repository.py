"""Reading a model repository on disk: layout, version policy, files, refusals, and noticing changes."""

import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.errors import GatewayError, Internal, InvalidArgument, NotFound, Unavailable, Unsupported
from gateway.repository import Repository
from gateway.types import DataType, ModelIO, TensorSpec

IO = ModelIO((TensorSpec("x", DataType.FP32, (-1, 4)),), (TensorSpec("y", DataType.FP32, (-1, 2)),))
TENSORS = """
input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 2 ] }
"""


class Describe:
    """Stands where the application puts the ONNX reader; remembers which files it was asked about."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.error: Exception | None = None

    def __call__(self, path: Path) -> ModelIO:
        self.asked.append(f"{path.parent.name}/{path.name}")
        if self.error:
            raise self.error
        return IO


@pytest.fixture
def describe() -> Describe:
    return Describe()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def repository(root: Path, describe: Describe) -> Repository:
    return Repository([root], describe)


def put(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def refusal(repository: Repository, name: str = "m", parameters: Mapping[str, str] | None = None) -> str:
    with pytest.raises(GatewayError) as caught:
        repository.read(name, parameters)
    return caught.value.message


# --- scan


def test_scan_finds_model_folders_only(repository: Repository, root: Path) -> None:
    put(root, {"b/1/model.onnx": "", "a/config.pbtxt": "", ".git/x": "", "_old/1/model.onnx": "", "README.md": ""})
    (root / "linked").symlink_to(root / "a")
    assert list(repository.scan()) == ["a", "b", "linked"]


def test_one_model_is_read_without_a_look_at_the_others(
    repository: Repository, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, {"m/config.pbtxt": "", "m/1/model.onnx": ""})

    def listed(*_: object) -> None:
        raise AssertionError("all models were listed to read one")

    monkeypatch.setattr("gateway.repository.layout.models", listed)
    assert repository.read("m").name == "m"


@pytest.mark.parametrize("name", ["_m", ".m"])
def test_what_a_scan_does_not_find_is_not_read(repository: Repository, root: Path, name: str) -> None:
    put(root, {"m/1/model.onnx": "", "_m/1/model.onnx": "", ".m/1/model.onnx": ""})
    with pytest.raises(NotFound):
        repository.read(name)


def test_rate_limiters_are_warned_of_unless_rates_are_limited(repository: Repository, root: Path) -> None:
    group = 'instance_group { rate_limiter { resources { name: "R" count: 1 } } }'
    put(root, {"m/config.pbtxt": TENSORS + group, "m/1/model.onnx": ""})
    (warning,) = repository.read("m").warnings
    assert warning.startswith("m/config.pbtxt line 4: rate_limiter has no effect without --rate-limit execution_count.")
    repository.limit_rates()
    assert repository.read("m").warnings == ()


def test_a_repository_that_is_not_there(describe: Describe, tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        Repository([tmp_path / "nowhere"], describe).scan()
    assert caught.value.message.startswith("folder 'nowhere' cannot be read: No such file or directory")
    assert str(tmp_path) not in caught.value.message


def test_a_models_own_folder_given_as_repository(describe: Describe, root: Path) -> None:
    put(root, {"m/config.pbtxt": "", "m/1/model.onnx": ""})
    with pytest.raises(InvalidArgument, match="'m' is the folder of one model; give the folder that holds it"):
        Repository([root / "m"], describe).scan()


def test_a_model_in_two_repositories_is_refused_and_the_others_serve(describe: Describe, root: Path) -> None:
    put(root, {"one/m/1/model.onnx": "", "two/m/1/model.onnx": "", "two/n/1/model.onnx": ""})
    repository = Repository([root / "one", root / "two"], describe)
    assert refusal(repository).startswith("model 'm' appears in two or more repositories ('one', 'two')")
    assert list(repository.read("n").versions) == [1]


@pytest.mark.parametrize("name", ["nowhere", "../m", "m/1", "", ".", "/"])
def test_an_unknown_name_is_not_found(repository: Repository, root: Path, name: str) -> None:
    put(root, {"m/1/model.onnx": ""})
    with pytest.raises(NotFound):
        repository.read(name)


# --- reading


def test_without_a_configuration_the_file_tells(repository: Repository, root: Path, describe: Describe) -> None:
    put(root, {"m/1/model.onnx": ""})
    source = repository.read("m")
    assert describe.asked == ["1/model.onnx"]
    assert source.config.name == source.name == "m"
    assert source.config.backend == "onnxruntime"
    assert source.config.max_batch_size == 4
    assert source.config.batching is not None
    assert [(t.name, t.dims) for t in source.config.inputs] == [("x", (4,))]
    assert source.versions == {1: root / "m/1"}
    assert source.warnings == ()


def test_a_full_configuration_asks_nothing_of_the_file(repository: Repository, root: Path, describe: Describe) -> None:
    put(root, {"m/1/model.onnx": "", "m/config.pbtxt": f'name: "m" max_batch_size: 16 {TENSORS}'})
    config = repository.read("m").config
    assert describe.asked == []
    assert config.max_batch_size == 16
    assert config.batching is None


def test_the_default_batch_size_and_the_configuration_name_are_the_operators(root: Path, describe: Describe) -> None:
    put(root, {"m/1/model.onnx": "", "m/config.pbtxt": "max_batch_size: 2", "m/configs/edge.pbtxt": ""})
    put(root, {"n/1/model.onnx": "", "n/config.pbtxt": "max_batch_size: 3"})
    repository = Repository([root], describe, default_max_batch_size=64, config_name="edge")
    assert repository.read("m").config.max_batch_size == 64
    assert repository.read("n").config.max_batch_size == 3
    assert repository.read("m").warnings == ()
    put(root, {"m/configs/edge.pbtxt": "oops: 1"})
    assert refusal(repository).startswith("m/configs/edge.pbtxt line 1 column 1")


def test_a_backend_without_files_needs_its_tensors_in_the_configuration(repository: Repository, root: Path) -> None:
    put(root, {"m/config.pbtxt": f'backend: "fake" {TENSORS}', "m/1/.keep": ""})
    assert repository.read("m").config.backend == "fake"
    put(root, {"m/config.pbtxt": 'backend: "fake"'})
    assert "must specify 'input'" in refusal(repository)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('\nname: "other"', "m/config.pbtxt line 2: unexpected directory name 'm' for model 'other'"),
        ("\n\nmax_batchsize: 1", "m/config.pbtxt line 3 column 1: "),
        (
            '\nbackend: "python"',
            "m/config.pbtxt line 2: backend 'python' runs the code in 'model.py', which is not allowed",
        ),
        (
            "sequence_batching { iterative_sequence: true }",
            "m/config.pbtxt line 1: iterative_sequence is not supported",
        ),
        (
            '\ndefault_model_filename: "a.onnx" backend: "onnxruntime"',
            "m/config.pbtxt line 2: 'm/1/a.onnx' is not there",
        ),
        ('backend: "onnxruntime" default_model_filename: "../../../x"', "leads out of the model repository"),
        ('backend: "onnxruntime" default_model_filename: "/etc/passwd"', "leads out of the model repository"),
        (
            TENSORS.replace("[ 2 ]", '[ 2 ] label_filename: "none.txt"'),
            "line 3: label_filename 'none.txt' is not in folder",
        ),
        (
            TENSORS.replace("[ 2 ]", '[ 2 ] label_filename: "/etc/passwd"'),
            "line 3: label_filename '/etc/passwd' leads out",
        ),
        (
            TENSORS + 'model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 '
            'input_data_file: "x.raw" } } }',
            "line 4: input_data_file 'x.raw' is not in folder 'warmup'",
        ),
        (
            TENSORS + 'model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 '
            'input_data_file: "../../../x" } } }',
            "line 4: input_data_file '../../../x' leads out of the model repository",
        ),
        (
            'input { name: "z" data_type: TYPE_FP32 dims: [ 4 ] }',
            "unexpected inference input 'z', allowed inputs are: x",
        ),
    ],
)
def test_refusals_name_file_line_and_remedy(repository: Repository, root: Path, config: str, message: str) -> None:
    put(root, {"m/1/model.onnx": "", "m/config.pbtxt": config})
    refused = refusal(repository)
    assert message in refused
    assert str(root) not in refused


def test_a_configuration_that_is_not_text(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.onnx": ""})
    (root / "m/config.pbtxt").write_bytes(b'name: "m"\n\xff\xfe')
    assert refusal(repository) == "m/config.pbtxt line 2: the file is not UTF-8 text; save it as UTF-8"
    (root / "m/config.pbtxt").write_bytes(b'\xef\xbb\xbfname: "m"')
    assert repository.read("m").config.name == "m"


def test_a_broken_model_file_is_named_without_its_path(repository: Repository, root: Path, describe: Describe) -> None:
    put(root, {"m/1/model.onnx": "junk"})
    describe.error = RuntimeError(f"Load model from {root}/m/1/model.onnx failed: protobuf parsing failed")
    refused = refusal(repository)
    assert refused.startswith("m/1/model.onnx cannot be read: Load model from model.onnx failed: protobuf parsing")
    assert str(root) not in refused
    describe.error = InvalidArgument("opset 99 is not known")
    assert refusal(repository) == "m/1/model.onnx: opset 99 is not known"


def test_a_link_out_of_the_repository_is_not_followed(repository: Repository, root: Path, tmp_path: Path) -> None:
    put(tmp_path, {"secret.txt": "secret"})
    put(root, {"m/1/model.onnx": "", "m/config.pbtxt": TENSORS.replace("[ 2 ]", '[ 2 ] label_filename: "l.txt"')})
    (root / "m/l.txt").symlink_to(tmp_path / "secret.txt")
    assert "label_filename 'l.txt' leads out of the model repository" in refusal(repository)
    (root / "m/l.txt").unlink()
    put(root, {"shared.txt": "cat\n"})
    (root / "m/l.txt").symlink_to(root / "shared.txt")
    assert repository.read("m").config.outputs[0].labels == ("cat",)


def test_a_version_folder_that_is_a_link_serves(repository: Repository, root: Path, tmp_path: Path) -> None:
    put(tmp_path, {"elsewhere/model.onnx": ""})
    (root / "m").mkdir()
    (root / "m/1").symlink_to(tmp_path / "elsewhere")
    assert repository.read("m").versions == {1: root / "m/1"}


def test_labels_are_the_lines_of_the_file(repository: Repository, root: Path) -> None:
    config = TENSORS.replace("[ 2 ]", '[ 2 ] label_filename: "labels.txt"')
    put(root, {"m/1/model.onnx": "", "m/config.pbtxt": config, "m/labels.txt": "cat\nchien élu\n"})
    config = repository.read("m").config
    assert config.outputs[0].labels == ("cat", "chien élu")
    assert config.outputs[0].label_filename == "labels.txt"


def test_a_warm_up_file_in_its_folder(repository: Repository, root: Path) -> None:
    sample = (
        'model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 input_data_file: "x" } } }'
    )
    put(root, {"m/1/model.onnx": "", "m/config.pbtxt": TENSORS + sample, "m/warmup/x": "0123456789abcdef"})
    source = repository.read("m")
    assert source.config.warmup[0].inputs["x"].source == "x"
    assert source.warnings == ()


def test_what_has_no_effect_is_said(repository: Repository, root: Path, describe: Describe) -> None:
    put(root, {"m/1/model.onnx": "", "m/final/model.onnx": "", "m/007/model.onnx": "", "m/0/model.onnx": ""})
    put(root, {"m/config.pbtxt": "response_cache { enable: true }"})
    texts = repository.read("m").warnings
    assert [text.partition(" is ignored")[0] for text in texts[:3]] == [
        "folder 'm/0'",
        "folder 'm/007'",
        "folder 'm/final'",
    ]
    assert texts[3] == (
        "m/config.pbtxt line 1: response_cache has no effect without --response-cache-bytes. Every request is computed"
    )
    assert Repository([root], describe, caches=True).read("m").warnings == texts[:3]


# --- versions


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", [10]),
        ("version_policy { latest { } }", [10]),
        ("version_policy { latest { num_versions: 2 } }", [3, 10]),
        ("version_policy { latest { num_versions: 9 } }", [1, 3, 10]),
        ("version_policy { all { } }", [1, 3, 10]),
        ("version_policy { specific { versions: [ 3, 1 ] } }", [1, 3]),
        ("version_policy { specific { versions: [ 10, 3, 1, 3 ] } }", [1, 3, 10]),
    ],
)
def test_version_policy(
    repository: Repository, root: Path, describe: Describe, policy: str, expected: list[int]
) -> None:
    put(root, {"m/1/model.onnx": "", "m/3/model.onnx": "", "m/10/model.onnx": "", "m/config.pbtxt": policy})
    source = repository.read("m")
    assert list(source.versions) == expected
    assert describe.asked == [f"{expected[-1]}/model.onnx"]


def test_specific_versions_that_are_not_there(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.onnx": "", "m/config.pbtxt": "\nversion_policy { specific { versions: [ 1, 2 ] } }"})
    source = repository.read("m")
    assert list(source.versions) == [1]
    assert source.warnings == ("m/config.pbtxt line 2: version 2 is specified and folder 'm/2' is not there",)
    put(root, {"m/config.pbtxt": "\nversion_policy { specific { versions: [ 7 ] } }"})
    assert refusal(repository).startswith(
        "m/config.pbtxt line 2: at least one version must be available under the version policy of model 'm'; "
        "there are: 1"
    )


def test_no_version_folder(repository: Repository, root: Path) -> None:
    put(root, {"m/model.onnx": ""})
    assert refusal(repository) == "model 'm' has no version folder; put its model file into m/1/"


def test_a_version_without_its_file_does_not_stop_the_others(
    repository: Repository, root: Path, describe: Describe
) -> None:
    put(
        root,
        {
            "m/1/model.onnx": "",
            "m/2/notes.txt": "",
            "m/config.pbtxt": 'backend: "onnxruntime" version_policy { all {} }',
        },
    )
    assert list(repository.read("m").versions) == [1, 2]
    assert describe.asked == ["1/model.onnx"]
    (root / "m/1/model.onnx").unlink()
    assert "'m/2/model.onnx' is not there; the folder holds: notes.txt" in refusal(repository)


# --- load parameters


def test_a_configuration_in_the_load_request_replaces_the_file(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.onnx": "", "m/2/model.onnx": "", "m/config.pbtxt": "max_batch_size: 2 oops"})
    override = {"max_batch_size": "16", "version_policy": {"specific": {"versions": ["1"]}}}
    source = repository.read("m", {"config": json.dumps(override)})
    assert source.config.max_batch_size == 16
    assert list(source.versions) == [1]


@pytest.mark.parametrize(
    ("parameters", "kind", "message"),
    [
        ({"config": '{"max_batchsize": 1}'}, InvalidArgument, 'model configuration: Message type "ModelConfig"'),
        (
            {"config": '{"name": "n"}'},
            InvalidArgument,
            "model configuration: unexpected directory name 'm' for model 'n'",
        ),
        ({"config": '{"backend": "onnxruntime", "default_model_filename": "../x"}'}, InvalidArgument, "leads out of"),
        (
            {"config": "{}", "file:1/model.onnx": "..."},
            Internal,
            "file parameter 'file:1/model.onnx' is not base64",
        ),
        ({"confg": "{}"}, InvalidArgument, "unexpected load parameter 'confg'; expected 'config' or 'file:<path>'"),
    ],
)
def test_load_parameters_that_are_refused(
    repository: Repository, root: Path, parameters: dict[str, str], kind: type[GatewayError], message: str
) -> None:
    put(root, {"m/1/model.onnx": ""})
    with pytest.raises(kind) as caught:
        repository.read("m", parameters)
    assert message in caught.value.message


def test_files_of_a_request_are_there_for_as_long_as_they_are_used(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.onnx": "from the repository", "m/labels.txt": "a"})
    files = {"file:2/model.onnx": "eA==", "file:labels.txt": "Yg=="}
    source = repository.read("m", {"config": "{}", **files})
    assert list(source.versions) == [2]
    folder = source.versions[2].parent
    assert (folder / "2/model.onnx").read_bytes() == b"x"
    assert (folder / "labels.txt").read_bytes() == b"b"
    assert repository.read("m").versions == {1: root / "m/1"}
    del source
    gc.collect()
    assert not folder.parent.exists()


# --- changes


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_changes_since_the_last_look(repository: Repository, root: Path) -> None:
    put(root, {"a/1/model.onnx": "", "b/1/model.onnx": ""})
    first = repository.changes({})
    assert (first.added, first.changed, first.removed) == (("a", "b"), (), ())
    again = repository.changes(first.now)
    assert (again.added, again.changed, again.removed) == ((), (), ())
    touch(root / "a/1/model.onnx")
    (root / "b/1/model.onnx").unlink()
    (root / "b/1").rmdir()
    (root / "b").rmdir()
    put(root, {"c/1/model.onnx": ""})
    last = repository.changes(again.now)
    assert (last.added, last.changed, last.removed) == (("c",), ("a",), ("b",))


@pytest.mark.parametrize(
    "name",
    ["config.pbtxt", "labels.txt", "1/model.onnx", "1/weights/part.bin", "2/model.onnx", "configs/x.pbtxt", "warmup/x"],
)
def test_every_file_of_a_model_counts(repository: Repository, root: Path, name: str) -> None:
    put(root, {"m/1/model.onnx": "", "m/config.pbtxt": ""})
    before = repository.changes({}).now
    put(root, {f"m/{name}": "more"})
    assert repository.changes(before).changed == ("m",)


@pytest.mark.parametrize("name", [".hidden", "__pycache__/a.pyc", "1/__pycache__/a.pyc", "1/.tmp"])
def test_files_that_do_not_count(repository: Repository, root: Path, name: str) -> None:
    put(root, {"m/1/model.onnx": ""})
    before = repository.changes({}).now
    put(root, {f"m/{name}": "more"})
    assert repository.changes(before).changed == ()


def test_of_artefacts_only_what_is_promoted_counts(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.onnx": "", "m/1/artefacts/1/int8.onnx": "a", "m/1/artefacts/1/report.json": "{}"})
    now = repository.changes({}).now
    put(root, {"m/1/artefacts/2/int8.onnx": "half a bu", "m/1/artefacts/2/_cache/x": "", "m/1/artefacts/.lock": ""})
    assert repository.changes(now).changed == ()
    for name, text, counts in (
        ("promoted", "1 promote 1\n", True),
        ("1/report.json", "{ }", True),
        ("1/int8.onnx", "bc", True),
        ("2/int8.onnx", "half a build", False),
        ("promoted", "1 promote 1\n2 promote 2\n", True),
        ("1/int8.onnx", "a", False),
    ):
        put(root, {f"m/1/artefacts/{name}": text})
        changes = repository.changes(now)
        assert changes.changed == (("m",) if counts else ()), name
        now = changes.now
    # A folder of that name elsewhere is like any other.
    put(root, {"m/1/weights/artefacts/w": ""})
    assert repository.changes(now).changed == ("m",)


def test_a_digest_tells_what_a_version_computes_wherever_it_lies(tmp_path: Path, describe: Describe) -> None:
    def digest(folder: str, more: Mapping[str, str] | None = None) -> str:
        files = {"m/1/model.onnx": "", "m/1/data/w": "1", "m/config.pbtxt": "response_cache { enable: true }"}
        put(tmp_path / folder, {**files, **(more or {})})
        return Repository([tmp_path / folder], describe).read("m").digests[1]

    one = digest("one")
    assert one
    assert digest("two") == one
    os.utime(tmp_path / "one" / "m" / "1" / "model.onnx", (1, 1))
    assert digest("one", {"m/1/.gateway-latency.json": "x", "m/labels.txt": "x"}) == one
    assert digest("two", {"m/1/artefacts/1/int8.onnx": "x", "m/1/artefacts/promoted": "1 promote 1"}) == one
    assert digest("three", {"m/1/data/w": "2"}) != one
    assert digest("four", {"m/1/data/v": ""}) != one
    parameter = 'response_cache { enable: true } parameters { key: "a" value { string_value: "b" } }'
    assert digest("five", {"m/config.pbtxt": parameter}) != one


def test_only_what_is_cached_has_a_digest_and_what_cannot_be_read_has_none(
    repository: Repository, root: Path, tmp_path: Path
) -> None:
    put(root, {"m/1/model.onnx": ""})
    assert repository.read("m").digests == {}
    put(root, {"m/config.pbtxt": "response_cache { enable: true }"})
    os.mkfifo(root / "m" / "1" / "pipe")
    assert repository.read("m").digests == {1: ""}


def test_a_new_version_leaves_the_fingerprints_of_the_others(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.onnx": "", "m/config.pbtxt": "version_policy { all { } }"})
    before = repository.read("m").fingerprint
    put(root, {"m/2/model.onnx": ""})
    after = repository.read("m").fingerprint
    assert after != before
    assert after.of(1) == before.of(1)
    assert after.of(2) != after.of(1)
    touch(root / "m/config.pbtxt")
    assert repository.read("m").fingerprint.of(1) != before.of(1)


def test_read_and_changes_agree_unless_the_configuration_was_overridden(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.onnx": "", "m/2/model.onnx": ""})
    assert repository.read("m").fingerprint == repository.changes({}).now["m"]
    assert repository.read("m", {"config": "{}"}).fingerprint != repository.changes({}).now["m"]


def test_a_second_repository_taking_the_name_is_a_change(describe: Describe, root: Path) -> None:
    put(root, {"one/m/1/model.onnx": "", "two/n/1/model.onnx": ""})
    repository = Repository([root / "one", root / "two"], describe)
    before = repository.changes({}).now
    put(root, {"two/m/1/model.onnx": ""})
    assert repository.changes(before).changed == ("m",)


def test_a_dangling_link_is_no_obstacle(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.onnx": ""})
    (root / "m/1/gone").symlink_to(root / "nowhere")
    before = repository.changes({}).now
    assert repository.changes(before).changed == ()


# --- models that are code


def completed(path: Path, config: str) -> str:
    fields = json.loads(config)
    assert (path.name, fields["name"]) == ("model.py", "m")
    tensor = {"name": "x", "data_type": "TYPE_FP32", "dims": [4]}
    added = {"input": [tensor], "output": [{**tensor, "name": "y"}], "max_batch_size": 8, "dynamic_batching": {}}
    return json.dumps(fields | added | {"backend": "fake", "model_transaction_policy": {"decoupled": True}})


def test_code_completes_what_it_may_of_its_configuration(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.py": "", "m/config.pbtxt": 'parameters { key: "k" value { string_value: "v" } }'})
    assert "is not allowed" in refusal(repository)
    repository.allow_python(completed)
    config = repository.read("m").config
    assert (config.backend, config.max_batch_size, config.decoupled) == ("python", 8, True)
    assert config.batching is not None
    assert config.inputs[0].dims == (4,)
    assert config.parameters == {"k": "v"}


def test_code_that_says_nothing_of_its_tensors_is_asked_to(repository: Repository, root: Path, describe) -> None:
    put(root, {"m/1/model.py": ""})
    describe.error = Unsupported("'model.py' does not say")
    repository.allow_python(lambda _, config: config)
    assert refusal(repository) == "m/1/model.py: 'model.py' does not say"


def test_code_that_has_nothing_to_say_is_not_asked(repository: Repository, root: Path) -> None:
    def refuse(path: Path, config: str) -> str:
        raise InvalidArgument("asked")

    repository.allow_python(refuse)
    put(root, {"m/1/model.py": "class TritonPythonModel: ...", "m/config.pbtxt": TENSORS})
    assert repository.read("m").config.is_code
    put(root, {"m/1/model.py": "def auto_complete_config(config): ..."})
    assert refusal(repository) == "m/config.pbtxt: asked"


def test_whoever_may_load_models_does_not_say_what_is_code(repository: Repository, root: Path) -> None:
    put(root, {"m/1/model.py": "", "m/config.pbtxt": TENSORS})
    repository.allow_python(lambda _, config: config)
    assert repository.read("m").config.is_code
    override = {"config": '{"backend": "python", "default_model_filename": "../config.pbtxt"}'}
    assert "is loaded as its config.pbtxt says and not by an override" in refusal(repository, "m", override)


def test_only_code_is_decoupled(repository: Repository, root: Path) -> None:
    decoupled = TENSORS + "model_transaction_policy { decoupled: true }"
    put(root, {"m/1/model.py": "", "m/config.pbtxt": decoupled, "n/1/model.onnx": "", "n/config.pbtxt": decoupled})
    repository.allow_python(lambda _, config: config)
    assert repository.read("m").config.decoupled
    assert "Only models of backend 'python' can be" in refusal(repository, "n")
