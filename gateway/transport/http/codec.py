"""Turns an infer body into an `InferRequest` and an `InferResponse` into a body: KServe V2 JSON and Triton's
binary tensor data, framework-free.

Promises that a body raises nothing but `GatewayError`, in Triton's words and status codes, and that binary
tensors are views of the body. It checks what the wire can tell; names, types and shapes are checked against
the model by the service.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import orjson

from gateway.config.model import ModelConfig
from gateway.errors import InvalidArgument
from gateway.transport.http.document import DocumentReader, too_large
from gateway.transport.http.header import InputHeader, RequestHeader, ResponsePlan, read_header
from gateway.transport.http.limits import HttpLimits
from gateway.types import Array, DataType, InferRequest, InferResponse, Tensor, element_count

Headers = list[tuple[str, str]]

_CACHED_HEADERS = 512
_CACHED_HEADER_BYTES = 4096
_WORDS = {each: each.value for each in DataType}
_NOT_JSON = (DataType.FP16, DataType.BF16)


class Codec:
    """Decodes and encodes infer bodies for one event loop."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._reader = DocumentReader(limits.max_input_size, limits.max_json_depth)
        self._headers: dict[bytes, RequestHeader] = {}

    def decode(
        self, body: bytes, header_length: str | None, model: str, version: str, config: Callable[[], ModelConfig]
    ) -> tuple[InferRequest, ResponsePlan]:
        """Read an infer body. `header_length` is the Inference-Header-Content-Length header.

        `config` is asked for only by a raw binary request (header length 0), whose shape is the model's.
        """
        if header_length is None:
            header, blobs = self._read(body), memoryview(b"")
        else:
            length = _header_length(header_length, len(body))
            if not length:
                return self._decode_raw(body, model, version, config())
            header, blobs = self._read_cached(body[:length]), memoryview(body)[length:]
        request = InferRequest(
            model, _tensors(header.inputs, blobs, model), version, header.id, header.outputs, header.parameters
        )
        return request, header.plan

    def _read(self, text: bytes) -> RequestHeader:
        return read_header(self._reader.read(text), self._limits)

    def _read_cached(self, text: bytes) -> RequestHeader:
        # Clients repeat a header byte for byte; not reading it again saves more time than all else here takes.
        header = self._headers.get(text)
        if header is None:
            header = self._read(text)
            if not header.id and len(text) <= _CACHED_HEADER_BYTES and all(i.array is None for i in header.inputs):
                if len(self._headers) >= _CACHED_HEADERS:
                    self._headers.clear()
                self._headers[text] = header
        return header

    def _decode_raw(
        self, body: bytes, model: str, version: str, config: ModelConfig
    ) -> tuple[InferRequest, ResponsePlan]:
        if len(body) > self._limits.max_input_size:
            raise too_large(len(body), self._limits.max_input_size)
        if len(config.inputs) != 1:
            raise InvalidArgument(
                "Raw request must only have 1 input to be deduced but got "
                f"{len(config.inputs)} inputs in '{model}' model configuration"
            )
        (spec,) = config.inputs
        wire = body
        if spec.datatype is DataType.BYTES:
            if spec.dims != (1,):
                raise InvalidArgument(
                    f"For BYTES datatype raw input '{spec.name}', the model must have input shape [1]"
                )
            wire = len(body).to_bytes(4, "little") + body
        dims = _deduced(spec.name, spec.dims, spec.datatype.itemsize, len(body))
        shape = (1, *dims) if config.max_batch_size else dims
        return InferRequest(model, {spec.name: Tensor(spec.datatype, shape, wire=wire)}, version), ResponsePlan(
            True, {}
        )


