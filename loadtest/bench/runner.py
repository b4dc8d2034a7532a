"""Runs the cells of a plan: servers up, one measurement after another, everything checked.

What each figure rests on: requests/s and percentiles come from the generator, answered requests from the gateway's own success
counter (for baseline (a), which has none, from the generator's 2xx), CPU from the server's process tree, divided by the answered.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from loadtest import samples
from loadtest.bench import bodies, generators, probes, rawort, servers
from loadtest.bench.calibration import calibrate
from loadtest.bench.instructions import counting
from loadtest.bench.meter import Meter, wait_quiet
from loadtest.bench.plan import GATEWAY, PINNED, Cell, Options, cells
from loadtest.samples import Arrays

SERVER_CORE, CLIENT_CORE = 0, 1


@dataclass(frozen=True, slots=True)
class Result:
    """One measured cell."""

    model: str
    connections: int
    pair: int
    system: str
    seconds: float
    requests: int
    answered: int
    rps: float
    p50_us: float
    p99_us: float
    cpu_us: float
    errors: int
    calibration_ms: float
    calibration_cpu_ms: float
    client_cores: float = 0.0
    other_cores: float = 0.0
    kilo_instructions: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A running system that can be loaded: where, with what, and what the right answer is."""

    server: servers.Server
    port: int
    wire: bodies.Wire
    want: Arrays
    count: Callable[[], int] | None

    def check(self) -> str:
        """Send one request with a real client; the empty text when its answer is right."""
        try:
            probes.check(self.port, self.wire, self.want)
        except (probes.ProbeError, bodies.BodyError, OSError, ValueError, KeyError) as error:
            return str(error)[:300]
        return ""


@dataclass(frozen=True, slots=True)
class Rig:
    """All that is up while one model is measured."""

    file: Path
    core: int | None
    instructions: bool
    shape: rawort.Shape
    targets: dict[str, Target]


def settled(count: Callable[[], int]) -> int:
    """The counter once it has stopped moving: requests whose client has left may still be running."""
    last = count()
    for _ in range(50):
        time.sleep(0.1)
        now = count()
        if now == last:
            break
        last = now
    return last


def errors_of(load: generators.Load, answered: int) -> int:
    """Requests without a right answer: what the generator saw, or what the server's counter lacks."""
    return load.errors + max(0, load.requests - load.errors - answered)


def _measure_target(cell: Cell, target: Target, core: int | None, *, count_instructions: bool) -> Result:
    """Load one server and account for every request."""
    calibration = calibrate(SERVER_CORE if core is not None else None)
    note = target.check()
    count = target.count
    first = settled(count) if count else 0
    meter = Meter(target.server.cpu_seconds)
    client = None if core is None else CLIENT_CORE
    base = f"http://127.0.0.1:{target.port}"
    load = generators.run(base, target.wire, cell.connections, cell.seconds, client)
    answered = settled(count) - first if count else load.requests - load.errors
    _, used, others = meter.read()
    instructions = _instructions(base, cell, target, client) if count_instructions else 0.0
    note = "; ".join(filter(None, [note, target.check()]))
    wrong = bool(note)
    note = "; ".join(filter(None, [note, load.note]))
    if answered > load.requests + 2 * cell.connections:
        note += f" the server answered {answered - load.requests} requests that were not ours"
    return Result(
        cell.model, cell.connections, cell.pair, cell.system, load.seconds, load.requests, answered,
        (load.requests - load.errors) / load.seconds, load.p50_us, load.p99_us, used / max(1, answered) * 1e6,
        errors_of(load, answered) + wrong, calibration.wall_ms, calibration.cpu_ms,
        load.client_cpu_s / load.seconds, others, instructions, note,
    )  # fmt: skip


def _instructions(base: str, cell: Cell, target: Target, client: int | None) -> float:
    """Thousands of instructions per request, in a run of its own: counting slows thread switches down several times."""
    with counting([process.pid for process in target.server.tree()]) as counted:
        load = generators.run(base, target.wire, cell.connections, 2, client)
    return counted.total / max(1, load.requests) / 1e3


