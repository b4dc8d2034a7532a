"""The settings as each transport wants them: limits, options and what it takes from whoever started the process."""

from __future__ import annotations

import socket

from gateway import errors
from gateway.config.settings import Settings
from gateway.config.trace import read_trace_config
from gateway.transport.auth import Tokens
from gateway.transport.grpc import GrpcOptions, Keepalive, Tls
from gateway.transport.header_rules import HeaderRules
from gateway.transport.http import HttpLimits, TlsFiles


def inherited(descriptor: int | None) -> socket.socket | None:
    """A listening socket that whoever started this process made. Raises `InvalidArgument` when it is none."""
    try:
        return None if descriptor is None else socket.socket(fileno=descriptor)
    except OSError as problem:
        raise errors.InvalidArgument(f"descriptor {descriptor} is no open socket: {problem.strerror}") from None


def tokens(settings: Settings) -> Tokens | None:
    """What callers must show; None when they need not. Raises `InvalidArgument` for a file that has no tokens."""
    if settings.token_file is None:
        return None
    try:
        return Tokens.load(settings.token_file)
    except ValueError as problem:
        raise errors.InvalidArgument(f"--token-file: {problem}") from None


def http_tls(settings: Settings) -> TlsFiles | None:
    """The certificate for HTTPS; None for HTTP."""
    if settings.http_tls_cert is None or settings.http_tls_key is None:
        return None
    return TlsFiles(settings.http_tls_cert, settings.http_tls_key)


def http_limits(settings: Settings) -> HttpLimits:
    """What a body may have."""
    return HttpLimits(
        max_request_bytes=settings.max_request_bytes,
        max_inflight_bytes=settings.max_inflight_bytes,
        max_input_size=settings.http_max_input_size,
        max_request_tensors=settings.max_request_tensors,
        max_tensor_elements=settings.max_tensor_elements,
        max_json_depth=settings.max_json_depth,
    )


def grpc_options(settings: Settings) -> GrpcOptions:
    """How the gRPC server listens and what it takes."""
    tls = None
    if settings.grpc_use_ssl and settings.grpc_server_cert and settings.grpc_server_key:
        root = settings.grpc_root_cert if settings.grpc_use_ssl_mutual else None
        tls = Tls(settings.grpc_server_cert, settings.grpc_server_key, root)
    return GrpcOptions(
        host=settings.grpc_address,
        port=settings.grpc_port,
        keepalive=Keepalive(
            time_ms=settings.grpc_keepalive_time,
            timeout_ms=settings.grpc_keepalive_timeout,
            permit_without_calls=settings.grpc_keepalive_permit_without_calls,
            max_pings_without_data=settings.grpc_http2_max_pings_without_data,
            min_recv_ping_interval_without_data_ms=settings.grpc_http2_min_recv_ping_interval_without_data,
            max_ping_strikes=settings.grpc_http2_max_ping_strikes,
            max_connection_age_ms=settings.grpc_max_connection_age,
            max_connection_age_grace_ms=settings.grpc_max_connection_age_grace,
        ),
        tls=tls,
        compression=settings.grpc_infer_response_compression_level,
        max_request_bytes=settings.max_request_bytes,
        max_request_tensors=settings.max_request_tensors,
        max_connections=settings.max_connections,
        grace=float(settings.exit_timeout_secs),
        share=settings.share_ports,
        rules=HeaderRules.of(
            settings.grpc_restricted_protocol,
            settings.grpc_header_forward_pattern,
            grpc=True,
            traced=_traced(settings),
        ),
    )


def http_rules(settings: Settings) -> HeaderRules:
    """What HTTP headers decide."""
    pattern = settings.http_header_forward_pattern
    return HeaderRules.of(settings.http_restricted_api, pattern, traced=_traced(settings))


def _traced(settings: Settings) -> bool:
    return read_trace_config(settings.trace_config).mode == "opentelemetry"
