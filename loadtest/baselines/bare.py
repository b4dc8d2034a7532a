"""How near to ONNX Runtime alone a server can come at one connection: the least server there can be, against it, in turns.

One thread with a blocking socket reads a request, runs the model on all cores and writes the answer: no event loop, no queue, no
child process, no checks. What it adds to the p50 of (b) is what this machine's sockets, copies and wake-ups cost anybody.

    python -m loadtest.baselines.bare [--model efficientnet_lite0] [--repository model_repo] [--rounds 8] [--seconds 3]

For models with one input and one output; needs wrk.
"""

from __future__ import annotations

import argparse
import re
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime as ort

from loadtest.bench import bodies, generators, rawort
from loadtest.record import ROOT
from loadtest.samples import model_file, sample

_LENGTHS = re.compile(rb"\n(inference-header-)?content-length: *(\d+)", re.IGNORECASE)


def serve(file: Path, model: str) -> None:
    """Print the port, then answer one connection after the other until the process is ended."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = rawort.LONE.threads
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    ((name, like),) = sample(model).inputs.items()
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    buffer = bytearray(like.nbytes + (1 << 16))
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, suppress(ConnectionError):  # wrk leaves in the middle of a request
            while start := _receive(connection, buffer):
                array = np.frombuffer(buffer[start : start + like.nbytes], like.dtype).reshape(like.shape)
                answer = session.run(None, {name: array})[0].tobytes()
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)


def _receive(connection: socket.socket, buffer: bytearray) -> int:
    """Where in the buffer the tensor of the next request starts; 0 when the client has gone."""
    view, got, wanted, head = memoryview(buffer), 0, -1, 0
    while got != wanted:
        count = connection.recv_into(view[got:])
        if not count:
            return 0
        got += count
        if wanted < 0 and (head := buffer.find(b"\r\n\r\n", 0, got) + 4) > 3:
            lengths = {bool(prefix): int(value) for prefix, value in _LENGTHS.findall(buffer, 0, head)}
            wanted = head + lengths[False]
            head += lengths[True]
    return head


def main() -> None:
    """Print both p50 of each round and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.baselines.bare", description=__doc__)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repo")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    file = model_file(options.repository, options.model)
    if options.serve:
        serve(file, options.model)
        return
    command = [sys.executable, "-m", "loadtest.baselines.bare", *sys.argv[1:], "--serve"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            _compare(f"http://127.0.0.1:{int(server.stdout.readline())}", file, options)
        finally:
            server.kill()


def _compare(base: str, file: Path, options: argparse.Namespace) -> None:
    wire, ratios = bodies.http_binary(sample(options.model)), []
    for number in range(options.rounds):
        alone = rawort.measure(file, options.model, rawort.LONE, options.seconds).p50_us
        load = generators.run(base, wire, 1, options.seconds, None)
        ratios.append(load.p50_us / alone)
        print(
            f"#{number} ort {alone / 1e3:.2f} ms, bare server {load.p50_us / 1e3:.2f} ms, errors {load.errors}",
            flush=True,
        )
    print(f"p50 of one connection, bare server against (b): {_spread(ratios)}")


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()
