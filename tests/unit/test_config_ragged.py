"""`allow_ragged_batch`, `batch_input`, `batch_output` and shape tensors in a configuration, and whether the file fits it."""

from pathlib import Path

import pytest

from gateway.config.build import build
from gateway.config.complete import complete, fill_backend
from gateway.config.fit import check_fit
from gateway.config.model import BatchInput, ModelConfig
from gateway.config.parse import Source, parse_text
from gateway.config.support import require_supported, warnings
from gateway.engines.onnxruntime import describe
from gateway.errors import InvalidArgument
from gateway.types import DataType
from tests import ragged_support as models

IO = """max_batch_size: 4
input { name: "IN" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
output { name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] }
"""


def made(text: str, backend: str = "onnxruntime") -> ModelConfig:
    source = Source("m/config.pbtxt", f'backend: "{backend}"\n{text}')
    proto = fill_backend(parse_text(source), "m", [])
    require_supported(proto, {backend}, source)
    return build(proto, source)


def refusal(text: str) -> str:
    with pytest.raises(InvalidArgument) as caught:
        made(text)
    return caught.value.message


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("datatype", ["INT32", "FP32"])
def test_batch_inputs_are_read(kind: str, datatype: str) -> None:
    text = f'batch_input {{ kind: {kind} target_name: [ "A", "B" ] data_type: TYPE_{datatype} source_input: "IN" }}'
    config = made(IO + text)
    name = kind.removeprefix("BATCH_").lower()
    assert config.batch_inputs == (BatchInput(name, ("A", "B"), DataType(datatype), "IN"),)
    assert config.inputs[0].ragged
    assert not config.by_rows


def test_batch_outputs_are_read() -> None:
    config = made(IO + 'batch_output { target_name: "OUT" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "IN" }')
    assert config.outputs[0].like == "IN"


