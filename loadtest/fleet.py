"""A fleet on this machine: a Redis, gateways, workers and clients, each a process of its own that can be killed, stopped and started again.

Used by `loadtest.fleet_faults` and by the tests in tests/system. Blocking calls, so that the caller decides where they run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import psutil

from gateway.queues.redis import announce
from gateway.redis_server import find_server
from loadtest.bench import servers
from loadtest.fleet_client import MODEL, write_model
from loadtest.history import History, Run, Verdict, check, read
from loadtest.record import ROOT

_PATIENCE = 30.0  # seconds until what was started must be ready
_LOOK = 0.02  # seconds between looks at other processes


class FleetError(RuntimeError):
    """A process did not start, or did not do what it was to do; the text has the end of its log."""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = _PATIENCE) -> None:
    """Look until it is so. Raises `FleetError` when it does not come to be."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            message = f"not within {seconds:g} s: {what}"
            raise FleetError(message)
        time.sleep(_LOOK)


class Resources(NamedTuple):
    """What a process uses."""

    memory: int  # resident bytes that are its own
    descriptors: int
    threads: int
    tasks: int  # on its event loop


class Process:
    """A child with its log in a file. The context ends it."""

    def __init__(self, command: Sequence[str], log: Path, *, stdin: bytes | None = None) -> None:
        self.command = command
        self.log = log
        self._stdin = stdin
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, again if it has ended."""
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL if self._stdin is None else subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        if self._stdin is not None:
            assert self._child.stdin is not None
            self._child.stdin.write(self._stdin)
            self._child.stdin.close()

    @property
    def pid(self) -> int:
        """Of the child."""
        assert self._child is not None
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and self._child.poll() is None

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        assert self._child is not None
        self._child.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 40.0) -> int:
        """The exit status."""
        assert self._child is not None
        return self._child.wait(seconds)

    def stop(self) -> int:
        """SIGTERM, and wait until it has drained."""
        if self._child is None or self._child.poll() is not None:
            return 0
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            return -9

    def tail(self, size: int = 3000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-size:]

    def resources(self) -> Resources:
        """What it uses now. Its metrics must answer."""
        process = psutil.Process(self.pid)
        with process.oneshot():
            memory = process.memory_info()
            found = memory.rss - memory.shared, process.num_fds(), process.num_threads()
        return Resources(*found, self._tasks())  # asked last, because asking takes a descriptor for a moment

    def _tasks(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port()}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return int(float(next(line for line in lines if line.startswith("gateway_tasks")).rpartition(" ")[2]))

    def _metrics_port(self) -> int:
        """As it said when it was last started."""
        said = (json.loads(line) for line in self.log.read_text().splitlines() if '"listening"' in line)
        return [int(line["metrics"]) for line in said if "metrics" in line][-1]

    def descriptors(self) -> dict[str, int]:
        """How many descriptors there are of each kind."""
        kinds: Counter[str] = Counter()
        for each in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(OSError):
                kinds[each.readlink().as_posix().split(":", 1)[0]] += 1
        return dict(kinds)


class Fleet:
    """Redis in a folder of its own, and what is started beside it. A context manager that ends all of it.

    `via` is the URL that gateways and workers use, where that is not the server's own: a proxy's.
    """

    def __init__(
        self, *, aof: bool = False, max_memory: int = 0, via: str = "", model: dict[str, Any] | None = None
    ) -> None:
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lockgate-fleet-")))
        self.socket = self.folder / "redis.sock"
        self.via = via
        self.models = self.folder / "models"
        write_model(self.models, **(model or {}))
        options = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder), "--save", ""]
        options += ["--appendonly", "yes" if aof else "no", "--maxmemory-policy", "noeviction"]
        options += ["--maxmemory", str(max_memory)] if max_memory else []
        self.redis = Process([find_server(), *options], self.folder / "redis.log")
        self.gateways: list[Process] = []
        self.workers: list[Process] = []
        self.ports: list[servers.Ports] = []
        self._clients = 0

    def __enter__(self) -> Self:
        self.start_redis()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            for process in (*self.gateways, *self.workers, self.redis):
                self._stack.callback(process.stop)

    @property
    def url(self) -> str:
        """Where gateways and workers meet."""
        return self.via or f"unix://{self.socket}"

    def start_redis(self) -> None:
        """Start the server, or start it again."""
        self.redis.start()
        wait_until(self._answers, f"Redis is ready; its log:\n{self.redis.tail()}")

    def _answers(self) -> bool:
        import redis

        try:
            with redis.Redis(unix_socket_path=str(self.socket)) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def ask(self, *command: str | bytes | int) -> Any:
        """One command to the server."""
        import redis

        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            return client.execute_command(*command)

    def entries(self, model: str = MODEL) -> int:
        """Requests in the streams of a model."""
        return sum(self.ask("XLEN", f"lockgate:q:{{{model}/1}}:{klass}") for klass in (1, 2, 3))

    def pending(self, model: str = MODEL) -> int:
        """Requests that workers have read and not acknowledged."""
        import redis

        total = 0
        for klass in (1, 2, 3):
            with suppress(redis.ResponseError):  # no worker has made the group
                total += self.ask("XPENDING", f"lockgate:q:{{{model}/1}}:{klass}", "workers")["pending"]
        return total

    def add_worker(self, *flags: str, hook: str = "") -> Process:
        """Start a worker; it is not waited for. `hook` is one of `loadtest.fleet_hooks`."""
        command = self._command(
            "worker", "--model-repository", str(self.models), "--metrics-port", "0", *flags, hook=hook
        )
        return self._start(self.workers, command, "worker")

    def add_gateway(self, *flags: str, hook: str = "") -> Process:
        """Start a gateway; it is not waited for."""
        ports = servers.Ports(*servers.free_ports(3))
        self.ports.append(ports)
        listening = [
            "--http-port",
            str(ports.http),
            "--grpc-port",
            str(ports.grpc),
            "--metrics-port",
            str(ports.metrics),
        ]
        command = self._command("serve", "--role", "gateway", *listening, *flags, hook=hook)
        return self._start(self.gateways, command, "gateway")

    def _command(self, command: str, *flags: str, hook: str = "") -> list[str]:
        module = ["loadtest.fleet_hooks", hook] if hook else ["gateway"]
        return [sys.executable, "-m", *module, command, "--queue", self.url, "--log-format", "json", *flags]

    def _start(self, among: list[Process], command: list[str], role: str) -> Process:
        process = Process(command, self.folder / f"{role}-{len(among)}.log")
        among.append(process)
        process.start()
        return process

    def ready(self, workers: int | None = None, model: str = MODEL) -> None:
        """Wait until every gateway serves the model and knows so many workers of it."""
        wanted = len(self.workers) if workers is None else workers
        for gateway, ports in zip(self.gateways, self.ports, strict=True):
            try:
                wait_until(lambda ports=ports: self._knows(ports.http, model, wanted), "a gateway is ready")  # type: ignore[misc]
            except FleetError as problem:
                logs = "\n".join(each.tail() for each in (gateway, *self.workers))
                message = f"{problem}\n{logs}"
                raise FleetError(message) from None

    def _knows(self, port: int, model: str, workers: int) -> bool:
        status, _ = servers.get(port, f"/v2/models/{model}/ready")
        return status == 200 and self.holding(model) >= workers

    def holding(self, model: str = MODEL) -> int:
        """How many live workers hold a model, by what they announce."""
        names = [each.decode() for each in self.ask("HKEYS", "{lockgate}:processes")]
        alive = [each for each in names if self.ask("EXISTS", f"{{lockgate}}:p:{each}")]
        return sum(_ready(self.ask("GET", f"{{lockgate}}:h:{each}") or b"", model) for each in alive)

    @contextmanager
    def client(self, **plan: Any) -> Iterator[Client]:
        """Load from a process of its own while the block runs; what became of it is in `verdict` after that."""
        self._clients += 1
        history = self.folder / f"client-{self._clients}.jsonl"
        given = {"ports": [ports.http for ports in self.ports], "history": str(history), "client": f"c{self._clients}"}
        client = Client(json.dumps(given | plan).encode(), self.folder / f"client-{self._clients}.log", history)
        client.start()
        try:
            wait_until(lambda: b"started" in client.log.read_bytes(), "the client has started")
            yield client
        finally:
            client.finish()


def _ready(holding: bytes, model: str) -> bool:
    """Whether a process holds a ready version of a model."""
    read = announce.read_holding(holding)
    pool = None if read is None else read[0].get(model)
    return pool is not None and any(state.state == "READY" for state in pool.versions)


class Client(Process):
    """The load generator, and its verdict once it has ended."""

    def __init__(self, plan: bytes, log: Path, history: Path) -> None:
        super().__init__([sys.executable, "-m", "loadtest.fleet_client"], log, stdin=plan)
        self._file = history
        self.history = History(Run(history.stem), [])  # and whether the promises were kept: once it has finished
        self.verdict = Verdict()

    def finish(self) -> None:
        """Send no more, wait for the last answers."""
        # A signal that comes when it has done everything, and listens to none any more, ends it as well.
        if self.stop() not in (0, -signal.SIGTERM):
            message = f"the client failed:\n{self.tail()}"
            raise FleetError(message)
        self.history = read(self._file)
        self.verdict = check([self.history])
