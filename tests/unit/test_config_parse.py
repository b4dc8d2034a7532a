"""config.pbtxt text and the JSON form: what real files contain, every refusal with its place, and GET /config."""

import json

import pytest

from gateway.config.complete import normalise
from gateway.config.parse import Source, config_json, empty, parse_json, parse_text
from gateway.errors import InvalidArgument

FULL = """
name: "resnet"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1000 ] label_filename: "labels.txt" } ]
version_policy { specific { versions: [ 1, 3 ] } }
dynamic_batching {
  max_queue_delay_microseconds: 500
  default_queue_policy { default_timeout_microseconds: 7 }
  priority_queue_policy { key: 2 value { max_queue_size: 4 default_timeout_microseconds: 9 } }
}
model_warmup [ { name: "w" batch_size: 1 inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 3, 224, 224 ] zero_data: true } } } ]
parameters { key: "k" value { string_value: "v" } }
"""


def parse(text: str):
    return parse_text(Source("m/config.pbtxt", text))


def refusal(text: str) -> str:
    with pytest.raises(InvalidArgument) as caught:
        parse(text)
    return caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "input: [ { name: 'x', data_type: TYPE_FP32, dims: [ 4 ] } ]",
        'input [ { name: "x" data_type: TYPE_FP32 dims: 4 } ]',
        'input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] }',
        'input: { name: "x"; data_type: TYPE_FP32; dims: 4; }',
        '# the model\ninput [\n  {\n    name: "x"  # its only input\n    data_type: 11\n    dims: [ 4 ]\n  }\n]\n',
        'input < name: "x" data_type: TYPE_FP32 dims: [ 4 ] >',
        'input { name: "x", data_type: TYPE_FP32, dims: [ 4 ], };',
    ],
)
def test_variants_seen_in_the_wild_mean_the_same(text: str) -> None:
    proto = parse(text)
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in proto.input] == [("x", 11, [4])]


def test_other_forms_that_real_files_use() -> None:
    proto = parse(
        """
        name: 'm'
        input { name: "a" data_type: TYPE_STRING dims: [ 1 ] reshape {} }
        input { name: "b" data_type: TYPE_FP16 dims: [ -1 ] optional: True }
        parameters: { key: "execution_mode" value: { string_value: "0" } }
        parameters [ { key: "k", value { string_value: "v" } } ]
        instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_AUTO } ]
        """
    )
    assert proto.input[0].HasField("reshape")
    assert proto.input[1].optional
    assert sorted(proto.parameters) == ["execution_mode", "k"]
    assert [group.count for group in proto.instance_group] == [2, 0]


@pytest.mark.parametrize(
    ("text", "place", "problem", "hint"),
    [
        ('max_batch_size: 4\nbackend: “pytorch"', "line 2 column 10", "Expected string", "typographic quotes"),
        ("\n\ninput [ { type: TYPE_FP32 } ]", "line 3 column 11", 'no field named "type"', "Did you mean 'data_type'?"),
        ("max_batchsize: 4", "line 1 column 1", 'no field named "max_batchsize"', "Did you mean 'max_batch_size'?"),
        ('{\n  "name": "m"\n}', "line 1 column 1", "Expected identifier", "This is JSON"),
        ("import numpy as np\n", "line 1 column 1", 'no field named "import"', "looks like Python"),
        ("max_batch_size: ${bs}", "line 1 column 17", "parse integer", "'${bs}' looks like a template placeholder"),
        ("max_batch_size: {{ bs }}", "line 1 column 17", "parse integer", "template placeholder"),
        ("max_batch_size: MAX_BATCH", "line 1 column 17", "parse integer", "template placeholder"),
        ("input { data_type: TYPE_#DTYPE }", "line 1", "no value named TYPE_", "'#DTYPE' looks like a template"),
        (
            "input { data_type: TYPE_FLOAT }",
            "line 1 column 20",
            "no value named TYPE_FLOAT",
            "Did you mean 'TYPE_FP32'?",
        ),
        ("input { data_type: INT64 }", "line 1 column 20", "no value named INT64", "Did you mean 'TYPE_INT64'?"),
        ("input { data_type: BYTES }", "line 1 column 20", "no value named BYTES", "Did you mean 'TYPE_STRING'?"),
        ('input { data_type: "TYPE_FP32" }', "line 1 column 20", "no value named", "Write TYPE_FP32 without quotes"),
        ("max_batch_size: 1\nmax_batch_size: 2", "line 2 column 17", "should not have multiple", "Give it once"),
        ("version_policy { all {} latest {} }", "line 1", "along with", "Give it once"),
        ('name: "m', "line 1 column 7", "missing ending quote", "Close the quote"),
        ("name: m", "line 1 column 7", "Expected string", "Put the value in quotes"),
        ("input { dims: [ 1, 2, ] }", "line 1", "parse integer", "Remove the comma before the closing bracket"),
        ("input [ { dims: 1 }, ]", "line 1", "Expected", "Remove the comma before the closing bracket"),
        ("input [ { dims: 1 }\n", "line 2 column 1", "Expected", "close it"),
        ('parameters { key: "a" value: "b" }', "line 1 column 30", 'Expected "{"', "write its fields in { }"),
        ("max_batch_size: 99999999999", "line 1 column 17", "out of range", "documentation"),
    ],
)
def test_refusal_names_place_problem_and_remedy(text: str, place: str, problem: str, hint: str) -> None:
    message = refusal(text)
    assert message.startswith(f"m/config.pbtxt {place}")
    assert problem in message
    assert hint in message.partition(". ")[2]
    assert "inference." not in message


