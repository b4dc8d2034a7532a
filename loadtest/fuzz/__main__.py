"""`python -m loadtest.fuzz --requests 2000 --seed 1`: see the package. The exit status is 1 when there was a fault."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from loadtest.fuzz.play import Plan, play
from loadtest.fuzz.report import reproduction, result
from loadtest.record import provenance

SHOWN = 5  # faults, in full


def main() -> int:
    """Play, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="good and malformed together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", type=int, action="append", default=[], help="only the model of this number; repeatable"
    )
    parser.add_argument("--gateway", default=f"{shlex.quote(sys.executable)} -m gateway", help="the gateway's command")
    parser.add_argument("--flags", default="", help="more flags for it, e.g. '--queue embedded --isolation process'")
    parser.add_argument("--out", type=Path, help="JSON result file")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    plan = Plan(options.seed, options.requests, tuple(options.model), tuple(shlex.split(options.flags)))
    tally, complaints = play(plan, tuple(shlex.split(options.gateway)))
    for fault in tally.faults[:SHOWN]:
        print("\n" + reproduction(fault, f"python -m loadtest.fuzz --flags {shlex.quote(options.flags)}"))
    found = result(tally, complaints)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if options.out:
        written = {**provenance(), "seed": options.seed, "flags": options.flags, **found}
        options.out.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if tally.faults or complaints else 0


if __name__ == "__main__":
    sys.exit(main())
