"""Requests and answers as they go over the wire, written here by hand, so that they can also be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from loadtest.fuzz.requests import DTYPES, Array

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
NOT_JSON = ("FP16", "BF16")


@dataclass(slots=True)
class Part:
    """An input: its bytes, or values for JSON and typed contents (`typed`), or where it lies in shared memory."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes = b""
    typed: list[Any] | None = None
    place: dict[str, Any] | None = None


@dataclass(slots=True)
class Message:
    """A request. `outputs` are names and parameters."""

    model: str
    inputs: list[Part]
    outputs: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    version: str = ""

    @property
    def path(self) -> str:
        """Its model, and version if it has one, in a URL."""
        return self.model + (f"/versions/{self.version}" if self.version else "")


def to_wire(array: Array) -> bytes:
    """Little-endian elements in row-major order, with a length before each of BYTES."""
    if array.dtype != object:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(each)) + each for each in array.reshape(-1))


def from_wire(data: bytes, datatype: str, shape: Sequence[int]) -> Array:
    """The array. Raises ValueError for bytes that do not fill it."""
    if datatype != "BYTES":
        return np.frombuffer(data, DTYPES[datatype]).reshape(shape)
    found, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return objects(found, shape)


def objects(elements: Sequence[bytes], shape: Sequence[int]) -> Array:
    """An array of BYTES."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def typed(array: Array) -> list[Any]:
    """The elements for JSON or typed contents."""
    return [each.decode() if isinstance(each, bytes) else each for each in array.reshape(-1).tolist()]


def http(message: Message, *, nested: bool = False) -> tuple[bytes, bytes]:
    """The JSON and the binary part of a body."""
    inputs, blobs = [], []
    for part in message.inputs:
        made: dict[str, Any] = {"name": part.name, "datatype": part.datatype, "shape": part.shape}
        if part.place is not None:
            made["parameters"] = part.place
        elif part.typed is not None:
            made["data"] = _nested(part.typed, part.shape) if nested else part.typed
        else:
            made["parameters"] = {"binary_data_size": len(part.data)}
            blobs.append(part.data)
        inputs.append(made)
    head: dict[str, Any] = {"inputs": inputs}
    if message.outputs:
        head["outputs"] = [{"name": name, "parameters": parameters} for name, parameters in message.outputs]
    return json.dumps(head).encode(), b"".join(blobs)


def _nested(elements: list[Any], shape: Sequence[int]) -> Any:
    if 0 in shape or not shape:
        return elements
    for size in reversed(shape[1:]):
        elements = [elements[at : at + size] for at in range(0, len(elements), size)]
    return elements


def read_http(body: bytes, header_length: str | None) -> dict[str, tuple[str, Array]]:
    """The outputs of an answer, by name: datatype and array. Raises ValueError, KeyError for what is no answer."""
    cut = len(body) if header_length is None else int(header_length)
    found, at = {}, cut
    for output in json.loads(body[:cut])["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        datatype, shape = output["datatype"], output["shape"]
        if size is None:
            found[output["name"]] = datatype, _from_json(output["data"], datatype, shape)
        else:
            found[output["name"]] = datatype, from_wire(body[at : at + size], datatype, shape)
            at += size
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes are left in the answer")
    return found


def _from_json(data: list[Any], datatype: str, shape: Sequence[int]) -> Array:
    if datatype == "BYTES":
        return objects([each.encode() for each in data], shape)
    if datatype == "BOOL" and not all(isinstance(each, bool) for each in data):
        raise ValueError("a BOOL that is not true or false")
    return np.array(data, DTYPES[datatype]).reshape(shape)


def grpc(message: Message) -> Any:
    """A `ModelInferRequest`."""
    made = pb.ModelInferRequest(model_name=message.model, model_version=message.version)
    for part in message.inputs:
        tensor = made.inputs.add(name=part.name, datatype=part.datatype, shape=part.shape)
        if part.place is not None:
            _set(tensor.parameters, part.place)
        elif part.typed is not None:
            elements = [each.encode() if isinstance(each, str) else each for each in part.typed]
            getattr(tensor.contents, _CONTENTS[part.datatype]).extend(elements)
            tensor.contents.SetInParent()
        else:
            made.raw_input_contents.append(part.data)
    for name, parameters in message.outputs:
        _set(made.outputs.add(name=name).parameters, parameters)
    return made


def _set(parameters: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key != "binary_data":  # of HTTP
            setattr(parameters[key], "string_param" if isinstance(value, str) else "int64_param", value)


def read_grpc(answer: Any) -> dict[str, tuple[str, Array]]:
    """The outputs of a `ModelInferResponse`, by name: datatype and array. Raises ValueError."""
    if len(answer.outputs) != len(answer.raw_output_contents):
        raise ValueError(f"{len(answer.outputs)} outputs and {len(answer.raw_output_contents)} raw ones")
    return {
        output.name: (output.datatype, from_wire(raw, output.datatype, output.shape))
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
