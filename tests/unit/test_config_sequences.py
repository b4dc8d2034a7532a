"""What a configuration may say of sequences, how it is read, and which tensors the model's file must have for it."""

from __future__ import annotations

import pytest

from gateway.config.build import build
from gateway.config.complete import complete
from gateway.config.model import ModelConfig, SequenceControl, SequenceState
from gateway.config.parse import Source, parse_text
from gateway.config.sequences import model_side
from gateway.errors import InvalidArgument
from gateway.types import DataType, ModelIO, TensorSpec

IO_TEXT = """name: "m" backend: "fake" max_batch_size: 4
input { name: "IN" data_type: TYPE_FP32 dims: 2 } output { name: "OUT" data_type: TYPE_FP32 dims: 2 }
"""
ID = 'control_input { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }'
STATE = 'state { input_name: "A" output_name: "B" data_type: TYPE_FP32 dims: [ -1, 2 ] %s }'


def made(text: str) -> ModelConfig:
    source = Source("m/config.pbtxt", f"{IO_TEXT}sequence_batching {{ {text} }}")
    return build(parse_text(source), source)


def control(kind: str, values: str = "int32_false_true: [ 0, 1 ]", name: str = "C") -> str:
    return f'control_input {{ name: "{name}" control {{ kind: CONTROL_SEQUENCE_{kind} {values} }} }}'


def test_strategies_are_read_with_tritons_defaults() -> None:
    plain = made("direct { minimum_slot_utilization: 0.5 max_queue_delay_microseconds: 7 }").sequences
    assert plain is not None
    assert (plain.candidates, plain.idle_us, plain.minimum_slot_utilization, plain.max_queue_delay_us) == (
        0, 1_000_000, 0.5, 7,
    )  # fmt: skip
    oldest = made("max_sequence_idle_microseconds: 9 oldest { max_candidate_sequences: 6 preferred_batch_size: [ 2 ] }")
    assert oldest.sequences is not None
    assert (oldest.sequences.candidates, oldest.sequences.idle_us, oldest.sequences.preferred_batch_sizes) == (
        6,
        9,
        (2,),
    )
    by_default = made("oldest { max_candidate_sequences: 6 }").sequences
    assert by_default is not None
    assert by_default.preferred_batch_sizes == ()


def test_the_model_has_what_is_filled_in_and_kept() -> None:
    config = made(f"{ID} {control('END', 'fp32_false_true: [ -1, 2 ]')} {STATE % ''}")
    assert config.sequences is not None
    assert config.sequences.controls == (
        SequenceControl("ID", "corrid", DataType.BYTES),
        SequenceControl("C", "end", DataType.FP32, -1.0, 2.0),
    )
    assert config.sequences.states == (SequenceState("A", "B", DataType.FP32, (-1, 2), "", (1, 2)),)
    whole = model_side(config)
    assert [(each.name, each.datatype.name, each.dims) for each in whole.inputs[1:]] == [
        ("ID", "BYTES", (1,)),
        ("C", "FP32", (1,)),
        ("A", "FP32", (-1, 2)),
    ]
    assert [each.name for each in whole.outputs] == ["OUT", "B"]
    assert model_side(whole) is whole


def test_what_is_filled_in_is_not_completed_from_the_file() -> None:
    source = Source("m/config.pbtxt", f'name: "m" sequence_batching {{ {ID} {STATE % ""} }}')
    names = ("IN", "ID", "A"), ("OUT", "B")
    io = ModelIO(*(tuple(TensorSpec(name, DataType.FP32, (-1, 2)) for name in each) for each in names))
    full = complete(parse_text(source), io, 4, source)
    assert ([each.name for each in full.input], [each.name for each in full.output]) == (["IN"], ["OUT"])
    assert (full.max_batch_size, full.HasField("dynamic_batching")) == (4, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (control("END", name=""), "sequence batching control tensor must have a name for m"),
        (control("END") + control("START"), "'C' is specified for multiple control kinds for m"),
        (
            control("END") + control("END", name="D"),
            "sequence batching specifies multiple CONTROL_SEQUENCE_END tensors for m",
        ),
        (control("END", ""), "sequence batching must specify either 'int32_false_true', 'fp32_false_true' or"),
        (
            control("END", "int32_false_true: [ 0, 1 ] fp32_false_true: [ 0, 1 ]"),
            "sequence batching specifies more than one from",
        ),
        (
            control("READY", "int32_false_true: [ 0 ]"),
            "control 'int32_false_true' must have exactly 2 entries for CONTROL_SEQUENCE_READY for m",
        ),
        (control("CORRID"), "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or"),
        (control("CORRID", "data_type: TYPE_FP32"), "unexpected control data type, expected TYPE_UINT64, TYPE_INT64"),
        ("oldest { }", "sequence batching max candidate sequences must be positive for m"),
        (
            "oldest { max_candidate_sequences: 4 preferred_batch_size: 5 }",
            "sequence batching preferred batch size must be <= max batch size for m: 5",
        ),
        ("oldest { max_candidate_sequences: 4 preferred_batch_size: -1 }", "must be positive for m: -1"),
        ('state { input_name: "A" }', "must specify input_name, output_name, data_type and dims"),
        (STATE.replace("-1", "0") % "", "dimension must be integer >= 1, or -1 for one that varies"),
        (STATE % ("initial_state { data_type: TYPE_FP32 dims: [ 1, 2 ] zero_data: true } " * 2), "more than one"),
        (STATE % "initial_state { data_type: TYPE_INT8 dims: [ 1, 2 ] zero_data: true }", "another data_type"),
        (STATE % "initial_state { data_type: TYPE_FP32 dims: [ 1, 2 ] }", "must have zero_data or data_file"),
        (STATE % "initial_state { data_type: TYPE_FP32 dims: [ -1, 2 ] zero_data: true }", "give each -1 a size"),
        (STATE % 'initial_state { data_type: TYPE_FP32 dims: [ 1, 2 ] data_file: "../x" }', "the name of a file"),
        (STATE % 'initial_state { data_type: TYPE_FP32 dims: [ 1, 2 ] data_file: "/x" }', "the name of a file"),
        ('} model_warmup { name: "w" ', "model_warmup 'w': a model of sequences is warmed up by a row of zeros"),
    ],
)
def test_faults_are_told_in_tritons_words(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        made(text)
    assert message in caught.value.message
    assert caught.value.message.startswith("m/config.pbtxt line 3: ")
