"""An edge gateway, another gateway far away, the network between them that can be hurt, and clients of the edge.

The gateways are real processes; the network is a `FaultProxy`. Clients send one request after the other at a constant
rate, each with a tag of its own, and note what came back and which engine gave it. For `loadtest.edge_faults` and tests/system.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from loadtest.bench import servers
from loadtest.fault_proxy import FaultProxy
from loadtest.fleet import Process
from loadtest.history import LOST, UNANSWERED, History, Record, Run, Verdict, check
from loadtest.record import ROOT

FAR, NEAR = "add_sub", "edge"  # the model's name there and here
_SIZE = 16  # numbers in each of its inputs
_LARGEST = 1 << 24  # FP32 has all whole numbers up to here
_SETTLE = 30.0  # seconds
_GOOD = 100  # answers in a row of the far gateway
_PATIENCE = 5.0  # seconds after its deadline until a request counts as unanswered
_PARAMETERS = {
    "fallback": "remote,cpu",
    "remote.model": FAR,
    "remote.connect_timeout_ms": "500",
}


@dataclass(slots=True)
class Answer:
    """A record with the engine that the answer names."""

    record: Record
    engine: str = ""

    @property
    def remote(self) -> bool:
        """Whether the server far away gave it."""
        return self.engine.startswith("remote:")


@dataclass(slots=True)
class Phase:
    """What happened between two moments of the monotonic clock."""

    answers: list[Answer]
    deadline_ms: float
    verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        run = Run("edge", len(self.answers), self.deadline_ms)
        # The history checker wants numbers from 0; which requests they were is told by their tags.
        records = [replace_id(answer.record, number) for number, answer in enumerate(self.answers)]
        self.verdict = check([History(run, records)])

    @property
    def engines(self) -> Counter[str]:
        """Answers by where they came from."""
        good = [answer for answer in self.answers if answer.record.status == 200]
        return Counter("remote" if answer.remote else "local" for answer in good)


def replace_id(record: Record, number: int) -> Record:
    """The record under another number."""
    return Record(number, record.tag, record.sent, record.received, record.status, record.answer, error=record.error)


class Edge:
    """All of it, while the context is open. `scheme` is how the edge talks to the far gateway: grpc or http."""

    def __init__(self, scheme: str, *, deadline_ms: float = 150.0, rate: float = 100.0) -> None:
        self.scheme = scheme
        self.deadline_ms = deadline_ms
        self.rate = rate
        self.answers: list[Answer] = []
        self.far: Process
        self.near: Process
        self.proxy: FaultProxy
        self._tags = itertools.count(random.randrange(1, _LARGEST // 2))
        self._stack = AsyncExitStack()
        self._changed = asyncio.Event()  # there is another answer

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockgate-edge-")))
            self._far_ports, self._near_ports = (servers.Ports(*servers.free_ports(3)) for _ in range(2))
            (folder / "far").mkdir()
            (folder / "far" / FAR).symlink_to(ROOT / "model_repo" / FAR)
            self.far = _gateway(folder / "far", self._far_ports, folder / "far.log")
            target = self._far_ports.grpc if self.scheme == "grpc" else self._far_ports.http
            self.proxy = await stack.enter_async_context(FaultProxy(f"127.0.0.1:{target}"))
            _write_edge_model(folder / "near" / NEAR, f"{self.scheme}://{self.proxy.address}")
            self.near = _gateway(folder / "near", self._near_ports, folder / "near.log")
            for process, ports, model in ((self.far, self._far_ports, FAR), (self.near, self._near_ports, NEAR)):
                process.start()
                stack.push_async_callback(asyncio.to_thread, process.stop)
                await ready(process, ports.http, model)
            await self._settle()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def _settle(self) -> None:
        """Wait until all engines are loaded and nothing is slow any more because it is done for the first time."""
        async with self.load():
            await self.remote(time.monotonic(), _GOOD, _SETTLE)
        self.answers.clear()

    async def remote(self, since: float, times: int, seconds: float) -> None:
        """Wait until so many answers in a row were the far gateway's, of requests sent since a moment; no longer than that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._is_remote(since, times):
                    self._changed.clear()
                    await self._changed.wait()

    def _is_remote(self, since: float, times: int) -> bool:
        last = self.answers[-times:]
        return len(last) == times and all(each.remote and each.record.sent >= since for each in last)

    async def restart_far(self) -> None:
        """Start the far gateway again, and wait until it serves."""
        self.far.start()
        await ready(self.far, self._far_ports.http, FAR)

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Requests at the rate for as long as the block lasts; then all of them are over, one way or the other."""
        async with asyncio.TaskGroup() as tasks:
            idle: list[_Connection] = []
            sending = tasks.create_task(self._send(tasks, idle))
            try:
                yield
            finally:
                sending.cancel()
        for connection in idle:
            connection.close()

    def phase(self, start: float, end: float) -> Phase:
        """The requests sent between two moments."""
        return Phase([each for each in self.answers if start <= each.record.sent < end], self.deadline_ms)

    async def _send(self, tasks: asyncio.TaskGroup, idle: list[_Connection]) -> None:
        due = time.monotonic()
        while True:
            due += 1 / self.rate
            await asyncio.sleep(due - time.monotonic())
            tasks.create_task(self._ask(idle))

    async def _ask(self, idle: list[_Connection]) -> None:
        tag, sent = next(self._tags), time.monotonic()
        connection = idle.pop() if idle else _Connection(self._near_ports.http)
        try:
            async with asyncio.timeout(self.deadline_ms / 1e3 + _PATIENCE):
                status, answer, engine, error = await connection.ask(_request(tag, self.deadline_ms))
        except (OSError, asyncio.IncompleteReadError):
            connection.close()
            self._note(Record(0, tag, sent, time.monotonic(), LOST))
        except TimeoutError:
            connection.close()
            self._note(Record(0, tag, sent, None, UNANSWERED))
        else:
            idle.append(connection)
            self._note(Record(0, tag, sent, time.monotonic(), status, answer, error=error), engine)

    def _note(self, record: Record, engine: str = "") -> None:
        self.answers.append(Answer(record, engine))
        self._changed.set()


class _Connection:
    """A connection to the edge with at most one request on its way, opened when it is first used."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> tuple[int, int | None, str, str]:
        """Status, the number that came back, the engine, and the error if it is one."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        body = await self._reader.readexactly(int(headers["content-length"]))
        status = int(head.split()[1])
        if status != 200:
            return status, None, "", body.decode()
        size = int(headers["inference-header-content-length"])
        (number,) = struct.unpack_from("<f", body, size)
        return status, int(number), str(json.loads(body[:size]).get("parameters", {}).get("engine", "")), ""

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


async def ready(process: Process, port: int, model: str, seconds: float = 30.0) -> None:
    """Wait until the gateway serves the model. Raises RuntimeError, with its log, when it does not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.alive:
        try:
            if (await asyncio.to_thread(servers.get, port, f"/v2/models/{model}/ready"))[0] == 200:
                return
        except OSError:
            pass
        await asyncio.sleep(0.02)
    message = f"{model} is not served within {seconds:g} s:\n{process.tail()}"
    raise RuntimeError(message)


