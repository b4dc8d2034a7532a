"""The `Idempotency-Key` of a request, as HTTP's header and gRPC's metadata carry it."""

from __future__ import annotations

from gateway.errors import InvalidArgument

HEADER = "idempotency-key"
MAX_LENGTH = 255


def checked(key: str) -> str:
    """`key` itself. Raises `InvalidArgument` for one that cannot tell requests apart, or is no key at all."""
    if not 0 < len(key) <= MAX_LENGTH or not key.isprintable():
        raise InvalidArgument(
            f"'{HEADER}' must be 1 to {MAX_LENGTH} printable characters, such as a UUID made for this request, got "
            f"{len(key)} characters"
        )
    return key
