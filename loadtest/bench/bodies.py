"""Request bodies for the three wire formats, and the readers that turn a response back into arrays.

What tritonclient would send, built once and kept in a file so that wrk and h2load can post it: HTTP JSON (flat `data`), HTTP with
binary tensors (`Inference-Header-Content-Length`), gRPC (a length-prefixed ModelInferRequest) and the raw route of baseline (a).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field

import numpy as np

from loadtest.samples import Arrays, Sample

_NAMES = {"float32": "FP32", "float64": "FP64", "int64": "INT64", "int32": "INT32", "uint8": "UINT8", "bool": "BOOL"}
_DTYPES = {name: np.dtype(dtype) for dtype, name in _NAMES.items()}
GRPC_PATH = "/inference.GRPCInferenceService/ModelInfer"
HEADER_LENGTH = "Inference-Header-Content-Length"


class BodyError(ValueError):
    """A response that does not follow the protocol."""


@dataclass(frozen=True, slots=True)
class Wire:
    """One request as bytes: where it goes, with which headers."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def _describe(sample: Sample) -> list[dict[str, object]]:
    return [
        {"name": name, "shape": list(array.shape), "datatype": _NAMES[array.dtype.name]}
        for name, array in sample.inputs.items()
    ]


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def http_json(sample: Sample) -> Wire:
    """All-JSON: numbers in a flat list, with the shortest digits that keep the FP32 value (what numpy-based clients print)."""
    inputs = _describe(sample)
    for entry, array in zip(inputs, sample.inputs.values(), strict=True):
        entry["data"] = array.ravel().tolist()
    return Wire(f"/v2/models/{sample.model}/infer", _dump({"inputs": inputs}), {"Content-Type": "application/json"})


def http_binary(sample: Sample) -> Wire:
    """JSON header plus tensors, binary outputs: byte for byte what tritonclient.http sends when no outputs are named."""
    inputs = _describe(sample)
    for entry, array in zip(inputs, sample.inputs.values(), strict=True):
        entry["parameters"] = {"binary_data_size": array.nbytes}
    header = _dump({"inputs": inputs, "parameters": {"binary_data_output": True}})
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return Wire(f"/v2/models/{sample.model}/infer", header + raw_bytes(sample), headers)


def grpc_message(sample: Sample) -> bytes:
    """A serialized ModelInferRequest with raw_input_contents, without the length prefix."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=sample.model)
    for name, array in sample.inputs.items():
        tensor = request.inputs.add(name=name, datatype=_NAMES[array.dtype.name])
        tensor.shape.extend(array.shape)
        request.raw_input_contents.append(array.tobytes())
    return bytes(request.SerializeToString())


def grpc(sample: Sample) -> Wire:
    """The gRPC message as the body of one HTTP/2 request: not compressed, four bytes of length, the message."""
    message = grpc_message(sample)
    headers = {"te": "trailers", "content-type": "application/grpc"}
    return Wire(GRPC_PATH, struct.pack(">BI", 0, len(message)) + message, headers)


def raw_bytes(sample: Sample) -> bytes:
    """The tensors alone, one after another."""
    return b"".join(array.tobytes() for array in sample.inputs.values())


def raw(sample: Sample) -> Wire:
    """The raw route of baseline (a)."""
    shapes = ";".join(",".join(map(str, array.shape)) for array in sample.inputs.values())
    headers = {"Content-Type": "application/octet-stream", "X-Shape": shapes}
    return Wire(f"/infer/{sample.model}", raw_bytes(sample), headers)


def parse_http(body: bytes, header_length: str | None) -> Arrays:
    """Read an infer response, JSON or binary; raises BodyError when sizes or types do not add up."""
    length = len(body) if header_length is None else int(header_length)
    document = json.loads(body[:length])
    arrays: Arrays = {}
    offset = length
    for entry in document.get("outputs", []):
        dtype = _DTYPES[entry["datatype"]]
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.asarray(entry["data"], dtype=dtype)
        else:
            array = np.frombuffer(body[offset : offset + size], dtype=dtype)
            offset += size
        arrays[entry["name"]] = array.reshape(entry["shape"])
    if offset != len(body):
        message = f"{len(body) - offset} bytes left over after the last output"
        raise BodyError(message)
    return arrays


def parse_grpc(message: bytes) -> Arrays:
    """Read a serialized ModelInferResponse."""
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse.FromString(message)
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {
        output.name: np.frombuffer(content, _DTYPES[output.datatype]).reshape(tuple(output.shape))
        for output, content in pairs
    }


def parse_raw(body: bytes, like: Arrays) -> Arrays:
    """Read the raw route's answer, given arrays of the expected types and shapes."""
    arrays: Arrays = {}
    offset = 0
    for name, array in like.items():
        arrays[name] = np.frombuffer(body[offset : offset + array.nbytes], array.dtype).reshape(array.shape)
        offset += array.nbytes
    if offset != len(body):
        message = f"{len(body)} bytes where {offset} were expected"
        raise BodyError(message)
    return arrays
