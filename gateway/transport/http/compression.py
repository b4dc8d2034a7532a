"""Content-Encoding and Accept-Encoding: gzip and deflate (zlib format), as Triton does them.

Large bodies are packed and unpacked on a thread, where zlib lets go of the interpreter.
"""

from __future__ import annotations

import asyncio
import zlib

from gateway.errors import InvalidArgument, Unsupported
from gateway.transport.http.document import too_large

_INLINE = 1 << 15  # up to here a hop to a thread costs more than the work
_LEVEL = 1  # tensors hardly compress, so a higher level buys time for nothing
_WBITS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
_DETECT = zlib.MAX_WBITS | 32


class UnsupportedEncoding(Unsupported):
    """A request's Content-Encoding that is not done here; its answer lists those that are."""


async def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its Content-Encoding.

    Raises UnsupportedEncoding, InvalidArgument for a body that is not in the encoding or unpacks to more than
    `limit` bytes.
    """
    if encoding == "identity":
        return body
    if encoding not in _WBITS:
        raise UnsupportedEncoding("Unsupported compression type")
    # What it unpacks to is not known, so it is the small body that may be the long work.
    return await asyncio.to_thread(_decompress, body, limit)


def _decompress(body: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj(_DETECT)
    try:
        plain = unpacker.decompress(body, limit + 1)
    except zlib.error as problem:
        raise InvalidArgument(f"the request body does not match its Content-Encoding: {problem}") from None
    if len(plain) > limit:
        raise too_large(len(plain), limit)
    if not unpacker.eof:
        raise InvalidArgument("the compressed request body ends too early")
    return plain


async def compress(body: bytes, encoding: str) -> bytes:
    """The body in `encoding`, gzip or deflate."""
    if len(body) <= _INLINE:
        return _compress(body, encoding)
    return await asyncio.to_thread(_compress, body, encoding)


def _compress(body: bytes, encoding: str) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WBITS[encoding])
    return packer.compress(body) + packer.flush()


def accepted(header: str) -> str:
    """The encoding that an Accept-Encoding header ranks highest of gzip, deflate and identity; the first of equals."""
    best, best_weight = "identity", 0.0
    for entry in header.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        if name in _WBITS or name == "identity":
            weight = _weight(parameters)
            if weight > best_weight:
                best, best_weight = name, weight
    return best


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0
    return 1.0
