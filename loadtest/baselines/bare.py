"""How near to ONNX Runtime alone a server can come at one connection: two that do nothing of their own, against it, in turns.

- `least`: one thread with a blocking socket reads a request, runs the model on all cores and writes the answer. No event
  loop, no queue, no child process, no checks: what it adds to the p50 of (b) is what sockets, copies and wake-ups cost anybody.
- `hops`: the gateway's own HTTP server (granian) and a child process that has the model, with shared memory between them, and
  nothing else: no checks, no queue, no batches, no statistics. What it adds is the price of the gateway's architecture.

    python -m loadtest.baselines.bare [--model efficientnet_lite0] [--repository model_repo] [--rounds 8] [--seconds 3]

For models with one input and one output; needs wrk.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import re
import socket
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import uvloop
from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]

from gateway.engines import cores
from gateway.transport.http.handover import Body, Head
from gateway.transport.http.server import HttpServer
from loadtest.bench import bodies, generators, rawort
from loadtest.record import ROOT
from loadtest.samples import model_file, sample

_LENGTHS = re.compile(rb"\n(inference-header-)?content-length: *(\d+)", re.IGNORECASE)
_HEADERS = [("content-type", "application/octet-stream")]


class _Model:
    """Runs on all cores, ONNX Runtime's own threads on one each, as the gateway has it.

    They spin on after a run, which the gateway's do not: a next run that comes at once begins the sooner.
    """

    def __init__(self, file: Path, model: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = rawort.LONE.threads
        if places := cores.places(rawort.LONE.threads):
            rest = ";".join(str(core + 1) for core in places[1:])
            options.add_session_config_entry("session.intra_op_thread_affinities", rest)
        self._session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        ((self._name, self._like),) = sample(model).inputs.items()
        self.nbytes: int = self._like.nbytes

    def run(self, tensor: bytes | bytearray | memoryview) -> bytes:
        array = np.frombuffer(tensor, self._like.dtype).reshape(self._like.shape)
        return bytes(self._session.run(None, {self._name: array})[0].tobytes())


# --- least


def least(file: Path, model: str) -> None:
    """Print the port, then answer one connection after the other until the process is ended."""
    served = _Model(file, model)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    buffer = bytearray(served.nbytes + (1 << 16))
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, suppress(ConnectionError):  # wrk leaves in the middle of a request
            while start := _receive(connection, buffer):
                answer = served.run(buffer[start : start + served.nbytes])
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


# --- hops


def hops(file: Path, model: str) -> None:
    """The same through granian and a child process."""
    ours, theirs = socket.socketpair()
    size: int = next(iter(sample(model).inputs.values())).nbytes
    area = mmap.mmap(-1, size + (1 << 16))  # the input, and behind it the answer
    if os.fork() == 0:
        ours.close()
        _child(_Model(file, model), theirs, area)
    theirs.close()
    ours.recv(1)  # it is ready
    uvloop.run(_serve(ours, area, size))


def _child(model: _Model, line: socket.socket, area: mmap.mmap) -> None:
    with suppress(ConnectionError):  # the server is killed when all is measured
        line.send(b"!")
        while line.recv(1):
            answer = model.run(memoryview(area)[: model.nbytes])
            area[model.nbytes : model.nbytes + len(answer)] = answer
            line.send(len(answer).to_bytes(4, "little"))
    os._exit(0)


async def _serve(line: socket.socket, area: mmap.mmap, size: int) -> None:
    async with HttpServer(_Hops(line, area, size), "127.0.0.1", 0) as server:
        print(server.port, flush=True)
        await asyncio.Event().wait()


class _Hops:
    """An `RsgiApp` and its own `Door`: every request's tensor goes to the child, and its answer back. For one at a time."""

    shut_until = 0.0

    def __init__(self, line: socket.socket, area: mmap.mmap, size: int) -> None:
        line.setblocking(False)
        self.door = self
        self._line, self._area, self._size = line, area, size
        self._context = copy_context()
        self._asked: deque[Any] = deque()  # whom the child's next answers are for; wrk leaves in the middle of a run
        asyncio.get_running_loop().add_reader(line.fileno(), self._answered)

    def turn_away(self, scope: Any, now: float, behind: Any) -> None:
        """See `Door`."""

    def reads(self, scope: Any) -> Head:
        """See `Door`."""
        return ("", ""), scope.headers.get

    def begin(self, scope: Any, protocol: Any, head: Head, arrived: float, body: Body) -> bool:  # noqa: ARG002
        """See `RsgiApp`."""
        start = int(head[1]("inference-header-content-length") or 0)

        def read(body: Body) -> None:
            with suppress(ProtocolClosed):  # the client has gone
                self._area[: self._size] = memoryview(body.result())[start : start + self._size]
                self._asked.append(protocol)
                self._line.send(b"!")

        body.add_done_callback(read, context=self._context)
        return True

    def _answered(self) -> None:
        length = int.from_bytes(self._line.recv(4), "little")
        self._asked.popleft().response_bytes(200, _HEADERS, self._area[self._size : self._size + length])

    async def __rsgi__(self, scope: Any, protocol: Any, arrived: Any = None, given: Any = None) -> None:
        """See `RsgiApp`. Everything goes by `begin`."""

    async def finished(self) -> None:
        """See `RsgiApp`."""


_SERVERS: dict[str, Callable[[Path, str], None]] = {"least": least, "hops": hops}


# --- compared


def main() -> None:
    """Print the p50 of each round, and the ratios."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.baselines.bare", description=__doc__)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repo")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--serve", choices=_SERVERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    file = model_file(options.repository, options.model)
    if options.serve:
        _SERVERS[options.serve](file, options.model)
        return
    with ExitStack() as stack:
        _compare({kind: _started(stack, kind) for kind in _SERVERS}, file, options)


def _started(stack: ExitStack, kind: str) -> str:
    command = [sys.executable, "-m", "loadtest.baselines.bare", *sys.argv[1:], "--serve", kind]
    server = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    stack.callback(server.kill)
    assert server.stdout is not None
    return f"http://127.0.0.1:{int(server.stdout.readline())}"


def _compare(servers: dict[str, str], file: Path, options: argparse.Namespace) -> None:
    wire = bodies.http_binary(sample(options.model))
    ratios: dict[str, list[float]] = {kind: [] for kind in servers}
    for number in range(options.rounds):
        alone = rawort.measure(file, options.model, rawort.LONE, options.seconds).p50_us
        said = [f"#{number} ort {alone / 1e3:.2f} ms"]
        for kind, base in servers.items():
            load = generators.run(base, wire, 1, options.seconds, None)
            ratios[kind].append(load.p50_us / alone)
            said.append(f"{kind} {load.p50_us / 1e3:.2f} ms, errors {load.errors}")
        print("; ".join(said), flush=True)
    for kind, found in ratios.items():
        print(f"p50 of one connection, {kind} against (b): {_spread(found)}")


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()
