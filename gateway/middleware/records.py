"""What is kept of a request as bytes, for Redis.

A record is a signature, a head, the digest of the request and, where it holds a response, its message (see
`gateway.message`). The signature, there with a deployment key only, is over the key's name too, so that who can
write to Redis can neither make an answer nor move one.
"""

from __future__ import annotations

import secrets
import struct

from gateway.message import BadMessage, pack_response, unpack_response
from gateway.middleware.store import Kept
from gateway.queues.redis.seal import Seal
from gateway.types import Buffer

_PENDING, _ANSWERED, _LARGE = b"1p", b"1r", b"1l"  # the format's version, and the kind
_KINDS = (_PENDING, _ANSWERED, _LARGE)
_HEAD = struct.Struct("<2sBI")  # kind, bytes of the digest, bytes of the message's header


class Records:
    """Reads and writes the records of one deployment. `name` is that of the key in Redis."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal

    def pending(self, name: str, body: bytes) -> bytes:
        """A claim, unlike any other."""
        return self._sealed(name, _PENDING, body, b"", secrets.token_bytes(16))

    def pack(self, name: str, kept: Kept) -> bytes:
        """An answer. Raises `Internal` for one that a message cannot carry."""
        if kept.response is None:
            return self._sealed(name, _LARGE, kept.body, b"")
        header, parts = pack_response(kept.response)
        return self._sealed(name, _ANSWERED, kept.body, header, *parts)

    def unpack(self, name: str, value: bytes) -> Kept:
        """What a record says; tensors are views of it. Raises `BadMessage`."""
        signature, record = value[: self._seal.size], memoryview(value)[self._seal.size :]
        self._seal.verify(signature, name.encode(), record)
        try:
            kind, body_size, header_size = _HEAD.unpack_from(record)
        except struct.error:
            raise BadMessage("a record is cut short") from None
        if kind not in _KINDS:
            raise BadMessage(f"a record is of kind {kind!r}; run the same release in all processes")
        header = _HEAD.size + body_size
        body = bytes(record[_HEAD.size : header])
        if kind != _ANSWERED:
            return Kept(body, None, kind == _PENDING)
        payload = header + header_size
        return Kept(body, unpack_response(record[header:payload], record[payload:]))

    def _sealed(self, name: str, kind: bytes, body: bytes, header: bytes, *parts: Buffer) -> bytes:
        record = b"".join((_HEAD.pack(kind, len(body), len(header)), body, header, *parts))
        return self._seal.sign(name.encode(), record) + record
