"""A gateway whose engines are to be hurt: its process, load on it, requests that break its models, and what is seen of all that.

Used by `loadtest.engine_faults` and by the tests in tests/system. Blocking calls, so that the caller decides where they run.
"""

from __future__ import annotations

import http.client
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import psutil

from loadtest.bench import servers
from loadtest.fleet import Client, FleetError, Process, wait_until
from loadtest.fleet_client import MODEL, write_model
from loadtest.history import History, Verdict
from loadtest.record import ROOT

FLOATS = "floats"
IMAGES = "efficientnet_lite0"
IN_FLIGHT = 32
FIRST_TAG = 1000  # of our own requests: no value that breaks a model
GROWTH, SLACK = 0.03, 8 << 20  # of resident memory: a share of it, and bytes
VALUES = {  # a number that makes the fake model do this
    "segfault": 13, "abort": 14, "exit": 15, "kill": 16, "sticky": 17, "hang": 18, "hang_gil": 19, "poison": 20, "oom": 21,
    "short": 22, "nan": 23,
}  # fmt: skip


class Told(NamedTuple):
    """An answer to one of our own requests."""

    status: int
    body: bytes
    seconds: float

    @property
    def error(self) -> str:
        """Its text, when it is an error."""
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(self.body)["error"])
        return ""


class Death(NamedTuple):
    """The end of an engine's process: when, by the monotonic clock, and why."""

    at: float
    cause: str


@dataclass(slots=True)
class Outcome:
    """What came of a fault. `broken` are promises, and empty when all is well."""

    verdict: Verdict = field(default_factory=Verdict)
    history: History | None = None
    deaths: list[Death] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def require(self, kept: object, promise: str) -> None:
        """Note a promise that was not kept."""
        if not kept:
            self.broken.append(promise)

    def judge(self, recovery: float) -> Self:
        """Every request was answered, with its own answer and in time, and again so soon after the end of a process."""
        verdict = self.verdict
        self.broken += verdict.faults(late_share=0.0)
        bad = {status: count for status, count in verdict.statuses.items() if status != 200}
        self.require(not bad, f"requests without poison that failed: {bad}, {dict(verdict.errors.most_common(3))}")
        took = self.recovery()
        self.require(took <= recovery, f"answers again {took:.3f} s after the end of a process, not {recovery:g} s")
        self.figures = {
            "requests": verdict.requests,
            "slowest_ms": round(1e3 * verdict.slowest, 1),
            "gap_ms": round(1e3 * verdict.gap, 1),
            "deaths": len(self.deaths),
            "recovery_ms": round(1e3 * took, 1),
            **self.figures,
        }
        return self

    def recovery(self) -> float:
        """The longest time from the end of a process to the next good answer, of those that no other end came before."""
        records = [] if self.history is None else self.history.records
        good = sorted(each.received for each in records if each.status == 200 and each.received is not None)
        ends = sorted(each.at for each in self.deaths)
        took = [0.0]
        for number, end in enumerate(ends):
            answer = next((moment for moment in good if moment >= end), math.inf)
            following = ends[number + 1] if number + 1 < len(ends) else math.inf
            if answer <= following < math.inf or (answer < math.inf and following == math.inf):
                took.append(answer - end)
        return max(took)


