"""Turns an infer body into an `InferRequest` and an `InferResponse` into a body: KServe V2 JSON and Triton's
binary tensor data, framework-free.

Promises that a body raises nothing but `GatewayError`, in Triton's words and status codes, and that binary
tensors are views of the body. It checks what the wire can tell; names, types and shapes are checked against
the model by the service.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import orjson

from gateway.config.model import ModelConfig
from gateway.errors import GatewayError, InvalidArgument, request_prefix
from gateway.transport.http.document import DocumentReader, too_large
from gateway.transport.http.header import InputHeader, RequestHeader, ResponsePlan, read_header
from gateway.transport.http.limits import HttpLimits
from gateway.types import Array, DataType, InferRequest, InferResponse, Tensor, element_count, wires

Headers = list[tuple[str, str]]

_REMEMBERED = 512  # headers of requests, and of responses
_REMEMBERED_BYTES = 4096
_WORDS = {each: each.value for each in DataType}
_NOT_JSON = (DataType.FP16, DataType.BF16)


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """A header that was met before: what it says, where in a body its tensors lie, and how long the body must be."""

    header: RequestHeader
    cuts: tuple[tuple[str, DataType, tuple[int, ...], int, int], ...]
    size: int


class Codec:
    """Decodes and encodes infer bodies for one event loop."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._reader = DocumentReader(limits.max_input_size, limits.max_json_depth)
        self._forms: dict[bytes, _Form] = {}

    def decode(
        self, body: bytes, header_length: str | None, model: str, version: str, config: ModelConfig
    ) -> tuple[InferRequest, ResponsePlan]:
        """Read an infer body. `header_length` is the Inference-Header-Content-Length header.

        A raw binary request (header length 0) has the shape that `config` gives.
        """
        if header_length is None:
            return self._decode_parts(body, b"", model, version)
        length = _natural(header_length)
        if not 0 <= length <= len(body):
            raise InvalidArgument(
                f"inference header size should be in range (0, {len(body)}), got: {header_length[:40]}"
            )
        # Clients repeat a header byte for byte; not reading it again saves more time than all else here takes.
        form = self._forms.get(body[:length]) if length <= _REMEMBERED_BYTES else None
        if form is not None and form.size == len(body):
            # Copying a few bytes is quicker than making a view of them.
            source = body if len(body) <= _REMEMBERED_BYTES else memoryview(body)
            tensors = {
                name: Tensor(datatype, shape, source[start:end]) for name, datatype, shape, start, end in form.cuts
            }
            header = form.header
            request = InferRequest(model, tensors, version, "", header.outputs, header.parameters, form=form)
            if header.places is not None:
                request.places = header.places
            return request, header.plan
        if not length:
            return self._decode_raw(body, model, version, config)
        return self._decode_parts(body[:length], memoryview(body)[length:], model, version)

    def _decode_parts(
        self, text: bytes, blobs: bytes | memoryview, model: str, version: str
    ) -> tuple[InferRequest, ResponsePlan]:
        header = self._read(text)
        tensors = _tensors(header.inputs, blobs, model)
        if not header.id and len(text) <= _REMEMBERED_BYTES and all(each.array is None for each in header.inputs):
            self._remember(text, header)
        request = InferRequest(model, tensors, version, header.id, header.outputs, header.parameters)
        request.places = header.places
        return request, header.plan

    def _read(self, text: bytes) -> RequestHeader:
        document = self._reader.read_around(text)
        if document is not None:
            try:
                return read_header(document, self._limits)
            except GatewayError:
                del document  # it holds the parser, which tells from the whole text what is wrong, if anything
        return read_header(self._reader.read(text), self._limits)

    def _remember(self, text: bytes, header: RequestHeader) -> None:
        if len(self._forms) >= _REMEMBERED:
            self._forms.clear()
        ends = list(accumulate([each.size for each in header.inputs], initial=len(text)))
        cuts = tuple(
            (each.name, each.datatype, each.shape, start, end)
            for each, start, end in zip(header.inputs, ends[:-1], ends[1:], strict=True)
        )
        self._forms[text] = _Form(header, cuts, ends[-1])

    def _decode_raw(
        self, body: bytes, model: str, version: str, config: ModelConfig
    ) -> tuple[InferRequest, ResponsePlan]:
        if len(body) > self._limits.max_input_size:
            raise too_large(len(body), self._limits.max_input_size)
        if len(config.inputs) != 1:
            raise _not_raw(
                "Raw request must only have 1 input (found 1) to be deduced but got "
                f"{len(config.inputs)} inputs in '{model}' model configuration"
            )
        (spec,) = config.inputs
        wire = body
        if spec.datatype is DataType.BYTES:
            if any(dim != 1 for dim in spec.dims):
                raise _not_raw(f"For BYTE datatype raw input '{spec.name}', the model must have input shape [1]")
            wire = len(body).to_bytes(4, "little") + body
        dims = _deduced(spec.name, spec.dims, spec.datatype.itemsize, len(body))
        shape = (1, *dims) if config.max_batch_size else dims
        return InferRequest(model, {spec.name: Tensor(spec.datatype, shape, wire)}, version), ResponsePlan(True, {})


