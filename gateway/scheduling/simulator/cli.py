"""The command `gateway simulate`: its options, and the simulations they ask for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gateway import errors
from gateway.scheduling.simulator.policies import BEST, OURS, POLICIES
from gateway.scheduling.simulator.replay import read, replayed
from gateway.scheduling.simulator.report import NOTES, plot, table
from gateway.scheduling.simulator.scenario import Latency, Scenario
from gateway.scheduling.simulator.simulation import Fault
from gateway.scheduling.simulator.trials import Trials, compare
from gateway.scheduling.simulator.workloads import WORKLOADS, Setup, build

_DEFAULT_POLICIES = (OURS, BEST, "timeout-0.8", "bento", "clockwork", "aimd", "triton")


def run(argv: Sequence[str]) -> int:
    """Simulate what a command line asks for, print the table, and return the exit status.

    Prints the problem and raises `SystemExit` 2 on a bad option.
    """
    options = _parser().parse_args(argv)
    try:
        results = list(_results(options))
        sys.stdout.write(f"{table(results)}\n\n{NOTES}\n")
        if options.json:
            options.json.write_text(json.dumps([each.as_json() for each in results], indent=1), encoding="utf-8")
        if options.plot:
            plot(results, options.plot)
    except (OSError, Fault, errors.GatewayError) as problem:
        sys.stderr.write(f"gateway simulate: {problem}\n")
        return 1
    return 0


def _results(options: argparse.Namespace) -> Iterator[Trials]:
    policies = options.policy or _DEFAULT_POLICIES
    seeds = range(1, options.seeds + 1)
    for scenario in _scenarios(options):
        if sys.stderr.isatty():
            sys.stderr.write(f"simulating {scenario.name} at {scenario.load:g}\n")
        yield from compare(scenario, policies, seeds)


def _scenarios(options: argparse.Namespace) -> Iterator[Scenario]:
    setup = Setup(
        options.device, options.max_batch, options.deadline_ms / 1000, options.seconds, options.noise_percent / 100
    )
    least = setup.latency(1)
    if least > setup.deadline:
        raise errors.InvalidArgument(
            f"a deadline of {options.deadline_ms:g} ms is shorter than the {1000 * least:g} ms of a single row"
        )
    if options.replay:
        arrivals = read(options.replay)
        for speed in options.load or [1.0]:
            yield replayed(arrivals, setup, speed)
        return
    for name in options.workload or ["poisson"]:
        for load in options.load or [0.9, 1.1, 1.5]:
            yield build(name, setup, load)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway simulate",
        description="Simulate the scheduling of the gateway and of others on one device, and print who answers how "
        "much in time. Same options, same figures.",
        epilog=f"Workloads: {', '.join(WORKLOADS)}. Policies: {', '.join([*POLICIES, BEST])}.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workload", nargs="+", choices=[*WORKLOADS], metavar="NAME", help="what arrives (default: poisson)")
    add("--load", nargs="+", type=_positive, metavar="X", help="times the capacity (default: 0.9 1.1 1.5); of a "
        "recording: times its speed (default: 1)")  # fmt: skip
    add("--deadline-ms", type=_positive, default=50.0, metavar="MS", help="of every request (default: 50)")
    add("--device", type=_latency, default=Latency(0.004, 0.00025), metavar="A,B",
        help="milliseconds of a batch, and of each row in it (default: 4,0.25)")  # fmt: skip
    add("--max-batch", type=_count, default=64, metavar="N", help="rows (default: 64)")
    add("--noise-percent", type=_share, default=2.0, metavar="P", help="sigma of a run's time (default: 2)")
    add("--seeds", type=_count, default=5, metavar="N", help="simulations of each kind (default: 5)")
    add("--seconds", type=_positive, default=5.0, metavar="S", help="simulated time (default: 5)")
    add("--policy", nargs="+", choices=[*POLICIES, BEST], metavar="NAME",
        help=f"who schedules (default: {' '.join(_DEFAULT_POLICIES)})")  # fmt: skip
    add("--replay", type=Path, metavar="DIR", help="play what `gateway serve --record DIR` recorded, not a workload")
    add(
        "--plot", type=Path, metavar="FILE.png", help="write a plot of goodput against load; needs 'lockgate[simulate]'"
    )
    add("--json", type=Path, metavar="FILE", help="write every figure of every seed")
    return parser


def _positive(text: str) -> float:
    return _number(text, float("inf"), "a number greater than 0", zero=False)


def _share(text: str) -> float:
    return _number(text, 100.0, "a number from 0 to 100", zero=True)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _number(text: str, most: float, wanted: str, *, zero: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value >= 0 if zero else value > 0) or value > most or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def _latency(text: str) -> Latency:
    base, comma, per_row = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers with a comma between, such as 4,0.25")
    return Latency(_positive(base) / 1000, _positive(per_row) / 1000)
