"""What travels between processes of ours: requests, responses and errors as bytes.

A message is a header and a payload. The payload is the wire bytes of all tensors, one after another. The header is one
byte with the version, one with the kind, and a msgpack array of everything else. Within a version fields are only
added, at the end and with a default, and a reader passes over those it does not know. A message of a greater version
is not read at all, because what its fields mean may have changed.

Whoever reads a message gets what was packed, or `BadMessage`. The tensors of a message are views of its payload.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
from msgspec.structs import astuple

from gateway import errors
from gateway.types import (
    NO_PARAMETERS,
    Buffer,
    DataType,
    InferRequest,
    InferResponse,
    Parameter,
    RequestedOutput,
    Tensor,
    Timings,
)

VERSION = 1

_REQUEST, _RESPONSE, _ERROR = (bytes((VERSION, kind)) for kind in b"qre")
_KINDS = {ord("q"): "a request", ord("r"): "a response", ord("e"): "an error"}
_MAX_ELEMENTS = 1 << 48  # what numpy can address in any type, and the most the service accepts
_MAX_DIMS = 64
_REMEMBERED = 512  # forms
_SMALL = 4096
_NONE: dict[str, Parameter] = {}

_Dim = Annotated[int, msgspec.Meta(ge=0, le=_MAX_ELEMENTS)]
_Shape = Annotated[tuple[_Dim, ...], msgspec.Meta(max_length=_MAX_DIMS)]
_Size = Annotated[int, msgspec.Meta(ge=0)]
_Tensors: TypeAlias = tuple[tuple[str, DataType, _Shape, _Size], ...]
_Parameters: TypeAlias = dict[str, Parameter]
_Packed: TypeAlias = tuple[bytes, list[Buffer]]


class BadMessage(errors.Internal):
    """A message that cannot be read: damaged, forged, or written by a newer release. The text is the operator's."""


class _RequestForm(msgspec.Struct, array_like=True, gc=False):
    model: str
    model_version: str
    tensors: _Tensors
    outputs: tuple[tuple[str, int], ...]
    rows: Annotated[int, msgspec.Meta(ge=1)]
    size: _Size
    signature: frozenset[Any]  # of the signature alone: msgspec makes what is in a set hashable, arrays into tuples


class _Request(msgspec.Struct, array_like=True, gc=False):
    form: bytes
    id: str
    parameters: _Parameters
    priority: int
    tenant: str
    callers: tuple[str, ...] = ()


class _ResponseForm(msgspec.Struct, array_like=True, gc=False):
    model: str
    model_version: str
    tensors: _Tensors
    digest: str = ""


class _Response(msgspec.Struct, array_like=True, gc=False):
    form: bytes
    id: str
    parameters: _Parameters
    timings: tuple[int, int, int, int, int] | None
    final: bool


class _Error(msgspec.Struct, array_like=True, gc=False):
    name: str
    message: str
    retry_after: float | None
    more: dict[str, Any]


_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(_Request).decode
_decode_response = msgspec.msgpack.Decoder(_Response).decode
_decode_request_form = msgspec.msgpack.Decoder(_RequestForm).decode
_decode_response_form = msgspec.msgpack.Decoder(_ResponseForm).decode
_decode_error = msgspec.msgpack.Decoder(_Error).decode
_T = TypeVar("_T")
_CLASSES: dict[str, type[errors.GatewayError]] = {
    name: each
    for name, each in vars(errors).items()
    if isinstance(each, type) and issubclass(each, errors.GatewayError)
}
_OWN = vars(errors.GatewayError("")).keys()


def version_of(header: Buffer) -> int:
    """The version a header was written in, whatever else it holds. Raises `BadMessage` when it is empty."""
    if not header:
        raise BadMessage("a message has an empty header")
    return header[0]


def pack_request(request: InferRequest) -> _Packed:
    """The header and the parts of the payload, which are not copied: views of the request's tensors where they can be.

    Not in it: form, admitted, deadline and idempotency key. Raises `InvalidArgument` for what msgpack cannot carry, such as a parameter
    of more than 64 bits.
    """
    described, parts = _described(request.inputs)
    try:
        form = _encode(
            (
                request.model_name,
                request.model_version,
                described,
                [(output.name, output.classification) for output in request.outputs] if request.outputs else (),
                request.rows,
                request.size,
                (request.signature,),
            )
        )
        parameters = dict(request.parameters) if request.parameters else _NONE
        body = (form, request.id, parameters, request.priority, request.tenant)
        return _REQUEST + _encode((*body, request.callers) if request.callers else body), parts
    except (OverflowError, TypeError, ValueError) as problem:
        raise errors.InvalidArgument(
            f"{errors.request_prefix(request.id)}the request cannot be queued: {problem}"
        ) from None


