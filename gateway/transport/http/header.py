"""Reads the JSON part of an infer request, once it is parsed: inputs, requested outputs and parameters.

Owns the meaning of each member and the errors for a wrong one. JSON tensors become arrays here; binary ones
stay a size, for the codec to cut from the body.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gateway.errors import Internal, InvalidArgument, duplicate_output, shared_memory_disabled
from gateway.transport.http.document import NumberKind, bad_member, flatten, numbers
from gateway.transport.http.limits import HttpLimits
from gateway.types import Array, DataType, Parameter, RequestedOutput, element_count

_DATATYPES = {each.value: each for each in DataType}
_KINDS: dict[str, NumberKind] = {
    "i": "i",
    "u": "u",
    "f": "d",
}  # numpy's kind of a type -> how its JSON numbers are read
_SOURCES = "'data', 'binary_data_size' in 'parameters', 'shared_memory_region' in 'parameters'"


@dataclass(frozen=True, slots=True)
class InputHeader:
    """One input: its array if it came as JSON, else the `size` of its binary data."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    size: int
    array: Array | None


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """The JSON part of a request. `binary` holds for outputs not in `binary_outputs`."""

    id: str
    inputs: tuple[InputHeader, ...]
    outputs: tuple[RequestedOutput, ...]
    parameters: Mapping[str, Parameter]
    binary: bool
    binary_outputs: Mapping[str, bool]


def read_header(document: dict[str, Any], limits: HttpLimits) -> RequestHeader:
    """Read a parsed request. Raises `GatewayError` for a wrong member."""
    request_id = document.get("id", "")
    if type(request_id) is not str:
        raise bad_member("id", "string", "string")
    outputs, binary_outputs = _outputs(document, limits)
    parameters = dict(_parameters(document.get("parameters")))
    binary = parameters.pop("binary_data_output", False)
    if type(binary) is not bool:
        raise bad_member("binary_data_output", "boolean", "boolean")
    return RequestHeader(request_id, _inputs(document, limits), outputs, parameters, binary, binary_outputs)


def _inputs(document: dict[str, Any], limits: HttpLimits) -> tuple[InputHeader, ...]:
    if "inputs" not in document:
        raise Internal("Unable to parse 'inputs': attempt to access non-existing object member 'inputs'")
    members = _members(document["inputs"], "inputs", limits)
    inputs = tuple(_input(member, limits) for member in members)
    names = [each.name for each in inputs]
    for position, name in enumerate(names):
        if name in names[:position]:
            raise InvalidArgument(f"input '{name}' already exists in request")
    return inputs


def _outputs(document: dict[str, Any], limits: HttpLimits) -> tuple[tuple[RequestedOutput, ...], dict[str, bool]]:
    outputs: list[RequestedOutput] = []
    binary: dict[str, bool] = {}
    for member in _members(document.get("outputs", []), "outputs", limits):
        name = _string(member, "name")
        if name in binary:
            raise duplicate_output(name)
        parameters = _parameters(member.get("parameters"))
        if "shared_memory_region" in parameters:
            raise shared_memory_disabled()
        wanted = parameters.get("binary_data", False)
        if type(wanted) is not bool:
            raise bad_member("binary_data", "boolean", "boolean")
        binary[name] = wanted
        outputs.append(RequestedOutput(name, _unsigned(parameters.get("classification", 0), "classification")))
    return tuple(outputs), binary


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
    shape = _shape(member, name, limits)
    parameters = _parameters(member.get("parameters"))
    sources = [source for source in ("binary_data_size", "shared_memory_region") if source in parameters]
    if "data" in member:
        sources.append("data")
    if len(sources) != 1:
        found = " and ".join(f"'{source}'" for source in sources) or "none of them"
        raise InvalidArgument(
            f"Input must set only one of the following fields: {_SOURCES}. But input '{name}' sets {found}"
        )
    if sources == ["shared_memory_region"]:
        raise shared_memory_disabled()
    if sources == ["binary_data_size"]:
        size = _unsigned(parameters["binary_data_size"], "binary_data_size")
        return InputHeader(name, datatype, shape, size, None)
    return InputHeader(name, datatype, shape, 0, _array(member["data"], name, datatype, shape))


def _shape(member: dict[str, Any], name: str, limits: HttpLimits) -> tuple[int, ...]:
    if "shape" not in member:
        raise Internal("Unable to parse 'shape': attempt to access non-existing object member 'shape'")
    dims = member["shape"]
    if not isinstance(dims, list):
        raise bad_member("shape", "array", "array")
    shape = tuple(_unsigned(dim, "shape") for dim in dims)
    # A zero dimension makes the product 0 whatever the others are, and those may still be absurd.
    if math.prod([dim or 1 for dim in shape]) > limits.max_tensor_elements:
        raise InvalidArgument(
            f"shape of input '{name}' causes total element count to exceed maximum size of {limits.max_tensor_elements}"
        )
    return shape


def _array(data: Any, name: str, datatype: DataType, shape: tuple[int, ...]) -> Array:
    if datatype in (DataType.FP16, DataType.BF16):
        raise InvalidArgument(
            f"receiving {datatype.name} data via JSON is not supported. "
            f"Please use the binary data format for input {name}"
        )
    if datatype is DataType.BYTES:
        flat = _objects(data)
    elif datatype is DataType.BOOL:
        flat = _booleans(data)
    else:
        # As in Triton, a number the type cannot hold wraps round or becomes infinite.
        with np.errstate(over="ignore"):
            flat = numbers(data, _KINDS[datatype.dtype.kind]).astype(datatype.dtype, copy=False)
    if flat.size != element_count(shape):
        raise Internal("Unable to parse 'data': Shape does not match true shape of 'data' field")
    return flat.reshape(shape)


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
