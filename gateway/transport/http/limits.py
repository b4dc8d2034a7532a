"""The limits of the HTTP transport: one value object, handed down from the settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a request may be at most. Bytes are bytes on the wire unless said otherwise."""

    max_request_bytes: int = 256 << 20
    max_inflight_bytes: int = 1 << 30  # of the large bodies that are arriving, all together
    max_input_size: int = 64 << 20  # of JSON, of a raw binary request, and of a decompressed body, as in Triton
    max_request_tensors: int = 256  # inputs, and outputs, of one request
    max_tensor_elements: int = 1 << 28
    max_json_depth: int = 100
