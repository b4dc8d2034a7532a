"""PROTOCOL.md section 10: no waiting for Nagle."""

from __future__ import annotations

import json
import socket
import time

from tests.api.protocol.facts import HTTP, Http, Section

SECTION = Section("10")
fact = SECTION.fact
LINE = "A test server wrote headers and body in two sends"
BODY = json.dumps({"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}).encode()


def _asked(line: socket.socket, request: bytes) -> float:
    """Seconds to the end of the answer."""
    begun = time.perf_counter()
    line.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received or len(received) < _length(received):
        received += line.recv(65536)
    return time.perf_counter() - begun


def _length(received: bytes) -> int:
    head, _, _ = received.partition(b"\r\n\r\n")
    size = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(head) + 4 + int(size.split(b":")[1])


@fact(LINE, "answers on a kept connection do not wait for an acknowledgement", HTTP)
def _(on: Http) -> None:
    for path, body in (("/v2/models/m/infer", BODY), ("/v2/models/m/generate", b'{"IN":[1,2]}')):
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", on.port("http")), timeout=10) as line:
            # The kernel acknowledges the first of a connection at once, so it is the later ones that tell.
            told = sorted([_asked(line, head + body) for _ in range(40)][20:])
        assert told[len(told) // 2] < 0.035, (path, told)