def _gateway(repository: Path, ports: servers.Ports, log: Path) -> Process:
    flags = ["--http-port", ports.http, "--grpc-port", ports.grpc, "--metrics-port", ports.metrics]
    flags += ["--model-repository", repository, "--persist-latency", "false", "--log-format", "json"]
    return Process([sys.executable, "-m", "gateway", "serve", *map(str, flags)], log)


def _write_edge_model(folder: Path, url: str) -> None:
    """The model of the far gateway, with the far gateway as its first engine."""
    there = ROOT / "model_repo" / FAR
    (folder / "1").mkdir(parents=True)
    shutil.copy(there / "1" / "model.onnx", folder / "1")
    text = (there / "config.pbtxt").read_text().replace(f'name: "{FAR}"', f'name: "{NEAR}"')
    for key, value in {**_PARAMETERS, "remote.url": url}.items():
        text += f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
    (folder / "config.pbtxt").write_text(text)


def _request(tag: int, deadline_ms: float) -> bytes:
    tensors: list[dict[str, Any]] = [
        {"name": name, "shape": [1, _SIZE], "datatype": "FP32", "parameters": {"binary_data_size": 4 * _SIZE}}
        for name in ("INPUT0", "INPUT1")
    ]
    document = json.dumps(
        {"inputs": tensors, "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}]}
    ).encode()
    body = document + struct.pack(f"<{_SIZE}f", *[tag] * _SIZE) + bytes(4 * _SIZE)
    deadline = f"x-request-timeout-ms: {deadline_ms:g}\r\n" if deadline_ms else ""
    head = (
        f"POST /v2/models/{NEAR}/infer HTTP/1.1\r\nHost: edge\r\n{deadline}"
        f"Inference-Header-Content-Length: {len(document)}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
