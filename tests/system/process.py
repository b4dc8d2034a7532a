"""A gateway in a process of its own, as an operator would start it, on free ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]

CONFIG = """
backend: "fake"
max_batch_size: 8
dynamic_batching {}
input { name: "IN" data_type: TYPE_FP32 dims: 2 }
output { name: "OUT" data_type: TYPE_FP32 dims: 2 }
instance_group { kind: KIND_CPU count: 1 }
"""


def write_model(repository: Path, name: str, **parameters: str) -> None:
    (repository / name / "1").mkdir(parents=True, exist_ok=True)
    more = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n' for key, value in parameters.items()
    )
    (repository / name / "config.pbtxt").write_text(CONFIG + more)


class GatewayProcess:
    """One `gateway serve`. Its log is read line by line, so waiting is on what it says."""

    def __init__(self, *flags: str, command: str = "serve", python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [
                python, "-m", "gateway", command, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0",
                "--log-format", "json", *flags,
            ],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ports: dict[str, int] = {}

    def wait_listening(self) -> None:
        """Until its ports are open; `ports` has them from then on."""
        listening = self.wait_for("listening")
        self.ports = {name: listening[name] for name in ("http", "grpc", "metrics") if name in listening}

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, event: str, **fields: object) -> dict:
        """The first log event of this name with these fields; AssertionError if the process ends without it."""
        with self._changed:
            seen = 0
            while True:
                for line in self.lines[seen:]:
                    seen += 1
                    found = json.loads(line) if line.startswith("{") else {}
                    if found.get("event") == event and fields.items() <= found.items():
                        return found
                assert self.process.poll() is None or self._reader.is_alive(), f"no '{event}' in: {''.join(self.lines)}"
                self._changed.wait(timeout=60)

    def wait_ready(self) -> None:
        """Until the start-up table is printed: the first loads have ended."""
        with self._changed:
            while not any(line.startswith("MODEL ") for line in self.lines):
                assert self.process.poll() is None, "".join(self.lines)
                self._changed.wait(timeout=60)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.ports['http']}{path}"

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url(path), timeout=20) as response:
            return response.read()

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@contextmanager
def started(*flags: str, command: str = "serve", python: str = sys.executable) -> Iterator[GatewayProcess]:
    """A gateway for the duration of the block, with its ports open; killed if it is still there at the end."""
    with ending(GatewayProcess(*flags, command=command, python=python)) as gateway:
        gateway.wait_listening()
        yield gateway


@contextmanager
def ending(gateway: GatewayProcess) -> Iterator[GatewayProcess]:
    """The process has ended when the block has, killed if need be."""
    try:
        yield gateway
    finally:
        if gateway.process.poll() is None:
            gateway.process.kill()
        gateway.process.wait()
        assert gateway.process.stderr is not None
        gateway._reader.join(timeout=20)
        gateway.process.stderr.close()