def unpack_request(header: Buffer, payload: Buffer) -> InferRequest:
    """The request of a message, its tensors views of `payload`. Raises `BadMessage`, and nothing else.

    The elements of BYTES tensors are read now, because an engine needs them all and only reading shows damage.
    """
    read = _read(header, _REQUEST, _decode_request)
    form = _request_form(read.form)
    inputs = _tensors(form.layout, payload)
    if form.layout.strings:
        _read_elements(inputs)
    return InferRequest(
        form.model,
        inputs,
        form.model_version,
        read.id,
        form.outputs,
        read.parameters or NO_PARAMETERS,
        None,
        read.priority,
        read.tenant,
        None,
        form.rows,
        form.size,
        form.signature,
        callers=read.callers,
    )


def pack_response(response: InferResponse) -> _Packed:
    """As `pack_request`. Raises `Internal` for what msgpack cannot carry."""
    described, parts = _described(response.outputs)
    timings = response.timings
    try:
        form = _encode((response.model_name, response.model_version, described, response.digest))
        parameters = dict(response.parameters) if response.parameters else _NONE
        times = None if timings is None else astuple(timings)
        return _RESPONSE + _encode((form, response.id, parameters, times, response.final)), parts
    except (OverflowError, TypeError, ValueError) as problem:
        raise errors.Internal(
            f"{errors.request_prefix(response.id)}the response cannot be sent back: {problem}"
        ) from None


def unpack_response(header: Buffer, payload: Buffer) -> InferResponse:
    """As `unpack_request`, but that the elements of BYTES tensors are not looked at: who wants them reads them."""
    read = _read(header, _RESPONSE, _decode_response)
    form = _response_form(read.form)
    return InferResponse(
        form.model,
        form.model_version,
        _tensors(form.layout, payload),
        read.id,
        read.parameters or NO_PARAMETERS,
        None if read.timings is None else Timings(*read.timings),
        read.final,
        form.digest,
    )


def pack_error(error: errors.GatewayError) -> bytes:
    """The header of an error, which has no payload: its class, message, `retry_after` and other plain attributes.

    A class that is not in errors.py goes as the nearest of its bases that is.
    """
    name = next(each.__name__ for each in type(error).__mro__ if _CLASSES.get(each.__name__) is each)
    more = {key: value for key, value in vars(error).items() if key not in _OWN}
    try:
        return _ERROR + _encode((name, error.message, error.retry_after, more))
    except (OverflowError, TypeError, ValueError):
        # An error always has a way home, if not with all that it carried.
        return _ERROR + _encode((name, error.message.encode(errors="replace").decode(), error.retry_after, {}))


def unpack_error(header: Buffer) -> errors.GatewayError:
    """The error of a message; `Internal` where this release does not know its class. Raises `BadMessage`."""
    read = _read(header, _ERROR, _decode_error)
    kind = _CLASSES.get(read.name, errors.Internal)
    error = kind(read.message, read.retry_after)
    # Nothing that comes over the network changes what a class answers with.
    vars(error).update({key: value for key, value in read.more.items() if not hasattr(kind, key)})
    return error


def _described(tensors: dict[str, Tensor]) -> tuple[list[tuple[str, str, tuple[int, ...], int]], list[Buffer]]:
    """What a header says of the tensors, and their wire bytes."""
    # One plain loop: two comprehensions take twice as long for the few tensors that a request has.
    described: list[tuple[str, str, tuple[int, ...], int]] = []
    parts: list[Buffer] = []
    for name, tensor in tensors.items():
        wire = tensor.wire
        parts.append(wire)
        described.append((name, _NAMES[tensor.datatype], tensor.shape, len(wire)))
    return described, parts


_NAMES = {datatype: datatype.value for datatype in DataType}  # `value` itself is a property written in Python


def _read(header: Buffer, kind: bytes, decode: Callable[[Buffer], _T]) -> _T:
    if header[:2] != kind:
        raise _misdirected(header, kind)
    return _decoded(header[2:], kind, decode)


