"""Overload on real processes: does the gateway keep its promise to what it accepts, and say no early to the rest?

    python -m loadtest.overload --out overload.json          # about 6 minutes; --quick takes one

A gateway serves a fake model that takes 16 ms + 1 ms a row, at most 64 rows: 800 requests/s. Every request has a deadline of 200 ms. A
generator in a process of its own sends Poisson arrivals at 0.9, 1.1 and 1.5 times that, whatever the server does (`poisson`); the same
with clients that ask again at once, up to five times, when they are refused (`storm`); and 0.9 times while the device becomes ten
times slower and recovers (`slow-down`). The simulator gets the very same arrivals, and its figures stand beside the real ones. A
table and the bars on standard output; exit status 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from loadtest.bench.meter import wait_quiet
from loadtest.overload_cells import Cell, Spec, fake_gateway, measure
from loadtest.overload_report import bars, bars_text, slow_down_text, table
from loadtest.record import provenance

SCENARIOS = ("poisson", "storm", "slow-down")
PAUSE = 1.0  # seconds between two cells, so that nothing of one is left in the next


def specs(scenarios: tuple[str, ...], loads: tuple[float, ...], *, quick: bool) -> Iterator[Spec]:
    """What one round measures."""
    warm, seconds = (1.0, 4.0) if quick else (2.0, 10.0)
    if "poisson" in scenarios:
        yield from (Spec("poisson", load, warm, seconds) for load in loads)
    if "storm" in scenarios:
        yield from (Spec("storm", load, warm, seconds, retries=True) for load in loads if load > 1)
    if "slow-down" in scenarios:
        # 20 slow batches take 4 s or more
        slow = (3.0, 10.0) if quick else (6.0, 18.0)
        yield Spec("slow-down", 0.9, warm, slow[1] + slow[0] - warm, slow=slow)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.overload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round: about a minute")
    parser.add_argument("--rounds", type=int, help="with other arrivals each; the figures are medians (3)")
    parser.add_argument("--only", action="append", choices=SCENARIOS, help="one scenario; may be repeated")
    parser.add_argument("--loads", default="0.9,1.1,1.5", help="times the capacity, comma-separated: %(default)s")
    parser.add_argument("--gateway", default=f"{shlex.quote(sys.executable)} -m gateway", help="the gateway's command")
    parser.add_argument(
        "--wait-quiet",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="before each cell wait this long at most for others to leave the cores alone",
    )
    parser.add_argument("--out", type=Path, help="JSON result file, written after every cell")
    return parser


def main() -> int:
    """Run the rounds and judge them."""
    args = _parser().parse_args()
    loads = tuple(float(load) for load in args.loads.split(","))
    wanted = list(specs(tuple(args.only or SCENARIOS), loads, quick=args.quick))
    rounds = args.rounds or (1 if args.quick else 3)
    head, cells = {"kind": "lockgate-overload/1", **provenance()}, list[Cell]()
    with fake_gateway(shlex.split(args.gateway)) as fake:
        for seed in range(1, rounds + 1):
            for spec in wanted:
                time.sleep(PAUSE)
                if args.wait_quiet:
                    wait_quiet(args.wait_quiet)
                cells.append(measure(fake, spec, seed))
                sys.stderr.write(f"seed {seed}\n{table(cells[-1:])}\n")
                if args.out:
                    _save(args.out, head, cells)
    told = [table(cells), slow_down_text(cells), bars_text(bars(cells))]
    sys.stdout.write("\n\n".join(text for text in told if text) + "\n")
    return 0 if all(bar.passed for bar in bars(cells)) else 1


def _save(path: Path, head: dict[str, object], cells: list[Cell]) -> None:
    judged = [asdict(bar) for bar in bars(cells)]
    document = {**head, "bars": judged, "cells": [asdict(cell) for cell in cells]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
