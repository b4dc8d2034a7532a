"""Ensembles by themselves and against the models of their steps, in Triton's words."""

from dataclasses import replace

import pytest

from gateway.config.build import build
from gateway.config.ensemble import fit
from gateway.config.model import ModelConfig
from gateway.config.parse import Source, parse_text
from gateway.errors import InvalidArgument
from gateway.types import DataType
from tests.support import model_config, tensor_config

IO = """name: "e" max_batch_size: {rows}
input {{ name: "IN" data_type: TYPE_FP32 dims: 2 }} output {{ name: "OUT" data_type: TYPE_FP32 dims: 2 }}"""
ONE = 'step { model_name: "a" input_map { key: "IN" value: "IN" } output_map { key: "OUT" value: "mid" } }'
TWO = 'step { model_name: "b" input_map { key: "IN" value: "mid" } output_map { key: "OUT" value: "OUT" } }'
CHAIN = f"ensemble_scheduling {{ {ONE} {TWO} }}"


def read(scheduling: str = CHAIN, more: str = 'platform: "ensemble"', rows: int = 8) -> ModelConfig:
    source = Source("e/config.pbtxt", f"{IO.format(rows=rows)} {more} {scheduling}")
    return build(parse_text(source), source)


def test_an_ensemble_has_steps_and_runs_nowhere() -> None:
    config = read()
    assert [(step.model, step.version, step.inputs, step.outputs) for step in config.steps] == [
        ("a", "", {"IN": "IN"}, {"OUT": "mid"}),
        ("b", "", {"IN": "mid"}, {"OUT": "OUT"}),
    ]
    assert not config.instance_groups
    assert not config.proto.HasField("optimization")
    assert config.platform == "ensemble"


def test_a_step_may_ask_for_a_version() -> None:
    config = read(
        CHAIN.replace('model_name: "b"', 'model_name: "b" model_version: 3').replace('"a"', '"a" model_version: -1')
    )
    assert [step.version for step in config.steps] == ["", "3"]


