"""What the HTTP transport says when it does not answer: errors as `{"error": ...}`, never a trace."""

from __future__ import annotations

import logging
import math
import secrets

import orjson

from gateway.errors import GatewayError, Unauthenticated
from gateway.telemetry import log_event
from gateway.transport.http.compression import UnsupportedEncoding

Reply = tuple[int, list[tuple[str, str]], bytes]
"""Status, headers and body."""

JSON = ("content-type", "application/json")


def error_reply(error: GatewayError) -> Reply:
    """The reply that carries an error to the client."""
    headers = [JSON]
    if isinstance(error, Unauthenticated):
        headers.append(("www-authenticate", "Bearer"))
    elif isinstance(error, UnsupportedEncoding):
        headers.append(("accept-encoding", "gzip, deflate"))
    elif error.retry_after is not None:
        # RFC 9110 knows whole seconds only, which is long for who was refused by milliseconds.
        headers.append(("retry-after", str(max(1, math.ceil(error.retry_after)))))
        headers.append(("retry-after-ms", str(max(1, math.ceil(error.retry_after * 1000)))))
    # A message may quote what the client sent, and half a surrogate pair has no UTF-8.
    message = error.message.encode(errors="replace").decode()
    return error.http, headers, orjson.dumps({"error": message})


def fault_reply(fault: Exception, path: str) -> Reply:
    """The reply to a request that met a fault of ours; the fault goes to the log under the id the client sees."""
    incident = secrets.token_hex(6)
    log_event("http_fault", logging.ERROR, fault, id=incident, path=path)
    text = f"internal error, request id {incident}; the server's log has the cause"
    return 500, [JSON], orjson.dumps({"error": text})
