"""What an operator may choose about the gRPC listener, with Triton's defaults. Plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gateway.transport.header_rules import NO_RULES, HeaderRules

INT32_MAX = 2_147_483_647  # bytes of a message, as Triton and its clients have it


@dataclass(frozen=True, slots=True)
class Keepalive:
    """HTTP/2 pings and the age of connections, in milliseconds; an age of 0 means no limit.

    The native front keeps `time_ms`, `timeout_ms` and `permit_without_calls`; it counts no client's pings.
    """

    time_ms: int = 7_200_000
    timeout_ms: int = 20_000
    permit_without_calls: bool = False
    max_pings_without_data: int = 2
    min_recv_ping_interval_without_data_ms: int = 300_000
    max_ping_strikes: int = 2
    max_connection_age_ms: int = 0
    max_connection_age_grace_ms: int = 0


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. With `client_root`, clients must show a certificate signed by it."""

    certificate: Path
    key: Path
    client_root: Path | None = None


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """Where and how to listen. Port 0 takes a free one; `grace` is how many seconds a stop waits for answers.

    `max_request_tensors` is how many inputs, and how many outputs, one request may name. The native front knows
    no `max_connections` and no `compression` of answers, with which grpcio is in charge. `native` False keeps grpcio in charge even where `pygrpc_native` is installed. With `share`
    other processes may listen on the port too.
    """

    host: str = "127.0.0.1"
    port: int = 8001
    max_request_bytes: int = INT32_MAX
    max_request_tensors: int = 256
    max_connections: int = 1000
    keepalive: Keepalive = Keepalive()
    tls: Tls | None = None
    compression: Literal["none", "low", "medium", "high"] = "none"
    native: bool = True
    grace: float = 30.0
    share: bool = False
    rules: HeaderRules = NO_RULES