@pytest.mark.parametrize(
    ("scheduling", "more", "text"),
    [
        (CHAIN, "", "ensemble scheduling cannot be set for model 'e' whose platform is not ensemble"),
        ("", 'platform: "ensemble"', "ensemble scheduling must be set for ensemble 'e' whose platform is ensemble"),
        (CHAIN, 'platform: "ensemble" backend: "fake"', "an ensemble has no backend, and 'e' names 'fake'"),
        (CHAIN, 'platform: "ensemble" instance_group { }', "instance group should not be specified for ensemble 'e'"),
        (CHAIN, 'platform: "ensemble" optimization { }', "optimization should not be specified for ensemble 'e'"),
        (CHAIN, 'platform: "ensemble" model_warmup { }', "model_warmup can not be specified for ensemble 'e'"),
        ("ensemble_scheduling { }", 'platform: "ensemble"', "must specify 'step' for ensemble 'e'"),
        (CHAIN.replace('model_name: "b"', ""), 'platform: "ensemble"', "must specify 'model_name' in step 1 of ensemble 'e'"),
        (f"ensemble_scheduling {{ {ONE} step {{ model_name: 'b' }} }}", 'platform: "ensemble"', "must specify 'input_map' in step 1 of ensemble 'e'"),
        (CHAIN.replace('model_name: "b"', 'model_name: "b" model_namespace: "n"'), 'platform: "ensemble"', "model_namespace is not supported"),
        (f"ensemble_scheduling {{ {ONE} {ONE} {TWO} }}", 'platform: "ensemble"', "ensemble tensor 'mid' can appear in an output map only once for ensemble 'e' step 1"),
        (CHAIN.replace('value: "IN"', 'value: "X"'), 'platform: "ensemble"', "ensemble input 'IN' for ensemble 'e' is not used"),
        (CHAIN.replace('value: "OUT"', 'value: "X"'), 'platform: "ensemble"', "ensemble output 'OUT' for ensemble 'e' is not used"),
        (CHAIN.replace('key: "IN" value: "mid"', 'key: "IN" value: "X"'), 'platform: "ensemble"', "output 'OUT' for ensemble 'e' is not written"),
        (CHAIN.replace('value: "mid" } }', 'value: "mid" } output_map { key: "O2" value: "spare" } }', 1), 'platform: "ensemble"', "ensemble tensor 'spare' is unused in ensemble 'e'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(scheduling: str, more: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read(scheduling, more)
    assert text in refused.value.message
    assert refused.value.message.startswith("e/config.pbtxt")


def fitting(**models: ModelConfig) -> ModelConfig:
    known = {"a": model_config(name="a"), "b": model_config(name="b")} | models
    return fit(read(), lambda name, _: known[name])


def test_what_the_models_say_is_filled_in() -> None:
    labelled = model_config(name="b", outputs=(replace(tensor_config("OUT"), labels=("cat", "dog")),))
    plain = model_config(
        name="a",
        max_batch_size=0,
        inputs=(tensor_config("IN", dims=(-1, 2)),),
        outputs=(tensor_config("OUT", dims=(-1, 2)),),
    )
    config = fitting(a=plain, b=labelled)
    assert [step.batched for step in config.steps] == [False, True]
    assert config.steps[0].dims == {"IN": (-1, 2)}
    assert config.outputs[0].labels == ("cat", "dog")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (model_config(name="a", max_batch_size=4), "ensemble 'e' allows maximum batch size 8, but it contains model 'a' which only allows maximum batch size to be 4"),
        (model_config(name="a", inputs=(tensor_config("X"),)), "in ensemble 'e', ensemble tensor 'IN' is mapping to non-existing input 'IN' in model 'a'"),
        (model_config(name="a", inputs=(tensor_config("IN"), tensor_config("X"))), "in ensemble 'e', input 'X' in model 'a' is not mapped to any ensemble tensors"),
        (model_config(name="a", outputs=(tensor_config("X"),)), "in ensemble 'e', ensemble tensor 'mid' is mapped from non-existing output 'OUT' in model 'a'"),
        (model_config(name="a", inputs=(tensor_config("IN", DataType.INT32),)), "in ensemble 'e', ensemble tensor 'IN': inconsistent data type: TYPE_FP32 is inferred from model 'e' while TYPE_INT32 is inferred from model 'a'"),
        (model_config(name="a", outputs=(tensor_config("OUT", dims=(3,)),)), "in ensemble 'e', ensemble tensor 'mid': inconsistent shape: [-1,3] is inferred from model 'a' while [-1,2] is inferred from model 'b'"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(model: ModelConfig, text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        fitting(a=model)
    assert text in refused.value.message


def test_an_optional_input_need_not_be_mapped() -> None:
    optional = model_config(name="a", inputs=(tensor_config("IN"), tensor_config("X", optional=True)))
    assert fitting(a=optional).steps[0].batched


def test_an_ensemble_is_decoupled_where_one_of_its_models_is() -> None:
    stream = model_config(name="b", decoupled=True)
    config = fitting(b=stream)
    assert [step.decoupled for step in config.steps] == [False, True]
    assert config.decoupled
    assert config.proto.model_transaction_policy.decoupled
    again = fit(config, lambda name, _: model_config(name=name))
    assert not again.decoupled
    assert not again.proto.model_transaction_policy.decoupled


def test_its_own_file_need_not_say_so() -> None:
    config = read(more='platform: "ensemble" model_transaction_policy { decoupled: true }')
    assert not fit(config, lambda name, _: model_config(name=name)).decoupled


JOIN = model_config(name="join", inputs=(tensor_config("A"), tensor_config("B")))


def sides(*models: str, more: str = "") -> str:
    """Two steps whose outputs a third takes."""
    first, second = (
        f'step {{ model_name: "{model}" input_map {{ key: "IN" value: "IN" }} output_map {{ key: "OUT" value: "{place}" }} }}'
        for place, model in zip("xy", models, strict=True)
    )
    maps = " ".join(f'input_map {{ key: "{name}" value: "{tensor}" }}' for name, tensor in (("A", "x"), ("B", "y")))
    join = f'step {{ model_name: "join" {maps} output_map {{ key: "OUT" value: "OUT" }} }}'
    return f"ensemble_scheduling {{ {first} {second} {join} }}"


@pytest.mark.parametrize("models", [("a", "stream"), ("stream", "a"), ("stream", "stream")])
def test_responses_of_different_models_do_not_meet(models: tuple[str, str]) -> None:
    known = {"join": JOIN, "a": model_config(name="a"), "stream": model_config(name="stream", decoupled=True)}
    with pytest.raises(InvalidArgument) as refused:
        fit(read(sides(*models)), lambda name, _: known[name])
    expected = "in ensemble 'e', step of model 'join' receives inputs originated from different decoupled models"
    assert refused.value.message == expected


def test_outputs_of_different_models_do_not_meet() -> None:
    known = {"a": model_config(name="a"), "stream": model_config(name="stream", decoupled=True)}
    steps = sides("a", "stream").partition(' step { model_name: "join"')[0].replace('"x"', '"OUT"') + " }"
    more = 'platform: "ensemble" output { name: "y" data_type: TYPE_FP32 dims: 2 }'
    config = read(steps, more)
    with pytest.raises(InvalidArgument, match="step of model 'e' receives inputs originated from different decoupled"):
        fit(config, lambda name, _: known[name])
