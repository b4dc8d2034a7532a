"""`python -m loadtest.photo`: the bytes of one photograph to its label over HTTP, one request at a time, and where the time goes.

Starts a gateway that has the models `photo_labels` (a Python model: decodes, scales, calls the classifier) and
`efficientnet_lite0`, and asks the two in turn (A B A B ...), each for the same picture: the one gets a JPEG of 640 x 480
pixels and about 100 KB, the other the tensor that is made of it. The exit status is 1 when the median is above the bar.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import socket
import statistics
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.bench import servers
from loadtest.bench.meter import Meter, wait_quiet
from loadtest.record import ROOT, provenance

BAR_MS = 10.0
PHOTO, CLASSIFIER = "photo_labels", "efficientnet_lite0"
SIZE = (640, 480)
BYTES = 100_000
LABEL = "espresso"  # what the photograph is of


def photograph(size: tuple[int, int] = SIZE, target: int = BYTES) -> bytes:
    """The classifier's sample picture as a JPEG of this size and, as near as can be, so many bytes."""
    from PIL import Image

    with Image.open(ROOT / "model_repo" / CLASSIFIER / "sample.jpg") as opened:
        picture = opened.convert("RGB")
    width = picture.height * size[0] / size[1]
    left = (picture.width - width) / 2
    scaled = picture.resize(size, Image.Resampling.LANCZOS, box=(left, 0, left + width, picture.height))

    def encoded(quality: int) -> bytes:
        buffer = io.BytesIO()
        scaled.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    return min(map(encoded, range(60, 98)), key=lambda jpeg: abs(len(jpeg) - target))


class Client:
    """One connection, on a bare socket: `http.client` would be a twentieth of what is measured.

    Each question has one input, and its answer is binary.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, model: str, body: bytes) -> tuple[float, bytes]:
        """Milliseconds, and the outputs' bytes. Raises RuntimeError for a failure."""
        head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nInference-Header-Content-Length: 0\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        started = time.perf_counter()
        self._socket.sendall(request)
        answer = self._socket.recv(1 << 16)
        while b"\r\n\r\n" not in answer:
            answer += self._more()
        status, _, fields = answer.partition(b"\r\n\r\n")[0].partition(b"\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in fields.split(b"\r\n"))
        start = answer.index(b"\r\n\r\n") + 4
        while len(answer) - start < int(headers[b"content-length"]):
            answer += self._more()
        milliseconds = (time.perf_counter() - started) * 1e3
        if b" 200 " not in status:
            raise RuntimeError(f"{model}: {status.decode()}: {answer[start : start + 300].decode(errors='replace')}")
        return milliseconds, answer[start + int(headers[b"inference-header-content-length"]) :]

    def _more(self) -> bytes:
        if not (data := self._socket.recv(1 << 16)):
            raise RuntimeError("the gateway closed the connection")
        return data


def first_label(outputs: bytes) -> str:
    """The best label of an answer of `photo_labels`."""
    (length,) = struct.unpack_from("<I", outputs)
    return outputs[4 : 4 + length].decode()


def measure(port: int, requests: int) -> dict[str, Any]:
    """Ask both models in turn, `requests` times each after a tenth as many that do not count."""
    client = Client(port)
    jpeg, image = photograph(), tensor()
    times: dict[str, list[float]] = {PHOTO: [], CLASSIFIER: []}
    for index in range(-max(10, requests // 10), requests):
        taken, outputs = client.ask(PHOTO, jpeg)
        if (label := first_label(outputs)) != LABEL:
            raise RuntimeError(f"the photograph is of an {LABEL}, {PHOTO} says: {label}")
        alone, _ = client.ask(CLASSIFIER, image)
        if index >= 0:
            times[PHOTO].append(taken)
            times[CLASSIFIER].append(alone)
    return {
        "jpeg_bytes": len(jpeg),
        "jpeg_pixels": SIZE,
        "requests": requests,
        "milliseconds": {model: summary(found) for model, found in times.items()},
        "classifier": json.loads(servers.get(port, f"/v2/models/{CLASSIFIER}")[1]),
    }


def tensor() -> bytes:
    """What the classifier takes, of the sample picture's size. Its time does not depend on what is in it."""
    values: NDArray[np.float32] = np.random.default_rng(0).uniform(-1, 1, (3, 224, 224)).astype(np.float32)
    return values.tobytes()


def summary(milliseconds: list[float]) -> dict[str, float]:
    """The percentiles of a list."""
    cuts = statistics.quantiles(milliseconds, n=100, method="inclusive")
    found = {"min": min(milliseconds), "p10": cuts[9], "p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}
    return {name: round(value, 3) for name, value in found.items()}


def start(command: str, repository: Path) -> tuple[servers.Server, int]:
    """A gateway with both models, and its HTTP port."""
    http, grpc, metrics = servers.free_ports(3)
    flags = [text for path in (repository, repository / "_python") for text in ("--model-repository", str(path))]
    chosen = ["--model-control-mode", "explicit", "--load-model", CLASSIFIER, "--load-model", PHOTO]
    listen = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    line = [*shlex.split(command), "serve", *flags, *chosen, "--allow-python-models", *listen]
    return servers.Server(line, lambda: servers.get(http, "/v2/health/ready")[0] == 200), http


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--gateway", default=f"{shlex.quote(sys.executable)} -m gateway", help="the gateway's command")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repo", help="with a repository _python in it")
    parser.add_argument(
        "--wait-quiet", type=float, default=0.0, metavar="SECONDS", help="for others to leave the cores"
    )
    parser.add_argument("--bar", type=float, default=BAR_MS, help="ms that the median may take")
    parser.add_argument("--out", type=Path, help="JSON result file")
    options = parser.parse_args()
    server, port = start(options.gateway, options.repository.resolve())
    with server:
        wait_quiet(options.wait_quiet)
        meter = Meter(server.cpu_seconds)
        found = measure(port, options.requests)
        _, _, others = meter.read()
    met = found["milliseconds"][PHOTO]["p50"] <= options.bar
    result = {**provenance(), **found, "other_cores": round(others, 2), "bar_ms": options.bar, "met": met}
    for model, times in found["milliseconds"].items():
        print(f"{model:20} " + "  ".join(f"{name} {value:6.2f}" for name, value in times.items()) + " ms")
    print(f"{len(photograph()):,} bytes of JPEG to a label: p50 <= {options.bar:g} ms {'met' if met else 'MISSED'}")
    print(f"cores that others used meanwhile: {others:.2f}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
