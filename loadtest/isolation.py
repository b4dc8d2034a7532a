"""`python -m loadtest.isolation`: what instances in child processes cost, against threads, A B A B.

Two gateways stand side by side and are loaded in turn by wrk with 32 connections, HTTP with binary tensors: throughput
with the image classifier, and CPU per request with the tiny model, of the gateway, its nursery and its children. With
`--crashes N` no gateway is started: an engine of the fake backend is crashed so often, and what is left of that is told.
The exit status is 0 when every bar that was measured is met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from loadtest import samples
from loadtest.bench import bodies, generators, probes, servers
from loadtest.bench.instructions import counting
from loadtest.bench.meter import Meter
from loadtest.record import ROOT, provenance

CONNECTIONS = 32
THROUGHPUT_BAR = 0.92  # of what threads do
CPU_BAR = 25.0  # us more per request
RECOVERY_BAR = 2.0  # seconds
IMAGES, TINY = "efficientnet_lite0", "add_sub"
KINDS = ("thread", "process")


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run."""

    model: str
    kind: str
    pair: int
    rps: float
    cpu_us: float
    p99_us: float
    errors: int
    other_cores: float
    kilo_instructions: float = 0.0


def gateway(model: str, kind: str, port: int) -> servers.Server:
    """A gateway with one model, its instances on threads or in processes; the tiny model's has one core."""
    flags = {
        "model-repository": ROOT / "model_repo", "model-control-mode": "explicit", "load-model": model,
        "isolation": kind, "http-port": port, "allow-grpc": "false", "allow-metrics": "false",
        "persist-latency": "false",
    }  # fmt: skip
    command = [sys.executable, "-m", "gateway", "serve", *(f"--{name}={value}" for name, value in flags.items())]
    core = 0 if model == TINY else None
    return servers.Server(command, lambda: servers.get(port, f"/v2/models/{model}/ready")[0] == 200, core)


def compare(model: str, pairs: int, seconds: float, *, instructions: bool) -> list[Run]:
    """Run both kinds in turn."""
    sample = samples.sample(model)
    want = samples.expected(samples.model_file(ROOT / "model_repo", model), sample.inputs)
    wire = bodies.http_binary(sample)
    client = 1 if model == TINY else None
    runs: list[Run] = []
    with ExitStack() as stack:
        ports = dict(zip(KINDS, servers.free_ports(len(KINDS)), strict=True))
        up = {kind: stack.enter_context(gateway(model, kind, port)) for kind, port in ports.items()}
        for kind in KINDS:
            generators.run(f"http://127.0.0.1:{ports[kind]}", wire, CONNECTIONS, 2, client)  # warm-up
            probes.check(ports[kind], wire, want)
        for pair in range(pairs):
            for kind in KINDS if pair % 2 == 0 else KINDS[::-1]:
                base = f"http://127.0.0.1:{ports[kind]}"
                meter = Meter(up[kind].cpu_seconds)
                load = generators.run(base, wire, CONNECTIONS, seconds, client)
                _, used, others = meter.read()
                cpu = used / max(load.requests, 1) * 1e6
                kilo = _instructions(base, wire, up[kind], client) if instructions else 0.0
                run = Run(model, kind, pair, load.requests / load.seconds, cpu, load.p99_us, load.errors, others, kilo)
                runs.append(run)
                sys.stderr.write(f"{run}\n")
    return runs


def _instructions(base: str, wire: bodies.Wire, server: servers.Server, client: int | None) -> float:
    with counting([process.pid for process in server.tree()]) as counted:
        load = generators.run(base, wire, CONNECTIONS, 2, client)
    return counted.total / max(load.requests, 1) / 1e3


