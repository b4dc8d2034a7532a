"""Many tiny models for `loadtest.repository_scale`: their folders, the gateway that serves them, traffic on them, and what is seen of the process.

A model gives twice what it takes, so every answer is checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import onnx
import psutil
from onnx import TensorProto, helper

from loadtest.bench import servers

CONFIG = """backend: "onnxruntime" max_batch_size: 4
input { name: "X" data_type: TYPE_FP32 dims: 2 } output { name: "Y" data_type: TYPE_FP32 dims: 2 }
instance_group { kind: KIND_CPU count: 1 }
"""
TASKS = "LOADTEST_TASKS"  # the variable that names the file for `count_tasks`
_ANSWER_SECONDS = 30.0
_AT_ONCE = 64


def write_models(repository: Path, names: Sequence[str]) -> None:
    """A folder for each, with an ONNX file and a configuration."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "XY"]
    graph = helper.make_graph([helper.make_node("Add", ["X", "X"], ["Y"])], "double", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    for name in names:
        version = repository / name / "1"
        version.mkdir(parents=True)
        (version / "model.onnx").write_bytes(data)
        (version.parent / "config.pbtxt").write_text(CONFIG, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Sample:
    """The process tree at one moment; bytes, and the tasks of the gateway's event loop."""

    after: int
    rss: int
    pss: int
    fds: int
    threads: int
    processes: int
    tasks: int = 0


def count_tasks() -> None:
    """In the gateway: on SIGUSR1 write how many tasks are not done into the file that the variable names."""

    def write(*_: object) -> None:
        gc.collect()  # what is only waiting to be collected is no leak, and is gone before memory is looked at
        tasks = len(asyncio.all_tasks())
        path = Path(os.environ[TASKS])
        path.with_suffix(".new").write_text(str(tasks), encoding="utf-8")
        path.with_suffix(".new").replace(path)

    signal.signal(signal.SIGUSR1, write)


class Rig:
    """A gateway on a repository; use `started`."""

    def __init__(self, server: servers.Server, port: int, tasks: Path) -> None:
        self.server = server
        self.port = port
        self._tasks = tasks

    def call(self, path: str, body: Any = None, timeout: float = 600.0) -> tuple[int, bytes, float]:
        """One POST: status, body, seconds. Raises OSError or HTTPException when there is no answer."""
        began = time.monotonic()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            connection.request("POST", path, json.dumps(body or {}).encode())
            response = connection.getresponse()
            return response.status, response.read(), time.monotonic() - began

    def fill_pools(self) -> None:
        """Have the threads started that are started once, when calls of control first coincide."""
        calls = [threading.Thread(target=self.call, args=("/v2/repository/index",)) for _ in range(_AT_ONCE)]
        for call in calls:
            call.start()
        for call in calls:
            call.join()

    def control(self, model: str, what: str) -> float:
        """Load or unload a model; seconds. Raises RuntimeError when that is refused."""
        status, body, seconds = self.call(f"/v2/repository/models/{model}/{what}")
        if status != 200:
            raise RuntimeError(f"{what} of {model} was answered {status}: {body[:300]!r}")
        return seconds

    def sample(self, after: int = 0) -> Sample:
        """Look at the gateway and its children."""
        tasks = self._count()
        rss = pss = fds = threads = processes = 0
        for process in self.server.tree():
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                memory = process.memory_full_info()
                rss += memory.rss
                pss += memory.pss
                fds += process.num_fds()
                threads += process.num_threads()
                processes += 1
        return Sample(after, rss, pss, fds, threads, processes, tasks)

    def settled(self, after: int, like: Sample | None, limit: float = 10.0) -> Sample:
        """A sample when descriptors, threads and tasks are back to those of an earlier one, or when that takes too long."""
        deadline = time.monotonic() + limit
        time.sleep(1.0)  # for children that were told to end
        while True:
            sample = self.sample(after)
            back = like is None or (
                sample.fds <= like.fds and sample.threads <= like.threads and sample.tasks <= like.tasks
            )
            if back or time.monotonic() > deadline:
                return sample
            time.sleep(0.5)

    def _count(self) -> int:
        self._tasks.unlink(missing_ok=True)
        os.kill(self.server.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while not self._tasks.exists():
            if time.monotonic() > deadline:
                raise RuntimeError("the gateway does not say how many tasks it has")
            time.sleep(0.01)
        return int(self._tasks.read_text(encoding="utf-8"))


@contextmanager
def started(folder: Path, repository: Path, *flags: str) -> Iterator[Rig]:
    """A gateway that listens; its models may still be loading. `folder` is for what it says of itself."""
    http_port, grpc, metrics = servers.free_ports(3)
    listen = ["--http-port", str(http_port), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    tasks = folder / "tasks"
    environment = ["env", f"{TASKS}={tasks}", sys.executable, "-m", "loadtest.repository_scale", "gateway"]
    command = [*environment, "serve", "--model-repository", str(repository), *listen, *flags]
    server = servers.Server(command, lambda: servers.get(http_port, "/v2/health/live", 60.0)[0] == 200)
    with server:
        yield Rig(server, http_port, tasks)


# --- traffic


@dataclass(slots=True)
class Tally:
    """What came of the requests of one model: by status, what was wrong, and the slowest answer in seconds."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    @property
    def requests(self) -> int:
        """How many there were."""
        return self.statuses.total()


class Traffic:
    """Clients, each on a connection of its own, that ask one model after the other until the block ends. A context manager."""

    def __init__(self, port: int, models: Sequence[str], clients: int) -> None:
        self.tallies = {model: Tally() for model in models}
        self._port = port
        self._lock = threading.Lock()
        self._going = threading.Event()
        self._ended = False
        self._idle = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._ask_all, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Self:
        self._going.set()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._going.set()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Every request is answered, and none is sent while the block runs."""
        self._going.clear()
        for _ in self._threads:
            self._idle.acquire()
        yield
        self._going.set()

    def _ask_all(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_SECONDS)
        value = float(number)
        with contextlib.closing(connection):
            while not self._ended:
                for model in self.tallies:
                    value += len(self._threads)
                    self._ask(connection, model, value % 100_000)
                if not self._going.is_set():
                    self._idle.release()
                    self._going.wait()

    def _ask(self, connection: http.client.HTTPConnection, model: str, value: float) -> None:
        began = time.monotonic()
        status, wrong = ask(connection, model, value)
        seconds = time.monotonic() - began
        with self._lock:
            tally = self.tallies[model]
            tally.statuses[status] += 1
            tally.slowest = max(tally.slowest, seconds)
            if wrong:
                tally.wrong[wrong] += 1


def ask(connection: http.client.HTTPConnection, model: str, value: float) -> tuple[str, str]:
    """One inference: its status, and what is wrong with the answer unless it is a 200 with the right numbers."""
    tensor = {"name": "X", "shape": [1, 2], "datatype": "FP32", "data": [value, -value]}
    try:
        connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode())
        response = connection.getresponse()
        body = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as problem:
        connection.close()
        return "none", f"no answer: {type(problem).__name__}"
    if response.status != 200:
        return str(response.status), str(body.get("error"))
    right = body["outputs"][0]["data"] == [2 * value, -2 * value]
    return "200", "" if right else "another's answer"
