"""One checked request with a real client, before and after each run: the load generators do not read answers.

For gRPC this is the only place where a wrong `grpc-status` in a trailer is seen directly.
"""

from __future__ import annotations

import http.client

import grpc

from loadtest.bench import bodies
from loadtest.samples import Arrays, matches


class ProbeError(RuntimeError):
    """The server's answer is an error, or is wrong."""


def _post(port: int, wire: bodies.Wire) -> tuple[bytes, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", wire.path, wire.body, wire.headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        message = f"{wire.path} answered {response.status}: {body[:300]!r}"
        raise ProbeError(message)
    return body, response.getheader(bodies.HEADER_LENGTH)


def _call(port: int, wire: bodies.Wire) -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)]) as channel:
        call = channel.unary_unary(wire.path, request_serializer=bytes, response_deserializer=bytes)
        try:
            return bytes(call(wire.body[5:], timeout=30))
        except grpc.RpcError as error:
            message = f"ModelInfer failed: {error}"
            raise ProbeError(message) from error


def check(port: int, wire: bodies.Wire, want: Arrays) -> None:
    """Send the request once and compare the answer with the reference; raises ProbeError."""
    if wire.path == bodies.GRPC_PATH:
        got = bodies.parse_grpc(_call(port, wire))
    elif wire.path.startswith("/infer/"):
        got = bodies.parse_raw(_post(port, wire)[0], want)
    else:
        got = bodies.parse_http(*_post(port, wire))
    if not matches(got, want):
        message = f"{wire.path} answered the wrong values"
        raise ProbeError(message)
