"""What to do with a model of a backend of Triton's that is not here: a sentence for each."""

from __future__ import annotations

_ONNX = 'put it into the version folder as model.onnx and set backend: "onnxruntime"'
_ELSEWHERE = 'serve it with its own server, and name that in a model of backend "remote"'
_PYTHON = 'or load it in a model.py of backend "python" (--allow-python-models)'

_INSTEAD = {
    "pytorch": f"Export it with torch.onnx.export(model, example, 'model.onnx', dynamo=True), {_ONNX}, {_PYTHON}",
    "tensorflow": f"Convert it with `python -m tf2onnx.convert --saved-model model.savedmodel --output model.onnx`, {_ONNX}",
    "openvino": f"Export the model that it was made of to ONNX, {_ONNX}; the accelerator openvino runs that on OpenVINO",
    "dali": 'Do the preprocessing in a model.py of backend "python" (--allow-python-models), or in the client',
    "vllm": 'Start `vllm serve` beside this server, which speaks OpenAI\'s API, or call vLLM in a model.py of backend "python"',
    "tensorrtllm": "Start `trtllm-serve` beside this server, which speaks OpenAI's API",
    "fastertransformer": "Move the model to vLLM or TensorRT-LLM, which took its place, and start their own server beside this one",
    "fil": f"Convert the trees with onnxmltools or skl2onnx (zipmap off), {_ONNX}",
    "fastdeploy": f"Export the model to ONNX (paddle2onnx), {_ONNX}",
    "paddle": f"Convert it with `paddle2onnx`, {_ONNX}",
    "onnxruntime_onnx": 'That is the platform\'s name; set backend: "onnxruntime"',
    "caffe2": f"Export it to ONNX with the framework that trained it, {_ONNX}",
    "identity": 'Use a one-node Identity model in ONNX, or a model.py of backend "python"',
    "square": 'Use a model.py of backend "python" with decoupled: true (--allow-python-models)',
    "repeat": 'Use a model.py of backend "python" with decoupled: true (--allow-python-models)',
}


def instead_of(backend: str) -> str:
    """The remedy for a model of this backend."""
    return _INSTEAD.get(backend, f"Export the model to ONNX and {_ONNX}, {_PYTHON}, or {_ELSEWHERE}")
