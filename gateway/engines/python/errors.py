"""`pb_utils.TritonError` and `TritonModelException`, and what they are among the gateway's errors."""

from __future__ import annotations

import enum

from gateway import errors
from gateway.errors import GatewayError


class ErrorCode(enum.IntEnum):
    """TRITONSERVER_Error_Code."""

    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7


_CLASSES: dict[ErrorCode, type[GatewayError]] = {
    ErrorCode.UNKNOWN: GatewayError,
    ErrorCode.INTERNAL: errors.Internal,
    ErrorCode.NOT_FOUND: errors.NotFound,
    ErrorCode.INVALID_ARG: errors.InvalidArgument,
    ErrorCode.UNAVAILABLE: errors.Unavailable,
    ErrorCode.UNSUPPORTED: errors.Unsupported,
    ErrorCode.ALREADY_EXISTS: errors.AlreadyExists,
    ErrorCode.CANCELLED: errors.Cancelled,
}


class TritonModelException(Exception):
    """What the code of a model raises, and what this module raises to it."""

    def message(self) -> str:
        """Its text."""
        return str(self)


class TritonError:
    """Why one request failed: a text for its client, and a code."""

    UNKNOWN = ErrorCode.UNKNOWN
    INTERNAL = ErrorCode.INTERNAL
    NOT_FOUND = ErrorCode.NOT_FOUND
    INVALID_ARG = ErrorCode.INVALID_ARG
    UNAVAILABLE = ErrorCode.UNAVAILABLE
    UNSUPPORTED = ErrorCode.UNSUPPORTED
    ALREADY_EXISTS = ErrorCode.ALREADY_EXISTS
    CANCELLED = ErrorCode.CANCELLED

    def __init__(self, message: str, code: int = ErrorCode.INTERNAL) -> None:
        self._message = message
        self._code = ErrorCode(code)

    @classmethod
    def from_gateway(cls, error: GatewayError) -> TritonError:
        """The nearest there is to an error of the gateway, its text unchanged."""
        # The most special class that Triton has a code for: an overload, say, is UNKNOWN to it.
        code = next((code for code, kind in _CLASSES.items() if code and isinstance(error, kind)), ErrorCode.UNKNOWN)
        return cls(error.message, code)

    def to_gateway(self) -> GatewayError:
        """The error that a client is answered with."""
        return _CLASSES[self._code](self._message)

    def code(self) -> ErrorCode:
        """Its code."""
        return self._code

    def message(self) -> str:
        """Its text."""
        return self._message

    def __str__(self) -> str:
        return self._message
