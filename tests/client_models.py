"""The models that NVIDIA's client examples and tests ask for, made here: `python -m tests.client_models FOLDER`.

Two repositories: FOLDER/examples holds the eight of Triton's documentation, no more, since the model control examples
count them; FOLDER/more holds those of its test suite and what `tests/system/client_calls.py` asks for besides.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DATATYPES = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")
_ECHO: dict[str, Any] = {"inputs": ["IN"], "outputs": ["OUT"]}
_NODE = helper.make_node
_PYTHON = """import io
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

"""
_INT32 = 'input {{ name: "{}" data_type: TYPE_INT32 dims: [ {} ] }}\n'

_REPEAT = '''class TritonPythonModel:
    """Answers each element of IN by itself, DELAY ms after the one before; the next request is taken WAIT ms later."""

    def execute(self, requests):
        for request in requests:
            values, delays, wait = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1) for name in ("IN", "DELAY", "WAIT")
            )
            threading.Thread(target=self.answer, args=(request.get_response_sender(), values, delays)).start()
            time.sleep(wait[0] / 1000)

    def answer(self, sender, values, delays):
        for index, (value, delay) in enumerate(zip(values, delays)):
            time.sleep(delay / 1000)
            outputs = [
                pb_utils.Tensor("OUT", np.array([value], np.int32)),
                pb_utils.Tensor("IDX", np.array([index], np.uint32)),
            ]
            sender.send(pb_utils.InferenceResponse(outputs))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''
_SQUARE = '''class TritonPythonModel:
    """Answers IN as often as it says, and with nothing if that is zero."""

    def execute(self, requests):
        for request in requests:
            sender, value = request.get_response_sender(), request.inputs()[0].as_numpy()
            for _ in range(int(value.reshape(-1)[0])):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", value)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''
_PARAMETERS = '''class TritonPythonModel:
    """PARAMETERS is what the request had as JSON; INPUT comes back as OUTPUT."""

    def execute(self, requests):
        responses = []
        for request in requests:
            text = np.array([request.parameters().encode()], object).reshape(1, 1)
            outputs = [
                pb_utils.Tensor("OUTPUT", request.inputs()[0].as_numpy()),
                pb_utils.Tensor("PARAMETERS", text),
            ]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
'''
_KEYS_AND_VALUES = '''class TritonPythonModel:
    """The request's parameters: their names, and their values as text."""

    def execute(self, requests):
        import json

        responses = []
        for request in requests:
            parameters = json.loads(request.parameters() or "{}")
            texts = {"key": list(parameters), "value": [str(each) for each in parameters.values()]}
            outputs = [pb_utils.Tensor(name, np.array(each, object)) for name, each in texts.items()]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
