"""`python -m loadtest.bench`: run the benchmark, print the table and the bars, write the JSON.

The exit status is 0 when every bar that was measured is met and no request failed, 1 otherwise, 2 when a tool is missing
or a server does not start.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from loadtest.bench import generators, report, runner, servers
from loadtest.bench.plan import MODELS, ORDER, Options
from loadtest.record import ROOT, provenance

QUICK = {"pairs": 2, "seconds": 1.0, "minutes": 4.0, "probe_seconds": 0.3, "connections": (32, 1)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 pairs of 1 s at 32 and 1 connections: under 4 minutes")
    parser.add_argument("--only", action="append", choices=MODELS, help="one model; may be repeated")
    parser.add_argument("--systems", default=",".join(ORDER), help="comma-separated: %(default)s")
    parser.add_argument("--connections", help="comma-separated, in the order of measurement (32,1,8)")
    parser.add_argument("--pairs", type=int, help="interleaved repetitions (5)")
    parser.add_argument("--seconds", type=float, help="length of one run; shortened to fit --minutes (5)")
    parser.add_argument("--minutes", type=float, help="time allowed for the whole benchmark (25)")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repo")
    parser.add_argument("--gateway", default=f"{shlex.quote(sys.executable)} -m gateway", help="the gateway's command")
    parser.add_argument("--inline", action="store_true", help="baseline (a) runs ONNX Runtime on its event loop")
    parser.add_argument(
        "--wait-quiet",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="before each run wait this long at most for others to leave the cores alone",
    )
    parser.add_argument("--instructions", action="store_true", help="count instructions per request with perf stat")
    parser.add_argument("--out", type=Path, help="JSON result file, written after every run")
    parser.add_argument("--resume", action="store_true", help="keep what --out already holds and measure the rest")
    return parser


def _options(args: argparse.Namespace) -> Options:
    chosen: dict[str, Any] = dict(QUICK) if args.quick else {}
    given = {"pairs": args.pairs, "seconds": args.seconds, "minutes": args.minutes}
    chosen.update({name: value for name, value in given.items() if value is not None})
    if args.connections:
        chosen["connections"] = tuple(int(part) for part in args.connections.split(","))
    command = tuple(shlex.split(args.gateway))
    systems = tuple(args.systems.split(","))
    if unknown := set(systems) - set(ORDER):
        sys.exit(f"unknown systems: {', '.join(sorted(unknown))}; known are {', '.join(ORDER)}")
    chosen.update(models=tuple(args.only or MODELS), systems=systems, inline=args.inline, quiet=args.wait_quiet)
    chosen.update(instructions=args.instructions)
    return Options(args.repository.resolve(), command, **chosen)


def main() -> int:
    """Run the benchmark."""
    args = _parser().parse_args()
    install = generators.missing()
    if install:
        sys.stderr.write(f"the load generators are missing: {install}\n")
        return 2
    options = _options(args)
    head = {**provenance(), "options": {name: str(getattr(options, name)) for name in Options.__slots__}}
    done = report.load(args.out) if args.resume and args.out and args.out.is_file() else []

    def save(rows: list[runner.Result]) -> None:
        if args.out:
            report.save(args.out, rows, head)

    try:
        rows = runner.run(options, done, save)
    except servers.ServerError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{report.table(rows)}\n\n{report.bars(rows)}\n")
    save(rows)
    return int(any(entry["verdict"] == "FAIL" for entry in report.judge(rows)))


if __name__ == "__main__":
    sys.exit(main())