def encode(response: InferResponse, plan: ResponsePlan) -> tuple[Headers, bytes]:
    """Write the response's headers and body. Raises InvalidArgument for an output that JSON cannot carry."""
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes | bytearray | memoryview] = []
    for name, tensor in response.outputs.items():
        output: dict[str, Any] = {"name": name, "datatype": _WORDS[tensor.datatype], "shape": tensor.shape}
        if plan.listed.get(name, plan.binary):
            wire = tensor.wire
            output["parameters"] = {"binary_data_size": len(wire)}
            if len(wire):
                blobs.append(wire)
        else:
            output["data"] = _json_data(name, tensor)
        outputs.append(output)
    head: dict[str, Any] = {"id": response.id} if response.id else {}
    head["model_name"] = response.model_name
    head["model_version"] = response.model_version
    if response.parameters:
        head["parameters"] = dict(response.parameters)
    head["outputs"] = outputs
    text = orjson.dumps(head)
    if not blobs:
        return [("content-type", "application/json")], text
    headers = [
        ("content-type", "application/octet-stream"),
        ("inference-header-content-length", str(len(text))),
    ]
    return headers, b"".join((text, *blobs))


def _header_length(value: str, size: int) -> int:
    # isdecimal also takes digits of other scripts, which int() would read.
    length = int(value) if value.isascii() and value.isdecimal() and len(value) < 12 else -1
    if not 0 <= length <= size:
        raise InvalidArgument(f"inference header size should be in range (0, {size}), got: {value[:40]}")
    return length


def _tensors(inputs: tuple[InputHeader, ...], blobs: memoryview, model: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    offset = 0
    for each in inputs:
        if each.array is not None:
            tensors[each.name] = Tensor(each.datatype, each.shape, array=each.array)
            continue
        end = offset + each.size
        if end > len(blobs):
            raise InvalidArgument(
                f"unexpected size for input '{each.name}', expecting {end - len(blobs)} additional bytes "
                f"for model '{model}'"
            )
        tensors[each.name] = Tensor(each.datatype, each.shape, wire=blobs[offset:end])
        offset = end
    if offset != len(blobs):
        raise InvalidArgument(f"unexpected additional input data for model '{model}'")
    return tensors


def _deduced(name: str, dims: tuple[int, ...], itemsize: int, size: int) -> tuple[int, ...]:
    """The dims with their one open dimension, if any, filled from the size in bytes."""
    if dims.count(-1) > 1:
        raise InvalidArgument(
            f"The shape of Raw input '{name}' can not be deduced because there are more than one variable-sized dimension"
        )
    if -1 not in dims:
        return dims
    known = element_count(tuple(dim for dim in dims if dim != -1)) * itemsize
    filled = size // known if known else 0
    return tuple(filled if dim == -1 else dim for dim in dims)


def _json_data(name: str, tensor: Tensor) -> Any:
    """The tensor as flat JSON: a list, or finished text."""
    if tensor.datatype in _NOT_JSON:
        raise InvalidArgument(
            f"sending {tensor.datatype.name} data via JSON is not supported. "
            f"Please use the binary data format for output {name}"
        )
    flat = np.ascontiguousarray(tensor.array).reshape(-1)
    if tensor.datatype is DataType.BYTES:
        return _strings(name, flat)
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        return orjson.Fragment(_with_nonfinite(flat))
    return orjson.Fragment(orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY))


def _strings(name: str, flat: Array) -> list[str]:
    try:
        return [element if isinstance(element, str) else bytes(element).decode() for element in flat]
    except UnicodeDecodeError:
        raise InvalidArgument(
            f"output '{name}' holds bytes that are not UTF-8 text, which JSON cannot carry. "
            f"Please use the binary data format for output {name}"
        ) from None


def _with_nonfinite(flat: Array) -> bytes:
    # orjson writes null for these, in order, so the text is cut at each null and mended with Triton's words.
    pieces = orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY).split(b"null")
    odd = flat[~np.isfinite(flat)]
    words = np.where(np.isnan(odd), b"NaN", np.where(odd > 0, b"Infinity", b"-Infinity")).tolist()
    return b"".join(part for pair in zip(pieces, [*words, b""], strict=True) for part in pair)
