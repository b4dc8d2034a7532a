"""What goes with an error status on gRPC beside code and text: when to try again, in each way that clients read it.

`grpc-status-details-bin` carries a `google.rpc.Status` with a `RetryInfo` and `retry-after-ms` the same as text, for
programs; `grpc-retry-pushback-ms` tells a gRPC library that retries by itself how long to wait. The native front
refuses to send that one, whose name is reserved, so behind it such a library keeps to its own backoff. The ModelStreamInfer call has no status for each
request, so there the text says it, and the parameter `retry_after_ms` of the empty response.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from google.rpc import error_details_pb2, status_pb2

from gateway.errors import GatewayError

Trailers: TypeAlias = tuple[tuple[str, str | bytes], ...]


def trailers(error: GatewayError, *, pushback: bool = True) -> Trailers:
    """The trailing metadata of an error's status; empty when nobody knows when to try again.

    `pushback` False leaves out what a server library may keep for itself.
    """
    milliseconds = retry_after_ms(error)
    if milliseconds is None:
        return ()
    details: Any = status_pb2.Status(code=error.grpc, message=error.message)
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(milliseconds)
    details.details.add().Pack(retry)
    said: Trailers = ("retry-after-ms", str(milliseconds)), ("grpc-status-details-bin", details.SerializeToString())
    return (*said, ("grpc-retry-pushback-ms", str(milliseconds))) if pushback else said


def retry_after_ms(error: GatewayError) -> int | None:
    """`retry_after` in whole milliseconds, at least one."""
    return None if error.retry_after is None else max(1, math.ceil(error.retry_after * 1000))
