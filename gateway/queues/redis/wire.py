"""What travels in the streams: the fields of a request, the frame of an answer, broadcasts, and how replies are read.

A request is an entry of its lane's stream: `e` the envelope, `h` the header of `message.pack_request`, then `p` the
tensors' bytes or `f` where they lie, and `s` the signature of all of it. Everything sent to one process within a turn
of the event loop is one entry of its reply stream, each answer a field: the id it answers and a frame.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from gateway.message import BadMessage
from gateway.queues.redis.seal import Seal
from gateway.types import Buffer

ENVELOPE, HEADER, PAYLOAD, REFERENCE, SIGNATURE = b"e", b"h", b"p", b"f", b"s"

ID_BYTES = 16
RESPONSE, ELSEWHERE, ERROR, REPORT, WORKING, TOLD = b"r", b"R", b"e", b"c", b"w", b"q"
"""Kinds of frames: a response, one whose tensors lie elsewhere, an error; a command's report, and that it is under way;
a question's answer.
"""

_PREFIX = struct.Struct("<cI")  # kind, bytes of the header
_BLOCK = 256  # ids made of one read of the system's randomness


class Envelope(msgspec.Struct, array_like=True, gc=False):
    """How to handle a request. `budget_ms` counts from the time of the entry's id; 0 for a request without a deadline.

    `sequence` is the call that began the sequence it is part of, if it is of one, and `after` the call before it of
    its gateway, if that was not answered yet: without that one it is not to run.
    """

    call: bytes
    reply_to: str
    budget_ms: int
    sequence: bytes = b""
    after: bytes = b""


class Broadcast(msgspec.Struct, array_like=True, gc=False):
    """One event for every process: what, from whom, and its own data."""

    kind: str
    sender: str
    id: bytes = b""
    text: str = ""
    parameters: dict[str, str] = {}
    ids: list[bytes] = []


class Frame(NamedTuple):
    """One field of an entry in a reply stream."""

    call: bytes
    kind: bytes
    header: bytes
    rest: memoryview


encode = msgspec.msgpack.Encoder().encode
_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
_decode_broadcast = msgspec.msgpack.Decoder(Broadcast).decode


def ids() -> Iterator[bytes]:
    """128-bit ids that nobody can guess."""
    while True:
        block = os.urandom(ID_BYTES * _BLOCK)
        for start in range(0, len(block), ID_BYTES):
            yield block[start : start + ID_BYTES]


def read_envelope(data: bytes) -> Envelope:
    """Raises `BadMessage`."""
    try:
        return _decode_envelope(data)
    except msgspec.DecodeError as problem:
        raise BadMessage(f"the envelope of a request cannot be read: {problem}") from None


def read_broadcast(data: bytes) -> Broadcast:
    """Raises `BadMessage`."""
    try:
        return _decode_broadcast(data)
    except msgspec.DecodeError as problem:
        raise BadMessage(f"an event cannot be read: {problem}") from None


def frame(kind: bytes, header: bytes, parts: Sequence[Buffer], seal: Seal, call: bytes) -> bytes:
    """The value of a field in a reply stream, signed as an answer to this call."""
    if not seal.size:
        return b"".join((_PREFIX.pack(kind, len(header)), header, *parts))
    rest = b"".join(parts)
    return b"".join((_PREFIX.pack(kind, len(header)), header, rest, seal.sign(call, kind, header, rest)))


def read_frame(name: bytes, value: bytes, seal: Seal) -> Frame:
    """A field of a reply stream. Raises `BadMessage`."""
    if len(name) < ID_BYTES or len(value) < _PREFIX.size + seal.size:
        raise BadMessage("a field of the reply stream is too short")
    call = name[:ID_BYTES]
    kind, length = _PREFIX.unpack_from(value)
    begin, end = _PREFIX.size + length, len(value) - seal.size
    if begin > end:
        raise BadMessage("an answer is shorter than it says")
    header, rest = value[_PREFIX.size : begin], memoryview(value)[begin:end]
    seal.verify(value[end:], call, kind, header, rest)
    return Frame(call, kind, header, rest)


def entries(reply: Any) -> Iterator[tuple[bytes, bytes, dict[bytes, bytes]]]:
    """Stream, id and fields of each entry in the reply of XREAD or XREADGROUP."""
    for stream, found in reply or ():
        for entry, values in found:
            if values is not None:  # deleted while it was pending
                yield stream, entry, fields(values)


def fields(values: Sequence[bytes]) -> dict[bytes, bytes]:
    """The fields of an entry, in their order."""
    return dict(zip(values[::2], values[1::2], strict=True))


def milliseconds(entry: bytes) -> int:
    """When an entry was made, by Redis' clock."""
    return int(entry.partition(b"-")[0])


def order(entry: bytes) -> tuple[int, int]:
    """An entry's id as something that compares."""
    first, _, second = entry.partition(b"-")
    return int(first), int(second or 0)
