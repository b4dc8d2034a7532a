"""What the queue between processes costs and gains, against the same gateway with the queue in memory.

    python -m loadtest.fleet_bench [--pairs 5] [--seconds 4] [--only cost|image|scale] [--out FILE.json] [--plot FILE.png]

Cost: CPU of all processes (gateway, Redis, worker) for each request of the tiny model at 64 in flight, A B A B. Image: requests a
second of the image classifier (602 KB each) with payloads in shared memory and in Redis, as shares of those in memory. Scale:
requests a second by workers, gateway processes and bytes of a request, of a fake model that takes no time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from loadtest import samples
from loadtest.bench import bodies, generators, servers
from loadtest.bench.runner import log
from loadtest.fleet import Fleet
from loadtest.record import ROOT, provenance
from loadtest.samples import Sample

REPOSITORY = ROOT / "model_repo"
_ECHO = """backend: "fake" max_batch_size: 64 dynamic_batching {{ }}
instance_group {{ count: 1 kind: KIND_CPU }}
input {{ name: "IN" data_type: TYPE_UINT8 dims: {size} }} output {{ name: "OUT" data_type: TYPE_UINT8 dims: 1 }}
"""
SIZES = (4 << 10, 64 << 10, 256 << 10, 1 << 20)


@dataclass(frozen=True, slots=True)
class Row:
    """One run of the generator."""

    part: str
    system: str
    pair: int
    rps: float
    p50_us: float
    cpu_us: float  # of all server processes, for each request
    errors: int
    payload: int = 0
    workers: int = 1
    gateways: int = 1


class System:
    """Processes that serve one model, and where."""

    def __init__(self, name: str, port: int, pids: Sequence[int]) -> None:
        self.name = name
        self.port = port
        self._processes = [psutil.Process(pid) for pid in pids]

    def cpu_seconds(self) -> float:
        """Of all of them so far."""
        return sum(times.user + times.system for times in (each.cpu_times() for each in self._processes))


@contextlib.contextmanager
def memory(repository: Path, model: str) -> Iterator[System]:
    """One process with the queue in memory."""
    ports = servers.Ports(*servers.free_ports(3))
    with servers.gateway((sys.executable, "-m", "gateway"), repository, model, ports, None) as server:
        yield System("memory", ports.http, [server.pid])


@contextlib.contextmanager
def fleet(
    repository: Path, model: str, name: str, *flags: str, workers: int = 1, gateways: int = 1
) -> Iterator[System]:
    """Gateways, workers and a Redis."""
    with Fleet() as of:
        of.models = repository
        explicit = ("--model-control-mode", "explicit", "--load-model", model)
        for _ in range(workers):
            of.add_worker(*explicit, *flags)
        for _ in range(gateways):
            of.add_gateway(*flags)
        of.ready(model=model)
        pids = [process.pid for process in (of.redis, *of.workers, *of.gateways)]
        yield System(name, of.ports[0].http, pids)


def measure(  # noqa: PLR0917 - what it is, and how it is loaded
    part: str, system: System, wire: bodies.Wire, pair: int, connections: int, seconds: float, **more: int
) -> Row:
    """Load one system."""
    before = system.cpu_seconds()
    load = generators.run(f"http://127.0.0.1:{system.port}", wire, connections, seconds, None)
    time.sleep(0.2)  # what is under way is part of it
    cpu = (system.cpu_seconds() - before) / max(1, load.requests) * 1e6
    row = Row(part, system.name, pair, load.requests / load.seconds, load.p50_us, cpu, load.errors, **more)
    log(
        f"{part:6} {system.name:14} #{pair} {row.rps:8.0f}/s p50 {row.p50_us / 1e3:7.2f} ms cpu {row.cpu_us:7.0f} us errors {row.errors} {more or ''}"
    )
    return row


def cost(pairs: int, seconds: float) -> list[Row]:
    """The tiny model at 64 in flight."""
    wire = bodies.http_binary(samples.sample("add_sub"))
    with memory(REPOSITORY, "add_sub") as one, fleet(REPOSITORY, "add_sub", "fleet") as many:
        for system in (one, many):
            generators.run(f"http://127.0.0.1:{system.port}", wire, 64, 1, None)
        return [measure("cost", system, wire, pair, 64, seconds) for pair in range(pairs) for system in (one, many)]


def image(pairs: int, seconds: float) -> list[Row]:
    """The image classifier."""
    model = "efficientnet_lite0"
    wire = bodies.http_binary(samples.sample(model))
    with ExitStack() as stack:
        systems = [
            stack.enter_context(memory(REPOSITORY, model)),
            stack.enter_context(fleet(REPOSITORY, model, "shared memory")),
            stack.enter_context(fleet(REPOSITORY, model, "redis", "--queue-shared-memory", "false")),
        ]
        for system in systems:
            generators.run(f"http://127.0.0.1:{system.port}", wire, 16, 2, None)
        return [measure("image", system, wire, pair, 16, seconds) for pair in range(pairs) for system in systems]


def scale(folder: Path, seconds: float) -> list[Row]:
    """The echo model by payload, workers and gateways."""
    rows = []
    for size in SIZES:
        model = folder / f"echo-{size}"
        (model / "1").mkdir(parents=True, exist_ok=True)
        (model / "config.pbtxt").write_text(_ECHO.format(size=size))
        data = np.random.default_rng(size).integers(0, 255, (1, size), np.uint8)
        wire = bodies.http_binary(Sample(model.name, {"IN": data}))
        for workers, gateways in ((1, 1), (2, 1), (1, 2), (2, 2)):
            with fleet(folder, model.name, "fleet", workers=workers, gateways=gateways) as system:
                rows.append(_scaled(system, wire, seconds, payload=size, workers=workers, gateways=gateways))
        with memory(folder, model.name) as system:
            rows.append(_scaled(system, wire, seconds, payload=size))
    return rows


def _scaled(system: System, wire: bodies.Wire, seconds: float, **more: int) -> Row:
    generators.run(f"http://127.0.0.1:{system.port}", wire, 32, 1, None)
    return measure("scale", system, wire, 0, 32, seconds, **more)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Medians of the pairs, and their ranges."""
    found: dict[str, Any] = {}
    pairs = sorted({row.pair for row in rows})

    def by(part: str, system: str, figure: str) -> dict[int, float]:
        return {row.pair: getattr(row, figure) for row in rows if (row.part, row.system) == (part, system)}

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    one, many = by("cost", "memory", "cpu_us"), by("cost", "fleet", "cpu_us")
    if one and many:
        found["cpu_us_above_memory"] = spread([many[pair] - one[pair] for pair in pairs if pair in one])
        found["cpu_us_memory"], found["cpu_us_fleet"] = spread(list(one.values())), spread(list(many.values()))
    base = by("image", "memory", "rps")
    for system in ("shared memory", "redis"):
        if there := by("image", system, "rps"):
            found[f"image_share_{system.replace(' ', '_')}"] = spread([there[pair] / base[pair] for pair in there])
    found["errors"] = sum(row.errors for row in rows)
    return found