def _measure_raw(cell: Cell, rig: Rig) -> Result:
    """Measure ONNX Runtime: its lone latency beside one connection, its best throughput otherwise."""
    calibration = calibrate(SERVER_CORE if rig.core is not None else None)
    shape = rawort.LONE if cell.lone else rig.shape
    meter = Meter(lambda: 0.0)
    raw = rawort.measure(rig.file, cell.model, shape, cell.seconds, rig.core)
    rows = round(raw.rows_per_second * cell.seconds)
    return Result(
        cell.model, cell.connections, cell.pair, cell.system, cell.seconds, rows, rows, raw.rows_per_second,
        raw.p50_us, raw.p99_us, raw.cpu_us_per_row, 0, calibration.wall_ms, calibration.cpu_ms,
        other_cores=meter.read()[2], note=str(shape),
    )  # fmt: skip


@contextlib.contextmanager
def _rig(options: Options, model: str) -> Iterator[Rig]:
    """Start the gateway and baseline (a) for one model, and find the shape in which ONNX Runtime is fastest."""
    core = SERVER_CORE if model in PINNED else None
    file = samples.model_file(options.repository, model)
    sample = samples.sample(model)
    want = samples.expected(file, sample.inputs)
    wires = {"json": bodies.http_json(sample), "binary": bodies.http_binary(sample), "grpc": bodies.grpc(sample)}
    shape = rawort.LONE
    if "ort" in options.systems:
        speeds = rawort.best(file, model, options.probe_seconds, core)
        shape = next(iter(speeds))
        log(f"{model}: ONNX Runtime rows/s " + ", ".join(f"{key} {value:.0f}" for key, value in speeds.items()))
    http, grpc, metrics, other = servers.free_ports(4)
    targets: dict[str, Target] = {}
    with contextlib.ExitStack() as stack:
        if set(options.systems) & set(GATEWAY):
            ports = servers.Ports(http, grpc, metrics)
            server = stack.enter_context(servers.gateway(options.command, options.repository, model, ports, core))
            log(f"{model}: gateway ready after {server.ready_seconds:.1f} s")
            for system in GATEWAY:
                port = grpc if system == "grpc" else http
                targets[system] = Target(server, port, wires[system], want, lambda: servers.success_count(http, model))
        if "fastapi" in options.systems:
            server = stack.enter_context(servers.fastapi(options.repository, model, other, core, inline=options.inline))
            targets["fastapi"] = Target(server, other, bodies.raw(sample), want, None)
        for system, target in targets.items():
            if problem := target.check():
                log(f"{model}: {system}: {problem}")
            generators.run(f"http://127.0.0.1:{target.port}", target.wire, 32, 1, None)  # warm-up
        yield Rig(file, core, options.instructions, shape, targets)


def log(text: str) -> None:
    """Progress, for whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _line(result: Result) -> str:
    return (
        f"{result.model:18} {result.connections:>3} #{result.pair} {result.system:8} {result.rps:>8.0f}/s "
        f"p50 {result.p50_us / 1e3:>7.2f} ms p99 {result.p99_us / 1e3:>7.2f} ms cpu {result.cpu_us:>7.0f} us "
        f"{result.kilo_instructions:.0f} ki errors {result.errors} calibration {result.calibration_ms:.0f}/{result.calibration_cpu_ms:.0f} ms others {result.other_cores:.2f} {result.note}"
    )


def run(options: Options, done: list[Result], save: Callable[[list[Result]], None]) -> list[Result]:
    """Measure what is not done yet; `save` is called after every cell, so an interrupted run can be resumed."""
    start = time.monotonic()
    results = list(done)
    have = {(r.model, r.connections, r.pair, r.system) for r in done}
    todo = [c for c in cells(options) if (c.model, c.connections, c.pair, c.system) not in have]
    for model, group in groupby(todo, key=lambda cell: cell.model):
        with _rig(options, model) as rig:
            for cell in group:
                if time.monotonic() - start > options.minutes * 60:
                    log(f"{cell.key}: left out, {options.minutes:g} minutes are over")
                    continue
                if options.quiet:
                    wait_quiet(options.quiet)
                results.append(_cell(cell, rig))
                log(_line(results[-1]))
                save(results)
    return results


def _cell(cell: Cell, rig: Rig) -> Result:
    """One cell; a generator that fails is an error in the result, not the end of the run."""
    try:
        if cell.system == "ort":
            return _measure_raw(cell, rig)
        return _measure_target(cell, rig.targets[cell.system], rig.core, count_instructions=rig.instructions)
    except (generators.GeneratorError, servers.ServerError) as error:
        nothing = Result(cell.model, cell.connections, cell.pair, cell.system, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0)
        return replace(nothing, note=str(error)[:300])


def as_json(results: list[Result]) -> list[dict[str, object]]:
    """Results as plain dictionaries."""
    return [asdict(result) for result in results]
