"""Triton's gRPC service over `Service`: `GrpcServer` listens, everything else is how."""

from gateway.transport.grpc.options import GrpcOptions, Keepalive, Tls
from gateway.transport.grpc.server import GrpcServer

__all__ = ["GrpcOptions", "GrpcServer", "Keepalive", "Tls"]