def plot(rows: Sequence[Row], file: Path) -> None:
    """Requests a second by payload, a line for each number of processes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for key in sorted({(row.system, row.workers, row.gateways) for row in rows if row.part == "scale"}):
        points = sorted(
            (row.payload / 1024, row.rps)
            for row in rows
            if (row.system, row.workers, row.gateways) == key and row.part == "scale"
        )
        label = "in memory, 1 process" if key[0] == "memory" else f"{key[2]} gateways, {key[1]} workers"
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="KiB of a request", ylabel="requests/s", title="Throughput through Redis"
    )
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> int:
    """Run what was asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.fleet_bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--only", action="append", choices=("cost", "image", "scale"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    parts = given.only or ["cost", "image", "scale"]
    rows: list[Row] = []
    if "cost" in parts:
        rows += cost(given.pairs, given.seconds)
    if "image" in parts:
        rows += image(given.pairs, given.seconds)
    if "scale" in parts:
        with tempfile.TemporaryDirectory(prefix="lockgate-echo-") as folder:
            rows += scale(Path(folder), given.seconds)
    found = summary(rows)
    print(json.dumps(found, indent=1))
    if given.out is not None:
        given.out.write_text(
            json.dumps({**provenance(), "summary": found, "rows": [asdict(row) for row in rows]}, indent=1)
        )
    if given.plot is not None:
        plot(rows, given.plot)
    return int(found["errors"] > 0)


if __name__ == "__main__":
    sys.exit(main())
