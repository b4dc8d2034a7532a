"""Server processes of the benchmark: start pinned or not, wait until ready, read the CPU of the whole process tree, stop.

Promise: `Server` never leaves a process behind, and its CPU figure holds every child, living or already reaped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from loadtest.record import ROOT

READY_SECONDS = 90.0
STOP_SECONDS = 15.0


class ServerError(RuntimeError):
    """A server did not start, or did not answer."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Addresses of one gateway on the loopback interface."""

    http: int
    grpc: int
    metrics: int


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; they are held together so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def get(port: int, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
    """One GET; status 0 when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def success_count(port: int, model: str) -> int:
    """How many requests the gateway says it has answered with success: Triton's inference_stats.success.count."""
    status, body = get(port, f"/v2/models/{model}/stats")
    if status != 200:
        message = f"the statistics of {model!r} answered {status}: {body[:200]!r}"
        raise ServerError(message)
    return sum(int(entry["inference_stats"]["success"]["count"]) for entry in json.loads(body)["model_stats"])


class Server:
    """One server process and its children, from start to stop; a context manager."""

    def __init__(self, command: Sequence[str], ready: Callable[[], bool], core: int | None = None) -> None:
        self.command = [*(["taskset", "-c", str(core)] if core is not None else []), *command]
        self.ready_seconds = 0.0
        self._ready = ready
        self._log = tempfile.NamedTemporaryFile(prefix="loadtest-server-", suffix=".log")  # noqa: SIM115 - closed in stop
        self._popen: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start and wait until ready."""
        start = time.monotonic()
        self._popen = subprocess.Popen(
            self.command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        while not self._ready():
            if self._popen.poll() is not None or time.monotonic() - start > READY_SECONDS:
                text = self.log_tail()
                self.stop()
                message = f"{' '.join(self.command)} is not ready after {time.monotonic() - start:.0f} s:\n{text}"
                raise ServerError(message)
            time.sleep(0.05)
        self.ready_seconds = time.monotonic() - start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, however the block ended."""
        self.stop()

    @property
    def pid(self) -> int:
        """The process at the root of the tree (taskset replaces itself, so it is the server)."""
        if self._popen is None:
            message = "the server is not running"
            raise ServerError(message)
        return self._popen.pid

    def log_tail(self, size: int = 3000) -> str:
        """The end of what the server printed."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")[-size:]

    def tree(self) -> list[psutil.Process]:
        """The server and all its descendants."""
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """User and system time of the tree so far; a child that ended is in its parent's share."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to whatever of the tree is left."""
        if self._popen is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = self.tree()
            self._popen.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(tree, timeout=STOP_SECONDS)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._popen.wait()
        self._popen = None
        self._log.close()


def gateway(command: Sequence[str], repository: Path, model: str, ports: Ports, core: int | None) -> Server:
    """A gateway that has loaded one model, on ports of its own."""
    flags = ["serve", "--model-repository", str(repository), "--model-control-mode", "explicit", "--load-model", model]
    listen = ["--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)]
    return Server([*command, *flags, *listen], lambda: get(ports.http, f"/v2/models/{model}/ready")[0] == 200, core)


def fastapi(repository: Path, model: str, port: int, core: int | None, *, inline: bool) -> Server:
    """Baseline (a)."""
    flags = ["--repository", str(repository), "--model", model, "--port", str(port), *(["--inline"] if inline else [])]
    command = [sys.executable, "-m", "loadtest.baselines.fastapi_app", *flags]
    return Server(command, lambda: get(port, "/ready")[0] == 200, core)
