"""Protobuf bytes to `InferRequest` and `InferResponse` to protobuf bytes. Knows no gRPC library.

Requests of a kind differ in their tensors and ids only, so the rest of a message is parsed and written once
and remembered. Tensors are views of the request's bytes, and are copied once into the response's. Whether a
request suits a model is the service's question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from gateway import errors
from gateway.errors import InvalidArgument
from gateway.shm.errors import no_place_region, no_place_size
from gateway.transport.grpc.contents import read_contents
from gateway.transport.grpc.layout import Layouts
from gateway.transport.grpc.wire import Parts, length, malformed, split
from gateway.types import (
    NO_PARAMETERS,
    Buffer,
    DataType,
    InferRequest,
    InferResponse,
    Parameter,
    Place,
    Places,
    RequestedOutput,
    Tensor,
    element_count,
)

_MAX_RANK = 64  # numpy's own limit
_REMEMBERED_BYTES = 4096  # a larger head carries typed contents, which do not repeat
_INT64 = range(-(1 << 63), 1 << 63)
_UINT64 = range(1 << 64)

_layouts = Layouts()

_RESPONSE_ID = b"\x1a"
_RESPONSE_RAW = b"\x32"
_STREAM_RESPONSE = b"\x12"

_REGION, _OFFSET, _SIZE = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"

_EXPECTED_KIND = {
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param",),
    "sequence_id": ("int64_param", "uint64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "triton_enable_empty_final_response": ("bool_param",),
}
_ANY_KIND = ("int64_param", "uint64_param", "bool_param", "double_param", "string_param")


@dataclass(frozen=True, slots=True)
class _Input:
    """An input as its message describes it; `wire` is None when the data is a raw tensor, or in shared memory."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    wire: Buffer | None
    place: Place | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """All of a request but its id and raw tensors; `raw_only` when no input has typed contents."""

    model_name: str
    model_version: str
    inputs: tuple[_Input, ...]
    outputs: tuple[RequestedOutput, ...]
    parameters: Mapping[str, Parameter]
    raw_only: bool
    places: Places | None


def decode(payload: bytes) -> InferRequest:
    """Read a serialized `ModelInferRequest`; its tensors are views of `payload`. Raises `InvalidArgument`."""
    if (known := _layouts.request(payload)) is not None:
        return known
    parts = split(payload)
    repeats = len(parts.head) <= _REMEMBERED_BYTES
    head = _remembered_head(parts.head) if repeats else _parse_head(parts.head)
    request = InferRequest(
        head.model_name,
        _tensors(head, parts),
        head.model_version,
        parts.id,
        head.outputs,
        dict(head.parameters) if head.parameters else NO_PARAMETERS,
        form=(head, *map(len, parts.raw)) if repeats and head.raw_only else None,
    )
    if head.places is not None:
        request.places = head.places
    elif parts.ordered and request.form is not None and not head.parameters:
        _layouts.remember(payload, parts.raw, request)
    return request


def encode(response: InferResponse) -> bytes:
    """Write a serialized `ModelInferResponse`, every output raw."""
    kinds: list[tuple[str, DataType, tuple[int, ...]]] = []
    wires: list[Buffer] = []
    for name, tensor in response.outputs.items():
        kinds.append((name, tensor.datatype, tensor.shape))
        wires.append(tensor.wire)
    head, seams = _response_head(response.model_name, response.model_version, tuple(kinds))
    parts: list[Buffer] = [head]
    if seams and not response.id and not response.parameters and not response.placed:
        for seam, wire in zip(seams, wires, strict=True):
            parts += (seam, wire)
        return b"".join(parts)
    if response.id:
        request_id = response.id.encode()
        parts += (_RESPONSE_ID, length(len(request_id)), request_id)
    if response.parameters:
        parts.append(_write_parameters(response.parameters))
    for wire in wires:
        parts += (_RESPONSE_RAW, length(len(wire)), wire)
    return b"".join(parts)


def encode_streamed(response: InferResponse) -> bytes:
    """Write a serialized `ModelStreamInferResponse`, which says whether it is its request's last."""
    body = encode(response) + _final_parameter(response.final)
    return b"".join((_STREAM_RESPONSE, length(len(body)), body))


