"""One cell of the overload test: a scenario sent to a real gateway, and beside it the simulation of the same arrivals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gateway.scheduling.simulator.scenario import Interval, Scenario
from loadtest import overload_figures as figures
from loadtest.bench import servers
from loadtest.bench.meter import Meter
from loadtest.overload_client import ANSWERED, LOST, MODEL, UNANSWERED, UNSENT, WRONG, Attempts, Plan
from loadtest.overload_figures import PUBLISHED, Figures, Pace, SlowDown
from loadtest.record import ROOT

_POLL = 0.1  # seconds between looks at the number of batches, while the device is slow and after
_CONFIG = """backend: "fake" max_batch_size: {rows} dynamic_batching {{ }}
instance_group {{ count: 1 kind: KIND_CPU }}
input {{ name: "IN" data_type: TYPE_INT64 dims: 1 }} output {{ name: "OUT" data_type: TYPE_INT64 dims: 1 }}
parameters {{ key: "a_us" value {{ string_value: "{base:g}" }} }}
parameters {{ key: "b_us" value {{ string_value: "{per_row:g}" }} }}
parameters {{ key: "slow_file" value {{ string_value: "{slow_file}" }} }}
"""
_METRIC = re.compile(r'^(\w+)\{[^}]*model="' + MODEL + r'"[^}]*\} (\S+)$')
_REASON = re.compile(r'reason="(\w+)"')
_SUCCESS, _ROWS, _BATCHES = "nv_inference_request_success", "nv_inference_count", "nv_inference_exec_count"
_COMPUTE, _REFUSED = "nv_inference_compute_infer_duration_us", "gateway_requests_refused_total"


@dataclass(frozen=True, slots=True)
class Spec:
    """What to measure. The figures are of the requests due after `warm` seconds and until `warm + seconds`."""

    name: str
    load: float
    warm: float
    seconds: float
    retries: bool = False
    slow: Interval | None = None  # when the device is slow
    pace: Pace = PUBLISHED  # of the gateway that it is sent to

    @property
    def window(self) -> Interval:
        """When a request is due that counts."""
        return self.warm, self.warm + self.seconds

    def scenario(self) -> Scenario:
        """What is offered."""
        return figures.scenario(self.load, self.window[1], retries=self.retries, slow=self.slow, pace=self.pace)


@dataclass(frozen=True, slots=True)
class Cell:
    """One scenario, once: on the real server, and simulated."""

    spec: Spec
    seed: int
    real: Figures
    simulated: Figures
    mean_batch: float
    simulated_mean_batch: float
    busy: float  # share of the window in which the engine ran, by its own clock (the mean of its runs is weighted by rows)
    server_late: float  # share of what the server admitted that it calls late itself, over the whole cell
    server_us: float  # CPU of the server for each attempt
    client_us: float  # and of the generator
    other_cores: float  # used by neither, during the window
    disagreements: dict[str, tuple[int, int]] = field(default_factory=dict)  # what the server counted, and the client
    strays: int = 0
    waited: int = 0  # attempts that found every connection in use: the server is far behind
    slow: SlowDown | None = None
    simulated_slow: SlowDown | None = None


class Fake:
    """A gateway that serves the fake model, and the switch that makes the device slow."""

    def __init__(self, server: servers.Server, ports: servers.Ports, slow_file: Path) -> None:
        self.server = server
        self.ports = ports
        self._slow_file = slow_file

    def slow(self, factor: float) -> None:
        """From the next batch on, the device takes this many times as long."""
        new = self._slow_file.with_suffix(".new")
        new.write_text(f"{factor:g}")
        new.replace(self._slow_file)

    def counts(self) -> Counter[str]:
        """What the server has counted so far, refusals by their reason."""
        status, text = servers.get(self.ports.metrics, "/metrics")
        if status != 200:
            message = f"the metrics answered {status}"
            raise servers.ServerError(message)
        return read_counts(text.decode())

    def late(self) -> tuple[int, int]:
        """How many requests the scheduler says were late so far, and how many it admitted."""
        status, text = servers.get(self.ports.http, f"/v2/models/{MODEL}/explain")
        if status != 200:
            message = f"/explain answered {status}"
            raise servers.ServerError(message)
        told = json.loads(text)
        return told["late"], told["admitted"]


def read_counts(text: str) -> Counter[str]:
    """The counters of the fake model from Prometheus' text, refusals as their reason."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if (match := _METRIC.match(line)) is None:
            continue
        name = match[1]
        if name == _REFUSED and (reason := _REASON.search(line)):
            name = reason[1]
        found[name] += int(float(match[2]))
    return found