def test_every_line_of_a_broken_file_is_pointed_at_in_turn() -> None:
    lines = FULL.strip().splitlines()
    for number in range(len(lines)):
        broken = [*lines[:number], "oops: 1", *lines[number:]]
        assert f" line {number + 1} " in refusal("\n".join(broken))


@pytest.mark.parametrize(
    ("words", "line"),
    [(("input", "b"), 4), (("input", "b", "dims"), 4), (("input", "c"), 2), (("output",), 0), (("note",), 0), ((), 0)],
)
def test_source_finds_the_line_of_a_field(words: tuple[str, ...], line: int) -> None:
    source = Source("m/config.pbtxt", '# note: output\ninput [\n  { name: "a" },\n  { name: "b" dims: 0 }\n]\n')
    where = f"m/config.pbtxt line {line}: wrong" if line else "m/config.pbtxt: wrong"
    assert source.error("wrong", *words).message == where


def test_json_takes_integers_as_strings() -> None:
    proto = parse_json(
        '{"max_batch_size": "16", "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["-1", 3]}]}'
    )
    assert proto.max_batch_size == 16
    assert list(proto.input[0].dims) == [-1, 3]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"max_batchsize": 1}', 'no field named "max_batchsize"'),
        ('{"max_batch_size": "x"}', "max_batch_size"),
        ("[1]", "expected a JSON object"),
        ("", "expected a JSON object"),
        ('{"name": ', "model configuration: "),
        ('{"parameters": ' + '{"a":' * 20000 + "1" + "}" * 20001, "model configuration: "),
        ('{"input": [{"data_type": "FP32"}]}', "FP32"),
    ],
)
def test_json_refusals(text: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_json(text)
    assert problem in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_config_json_is_tritons() -> None:
    shown = config_json(normalise(parse(FULL), ()))
    assert shown["input"] == [
        {
            "name": "x",
            "data_type": "TYPE_FP32",
            "format": "FORMAT_NONE",
            "dims": [3, 224, 224],
            "is_shape_tensor": False,
            "allow_ragged_batch": False,
            "optional": False,
            "is_non_linear_format_io": False,
        }
    ]
    assert shown["version_policy"] == {"specific": {"versions": [1, 3]}}
    batching = shown["dynamic_batching"]
    assert batching["preferred_batch_size"] == [8]
    assert batching["max_queue_delay_microseconds"] == 500
    assert batching["priority_levels"] == 0
    assert batching["default_queue_policy"]["default_timeout_microseconds"] == 7
    assert batching["priority_queue_policy"]["2"]["default_timeout_microseconds"] == 9
    assert shown["model_warmup"][0]["inputs"]["x"]["dims"] == [3, 224, 224]
    assert shown["instance_group"][0]["kind"] == "KIND_CPU"
    assert shown["instance_group"][0]["name"] == "resnet"
    assert shown["optimization"]["input_pinned_memory"] == {"enable": True}
    assert shown["optimization"]["output_pinned_memory"] == {"enable": True}
    assert shown["parameters"] == {"k": {"string_value": "v"}}
    assert shown["backend"] == ""
    assert shown["cc_model_filenames"] == {}
    assert shown["batch_input"] == []
    assert "sequence_batching" not in shown


def test_config_json_of_an_empty_message_has_every_plain_field_in_schema_order() -> None:
    shown = config_json(empty())
    assert list(shown)[:6] == ["name", "platform", "backend", "runtime", "max_batch_size", "input"]
    assert "version_policy" not in shown


def test_what_config_json_shows_can_be_loaded_again() -> None:
    proto = normalise(parse(FULL), ())
    assert parse_json(json.dumps(config_json(proto))) == proto