def encode_streamed_error(message: str, request_id: str, retry_after_ms: int | None = None) -> bytes:
    """Write a serialized `ModelStreamInferResponse` that reports a request's failure and when to try again."""
    answer = service_pb2.ModelStreamInferResponse(error_message=message)
    answer.infer_response.id = request_id
    if retry_after_ms is not None:
        # Both, because Triton's client hands on the text only.
        answer.error_message += f" (retry after {retry_after_ms} ms)"
        answer.infer_response.parameters["retry_after_ms"].int64_param = retry_after_ms
    return bytes(answer.SerializeToString())


def request_id(payload: bytes) -> str:
    """The id of a request that may be broken; empty when it cannot be read."""
    try:
        return split(payload).id
    except InvalidArgument:
        return ""


def check_version(version: str) -> str:
    """A version as the repository spells it; empty means the newest. Raises `InvalidArgument`."""
    if not version:
        return version
    if not (version.isascii() and version.isdigit() and len(version) < 19):
        raise errors.bad_version(version)
    return str(int(version))


def _tensors(head: _Head, parts: Parts) -> dict[str, Tensor]:
    if head.places is not None:
        sent = tuple(each for each in head.inputs if each.place is None)
        tensors = _tensors(replace(head, inputs=sent, places=None), parts)
        return {each.name: tensors.get(each.name) or Tensor(each.datatype, each.shape) for each in head.inputs}
    if head.raw_only and len(parts.raw) == len(head.inputs):
        return {
            each.name: Tensor(each.datatype, each.shape, wire)
            for each, wire in zip(head.inputs, parts.raw, strict=True)
        }
    if parts.raw:
        raise _misplaced(head, len(parts.raw))
    return {each.name: Tensor(each.datatype, each.shape, _present(each, head)) for each in head.inputs}


def _misplaced(head: _Head, raw: int) -> InvalidArgument:
    """Why so many raw tensors do not suit these inputs."""
    for each in head.inputs:
        if each.wire is not None:
            return InvalidArgument(
                f"contents field must not be specified when using raw_input_contents for '{each.name}' "
                f"for model '{head.model_name}'"
            )
    if raw < len(head.inputs):
        return _no_data(head.inputs[raw], head)
    return InvalidArgument(
        f"expected {len(head.inputs)} raw_input_contents, one for each input, but got {raw} "
        f"for model '{head.model_name}'"
    )


def _present(each: _Input, head: _Head) -> Buffer:
    if each.wire is None:
        raise _no_data(each, head)
    return each.wire


def _no_data(each: _Input, head: _Head) -> InvalidArgument:
    return InvalidArgument(
        f"unable to find data for input tensor '{each.name}' for model '{head.model_name}' in request."
    )


def _parse_head(head: bytes) -> _Head:
    message = service_pb2.ModelInferRequest()
    try:
        message.ParseFromString(head)
    except DecodeError:
        raise malformed() from None
    inputs: dict[str, _Input] = {}
    for tensor in message.inputs:
        if tensor.name in inputs:
            raise InvalidArgument(f"input '{tensor.name}' already exists in request")
        inputs[tensor.name] = _parse_input(tensor, message.model_name)
    return _Head(
        message.model_name,
        check_version(message.model_version),
        tuple(inputs.values()),
        tuple([_parse_output(output) for output in message.outputs]),
        _read_parameters(message.parameters),
        all(each.wire is None for each in inputs.values()),
        _places(inputs.values(), message.outputs),
    )


def _places(inputs: Iterable[_Input], outputs: Any) -> Places | None:
    read = {each.name: each.place for each in inputs if each.place is not None}
    written = {
        output.name: place for output in outputs if (place := _place(output.name, output.parameters)) is not None
    }
    return Places(read, written) if read or written else None


_remembered_head = lru_cache(maxsize=1024)(_parse_head)


def _parse_input(tensor: Any, model: str) -> _Input:
    name = tensor.name
    place = _place(name, tensor.parameters)
    datatype = DataType.__members__.get(tensor.datatype)
    if datatype is None:
        raise InvalidArgument(
            f"inference input '{name}' for model '{model}' has unknown data-type '{tensor.datatype}', "
            f"expected one of {', '.join(DataType.__members__)}"
        )
    if len(tensor.shape) > _MAX_RANK:
        raise InvalidArgument(f"input '{name}' for model '{model}' has more than {_MAX_RANK} dimensions")
    shape = tuple(tensor.shape)
    if any(size < 0 for size in shape):
        raise InvalidArgument(
            f"input '{name}' for model '{model}' has a negative dimension in its shape {list(shape)}, "
            "expected the sizes of the data that is sent"
        )
    if place is not None:
        if tensor.HasField("contents"):
            raise InvalidArgument(
                f"unexpected 'content' provided when using shared memory for input tensor '{name}' for model '{model}'"
            )
        return _Input(name, datatype, shape, None, place)
    wire = read_contents(tensor.contents, name, model, datatype) if tensor.HasField("contents") else None
    return _Input(name, datatype, shape, wire)


