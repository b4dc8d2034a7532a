"""`python -m loadtest.scheduling_cost`: what deadlines, admission and fairness cost a request, against greedy batching.

Two gateways stand side by side with the tiny model and are loaded in turn by wrk with 32 connections, HTTP with binary
tensors. They are the same but for the scheduler: one has the simulator's `Greedy`, which takes all that waits, admits
everything and learns nothing. The exit status is 0 when the bar is met.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway.queues.base import Job
from gateway.scheduling.base import Dispatch, LaneKey, Limits, Place, Refusal, Request, Run
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.scheduling.simulator.fifo import Greedy
from loadtest import samples
from loadtest.bench import bodies, generators, servers
from loadtest.bench.instructions import counting
from loadtest.bench.meter import Meter
from loadtest.record import ROOT, provenance

CONNECTIONS = 32
CPU_BAR = 12.0  # us more per request
MODEL = "add_sub"
KINDS = ("greedy", "deadline")


class GreedyScheduler(DeadlineScheduler[Job]):
    """Decides as `Greedy`; what the gateway asks beside that, it is told of a scheduler that has seen nothing."""

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type] # whatever it is made with
        self._greedy: Greedy[Job] = Greedy()

    def open(self, lane: LaneKey, limits: Limits, places: Sequence[Place]) -> None:
        super().open(lane, limits, places)
        self._greedy.open(lane, limits, places)

    def close(self, lane: LaneKey) -> list[Job]:
        super().close(lane)
        return self._greedy.close(lane)

    def admit(self, lane: LaneKey, request: Request, now: float) -> Refusal | None:
        return self._greedy.admit(lane, request, now)

    def settle(self, lane: LaneKey, request: Request, now: float) -> None:
        self._greedy.settle(lane, request, now)

    def add_all(self, lane: LaneKey, jobs: Sequence[Job], now: float) -> None:  # noqa: ARG002 - nothing is timed
        self._greedy._lines[lane].waiting.extend(jobs)  # noqa: SLF001 - as cheap as it can be

    def dispatch(self, device: str, now: float) -> Dispatch[Job]:
        return self._greedy.dispatch(device, now)

    def finished(self, run: Run[Job], seconds: float, now: float, *, failed: bool = False, learn: bool = True) -> None:
        del learn
        run.ended = now
        self._greedy.finished(run, seconds, now, failed=failed)


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured run."""

    kind: str
    pair: int
    rps: float
    cpu_us: float
    p99_us: float
    errors: int
    kilo_instructions: float


def serve(kind: str, arguments: list[str]) -> None:
    """Be a gateway with that scheduler."""
    import gateway.worker.worker as place
    from gateway.cli import main as run

    if kind == "greedy":
        setattr(place, "DeadlineScheduler", GreedyScheduler)  # noqa: B010 - a class is not assigned to, says mypy
    sys.argv = ["gateway", "serve", *arguments]
    run()


def gateway(kind: str, port: int) -> servers.Server:
    """A gateway on one core with the tiny model on a thread, so that nothing is measured but what is compared."""
    flags = {
        "model-repository": ROOT / "model_repo", "model-control-mode": "explicit", "load-model": MODEL,
        "isolation": "thread", "http-port": port, "allow-grpc": "false", "allow-metrics": "false",
        "persist-latency": "false",
    }  # fmt: skip
    command = [sys.executable, "-m", "loadtest.scheduling_cost", "--serve", kind]
    command += [f"--{name}={value}" for name, value in flags.items()]
    return servers.Server(command, lambda: servers.get(port, f"/v2/models/{MODEL}/ready")[0] == 200, 0)


def compare(pairs: int, seconds: float, *, instructions: bool) -> list[Measured]:
    """Run both kinds in turn."""
    wire = bodies.http_binary(samples.sample(MODEL))
    runs: list[Measured] = []
    with ExitStack() as stack:
        ports = dict(zip(KINDS, servers.free_ports(len(KINDS)), strict=True))
        up = {kind: stack.enter_context(gateway(kind, port)) for kind, port in ports.items()}
        for port in ports.values():
            generators.run(f"http://127.0.0.1:{port}", wire, CONNECTIONS, 2, 1)  # warm-up
        for pair in range(pairs):
            for kind in KINDS if pair % 2 == 0 else KINDS[::-1]:
                base = f"http://127.0.0.1:{ports[kind]}"
                meter = Meter(up[kind].cpu_seconds)
                load = generators.run(base, wire, CONNECTIONS, seconds, 1)
                _, used, _ = meter.read()
                kilo = 0.0
                if instructions:
                    with counting([process.pid for process in up[kind].tree()]) as counted:
                        kilo = generators.run(base, wire, CONNECTIONS, 2, 1).requests
                    kilo = counted.total / max(kilo, 1) / 1e3
                cpu = used / max(load.requests, 1) * 1e6
                runs.append(Measured(kind, pair, load.requests / load.seconds, cpu, load.p99_us, load.errors, kilo))
                sys.stderr.write(f"{runs[-1]}\n")
    return runs


def judge(runs: list[Measured]) -> dict[str, float]:
    """How much more the gateway's own scheduler takes: the median over pairs, and their range."""

    def more(of: Callable[[Measured], float]) -> list[float]:
        found = {(run.kind, run.pair): of(run) for run in runs}
        return [found["deadline", pair] - found["greedy", pair] for pair in range(len(runs) // 2)]

    cpu = more(lambda run: run.cpu_us)
    return {
        "cpu_us_more": statistics.median(cpu),
        "cpu_us_more_least": min(cpu),
        "cpu_us_more_most": max(cpu),
        "kilo_instructions_more": statistics.median(more(lambda run: run.kilo_instructions)),
    }


def main() -> int:
    """Measure, print and write."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.scheduling_cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--pairs", type=int, default=5, help="interleaved repetitions (5)")
    parser.add_argument("--seconds", type=float, default=5, help="length of one run (5)")
    parser.add_argument("--instructions", action="store_true", help="count instructions per request with perf stat")
    parser.add_argument("--out", type=Path, help="JSON result file")
    args = parser.parse_args()
    if install := generators.missing(("wrk", "taskset")):
        sys.stderr.write(f"the load generators are missing: {install}\n")
        return 2
    runs = compare(args.pairs, args.seconds, instructions=args.instructions)
    found = judge(runs)
    met = found["cpu_us_more"] <= CPU_BAR and not any(run.errors for run in runs)
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(
            json.dumps({**provenance(), "found": found, "met": met, "runs": [*map(asdict, runs)]}, indent=1)
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
