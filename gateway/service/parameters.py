"""The request parameters that the protocol gives a meaning: `timeout` in microseconds, and `priority`."""

from __future__ import annotations

import time

from gateway import errors
from gateway.types import EMPTY_FINAL, InferRequest, Parameter


def apply_parameters(request: InferRequest) -> None:
    """Read the parameters the protocol gives a meaning: `timeout` (us) and `priority`."""
    for key in request.parameters:
        if key.startswith("triton_") and key != EMPTY_FINAL:
            raise errors.reserved_parameter()
    if timeout := _natural(request.parameters.get("timeout")):
        deadline = time.monotonic() + timeout / 1e6
        request.deadline = deadline if request.deadline is None else min(request.deadline, deadline)
    if priority := _natural(request.parameters.get("priority")):
        request.priority = priority


def _natural(value: Parameter | None) -> int:
    """A parameter that is a positive integer, at most what 64 bits hold with a sign; 0 for any other."""
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return min(max(value, 0), (1 << 63) - 1)
