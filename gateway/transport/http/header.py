"""Reads the JSON part of an infer request, once it is parsed: inputs, requested outputs and parameters.

Owns the meaning of each member and the errors for a wrong one. JSON tensors become arrays here; binary ones
stay a size, for the codec to cut from the body.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gateway.errors import Internal, InvalidArgument, reserved_parameter
from gateway.shm.errors import no_place_size
from gateway.transport.http.arrays import Cut
from gateway.transport.http.document import NumberKind, bad_member, flatten, numbers
from gateway.transport.http.limits import HttpLimits
from gateway.types import EMPTY_FINAL, Array, DataType, Parameter, Place, Places, RequestedOutput, element_count

_DATATYPES = {each.value: each for each in DataType}
_KINDS: dict[str, NumberKind] = {
    "i": "i",
    "u": "u",
    "f": "d",
}  # numpy's kind of a type -> how its JSON numbers are read
_INT64_MAX = 2**63 - 1
_UNSIGNED = ("priority", "timeout")
_REGION, _OFFSET, _SIZE = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"


class ResponsePlan(NamedTuple):
    """Which outputs go back as binary: those in `listed` as it says, any other if `binary`."""

    binary: bool
    listed: Mapping[str, bool]


class InputHeader(NamedTuple):
    """One input: its array if it came as JSON, its place if it is in shared memory, else the `size` of its binary data."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    size: int
    array: Array | None
    place: Place | None = None


class RequestHeader(NamedTuple):
    """The JSON part of a request."""

    id: str
    inputs: tuple[InputHeader, ...]
    outputs: tuple[RequestedOutput, ...]
    parameters: Mapping[str, Parameter]
    plan: ResponsePlan
    places: Places | None = None


def read_header(document: dict[str, Any], limits: HttpLimits) -> RequestHeader:
    """Read a parsed request. Raises `GatewayError` for a wrong member."""
    request_id = document.get("id", "")
    if type(request_id) is not str:
        raise bad_member("id", "string", "string")
    outputs, binary_outputs, placed = _outputs(document, limits)
    parameters = _request_parameters(document.get("parameters"))
    binary = parameters.pop("binary_data_output", False)
    if type(binary) is not bool:
        raise bad_member("binary_data_output", "boolean", "boolean")
    plan = ResponsePlan(binary, binary_outputs)
    inputs = _inputs(document, limits)
    read = {each.name: each.place for each in inputs if each.place is not None}
    places = Places(read, placed) if read or placed else None
    return RequestHeader(request_id, inputs, outputs, parameters, plan, places)


def _request_parameters(value: Any) -> dict[str, Parameter]:
    parameters = dict(_parameters(value))
    for name in _UNSIGNED:
        if name in parameters:
            _unsigned(parameters[name], name)
    if EMPTY_FINAL in parameters:  # ModelStreamInfer's
        raise reserved_parameter()
    return parameters


