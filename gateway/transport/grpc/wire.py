"""A `ModelInferRequest` taken apart on its top level, without copying a tensor.

The raw tensors are views into the message and the id is taken out, so that what is left, the head, is the
same bytes for every request of a kind and can be parsed once. Protobuf's own parser sees the head only; a
message this module finds unusual is handed to it whole.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from gateway.errors import InvalidArgument
from gateway.types import Buffer

_ID = 0x1A  # field 3, length-delimited
_RAW = 0x3A  # field 7, length-delimited
RAW_TAG = bytes((_RAW,))
_MAX_FIELDS = 16_384  # inputs, outputs, parameters and raw tensors together; a walk stays under 10 ms


class Parts(NamedTuple):
    """The request id, the raw tensors in order, and every other field as serialized protobuf.

    `ordered` when the message is the head, byte for byte, with the raw tensors behind it and nothing else.
    """

    head: bytes
    id: str
    raw: list[Buffer]
    ordered: bool


def split(payload: bytes) -> Parts:
    """Take a serialized `ModelInferRequest` apart. Raises `InvalidArgument` when it is not one."""
    try:
        return _walk(payload)
    except (IndexError, ValueError):
        return _parse(payload)


def malformed() -> InvalidArgument:
    """Bytes that protobuf cannot read."""
    return InvalidArgument(
        "the request is not a valid inference.ModelInferRequest message; build it from Triton's grpc_service.proto"
    )


def length(size: int) -> bytes:
    """A size as a protobuf varint."""
    if size < 128:
        return bytes((size,))
    digits = bytearray()
    while size > 127:
        digits.append(size & 127 | 128)
        size >>= 7
    digits.append(size)
    return bytes(digits)


def _walk(payload: bytes) -> Parts:
    """Raises IndexError or ValueError on anything but well-formed length-delimited fields of a known kind."""
    view = memoryview(payload)
    heads: list[bytes] = []
    raw: list[Buffer] = []
    request_id = ""
    at = kept = fields = cuts = 0
    end = len(payload)
    while at < end:
        start = at
        tag, size = payload[at], payload[at + 1]
        at += 2
        if tag & 0x87 != 2 or fields == _MAX_FIELDS:
            raise ValueError
        if size > 127:
            size, at = _varint(payload, at - 1)
        stop = at + size
        if tag == _RAW:
            heads.append(payload[kept:start])
            raw.append(view[at:stop])
            cuts += kept != start  # something stood between this raw tensor and the last
            kept = stop
        elif tag == _ID:
            heads.append(payload[kept:start])
            request_id = str(view[at:stop], "utf-8")
            cuts += 2  # an id, be it empty, may stand between others
            kept = stop
        at = stop
        fields += 1
    if at > end:
        raise ValueError
    heads.append(payload[kept:])
    ordered = bool(raw) and cuts == 1 and kept == end
    return Parts(b"".join(heads), request_id, raw, ordered)


def _varint(payload: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = payload[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError


def _parse(payload: bytes) -> Parts:
    try:
        message = service_pb2.ModelInferRequest.FromString(payload)
    except DecodeError:
        raise malformed() from None
    raw = list(message.raw_input_contents)
    count = len(raw) + len(message.inputs) + len(message.outputs) + len(message.parameters)
    if count > _MAX_FIELDS:
        raise InvalidArgument(f"the request has {count} tensors and parameters, at most {_MAX_FIELDS} are accepted")
    request_id = message.id
    message.ClearField("raw_input_contents")
    message.ClearField("id")
    return Parts(message.SerializeToString(), request_id, raw, ordered=False)