'''
_COUNT = '''class TritonPythonModel:
    """How many inputs a request has."""

    def execute(self, requests):
        counts = [np.array([len(each.inputs())], np.float32) for each in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", count)]) for count in counts]
'''
_MOCK_LLM = '''class TritonPythonModel:
    """PROMPT back as TEXT, once, or with STREAM as often as the parameter REPETITION says; FAIL_LAST ends in an error."""

    def execute(self, requests):
        import json

        for request in requests:
            parameters = json.loads(request.parameters() or "{}")
            sender = request.get_response_sender()
            prompt = pb_utils.get_input_tensor_by_name(request, "PROMPT").as_numpy()
            response = pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", prompt)])
            if not pb_utils.get_input_tensor_by_name(request, "STREAM").as_numpy().reshape(-1)[0]:
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            for _ in range(parameters.get("REPETITION", 1)):
                time.sleep(parameters.get("DELAY", 0))
                sender.send(response)
            last = None
            if parameters.get("FAIL_LAST"):
                code = getattr(pb_utils.TritonError, parameters.get("ERROR_CODE", "INTERNAL"))
                last = pb_utils.InferenceResponse(error=pb_utils.TritonError("An Error Occurred", code))
            sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''
_PREPROCESS = '''from PIL import Image


class TritonPythonModel:
    """An encoded image in, the picture as an Inception network wants it out."""

    def execute(self, requests):
        return [self.one(request.inputs()[0].as_numpy()) for request in requests]

    def one(self, files):
        pictures = [
            np.asarray(Image.open(io.BytesIO(each)).convert("RGB").resize((299, 299)), np.float32) / 127.5 - 1
            for each in files.reshape(-1)
        ]
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", np.stack(pictures))])
'''


def write(folder: Path, name: str, config: str, model: onnx.ModelProto | str | None = None) -> Path:
    """Put a model into a repository: ONNX, the text of a model.py, or an ensemble, which has no file."""
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(f'name: "{name}"\n{config}')
    if isinstance(model, str):
        (folder / name / "1" / "model.py").write_text(_PYTHON + model)
    elif model is not None:
        onnx.save(model, folder / name / "1" / "model.onnx")
    return folder / name


def graph(nodes: Sequence[Any], inputs: dict[str, Any], outputs: dict[str, Any], weights: dict[str, Any] | None = None):
    """An ONNX model; each tensor is (element type, *dims)."""

    def values(tensors: dict[str, Any]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, kind, dims) for name, (kind, *dims) in tensors.items()]

    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    made = helper.make_graph(list(nodes), "model", values(inputs), values(outputs), initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def tensors(kind: str, dims: str, *, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """The lines of a configuration."""
    given = [("input", name) for name in inputs] + [("output", name) for name in outputs]
    return "".join(f'{what} {{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ] }}\n' for what, name in given)


# --- Triton's documentation: docs/examples/model_repository


def add_sub(folder: Path, name: str, kind: str, element: int, more: str = "") -> None:
    """OUTPUT0 is the sum and OUTPUT1 the difference of two rows of 16; strings are numbers in words."""
    names = {"inputs": ("INPUT0", "INPUT1"), "outputs": ("OUTPUT0", "OUTPUT1")}
    config = f'platform: "onnxruntime_onnx"\nmax_batch_size: 8\n{tensors(kind, "16", **names)}{more}'
    if element in (TensorProto.INT8, TensorProto.STRING):  # what ONNX Runtime cannot add
        nodes = [_NODE("Cast", [f"INPUT{n}"], [f"I{n}"], to=TensorProto.INT32) for n in range(2)]
        nodes += [_NODE(kind, ["I0", "I1"], [f"O{n}"]) for n, kind in enumerate(("Add", "Sub"))]
        nodes += [_NODE("Cast", [f"O{n}"], [f"OUTPUT{n}"], to=element) for n in range(2)]
    else:
        nodes = [_NODE(kind, ["INPUT0", "INPUT1"], [f"OUTPUT{n}"]) for n, kind in enumerate(("Add", "Sub"))]
    ends = [dict.fromkeys(side, (element, "rows", 16)) for side in names.values()]
    write(folder, name, config, graph(nodes, *ends))


def identity(folder: Path, name: str, kind: str, element: int, more: str = "") -> None:
    config = tensors(kind, "-1", inputs=["INPUT0"], outputs=["OUTPUT0"])
    sides = [{"INPUT0": (element, "rows", "size")}, {"OUTPUT0": (element, "rows", "size")}]
    model = graph([_NODE("Identity", ["INPUT0"], ["OUTPUT0"])], *sides)
    write(folder, name, f'platform: "onnxruntime_onnx"\nmax_batch_size: 8\n{config}{more}', model)


_FLAG = (
    'control_input {{ name: "{0}" control {{ kind: CONTROL_SEQUENCE_{0} int32_false_true: 0 int32_false_true: 1 }} }}\n'
)
_CORRID = 'control_input {{ name: "CORRID" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_{} }} }}\n'
_STATE = 'state { input_name: "STATE_IN" output_name: "STATE_OUT" data_type: TYPE_INT32 dims: [ 1 ] }\n'
_ROW = (TensorProto.INT32, "rows", 1)


def sequence(folder: Path, name: str, batching: str, nodes: Sequence[Any], inputs: dict[str, Any], **outputs: Any):
    config = tensors("INT32", "1", inputs=["INPUT"], outputs=["OUTPUT"])
    model = graph(nodes, {"INPUT": _ROW, **inputs}, {"OUTPUT": _ROW, **outputs})
    config = f'platform: "onnxruntime_onnx"\nmax_batch_size: 8\nsequence_batching {{ {batching} }}\n{config}'
    write(folder, name, config, model)


def sequences(folder: Path) -> None:
    """What the sequence examples ask for: the first answer is one more, the last has the sequence's number added."""
    nodes = [_NODE("Add", ["INPUT", "START"], ["A"]), _NODE("Mul", ["A", "READY"], ["OUTPUT"])]
    flags = _FLAG.format("START") + _FLAG.format("READY")
    sequence(folder, "simple_sequence", flags, nodes, {"START": _ROW, "READY": _ROW})
    nodes = [
        _NODE("Cast", ["CORRID"], ["ID"], to=TensorProto.INT32),
        _NODE("Mul", ["ID", "END"], ["LAST"]),
        _NODE("Add", ["INPUT", "START"], ["FIRST"]),
        _NODE("Add", ["FIRST", "LAST"], ["ALL"]),
        _NODE("Mul", ["ALL", "READY"], ["OUTPUT"]),
    ]
    oldest = "oldest { max_candidate_sequences: 1024 max_queue_delay_microseconds: 10000 }\n"
    flags = oldest + flags + _FLAG.format("END") + _CORRID.format("UINT64")
    inputs = {"START": _ROW, "READY": _ROW, "END": _ROW, "CORRID": (TensorProto.UINT64, "rows", 1)}
    sequence(folder, "simple_dyna_sequence", flags, nodes, inputs)


def string_sequence(folder: Path) -> None:
    """As simple_dyna_sequence, of ids that are strings; it answers with the sum so far."""
    nodes = [
        _NODE("Cast", ["CORRID"], ["ID"], to=TensorProto.INT32),
        _NODE("Mul", ["ID", "END"], ["LAST"]),
        _NODE("Add", ["INPUT", "STATE_IN"], ["SO_FAR"]),
        _NODE("Add", ["SO_FAR", "LAST"], ["OUTPUT"]),
        _NODE("Identity", ["OUTPUT"], ["STATE_OUT"]),
    ]
    flags = "oldest { max_candidate_sequences: 64 }\n" + _STATE + _FLAG.format("END") + _CORRID.format("STRING")
    inputs = {"STATE_IN": _ROW, "END": _ROW, "CORRID": (TensorProto.STRING, "rows", 1)}
    sequence(folder, "simple_string_dyna_sequence", flags, nodes, inputs, STATE_OUT=_ROW)


def labels(folder: Path, name: str, count: int) -> None:
    (folder / name).write_text("".join(f"label {index}\n" for index in range(count)))


def pictures(folder: Path) -> None:
    """Two networks that classify by the mean colour; which class, nobody asks."""
    rng = np.random.default_rng(7)
    config = """platform: "onnxruntime_onnx"
max_batch_size : 1
input [ { name: "data_0" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 224, 224 ] } ]
output [ { name: "fc6_1" data_type: TYPE_FP32 dims: [ 1000 ] reshape { shape: [ 1000, 1, 1 ] }
           label_filename: "densenet_labels.txt" } ]"""
    nodes = [
        _NODE("ReduceMean", ["data_0"], ["colour"], axes=[2, 3], keepdims=0),
        _NODE("MatMul", ["colour", "weights"], ["flat"]),
        _NODE("Reshape", ["flat", "shape"], ["fc6_1"]),
    ]
    weights = {"weights": rng.standard_normal((3, 1000), np.float32), "shape": np.array([-1, 1000, 1, 1])}
    sides = [{"data_0": (1, "rows", 3, 224, 224)}, {"fc6_1": (1, "rows", 1000, 1, 1)}]
    labels(write(folder, "densenet_onnx", config, graph(nodes, *sides, weights)), "densenet_labels.txt", 1000)
    config = """platform: "onnxruntime_onnx"
max_batch_size: 128
input [ { name: "input" data_type: TYPE_FP32 format: FORMAT_NHWC dims: [ 299, 299, 3 ] } ]
output [ { name: "InceptionV3/Predictions/Softmax" data_type: TYPE_FP32 dims: [ 1001 ]
           label_filename: "inception_labels.txt" } ]"""
    nodes = [
        _NODE("ReduceMean", ["input"], ["colour"], axes=[1, 2], keepdims=0),
        _NODE("MatMul", ["colour", "weights"], ["logits"]),
        _NODE("Softmax", ["logits"], ["InceptionV3/Predictions/Softmax"]),
    ]
    sides = [{"input": (1, "rows", 299, 299, 3)}, {"InceptionV3/Predictions/Softmax": (1, "rows", 1001)}]
    model = graph(nodes, *sides, {"weights": rng.standard_normal((3, 1001), np.float32)})
    labels(write(folder, "inception_onnx", config, model), "inception_labels.txt", 1001)


def examples(folder: Path) -> None:
    """The eight models of the documentation."""
    add_sub(folder, "simple", "INT32", TensorProto.INT32)
    add_sub(folder, "simple_int8", "INT8", TensorProto.INT8)
    add_sub(folder, "simple_string", "STRING", TensorProto.STRING)
    identity(folder, "simple_identity", "STRING", TensorProto.STRING)
    sequences(folder)
    pictures(folder)


# --- Triton's test suite, and ours


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    """A step of an ensemble; what the model calls a tensor, and what the ensemble calls it."""
    pairs = [("input_map", *each) for each in inputs.items()] + [("output_map", *each) for each in outputs.items()]
    maps = " ".join(f'{kind} {{ key: "{key}" value: "{value}" }}' for kind, key, value in pairs)
    return f'step {{ model_name: "{model}" model_version: -1 {maps} }}\n'


def ensembles(folder: Path) -> None:
    names = {"inputs": ("INPUT0", "INPUT1"), "outputs": ("OUTPUT0", "OUTPUT1")}
    same = [{name: name for name in side} for side in names.values()]
    config = f'platform: "ensemble"\nmax_batch_size: 8\n{tensors("INT32", "16", **names)}'
    whole = f"ensemble_scheduling {{ {step('simple', *same)} }}"
    write(folder, "ensemble_add_sub_int32_int32_int32", config + whole)
    preprocess = """backend: "python" max_batch_size: 128
input { name: "INPUT" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "OUTPUT" data_type: TYPE_FP32 dims: [ 299, 299, 3 ] }"""
    write(folder, "image_preprocess_nhwc_299x299x3_inception", preprocess, _PREPROCESS)
    steps = step("image_preprocess_nhwc_299x299x3_inception", {"INPUT": "INPUT"}, {"OUTPUT": "picture"})
    steps += step("inception_onnx", {"input": "picture"}, {"InceptionV3/Predictions/Softmax": "OUTPUT"})
    config = f"""platform: "ensemble" max_batch_size: 128
input {{ name: "INPUT" data_type: TYPE_STRING dims: [ 1 ] }}
output {{ name: "OUTPUT" data_type: TYPE_FP32 dims: [ 1001 ] label_filename: "inception_labels.txt" }}
ensemble_scheduling {{ {steps} }}"""
    labels(write(folder, "preprocess_inception_ensemble", config), "inception_labels.txt", 1001)


def more(folder: Path) -> None:
    """The other models."""
    string_sequence(folder)
    ensembles(folder)
    instances = "instance_group { kind: KIND_CPU count: 2 }"
    identity(folder, "custom_identity_int32", "INT32", TensorProto.INT32, instances)
    identity(folder, "identity_fp32", "FP32", TensorProto.FLOAT, "dynamic_batching {}")
    add_sub(folder, "batched", "INT32", TensorProto.INT32, "dynamic_batching {}\n" + instances)
    decoupled = 'backend: "python" max_batch_size: 0 model_transaction_policy { decoupled: true }\n'
    config = _INT32.format("IN", -1) + 'output { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] }\n'
    numbers = "".join(
        f'input {{ name: "{n}" data_type: TYPE_UINT32 dims: [ {d} ] }}\n' for n, d in (("DELAY", -1), ("WAIT", 1))
    )
    index = 'output { name: "IDX" data_type: TYPE_UINT32 dims: [ 1 ] }\n'
    write(folder, "repeat_int32", decoupled + config + numbers + index, _REPEAT)
    write(folder, "square_int32", decoupled + config.replace("-1", "1"), _SQUARE)
    config = tensors("INT32", "1", inputs=["INPUT"], outputs=["OUTPUT"])
    text = 'output { name: "PARAMETERS" data_type: TYPE_STRING dims: [ 1 ] }'
    write(folder, "parameters", f'backend: "python" max_batch_size: 1\n{config}{text}', _PARAMETERS)
    for kind in (*DATATYPES, "BF16"):
        write(folder, f"echo_{kind}", f'backend: "fake" max_batch_size: 8\n{tensors(kind, "2", **_ECHO)}')
    write(folder, "echo_empty", f'backend: "fake" max_batch_size: 8\n{tensors("FP32", "-1", **_ECHO)}')
    slow = """backend: "fake" max_batch_size: 1 parameters { key: "a_us" value { string_value: "400000" } }\n"""
    write(folder, "slow", slow + tensors("INT32", "1", inputs=["INPUT"], outputs=["OUTPUT"]))


def zero(folder: Path, name: str, kind: str, dims: str, count: int = 1, rows: int = 8) -> None:
    """What comes back as it went in, of the fake backend."""
    names = {side: [f"{side}{n}" for n in range(count)] for side in ("INPUT", "OUTPUT")}
    config = tensors(kind, dims, inputs=names["INPUT"], outputs=names["OUTPUT"])
    write(folder, name, f'backend: "fake" max_batch_size: {rows}\n{config}')


def server_tests(folder: Path) -> None:
    """Models by the names that they have in Triton's test suite."""
    zero(folder, "onnx_zero_1_float32", "FP32", "-1")
    zero(folder, "onnx_zero_1_object_1_element", "STRING", "1", rows=0)
    zero(folder, "onnx_zero_1_object", "STRING", "-1")
    zero(folder, "onnx_zero_1_float16", "FP16", "-1, -1")
    zero(folder, "onnx_zero_3_float32", "FP32", "-1", count=3)
    zero(folder, "simple_identity_int64", "INT64", "-1")
    text = "".join(f'output {{ name: "{name}" data_type: TYPE_STRING dims: [ -1 ] }}\n' for name in ("key", "value"))
    ends = f'input {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ 1 ] }}\n{text}'
    write(folder, "parameter", f'backend: "python" max_batch_size: 0\n{ends}', _KEYS_AND_VALUES)
    whole = step("parameter", {"INPUT0": "INPUT0"}, {"key": "key", "value": "value"})
    write(folder, "ensemble", f'platform: "ensemble" max_batch_size: 0\n{ends}ensemble_scheduling {{ {whole} }}')
    required = {
        "input_all_required": (True,) * 3,
        "input_optional": (True,) * 3 + (False,),
        "input_all_optional": (False,),
    }
    for name, inputs in required.items():
        given = "".join(
            f'input {{ name: "INPUT{n}" data_type: TYPE_FP32 dims: [ 1 ] optional: {str(not must).lower()} }}\n'
            for n, must in enumerate(inputs)
        )
        out = 'output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 1 ] }'
        write(folder, name, f'backend: "python" max_batch_size: 0\n{given}{out}', _COUNT)
    config = """backend: "python" max_batch_size: 0 model_transaction_policy { decoupled: true }
input [ { name: "PROMPT" data_type: TYPE_STRING dims: [ 1, 1 ] }, { name: "STREAM" data_type: TYPE_BOOL dims: [ 1, 1 ] } ]
output [ { name: "TEXT" data_type: TYPE_STRING dims: [ 1, -1 ] } ]
instance_group [ { count: 1 kind: KIND_MODEL } ]"""
    write(folder, "mock_llm", config, _MOCK_LLM)


def make(folder: Path) -> tuple[str, ...]:
    """Write both repositories; the flags with which a gateway serves them."""
    examples(folder / "examples")
    more(folder / "more")
    server_tests(folder / "more")
    repositories = ("--model-repository", str(folder / "examples"), "--model-repository", str(folder / "more"))
    return (*repositories, "--allow-python-models", "--allow-client-shm", "true")


if __name__ == "__main__":
    print(" ".join(make(Path(sys.argv[1]))))  # noqa: T201