def judge(runs: list[Run]) -> dict[str, float]:
    """The medians over pairs of what isolation costs."""

    def pairs(model: str) -> list[dict[str, Run]]:
        numbers = sorted({run.pair for run in runs if run.model == model})
        return [{run.kind: run for run in runs if run.model == model and run.pair == number} for number in numbers]

    found = {}
    if images := pairs(IMAGES):
        found["throughput_ratio"] = statistics.median(each["process"].rps / each["thread"].rps for each in images)
        # On a machine that others use, this says more.
        found["image_cpu_ratio"] = statistics.median(each["process"].cpu_us / each["thread"].cpu_us for each in images)
    if tiny := pairs(TINY):
        found["cpu_us_more"] = statistics.median(each["process"].cpu_us - each["thread"].cpu_us for each in tiny)
    return found


async def crash(times: int, folder: Path) -> dict[str, float]:
    """Crash an engine so often; how long it takes to come back, and what grew between a tenth of that and the end."""
    from gateway import engines
    from gateway.config.build import build
    from gateway.config.parse import Source, parse_text
    from gateway.engines.base import EngineCrashed, EngineSpec
    from gateway.engines.isolated.children import Children
    from gateway.statistics import Statistics
    from gateway.types import Array, Batch

    text = (
        "backend: 'fake' max_batch_size: 8 input { name: 'IN' data_type: TYPE_FP32 dims: [4] } output { name: 'OUT' "
        "data_type: TYPE_FP32 dims: [4] } parameters { key: 'allow_crash' value { string_value: 'true' } } "
        "parameters { key: 'segfault' value { string_value: '13' } }"
    )
    source = Source("crash/config.pbtxt", text)
    proto = parse_text(source)
    proto.name = "crash"

    def batch(value: float) -> Batch:
        inputs: dict[str, Array] = {"IN": np.full((1, 4), value, "<f4")}
        return Batch(1, lambda: inputs)

    me = psutil.Process()
    first: tuple[int, int, int] = (0, 0, 0)
    back: list[float] = []
    async with Children(Statistics(), "process") as children:
        (engine,) = await engines.create(EngineSpec(build(proto, source), "1", folder, "cpu", children=children))
        for number in range(times):
            crashed = time.monotonic()
            for value in (13.0, 1.0):
                try:
                    async with aclosing(engine.run(batch(value))) as results:
                        async for _ in results:
                            pass
                except EngineCrashed:
                    crashed = time.monotonic()
            back.append(time.monotonic() - crashed)
            if number == times // 10:
                first = me.memory_info().rss, me.num_fds(), me.num_threads()
        last = me.memory_info().rss, me.num_fds(), me.num_threads()
        await engine.close()
    grew = [after - before for before, after in zip(first, last, strict=True)]
    return {
        "crashes": times, "recovery_median_s": statistics.median(back), "recovery_max_s": max(back),
        "rss_growth_bytes": grew[0], "descriptors_growth": grew[1], "threads_growth": grew[2],
    }  # fmt: skip


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.isolation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="interleaved repetitions (5)")
    parser.add_argument("--seconds", type=float, default=5, help="length of one run (5)")
    parser.add_argument("--only", choices=(IMAGES, TINY), help="one model")
    parser.add_argument("--instructions", action="store_true", help="count instructions per request with perf stat")
    parser.add_argument("--crashes", type=int, default=0, help="crash an engine so often instead")
    parser.add_argument("--out", type=Path, help="JSON result file")
    args = parser.parse_args()
    runs: list[Run] = []
    if args.crashes:
        found = asyncio.run(crash(args.crashes, ROOT))
        met = found["recovery_max_s"] < RECOVERY_BAR and found["descriptors_growth"] == 0 == found["threads_growth"]
    else:
        if install := generators.missing(("wrk", "taskset")):
            sys.stderr.write(f"the load generators are missing: {install}\n")
            return 2
        for model in [args.only] if args.only else [TINY, IMAGES]:
            runs += compare(model, args.pairs, args.seconds, instructions=args.instructions)
        found = judge(runs)
        met = found.get("throughput_ratio", 1.0) >= THROUGHPUT_BAR and found.get("cpu_us_more", 0.0) <= CPU_BAR
        met = met and not any(run.errors for run in runs)
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(
            json.dumps({**provenance(), "found": found, "met": met, "runs": [*map(asdict, runs)]}, indent=1)
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