def encode(response: InferResponse, plan: ResponsePlan) -> tuple[Headers, bytes]:
    """Write the response's headers, which are not to be changed, and body. Raises InvalidArgument for an output that JSON cannot carry."""
    binary = all(map(plan.listed.get, response.outputs)) if plan.listed else plan.binary
    if binary and not response.id and not response.parameters and not response.placed:
        kinds = tuple([(name, tensor.datatype, tensor.shape) for name, tensor in response.outputs.items()])
        headers, text = _binary_head(response.model_name, response.model_version, kinds)
        if text:
            return headers, b"".join([text, *wires(response.outputs.values())])
    return _encode_each(response, plan)


def _encode_each(response: InferResponse, plan: ResponsePlan) -> tuple[Headers, bytes]:
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes | bytearray | memoryview] = []
    for name, tensor in response.outputs.items():
        output: dict[str, Any] = {"name": name, "datatype": _WORDS[tensor.datatype], "shape": tensor.shape}
        if name in response.placed:
            pass  # as Triton describes it: name, type and shape
        elif plan.listed.get(name, plan.binary):
            wire = tensor.wire
            output["parameters"] = {"binary_data_size": len(wire)}
            if len(wire):
                blobs.append(wire)
        else:
            output["data"] = json_data(name, tensor)
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
    return _binary_headers(text), b"".join((text, *blobs))


@lru_cache(_REMEMBERED)
def _binary_head(
    model: str, version: str, outputs: tuple[tuple[str, DataType, tuple[int, ...]], ...]
) -> tuple[Headers, bytes]:
    """Headers and JSON of a response whose sizes follow from its shapes; empty JSON when they do not."""
    sizes = [element_count(shape) * datatype.itemsize for _, datatype, shape in outputs]
    if any(datatype is DataType.BYTES for _, datatype, _ in outputs) or not sum(sizes):
        return [], b""
    described = [
        {"name": name, "datatype": _WORDS[datatype], "shape": shape, "parameters": {"binary_data_size": size}}
        for (name, datatype, shape), size in zip(outputs, sizes, strict=True)
    ]
    text = orjson.dumps({"model_name": model, "model_version": version, "outputs": described})
    return _binary_headers(text), text


def _binary_headers(text: bytes) -> Headers:
    return [
        ("content-type", "application/octet-stream"),
        ("inference-header-content-length", str(len(text))),
    ]


@lru_cache(_REMEMBERED)
def _natural(value: str) -> int:
    # isdecimal also takes digits of other scripts, which int() would read.
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 12 else -1


def _tensors(inputs: tuple[InputHeader, ...], blobs: bytes | memoryview, model: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    offset = 0
    for each in inputs:
        if each.array is not None:
            tensors[each.name] = Tensor.from_array(each.datatype, each.array)
            continue
        end = offset + each.size
        if end > len(blobs):
            raise InvalidArgument(
                f"unexpected size for input '{each.name}', expecting {end - len(blobs)} additional bytes "
                f"for model '{model}'"
            )
        tensors[each.name] = Tensor(each.datatype, each.shape, blobs[offset:end])
        offset = end
    if offset != len(blobs):
        raise InvalidArgument(f"unexpected additional input data for model '{model}'")
    return tensors


def _not_raw(problem: str) -> InvalidArgument:
    return InvalidArgument(request_prefix("") + problem)  # a raw request has no place for an id


def _deduced(name: str, dims: tuple[int, ...], itemsize: int, size: int) -> tuple[int, ...]:
    """The dims with their one open dimension, if any, filled from the size in bytes."""
    if dims.count(-1) > 1:
        raise _not_raw(
            f"The shape of the raw input '{name}' can not be deduced because there are more than one variable-sized dimension"
        )
    if -1 not in dims:
        return dims
    known = element_count(tuple(dim for dim in dims if dim != -1)) * itemsize
    filled = size // known if known else 0
    return tuple(filled if dim == -1 else dim for dim in dims)


def json_data(name: str, tensor: Tensor) -> Any:
    """The tensor as flat JSON: a list, or finished text. Raises InvalidArgument for what JSON cannot carry."""
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
