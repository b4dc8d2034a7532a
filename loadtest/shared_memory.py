"""`python -m loadtest.shared_memory`: CPU of the gateway per request for one image, sent as binary HTTP or left in shared memory.

Starts a gateway with a model that only looks at its input's first element, and asks it for an image of 3 x 224 x 224 FP32
values (150,528 elements, 602,112 bytes), one request at a time over one connection, in rounds that alternate between
the two ways (A B A B ...). The client writes the image into shared memory before each request, as a client would; its own CPU is
told too. The exit status is 1 when the gateway's median over the rounds is not less with shared memory.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.bench import servers
from loadtest.bench.meter import Meter, wait_quiet
from loadtest.record import provenance

ELEMENTS = 3 * 224 * 224
BYTES = 4 * ELEMENTS
BINARY, SHARED = "binary HTTP", "shared memory"
MODEL = f"""backend: "fake" max_batch_size: 8
input {{ name: "IN" data_type: TYPE_FP32 dims: {ELEMENTS} }} output {{ name: "OUT" data_type: TYPE_FP32 dims: 1 }}"""


class Client:
    """One connection, and one shared memory object that the gateway knows as region `image`."""

    def __init__(self, port: int, memory: SharedMemory) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=60)
        self._memory = memory
        self._image = np.random.default_rng(0).uniform(-1, 1, ELEMENTS).astype(np.float32).tobytes()
        self._headers = {way: _header(parameters) for way, parameters in _WAYS.items()}
        self._post("/v2/systemsharedmemory/region/image/register", _json({"key": memory.name, "byte_size": BYTES}))

    def ask(self, way: str) -> None:
        """One inference. Raises RuntimeError when its answer is wrong."""
        head = self._headers[way]
        if way == SHARED:
            self._memory.buf[:BYTES] = self._image
            body = head
        else:
            body = head + self._image
        answer = self._post("/v2/models/image/infer", body, {"Inference-Header-Content-Length": str(len(head))})
        if answer[-4:] != self._image[:4]:
            raise RuntimeError(f"{way} gave a wrong answer: {answer[:300]!r}")

    def _post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
        self._connection.request("POST", path, body, headers or {})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}: {answer[:300]!r}")
        return answer


_WAYS: dict[str, dict[str, Any]] = {
    BINARY: {"binary_data_size": BYTES},
    SHARED: {"shared_memory_region": "image", "shared_memory_byte_size": BYTES},
}


def _header(parameters: dict[str, Any]) -> bytes:
    tensor = {"name": "IN", "datatype": "FP32", "shape": [1, ELEMENTS], "parameters": parameters}
    return _json({"inputs": [tensor], "parameters": {"binary_data_output": True}})


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def measure(
    client: Client, cpu_seconds: Callable[[], float], rounds: int, requests: int
) -> dict[str, dict[str, float]]:
    """For each way the medians over the rounds: microseconds of the gateway's CPU, of ours, and of time, per request."""
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in _WAYS}
    for index in range(-1, rounds):  # the first does not count
        for way in _WAYS:
            before = cpu_seconds(), time.process_time(), time.perf_counter()
            for _ in range(requests):
                client.ask(way)
            after = cpu_seconds(), time.process_time(), time.perf_counter()
            if index >= 0:
                taken = [(end - start) / requests * 1e6 for start, end in zip(before, after, strict=True)]
                found[way].append((taken[0], taken[1], taken[2]))
    names = ("gateway_cpu_us", "client_cpu_us", "time_us")
    return {
        way: {name: round(statistics.median(each[at] for each in taken), 1) for at, name in enumerate(names)}
        for way, taken in found.items()
    }


def start(command: str, folder: Path) -> tuple[servers.Server, int]:
    """A gateway with the model, and its HTTP port."""
    (folder / "image" / "1").mkdir(parents=True)
    (folder / "image" / "config.pbtxt").write_text(MODEL, encoding="utf-8")
    http, grpc, metrics = servers.free_ports(3)
    listen = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    line = [*shlex.split(command), "serve", "--model-repository", str(folder), "--allow-client-shm", "true", *listen]
    return servers.Server(line, lambda: servers.get(http, "/v2/health/ready")[0] == 200), http


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="of each round and way; CPU is counted in 10 ms")
    parser.add_argument("--gateway", default=f"{shlex.quote(sys.executable)} -m gateway", help="the gateway's command")
    parser.add_argument(
        "--wait-quiet", type=float, default=0.0, metavar="SECONDS", help="for others to leave the cores"
    )
    parser.add_argument("--out", type=Path, help="JSON result file")
    options = parser.parse_args()
    memory = SharedMemory(f"loadtest-{secrets.token_hex(8)}", create=True, size=BYTES)
    with tempfile.TemporaryDirectory() as folder, closing(memory):
        try:
            server, port = start(options.gateway, Path(folder))
            with server:
                wait_quiet(options.wait_quiet)
                meter = Meter(server.cpu_seconds)
                found = measure(Client(port, memory), server.cpu_seconds, options.rounds, options.requests)
                _, _, others = meter.read()
        finally:
            memory.unlink()
    share = found[SHARED]["gateway_cpu_us"] / found[BINARY]["gateway_cpu_us"]
    for way, figures in found.items():
        print(f"{way:14} " + "  ".join(f"{name} {value:8.1f}" for name, value in figures.items()))
    print(f"shared memory costs the gateway {share:.2f} of what binary HTTP does: {'met' if share < 1 else 'MISSED'}")
    print(f"cores that others used meanwhile: {others:.2f}")
    if options.out:
        result = {
            **provenance(),
            "bytes": BYTES,
            "ways": found,
            "share": round(share, 3),
            "other_cores": round(others, 2),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if share < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