BATCH_INPUT = 'batch_input {{ target_name: "A" data_type: {} source_input: {} }}'
BATCH_OUTPUT = "batch_output {{ target_name: {} source_input: {} }}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BATCH_INPUT.format("TYPE_INT32", "[ ]"), "batch input kind 'BATCH_ELEMENT_COUNT' expects 1 source input, got 0"),
        (BATCH_INPUT.format("TYPE_INT32", '[ "IN", "IN" ]'), "expects 1 source input, got 2"),
        (BATCH_INPUT.format("TYPE_INT64", '"IN"'), "batch input data type must be TYPE_INT32 or TYPE_FP32"),
        (BATCH_INPUT.format("TYPE_INT32", '"Z"'), "unknown source input name 'Z' for m. There are: IN"),
        ('batch_input { data_type: TYPE_FP32 source_input: "IN" }', "must specify target_name"),
        (
            'batch_input { target_name: "IN" data_type: TYPE_FP32 source_input: "IN" }',
            "batch input target 'IN' of m is an input already",
        ),
        (BATCH_OUTPUT.format('"OUT"', "[ ]"), "batch output kind 'BATCH_SCATTER_WITH_INPUT_SHAPE' expects 1 source input, got 0"),
        (BATCH_OUTPUT.format('"OUT"', '"Z"'), "unknown source input name 'Z'"),
        (BATCH_OUTPUT.format('"Z"', '"IN"'), "unknown target output name 'Z'"),
        (BATCH_OUTPUT.format('[ "OUT", "OUT" ]', '"IN"'), "target output name 'OUT' can only be specified once"),
        (
            'output { name: "MORE" data_type: TYPE_FP32 dims: [ 1, -1 ] }' + BATCH_OUTPUT.format('"MORE"', '"IN"'),
            "has an open dimension where its source input 'IN' has none: [1, -1] and [-1]",
        ),
        (
            'input { name: "MAY" data_type: TYPE_FP32 dims: 1 optional: true }' + BATCH_INPUT.format("TYPE_FP32", '"MAY"'),
            "which is optional",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_where_it_stands(text: str, message: str) -> None:
    refused = refusal(IO + text)
    assert message in refused
    assert refused.startswith("m/config.pbtxt line ")


def test_code_is_told_the_shapes_and_makes_what_it_likes_of_them() -> None:
    text = IO + BATCH_INPUT.format("TYPE_FP32", '"IN"') + BATCH_OUTPUT.format('"OUT"', '"IN"')
    config = made(text, "python")
    (told,) = config.batch_inputs
    assert (told.kind, told.source, told.datatype) == ("shapes", "IN", DataType.INT64)
    assert config.outputs[0].like == ""
    source = Source("m/config.pbtxt", f'backend: "python"\n{text}')
    (warning,) = warnings(parse_text(source), source)
    assert "A Python model gets each request by itself" in warning


# --- the file


def described(folder: Path, config: str, name: str) -> None:
    """Raise what is wrong with this configuration of the file in `folder`."""
    source = Source(f"{name}/config.pbtxt", config)
    proto = fill_backend(parse_text(source), name, ["model.onnx"])
    io = describe(folder / "1" / "model.onnx")
    check_fit(build(complete(proto, io, 4, source), source), io)


@pytest.mark.parametrize("make", [models.identity, models.sums, models.reshaper, models.defaulted])
def test_a_configuration_that_fits(make, tmp_path: Path) -> None:
    folder = make(tmp_path)
    described(folder, (folder / "config.pbtxt").read_text(), folder.name)


@pytest.mark.parametrize("kind", models.KINDS)
def test_every_kind_fits_the_file_that_has_its_dimensions(kind: str, tmp_path: Path) -> None:
    folder = models.told(tmp_path, "m", kind, "TYPE_FP32")
    text = (folder / "config.pbtxt").read_text()
    described(folder, text, "m")
    other = "BATCH_ITEM_SHAPE" if models.KINDS[kind] == 1 else "BATCH_ELEMENT_COUNT"
    with pytest.raises(InvalidArgument, match=r"batch_input makes \d open dimension\(s\), and the model expects shape"):
        described(folder, text.replace(kind, other, 1), "m")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("TYPE_INT32", "TYPE_FP32", "the model has data type INT32 and batch_input FP32. Make them equal"),
        (
            '"ENDS"',
            '"Z"',
            "batch_input makes the input 'Z', which the model file of 'sums' has not; there are: IN, ENDS",
        ),
        ("allow_ragged_batch: true", "", "the model expects shape [-1]"),
        (
            "allow_ragged_batch: true",
            "allow_ragged_batch: true optional: true",
            "which is optional",
        ),
    ],
)
def test_a_configuration_that_does_not_fit(before: str, after: str, message: str, tmp_path: Path) -> None:
    folder = models.sums(tmp_path)
    text = (folder / "config.pbtxt").read_text()
    assert before in text
    with pytest.raises(InvalidArgument) as caught:
        described(folder, text.replace(before, after), "sums")
    assert message in caught.value.message


def test_a_ragged_input_of_a_file_that_has_dimensions_for_it(tmp_path: Path) -> None:
    folder = models.reshaper(tmp_path)
    text = (folder / "config.pbtxt").read_text().replace("dims: [ 4 ]", "dims: [ 4 ] allow_ragged_batch: true")
    with pytest.raises(InvalidArgument) as caught:
        described(folder, text, "reshaper")
    assert (
        "configuration expects model provides input with shape [-1] for ragged input 'X', model provides [-1,4]"
        in caught.value.message
    )


def test_what_the_gateway_makes_is_not_filled_in_as_an_input(tmp_path: Path) -> None:
    folder = models.sums(tmp_path)
    io = describe(folder / "1" / "model.onnx")
    source = Source("f", 'batch_input { target_name: "ENDS" data_type: TYPE_INT32 source_input: "IN" }')
    filled = complete(parse_text(source), io, 4, source)
    assert [tensor.name for tensor in filled.input] == ["IN"]
