"""PROTOCOL.md section 11: model repositories and config.pbtxt."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gateway.config import tritonserver
from gateway.config.arguments import parse_args
from gateway.config.parse import Source, parse_text
from gateway.errors import InvalidArgument
from tests.api.protocol.facts import GRPC, Grpc, Http, Section, tensor

SECTION = Section("11")
fact = SECTION.fact
IN = tensor("IN", [[1, 2]])
PARSING = "**Parsing [ran]:**"
LAYOUT = "`<repo>/<model>/config.pbtxt`"
ABSENT = "config.pbtxt may be absent"
FILLED = "ONNX (onnxruntime_backend"
DEFAULTS = "Defaults (core/src/model_config_utils.cc)"
FORMATION = "Batch formation"
CONTROLS = "Sequence models leave START"
BACKENDS = "Backends: python 97"
SECTION.beyond = {
    "Counted over 388 configuration files": "how the table was made",
    "field | files | share": "the heading of a table",
    "TensorRT: max batch from the profile": "needs a GPU; tests/unit/test_engine_tensorrt.py",
    "tritonclient needs nothing from config": "section 12 has what perf_analyzer reads",
    "batch_input, rate_limiter, response_cache, cc_model_filenames": "rare; each has tests of its own, or its refusal",
}


# --- what real configurations use: a model that has the field serves


def _serves(row: str, words: str, model: str, given: Any = IN) -> None:
    @fact(row, f"a model with {words} serves")
    def _(on: Http | Grpc) -> None:
        told = on.infer(model, given)
        assert told.ok, told
        assert told.arrays["OUT"].tolist() == given["data"].tolist()


_serves("input / output (name", "inputs and outputs", "m")
_serves("max_batch_size", "batches", "open", tensor("IN", [[1, 2], [3, 4]]))
_serves("name | 306", "a name", "named_well")
_serves("backend | 233", "a backend", "reload")
_serves("instance_group kind", "instance groups", "field_instance_group")
_serves("platform (mostly ensemble", "a platform", "auto_platform", tensor("IN", [[1, 2, 3]]))
_serves("dynamic_batching (any)", "dynamic batching", "field_dynamic_batching")
_serves("parameters{key", "parameters", "field_parameters")
_serves("default_model_filename", "a file of another name", "named_file", tensor("IN", [[1, 2, 3]]))
_serves("input.reshape / output.reshape", "reshape", "field_reshape")
_serves("input.optional", "an optional input", "field_optional")
_serves("max_queue_delay_microseconds", "a queue delay", "field_delay")
_serves("ensemble_scheduling", "ensemble scheduling", "ensemble")
_serves("preferred_batch_size", "preferred batch sizes", "field_preferred")
_serves("optimization (execution_accelerators", "optimization", "field_optimization")
_serves("input.format", "a format", "field_format", tensor("IN", [[[[1, 2], [3, 4]]] * 3][0:1]))
_serves("input.allow_ragged_batch", "ragged batches", "ragged", tensor("IN", [[[1, 2, 3], [4, 5, 6]]]))
_serves("label_filename", "labels", "labels", tensor("IN", [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]))
_serves("version_policy", "a version policy", "every")
_serves("default_queue_policy, priority_levels", "queue policies and priorities", "field_queue_policy")
_serves("model_warmup", "warm-up samples", "field_warmup")
_serves("batch_input, rate_limiter", "a rate limiter", "field_rate_limiter")


@fact("batch_input, rate_limiter", "a model with batch inputs is told of each request's size")
def _(on: Http | Grpc) -> None:
    told = on.infer("sums", tensor("IN", [[1, 2, 3, 4]]))
    assert told.ok, told
    assert told.arrays["SUM"].tolist() == [[10]]


@fact("model_transaction_policy.decoupled", "a decoupled model serves", GRPC)
def _(on: Grpc) -> None:
    found, code = on.stream(on.message("repeat", tensor("IN", [1]), parameters={"count": 2}))
    assert (len(found), code) == (2, "OK")


@fact("sequence_batching", "a model of sequences serves")
def _(on: Http | Grpc) -> None:
    name = {"http": 71, "grpc": 72}[on.name]
    first = on.infer("direct", tensor("IN", [[3]]), parameters={"sequence_id": name, "sequence_start": True})
    assert first.ok, first
    last = on.infer("direct", tensor("IN", [[4]]), parameters={"sequence_id": name, "sequence_end": True})
    assert (first.arrays["OUT"].tolist(), last.arrays["OUT"].tolist()) == ([[3]], [[7]])


def _reason(on: Http | Grpc, model: str) -> str:
    (entry,) = [each for each in on.index() if each["name"] == model]
    assert entry["state"] == "UNAVAILABLE", entry
    return str(entry["reason"])


@fact(BACKENDS, "models of backends that are not here are unavailable with what to do")
def _(on: Http | Grpc) -> None:
    for backend, remedy in (
        ("pytorch", "torch.onnx.export"), ("tensorflow", "tf2onnx"), ("dali", 'backend "python"'), ("vllm", "vllm serve"),
        ("fil", "onnxmltools"), ("fastertransformer", "TensorRT-LLM"),
    ):  # fmt: skip
        told = _reason(on, f"of_{backend}")
        assert f"backend '{backend}' is not supported" in told
        assert remedy in told


# --- reading config.pbtxt


@fact(PARSING, "every spelling that protobuf text allows is read")
def _(on: Http | Grpc) -> None:
    assert on.infer("commented", IN).ok


@fact(PARSING, "lists, scalars for lists, empty messages and words for booleans are read", needs="", queues=("memory",))
def _(_: Any) -> None:
    text = (
        "max_batch_size: 8 # a comment\n"
        "input: [ { name: 'A', data_type: TYPE_FP32, dims: 64, reshape {} }, ]\n"
        'input { name: "B" data_type: TYPE_FP32 dims: [ 1, 2 ] optional: True }\n'
        "output [ { name: 'C' data_type: TYPE_FP32 dims: [ -1 ] } ]"
    )
    try:
        proto = parse_text(Source("config.pbtxt", text))
    except InvalidArgument:
        proto = parse_text(Source("config.pbtxt", text.replace(" }, ]", " } ]")))
    assert [list(each.dims) for each in proto.input] == [[64], [1, 2]]
    assert proto.input[1].optional
    assert proto.input[0].HasField("reshape")


@fact(PARSING, "what is broken is told with line, column and a hint")
def _(on: Http | Grpc) -> None:
    for model, place, hint in (
        ("quoted", "quoted/config.pbtxt line 1 column ", "typographic quotes"),
        ("typed", "typed/config.pbtxt line 2 column ", "'data_type'"),
        ("as_json", "as_json/config.pbtxt line 1 column ", "This is JSON"),
        ("as_python", "as_python/config.pbtxt line 1 column ", "This looks like Python"),
        ("template", "template/config.pbtxt line 1 column ", "template placeholder"),
    ):
        told = _reason(on, model)
        assert told.startswith(place), told
        assert hint in told, told


# --- layout


@fact(LAYOUT, "a name that is not the folder's is refused")
def _(on: Http | Grpc) -> None:
    assert "unexpected directory name 'misnamed' for model 'other', directory name must equal model name" in _reason(
        on, "misnamed"
    )


@fact(LAYOUT, "a folder that is no number is no version")
def _(on: Http | Grpc) -> None:
    assert on.metadata("auto")["versions"] == ["1"]


@fact(LAYOUT, "a configuration of another name is taken where a model has it")
def _(on: Http | Grpc) -> None:
    assert on.metadata("newest")["versions"] == ["1", "2", "3"]


@fact(LAYOUT, "a model in two repositories is unavailable")
def _(on: Http | Grpc) -> None:
    assert "appears in two or more repositories" in _reason(on, "double")


@fact(ABSENT, "a model needs no configuration")
def _(on: Http | Grpc) -> None:
    assert on.infer("auto", tensor("IN", [[1, 2, 3]])).arrays["OUT"].tolist() == [[1, 2, 3]]


@fact(ABSENT, "backend, platform and file name are filled in from each other")
def _(on: Http | Grpc) -> None:
    for model in ("auto", "auto_platform", "named_file"):
        told = on.config(model)
        assert (told["backend"], told["platform"], told["default_model_filename"]) == (
            "onnxruntime", "onnxruntime_onnx", "model.onnx",
        )  # fmt: skip


# --- what is filled in from an ONNX file


@fact(FILLED, "an open first dimension of all tensors makes batches of 4")
def _(on: Http | Grpc) -> None:
    told = on.config("auto")
    assert told["max_batch_size"] == 4
    assert told["dynamic_batching"]["preferred_batch_size"] == [4]
    assert told["input"][0]["dims"] == [3]


@fact(FILLED, "a fixed first dimension makes none")
def _(on: Http | Grpc) -> None:
    told = on.config("auto_fixed")
    assert told["max_batch_size"] == 0
    assert "dynamic_batching" not in told
    assert told["input"][0]["dims"] == [1, 3]


@fact(FILLED, "a fixed first dimension with batches is an error in Triton's words")
def _(on: Http | Grpc) -> None:
    assert (
        "autofill failed for model 'auto_wants': model does not support batching while non-zero max_batch_size is "
        "specified"
    ) in _reason(on, "auto_wants")


@fact(FILLED, "a size that is given stays and 1 adds no scheduler")
def _(on: Http | Grpc) -> None:
    told = on.config("auto_one")
    assert told["max_batch_size"] == 1
    assert "dynamic_batching" not in told


@fact(FILLED, "with input and output given nothing is filled in")
def _(on: Http | Grpc) -> None:
    told = on.config("auto_not")
    assert told["max_batch_size"] == 0
    assert told["input"][0]["dims"] == [-1, 3]


@fact(FILLED, "one number a row is dims 1 with an empty reshape")
def _(on: Http | Grpc) -> None:
    told = on.config("auto_scalar")["input"][0]
    assert (told["dims"], told["reshape"]) == ([1], {"shape": []})
    assert on.infer("auto_scalar", tensor("IN", [[5], [6]])).arrays["OUT"].tolist() == [[5], [6]]


@fact(FILLED, "the size is set by backend-config", needs="", queues=("memory",))
def _(_: Any) -> None:
    words = tritonserver.translate(["--model-repository=/x", "--backend-config=default-max-batch-size=9"])
    assert parse_args(words).default_max_batch_size == 9


@fact(DEFAULTS, "the newest version alone is served")
def _(on: Http | Grpc) -> None:
    assert on.metadata("specific")["versions"] == ["1"]
    assert [entry["version"] for entry in on.index() if entry["name"] == "reload"] == ["1"]


@fact(DEFAULTS, "no version named means the newest")
def _(on: Http | Grpc) -> None:
    assert on.infer("latest", IN).head["model_version"] == "3"
    assert on.infer("latest", IN, version="2").head["model_version"] == "2"
    on.infer("latest", IN, version="1").refuses(404, "Request for unknown model: 'latest' version 1 is not found")


@fact(DEFAULTS, "a kind that is left open is the CPU where there is no GPU")
def _(on: Http | Grpc) -> None:
    assert on.config("auto")["instance_group"][0]["kind"] == "KIND_CPU"


@fact(DEFAULTS, "dims of rank 0 are refused")
def _(on: Http | Grpc) -> None:
    assert "must specify 'dims'" in _reason(on, "rankless")


# --- batches


@fact(FORMATION, "what waits is taken together up to the largest batch")
def _(on: Http | Grpc) -> None:
    before = on.statistics("together")[0]
    _crowd(on, "together", [[[number, number]] for number in range(13)])
    after = on.statistics("together")[0]
    assert after["inference_count"] - before["inference_count"] == 13
    assert after["execution_count"] - before["execution_count"] < 13
    assert max(each["batch_size"] for each in after["batch_stats"]) <= 8


@fact(FORMATION, "a request waits for others as long as the delay says")
def _(on: Http | Grpc) -> None:
    begun = time.monotonic()
    assert on.infer("delayed", IN).ok
    assert time.monotonic() - begun >= 0.2


@fact(FORMATION, "a batch of the largest or a preferred size waits for nobody")
def _(on: Http | Grpc) -> None:
    begun = time.monotonic()
    assert on.infer("delayed", tensor("IN", [[1, 2]] * 8)).ok
    _crowd(on, "patient", [[[1, 2]], [[3, 4]]])
    assert time.monotonic() - begun < 8


@fact(FORMATION, "requests of different shapes are not mixed")
def _(on: Http | Grpc) -> None:
    _crowd(on, "open_together", [[[number] * (1 + number % 3)] for number in range(12)])


def _crowd(on: Http | Grpc, model: str, values: list[Any]) -> None:
    """Ask for all at once; each must have its own back."""
    together = threading.Barrier(len(values))

    def ask(value: Any) -> Any:
        together.wait()
        return on.infer(model, tensor("IN", value)).arrays["OUT"].tolist()

    with ThreadPoolExecutor(len(values)) as pool:
        assert list(pool.map(ask, values)) == values


@fact(CONTROLS, "controls are no inputs and the scheduler gives them")
def _(on: Http | Grpc) -> None:
    assert [each["name"] for each in on.metadata("told")["inputs"]] == ["IN"]
    name = {"http": 81, "grpc": 82}[on.name]
    ends = {"sequence_id": name, "sequence_start": True, "sequence_end": True}
    told = on.infer("told", tensor("IN", [[9]], "INT32"), parameters=ends)
    assert told.ok, told
    assert told.arrays["OUT"].tolist() == [[9, 1, 1, 1, name]]


@fact(CONTROLS, "an id may be a string where the model takes one")
def _(on: Http | Grpc) -> None:
    ends = {"sequence_id": "über/1", "sequence_start": True, "sequence_end": True}
    told = on.infer("named", tensor("IN", [[1]]), outputs=["OUT"], parameters=ends)
    assert told.ok, told
    assert told.arrays["OUT"].tolist() == [["über/1".encode()]]


@fact(CONTROLS, "a first request without START is refused")
def _(on: Http | Grpc) -> None:
    on.infer("direct", tensor("IN", [[1]]), parameters={"sequence_id": 9999}).refuses(
        400,
        "inference request for sequence 9999 to model 'direct' must specify the START flag on the first request of the "
        "sequence",
    )


@fact(CONTROLS, "a state begins as its file says")
def _(on: Http | Grpc) -> None:
    name = {"http": 91, "grpc": 92}[on.name]
    ends = {"sequence_id": name, "sequence_start": True, "sequence_end": True}
    told = on.infer("hundred", tensor("IN", [[5]]), parameters=ends)
    assert told.ok, told
    assert told.arrays["OUT"].tolist() == [[105]]