class Rig:
    """A gateway with a fake model of whole numbers, one of floats and, if wanted, the image classifier. A context manager."""

    def __init__(self, *, base_us: float = 8000.0, images: bool = False, **more: str) -> None:
        """`base_us` is what a batch takes at least; `more` are parameters of the fake models."""
        self._base_us = base_us
        self._images = images
        self._more = more
        self._stack = ExitStack()
        self._clients = 0
        self.folder: Path
        self.models: Path
        self.process: Process
        self.ports: servers.Ports

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockgate-engines-")))
            models = self.models = self.folder / "models"
            faults = {name: str(value) for name, value in VALUES.items()}
            given = faults | self._more
            for name, datatype in ((MODEL, "INT64"), (FLOATS, "FP64")):
                write_model(models, name, base_us=self._base_us, datatype=datatype, **given)
            if self._images:
                # Its own file, whichever is best here: that takes longer, so that more is hurt.
                ignored = shutil.ignore_patterns("artefacts", ".*")
                shutil.copytree(ROOT / "model_repo" / IMAGES, models / IMAGES, ignore=ignored)
            self.ports = servers.Ports(*servers.free_ports(3))
            listen = [f"--{kind}-port={port}" for kind, port in asdict(self.ports).items()]
            command = [sys.executable, "-m", "gateway", "serve", "--model-repository", str(models), *listen]
            self.process = Process(
                [*command, "--isolation", "process", "--log-format", "json"], self.folder / "gateway.log"
            )
            self.process.start()
            stack.callback(self.process.stop)
            try:
                wait_until(lambda: self.ready, "the gateway is ready", 60.0)
            except FleetError as problem:
                message = f"{problem}\n{self.process.tail()}"
                raise FleetError(message) from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def ready(self) -> bool:
        """Whether it serves all of its models."""
        return servers.get(self.ports.http, "/v2/health/ready")[0] == 200

    def children(self, model: str = MODEL) -> list[psutil.Process]:
        """The processes that run a model."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.name().startswith(f"{model}/"[:15]):
                    found.append(child)
        return found

    def strike(self, number: signal.Signals, model: str = MODEL) -> None:
        """Send a signal to a process of a model; waits for one that there is."""
        wait_until(lambda: bool(self.children(model)), "a process runs the model")
        for child in self.children(model):
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    def deaths(self) -> list[Death]:
        """The ends of its engines' processes up to now, by its log."""
        offset = time.time() - time.monotonic()
        return [
            Death(datetime.fromisoformat(event["time"]).timestamp() - offset, event["cause"])
            for event in self.events("engine_died")
        ]

    def events(self, name: str) -> list[Mapping[str, Any]]:
        """What its log says of this."""
        lines = (line for line in self.process.log.read_bytes().splitlines() if f'"{name}"'.encode() in line)
        found = [json.loads(line) for line in lines if line.startswith(b"{")]
        return [event for event in found if event.get("event") == name]

    def send(self, value: float, tag: int, model: str = MODEL) -> Told:
        """A request of two rows, this value and a number of its own."""
        datatype, values = ("FP64", "<f8") if model == FLOATS else ("INT64", "<i8")
        tensor = {"name": "IN", "shape": [2, 1], "datatype": datatype, "parameters": {"binary_data_size": 16}}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        connection = http.client.HTTPConnection("127.0.0.1", self.ports.http, timeout=120)
        began = time.monotonic()
        try:
            body = head + np.array([value, FIRST_TAG + tag], values).tobytes()
            connection.request("POST", f"/v2/models/{model}/infer", body, headers)
            response = connection.getresponse()
            return Told(response.status, response.read(), time.monotonic() - began)
        finally:
            connection.close()

    @contextmanager
    def load(self, deadline_ms: float, model: str = MODEL) -> Iterator[Outcome]:
        """32 requests in flight while the block runs; what became of them is in the outcome after that."""
        outcome = Outcome()
        before = len(self.deaths())
        with self.client(model=model, deadline_ms=deadline_ms) as client:
            yield outcome
        outcome.verdict, outcome.history = client.verdict, client.history
        outcome.deaths = self.deaths()[before:]

    @contextmanager
    def client(self, **plan: Any) -> Iterator[Client]:
        """The load's own process."""
        self._clients += 1
        name = f"client-{self._clients}"
        history = self.folder / f"{name}.jsonl"
        datatype = "FP64" if plan.get("model") == FLOATS else "INT64"
        given = {"ports": [self.ports.http], "history": str(history), "client": name, "datatype": datatype}
        given |= {"concurrency": IN_FLIGHT}
        client = Client(json.dumps(given | plan).encode(), self.folder / f"{name}.log", history)
        client.start()
        try:
            wait_until(lambda: b"started" in client.log.read_bytes(), "the client has started")
            yield client
        finally:
            client.finish()