@contextmanager
def fake_gateway(command: Sequence[str], pace: Pace = PUBLISHED) -> Iterator[Fake]:
    """Start a gateway with a repository of its own; it has measured its batches when this enters."""
    with tempfile.TemporaryDirectory() as folder:
        slow_file, model = Path(folder) / "slow", Path(folder) / "models" / MODEL
        (model / "1").mkdir(parents=True)
        latency = pace.latency
        config = _CONFIG.format(
            rows=figures.MAX_ROWS, base=1e6 * latency.base, per_row=1e6 * latency.per_row, slow_file=slow_file
        )
        (model / "config.pbtxt").write_text(config)
        ports = servers.Ports(*servers.free_ports(3))
        with servers.gateway(command, model.parent, MODEL, ports, None) as server:
            yield Fake(server, ports, slow_file)


def measure(fake: Fake, spec: Spec, seed: int) -> Cell:
    """Simulate a scenario, then send it."""
    made = spec.scenario()
    record = figures.simulated(made, seed)
    simulation = figures.attempts_of(record)
    deadline = spec.pace.deadline
    plan = Plan(
        fake.ports.http,
        figures.arrivals(made, seed),
        1e3 * deadline,
        figures.RETRIES if spec.retries else 0,
    )
    before, late_before = fake.counts(), fake.late()
    run = _send(fake, plan, spec)
    counted, late = fake.counts(), fake.late()
    counted.subtract(before)
    attempts, real = run.attempts, figures.figures(run.attempts, spec.window, deadline)
    batches = max(run.counted[_BATCHES], 1)
    slow = simulated_slow = None
    if spec.slow is not None:
        slow = figures.slow_down(attempts, spec.slow, spec.window, run.batches, deadline)
        ended = [each.ended for each in record.runs]
        simulated_slow = figures.slow_down(simulation, spec.slow, spec.window, ended, deadline)
    return Cell(
        spec,
        seed,
        real,
        figures.figures(simulation, spec.window, deadline),
        run.counted[_ROWS] / batches,
        figures.mean_batch(record, spec.window),
        run.counted[_COMPUTE] / max(run.counted[_ROWS], 1) * batches / 1e6 / run.wall,
        (late[0] - late_before[0]) / max(late[1] - late_before[1], 1),
        1e6 * run.server_seconds / max(real.attempts, 1),
        1e6 * attempts.cpu_seconds / max(len(attempts.call), 1),
        max(0.0, run.unexplained - attempts.cpu_seconds / (spec.window[1] + 0.3)),
        disagreements(counted, attempts),
        attempts.strays,
        attempts.waited,
        slow,
        simulated_slow,
    )


def disagreements(counted: Counter[str], attempts: Attempts) -> dict[str, tuple[int, int]]:
    """Outcomes that the server counted another number of than the client: the server's, the client's."""
    seen = Counter(attempts.kind)
    seen[ANSWERED] += seen.pop(WRONG, 0)
    seen.pop(UNANSWERED, None)
    seen.pop(LOST, None)
    seen.pop(UNSENT, None)
    ours = {name: counted[name] for name in (*figures.STATUS, *seen)}
    ours[ANSWERED] = counted[_SUCCESS]
    return {name: (count, seen[name]) for name, count in ours.items() if count != seen[name]}


@dataclass(frozen=True, slots=True)
class _Run:
    attempts: Attempts
    counted: Counter[str]  # by the server, in the window
    batches: list[float]  # moments when batches were seen to have ended; only while the device is slow and after
    wall: float
    server_seconds: float
    unexplained: float  # cores used by all but the server


def _send(fake: Fake, plan: Plan, spec: Spec) -> _Run:
    """Run the generator, look at the server at both ends of the window, and slow the device meanwhile."""
    command = [sys.executable, "-m", "loadtest.overload_client"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(json.dumps(asdict(plan)))
        client.stdin.close()
        start = float(client.stdout.readline())
        _sleep_until(start + spec.window[0])
        before, used = fake.counts(), Meter(fake.server.cpu_seconds)
        batches = [] if spec.slow is None else _slow_down(fake, start, spec.slow)
        _sleep_until(start + spec.window[1])
        wall, server_seconds, unexplained = used.read()
        counted = fake.counts()
        counted.subtract(before)
        attempts = Attempts(**json.loads(client.stdout.read()))
    return _Run(attempts, counted, batches, wall, server_seconds, unexplained)


def _slow_down(fake: Fake, start: float, slow: Interval) -> list[float]:
    """Make the device slow in an interval, and note when its batches end."""
    _sleep_until(start + slow[0])
    fake.slow(figures.SLOWER)
    ended: list[float] = []
    try:
        seen = fake.counts()[_BATCHES]
        while time.monotonic() < start + slow[1]:
            time.sleep(_POLL)
            now, count = time.monotonic() - start, fake.counts()[_BATCHES]
            ended += [now] * (count - seen)
            seen = count
    finally:
        fake.slow(1.0)
    return ended


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