def _decoded(body: Buffer, kind: bytes, decode: Callable[[Buffer], _T]) -> _T:
    try:
        return decode(body)
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError, RecursionError) as problem:
        raise BadMessage(f"the header of {_KINDS[kind[1]]} cannot be read: {problem}") from None


def _misdirected(header: Buffer, kind: bytes) -> BadMessage:
    version = version_of(header)
    if version != VERSION:
        return BadMessage(
            f"{_KINDS[kind[1]]} is written in version {version}, this release reads version {VERSION}; "
            "run the same release in all processes"
        )
    found = _KINDS.get(header[1], "a message of an unknown kind") if len(header) > 1 else "a cut header"
    return BadMessage(f"expected {_KINDS[kind[1]]}, got {found}")


class _Layout(msgspec.Struct, frozen=True, gc=False):
    """Where in a payload of `size` bytes the tensors lie: name, type, shape, begin and end of each."""

    cuts: tuple[tuple[str, DataType, tuple[int, ...], int, int], ...]
    size: int
    strings: bool  # whether there is a BYTES tensor


class _RequestLayout(msgspec.Struct, frozen=True, gc=False):
    model: str
    model_version: str
    layout: _Layout
    outputs: tuple[RequestedOutput, ...]
    rows: int
    size: int
    signature: Hashable


class _ResponseLayout(msgspec.Struct, frozen=True, gc=False):
    model: str
    model_version: str
    layout: _Layout
    digest: str


@lru_cache(maxsize=_REMEMBERED)
def _request_form(form: bytes) -> _RequestLayout:
    read = _decoded(form, _REQUEST, _decode_request_form)
    if len(read.signature) != 1:
        raise BadMessage(f"a request to model '{read.model}' has {len(read.signature)} signatures instead of one")
    (signature,) = read.signature
    outputs = tuple([RequestedOutput(*output) for output in read.outputs])
    return _RequestLayout(
        read.model, read.model_version, _layout(read.tensors), outputs, read.rows, read.size, signature
    )


@lru_cache(maxsize=_REMEMBERED)
def _response_form(form: bytes) -> _ResponseLayout:
    read = _decoded(form, _RESPONSE, _decode_response_form)
    return _ResponseLayout(read.model, read.model_version, _layout(read.tensors), read.digest)


def _layout(described: _Tensors) -> _Layout:
    """Check that these tensors can be."""
    at = 0
    cuts: dict[str, tuple[str, DataType, tuple[int, ...], int, int]] = {}
    for name, datatype, shape, size in described:
        _check_size(name, datatype, shape, size)
        cuts[name] = (name, datatype, shape, at, at + size)
        at += size
    if len(cuts) != len(described):
        raise BadMessage(f"a message has {len(described)} tensors, but only {len(cuts)} names for them")
    strings = any(datatype is DataType.BYTES for _, datatype, _, _ in described)
    return _Layout(tuple(cuts.values()), at, strings)


def _check_size(name: str, datatype: DataType, shape: tuple[int, ...], size: int) -> None:
    """Raise `BadMessage` unless a tensor of this type and shape can have so many bytes."""
    count = math.prod(shape)
    if datatype is DataType.BYTES:
        fits = count * 4 <= size and (count > 0 or size == 0)
    else:
        fits = count * datatype.itemsize == size
    if not fits:
        raise BadMessage(f"tensor '{name}' has {size} bytes, which is not {datatype.name} of shape {list(shape)}")
    if math.prod([dim or 1 for dim in shape]) > _MAX_ELEMENTS:  # a dimension of 0 hides the others
        raise BadMessage(f"tensor '{name}' has the shape {list(shape)}, which is more than an array can have")


def _tensors(layout: _Layout, payload: Buffer) -> dict[str, Tensor]:
    if len(payload) != layout.size:
        raise BadMessage(f"the tensors of a message have {layout.size} bytes, its payload has {len(payload)}")
    # Copying a few bytes is quicker than making a view of them.
    source = payload if layout.size <= _SMALL else memoryview(payload)
    return {name: Tensor(datatype, shape, source[start:end]) for name, datatype, shape, start, end in layout.cuts}


def _read_elements(inputs: dict[str, Tensor]) -> None:
    """Read the elements of BYTES tensors, which stay with them. Raises `BadMessage`."""
    for name, tensor in inputs.items():
        if tensor.datatype is DataType.BYTES:
            try:
                _ = tensor.array
            except ValueError as problem:
                raise BadMessage(f"tensor '{name}' of a request: {problem}") from None
