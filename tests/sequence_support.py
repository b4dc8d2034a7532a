"""Small ONNX models of sequences."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tests.system.process import GatewayProcess

FLEET = ("--queue", "embedded", "--workers", "2", "--http-workers", "2")

FLAGS = {"START": "CONTROL_SEQUENCE_START", "END": "CONTROL_SEQUENCE_END", "READY": "CONTROL_SEQUENCE_READY"}

STATE = """state [ {{
  input_name: "STATE_IN" output_name: "STATE_OUT" data_type: TYPE_FP32 dims: [ 1 ] {initial}
}} ]"""


def save(folder: Path, name: str, config: str, nodes: list, inputs: dict, outputs: dict, batched: bool = True) -> None:
    """Put a model into a repository; `inputs` and `outputs` are element types by name, each of one element a row."""

    def value(tensor: str, kind: int | tuple[int, int]) -> onnx.ValueInfoProto:
        kind, size = kind if isinstance(kind, tuple) else (kind, 1)
        return helper.make_tensor_value_info(tensor, kind, ["rows", size] if batched else [size])

    graph = helper.make_graph(
        nodes, name, [value(*each) for each in inputs.items()], [value(*each) for each in outputs.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / name / "1").mkdir(parents=True)
    onnx.save(model, folder / name / "1" / "model.onnx")
    (folder / name / "config.pbtxt").write_text(f'backend: "onnxruntime"\n{config}')


def accumulator(folder: Path, name: str, batching: str, *, rows: int = 4, initial: str = "", more: str = "") -> None:
    """OUT is the sum of all IN of the sequence, which it carries in its state."""
    config = f"max_batch_size: {rows}\nsequence_batching {{ {batching} {STATE.format(initial=initial)} }}\n{more}"
    floats = TensorProto.FLOAT
    nodes = [helper.make_node("Add", ["IN", "STATE_IN"], ["OUT"]), helper.make_node("Identity", ["OUT"], ["STATE_OUT"])]
    inputs, outputs = {"IN": floats, "STATE_IN": floats}, {"OUT": floats, "STATE_OUT": floats}
    save(folder, name, config, nodes, inputs, outputs, batched=rows > 0)


def controls(folder: Path, name: str, batching: str, kind: str, values: str) -> None:
    """OUT says what the model was told: START, END, READY and CORRID, the last as INT64."""
    types = {"int32": TensorProto.INT32, "fp32": TensorProto.FLOAT, "bool": TensorProto.BOOL}
    flags = "".join(
        f'control_input [ {{ name: "{flag}" control [ {{ kind: {word} {kind}_false_true: [ {values} ] }} ] }} ]\n'
        for flag, word in FLAGS.items()
    )
    corrid = 'control_input [ { name: "ID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] } ]'
    config = f"max_batch_size: 4\nsequence_batching {{ {batching} {flags} {corrid} }}\n"
    nodes = [
        helper.make_node("Cast", [each], [f"{each}_64"], to=TensorProto.INT64) for each in ("IN", *FLAGS, "ID")
    ] + [helper.make_node("Concat", ["IN_64", *(f"{each}_64" for each in FLAGS), "ID_64"], ["OUT"], axis=1)]
    inputs = {"IN": TensorProto.INT32, **dict.fromkeys(FLAGS, types[kind]), "ID": TensorProto.UINT64}
    save(folder, name, config, nodes, inputs, {"OUT": (TensorProto.INT64, 5)})


def named(folder: Path, name: str) -> None:
    """OUT is the sequence's id, a string."""
    corrid = 'control_input [ { name: "ID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } ] } ]'
    config = f"max_batch_size: 4\nsequence_batching {{ oldest {{ max_candidate_sequences: 4 }} {corrid} }}\n"
    nodes = [helper.make_node("Identity", ["ID"], ["OUT"]), helper.make_node("Identity", ["IN"], ["SAME"])]
    inputs = {"IN": TensorProto.FLOAT, "ID": TensorProto.STRING}
    save(folder, name, config, nodes, inputs, {"OUT": TensorProto.STRING, "SAME": TensorProto.FLOAT})


def wait_served(gateway: GatewayProcess, *models: str) -> None:
    """Until both gateways of a `FLEET` have heard of these models: a dozen callers in a row find each."""
    gateway.wait_for("ready", gateways=2, workers=2)
    for model in models:
        found = 0
        while found < 12:
            try:
                gateway.get(f"/v2/models/{model}/ready")
                found += 1
            except urllib.error.HTTPError as not_yet:
                not_yet.close()
                found = 0