def _inputs(document: dict[str, Any], limits: HttpLimits) -> tuple[InputHeader, ...]:
    if "inputs" not in document:
        raise Internal("Unable to parse 'inputs': attempt to access non-existing object member 'inputs'")
    members = _members(document["inputs"], "inputs", limits)
    inputs = tuple(_input(member, limits) for member in members)
    if len({each.name for each in inputs}) < len(inputs):
        names = [each.name for each in inputs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument(f"input '{twice}' already exists in request")
    return inputs


def _outputs(
    document: dict[str, Any], limits: HttpLimits
) -> tuple[tuple[RequestedOutput, ...], dict[str, bool], dict[str, Place]]:
    outputs: list[RequestedOutput] = []
    binary: dict[str, bool] = {}
    placed: dict[str, Place] = {}
    for member in _members(document.get("outputs", []), "outputs", limits):
        name = _string(member, "name")
        parameters = _parameters(member.get("parameters"))
        wanted = parameters.get("binary_data", False)
        if type(wanted) is not bool:
            raise bad_member("binary_data", "boolean", "boolean")
        if _REGION in parameters:
            for other, given in (("classification", "classification" in parameters), ("binary_data", wanted)):
                if given:
                    raise InvalidArgument(f"Output can't set both '{_REGION}' and '{other}'")
            placed[name] = _place(name, parameters)
        binary[name] = wanted
        outputs.append(RequestedOutput(name, _unsigned(parameters.get("classification", 0), "classification")))
    return tuple(outputs), binary, placed


def _place(name: str, parameters: Mapping[str, Parameter]) -> Place:
    region = parameters[_REGION]
    if type(region) is not str:
        raise bad_member(_REGION, "string", "string")
    offset = _unsigned(parameters.get(_OFFSET, 0), _OFFSET)
    if _SIZE not in parameters:
        raise no_place_size(name)
    return Place(region, offset, _unsigned(parameters[_SIZE], _SIZE))


def _members(value: Any, name: str, limits: HttpLimits) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise bad_member(name, "array", "array")
    if len(value) > limits.max_request_tensors:
        raise InvalidArgument(
            f"the request has {len(value)} {name}, more than the limit of {limits.max_request_tensors}; "
            "send fewer, or raise --max-request-tensors"
        )
    for member in value:
        if not isinstance(member, dict):
            raise bad_member(name, "object", "object")
    return value


def _input(member: dict[str, Any], limits: HttpLimits) -> InputHeader:
    name = _string(member, "name")
    word = _string(member, "datatype")
    datatype = _DATATYPES.get(word)
    if datatype is None:
        raise InvalidArgument(f"input '{name}' has unknown datatype '{word}'; expected one of {', '.join(_DATATYPES)}")
    shape = _shape(member, name, datatype, limits)
    parameters = _parameters(member.get("parameters"))
    as_json, as_binary, as_region = "data" in member, "binary_data_size" in parameters, _REGION in parameters
    if as_json + as_binary + as_region != 1:
        raise InvalidArgument(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'{_REGION}' in 'parameters'. But input '{name}' sets {as_json + as_binary + as_region} of them"
        )
    if as_json:
        return InputHeader(name, datatype, shape, 0, json_array(member["data"], name, datatype, shape))
    if as_region:
        return InputHeader(name, datatype, shape, 0, None, _place(name, parameters))
    return InputHeader(name, datatype, shape, _unsigned(parameters["binary_data_size"], "binary_data_size"), None)


def _shape(member: dict[str, Any], name: str, datatype: DataType, limits: HttpLimits) -> tuple[int, ...]:
    if "shape" not in member:
        raise Internal("Unable to parse 'shape': attempt to access non-existing object member 'shape'")
    dims = member["shape"]
    if not isinstance(dims, list):
        raise bad_member("shape", "array", "array")
    shape = tuple(_unsigned(dim, "shape") for dim in dims)
    # A zero dimension makes the product 0 whatever the others are, and those may still be absurd.
    count = math.prod([dim or 1 for dim in shape])
    if count > limits.max_tensor_elements:
        if count <= _INT64_MAX < count * datatype.itemsize:
            raise InvalidArgument(f"byte size overflow for input '{name}'")
        raise InvalidArgument(
            f"shape of input '{name}' causes total element count to exceed maximum size of {limits.max_tensor_elements}"
        )
    return shape


def json_array(data: Any, name: str, datatype: DataType, shape: tuple[int, ...]) -> Array:
    """The tensor in a JSON array. Raises `GatewayError` for elements of another type or number."""
    if datatype is DataType.FP16 or datatype is DataType.BF16:
        raise InvalidArgument(
            f"receiving {datatype.name} data via JSON is not supported. "
            f"Please use the binary data format for input {name}"
        )
    if datatype is DataType.BYTES:
        flat = _objects(data)
    elif datatype is DataType.BOOL:
        flat = _booleans(data)
    else:
        flat = _numeric(data, datatype, element_count(shape))
    if flat.size != element_count(shape):
        raise Internal("Unable to parse 'data': Shape does not match true shape of 'data' field")
    return flat.reshape(shape)


def _numeric(data: Any, datatype: DataType, count: int) -> Array:
    kind = _KINDS[datatype.dtype.kind]
    if isinstance(data, Cut):
        flat = data.numbers(datatype.dtype if kind == "d" else np.dtype(f"{kind}8"), count)
    else:
        flat = numbers(data, kind)
    # As in Triton, a number the type cannot hold wraps round or becomes infinite.
    with np.errstate(over="ignore"):
        return flat.astype(datatype.dtype, copy=False)


def _objects(data: Any) -> Array:
    elements = flatten(data)
    array = np.empty(len(elements), dtype=object)
    for index, element in enumerate(elements):
        if type(element) is not str:
            raise bad_member("data", "string", "string")
        array[index] = element.encode()
    return array


def _booleans(data: Any) -> Array:
    elements = flatten(data)
    if not {bool}.issuperset(map(type, elements)):
        raise bad_member("data", "boolean", "boolean")
    return np.array(elements, dtype=np.bool_)


def _string(member: dict[str, Any], name: str) -> str:
    if name not in member:
        raise Internal(f"Unable to parse '{name}': attempt to access non-existing object member '{name}'")
    value = member[name]
    if type(value) is not str:
        raise bad_member(name, "string", "string")
    return value


def _unsigned(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise bad_member(name, "unsigned-integer", "unsigned-integer")
    return value


def _parameters(value: Any) -> Mapping[str, Parameter]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_member("parameters", "object", "object")
    for key, each in value.items():
        if type(each) not in (str, int, float, bool):
            raise InvalidArgument(
                f"parameter '{key}' has invalid type. It should be either 'int', 'bool', 'string' or 'double'"
            )
    return value
