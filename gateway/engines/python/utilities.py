"""The module `triton_python_backend_utils` as a model's code imports it, made for each model anew.

The names and what they mean are those of Triton's python_backend.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from gateway.engines.python import configuration, observing, requests, responses, tensors
from gateway.engines.python.errors import TritonError, TritonModelException
from gateway.types import InferRequest, InferResponse

NAME = "triton_python_backend_utils"


class MemoryType:
    """Where a tensor may be asked for; it comes in CPU memory whatever is asked."""

    TRITONSERVER_MEMORY_GPU = "gpu"
    TRITONSERVER_MEMORY_CPU = "cpu"


class PreferredMemory:
    """Where the outputs of a called model are wanted."""

    def __init__(self, preferred_memory_type: object, preferred_device_id: int = 0) -> None:
        self.kind, self.device = preferred_memory_type, preferred_device_id


def get_input_tensor_by_name(inference_request: requests.InferenceRequest, name: str) -> tensors.Tensor | None:
    """The request's input of this name; None if it has none."""
    return next((each for each in inference_request.inputs() if each.name() == name), None)


def get_output_tensor_by_name(inference_response: responses.InferenceResponse, name: str) -> tensors.Tensor | None:
    """The response's output of this name; None if it has none."""
    return next((each for each in inference_response.output_tensors() if each.name() == name), None)


def install(
    model: str,
    folder: Path,
    infer: Callable[[InferRequest], Iterator[InferResponse]],
    measure: Callable[..., float],
) -> ModuleType:
    """Make the module for a model, whose version folder this is, and let it be imported from now on.

    `infer` runs another model, `measure` is the `Channel`'s.
    """
    made = ModuleType(NAME, "What a Python model may use of the server: see Triton's python_backend.")
    request = type("InferenceRequest", (requests.InferenceRequest,), {"infer": staticmethod(infer)})
    vars(made).update(
        InferenceRequest=request,
        Logger=type("Logger", (observing.Logger,), {"model": model}),
        MetricFamily=type("MetricFamily", (observing.MetricFamily,), {"measure": staticmethod(measure)}),
        get_model_dir=lambda: str(folder),
        **_SAME,
    )
    sys.modules[NAME] = made
    return made


def _not_here(*_: object, **__: object) -> None:
    raise TritonModelException("models cannot be loaded, unloaded or asked after by a model of this server")


_SAME = {
    "Tensor": tensors.Tensor,
    "InferenceResponse": responses.InferenceResponse,
    "InferenceResponseSender": responses.InferenceResponseSender,
    "InferenceTrace": requests.InferenceTrace,
    "ResponseIterator": requests.ResponseIterator,
    "TritonError": TritonError,
    "TritonModelException": TritonModelException,
    "ModelConfig": configuration.ModelConfig,
    "LogLevel": observing.Level,
    "Metric": observing.Metric,
    "MetricKind": observing.MetricKind,
    "MemoryType": MemoryType,
    "PreferredMemory": PreferredMemory,
    "TRITONSERVER_MEMORY_GPU": MemoryType.TRITONSERVER_MEMORY_GPU,
    "TRITONSERVER_MEMORY_CPU": MemoryType.TRITONSERVER_MEMORY_CPU,
    "TRITONSERVER_RESPONSE_COMPLETE_FINAL": responses.FINAL,
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START": requests.SEQUENCE_START,
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END": requests.SEQUENCE_END,
    "TRITONSERVER_REQUEST_RELEASE_ALL": requests.RELEASE_ALL,
    "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE": requests.RELEASE_RESCHEDULE,
    "get_input_tensor_by_name": get_input_tensor_by_name,
    "get_output_tensor_by_name": get_output_tensor_by_name,
    "get_input_config_by_name": configuration.get_input_config_by_name,
    "get_output_config_by_name": configuration.get_output_config_by_name,
    "using_decoupled_model_transaction_policy": configuration.using_decoupled_model_transaction_policy,
    "serialize_byte_tensor": tensors.serialize_byte_tensor,
    "deserialize_bytes_tensor": tensors.deserialize_bytes_tensor,
    "triton_to_numpy_type": tensors.triton_to_numpy_type,
    "numpy_to_triton_type": tensors.numpy_to_triton_type,
    "triton_string_to_numpy": tensors.triton_string_to_numpy,
    "load_model": _not_here,
    "unload_model": _not_here,
    "is_model_ready": _not_here,
}
