"""Whether a message is of this deployment: a signature under a key that all its processes have."""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Any, cast

from gateway.message import BadMessage
from gateway.types import Buffer


class Seal:
    """Tells messages of this deployment from others: HMAC-SHA256 under a key that all its processes have.

    Without a key nothing is signed and everything passes. HMAC-SHA256 seals 600 KB in a third of keyed BLAKE2b's time
    (0.61 ms against 1.77) where the processor has SHA instructions.
    """

    def __init__(self, key: bytes | None) -> None:
        """Raises `ValueError` for a key of fewer than 16 bytes."""
        self._states: tuple[Any, Any] | None = None
        self.size = 0  # bytes of a signature
        if key is None:
            return
        self.size = hashlib.sha256().digest_size
        if len(key) < _LEAST_KEY:
            raise ValueError(f"the key has {len(key)} bytes; it needs {_LEAST_KEY} or more, and best 32 random ones")
        # The key's own two blocks are hashed once, as RFC 2104 section 4 suggests: 2 us of 6 for a small message.
        block = (hashlib.sha256(key).digest() if len(key) > _BLOCK else key).ljust(_BLOCK, b"\0")
        inner, outer = (bytes(byte ^ mask for byte in block) for mask in (0x36, 0x5C))
        self._states = hashlib.sha256(inner), hashlib.sha256(outer)

    def sign(self, *parts: Buffer) -> bytes:
        """The signature of these parts, in this order and division; empty without a key."""
        if self._states is None:
            return b""
        inner, outer = self._states[0].copy(), self._states[1].copy()
        inner.update(struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts)))
        for part in parts:
            inner.update(part)
        outer.update(inner.digest())
        return cast("bytes", outer.digest())

    def verify(self, signature: Buffer, *parts: Buffer) -> None:
        """Raises `BadMessage` unless `sign` gave this signature for these parts, under the same key."""
        if self._states is not None and not hmac.compare_digest(signature, self.sign(*parts)):
            raise BadMessage(
                "a message is not signed with this deployment's key; give all processes the same --queue-key-file, and "
                "let nobody else write to the queue's Redis"
            )


_BLOCK = 64  # bytes of SHA-256
_LEAST_KEY = 16