def _parse_output(output: Any) -> RequestedOutput:
    if not output.parameters:
        return RequestedOutput(output.name)
    classes = 0
    if "classification" in output.parameters:
        if _REGION in output.parameters:
            raise InvalidArgument(f"output can't set both '{_REGION}' and 'classification'")
        parameter = output.parameters["classification"]
        if parameter.WhichOneof("parameter_choice") != "int64_param":
            raise InvalidArgument("invalid value type for 'classification' parameter, expected int64_param")
        classes = parameter.int64_param
        if classes <= 0:
            raise InvalidArgument("invalid value for 'classification' parameter, expected > 0")
    return RequestedOutput(output.name, classes)


def _place(name: str, parameters: Any) -> Place | None:
    """Where in shared memory a tensor lies, if it does."""
    if not parameters:
        return None
    if _REGION not in parameters:
        for key in (_OFFSET, _SIZE):
            if key in parameters:
                raise no_place_region(name, key)
        return None
    if _SIZE not in parameters:
        raise no_place_size(name)
    # Triton takes the numbers for unsigned ones.
    offset, size = (_place_parameter(name, parameters, key, "int64_param") % (1 << 64) for key in (_OFFSET, _SIZE))
    return Place(_place_parameter(name, parameters, _REGION, "string_param"), offset, size)


def _place_parameter(name: str, parameters: Any, key: str, kind: str) -> Any:
    if key not in parameters:
        return 0
    if parameters[key].WhichOneof("parameter_choice") != kind:
        raise InvalidArgument(f"invalid value type for '{key}' parameter for tensor '{name}', expected {kind}.")
    return getattr(parameters[key], kind)


def _read_parameters(parameters: Any) -> dict[str, Parameter]:
    return {key: _read_parameter(key, parameter) for key, parameter in parameters.items()}


def _read_parameter(key: str, parameter: Any) -> Parameter:
    kind = parameter.WhichOneof("parameter_choice")
    expected = _EXPECTED_KIND.get(key, _ANY_KIND)
    if kind not in expected:
        raise InvalidArgument(f"invalid value type for '{key}' parameter, expected {_either(expected)}.")
    value: Parameter = getattr(parameter, kind)
    if key == "priority" and int(value) < 0:
        raise InvalidArgument("invalid value for 'priority', expected value >= 0.")
    return value


def _either(words: Sequence[str]) -> str:
    return " or ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


@lru_cache(maxsize=1024)
def _response_head(
    model: str, version: str, outputs: tuple[tuple[str, DataType, tuple[int, ...]], ...]
) -> tuple[bytes, tuple[bytes, ...]]:
    """All but the raw tensors, and what stands before each of those; empty when their sizes are not known."""
    message = service_pb2.ModelInferResponse(model_name=model, model_version=version)
    for name, datatype, shape in outputs:
        message.outputs.add(name=name, datatype=datatype.name, shape=shape)
    sizes = [element_count(shape) * datatype.itemsize for _, datatype, shape in outputs]
    fixed = not any(datatype is DataType.BYTES for _, datatype, _ in outputs)
    seams = tuple(_RESPONSE_RAW + length(size) for size in sizes) if fixed else ()
    return message.SerializeToString(), seams


@lru_cache(maxsize=2)
def _final_parameter(final: bool) -> bytes:
    return _write_parameters({"triton_final_response": final})


def _write_parameters(parameters: Mapping[str, Parameter]) -> bytes:
    message = service_pb2.ModelInferResponse()
    for key, value in parameters.items():
        parameter = message.parameters[key]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, str):
            parameter.string_param = value
        elif isinstance(value, float):
            parameter.double_param = value
        elif value in _INT64:
            parameter.int64_param = value
        elif value in _UINT64:
            parameter.uint64_param = value
        else:
            raise errors.Internal(f"response parameter '{key}' does not fit 64 bits")
    return bytes(message.SerializeToString())
