"""`python -m loadtest.fuzz --requests 2000 --seed 1`: see the package. The exit status is 1 when there was a fault."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from pathlib import Path

from loadtest.bench import servers
from loadtest.fuzz.report import complaints, reproduction, result
from loadtest.fuzz.session import Session, Tally
from loadtest.fuzz.wires import Ports, Wires
from loadtest.record import provenance

PER_MODEL = 24  # good requests to each model
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
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        ports = servers.free_ports(3)
        line = [*shlex.split(options.gateway), "serve", "--model-repository", folder, *shlex.split(options.flags)]
        line += [
            "--model-control-mode",
            "explicit",
            "--allow-client-shm",
            "true",
            "--persist-latency",
            "false",
            "--log-format",
            "json",
        ]
        line += ["--http-port", str(ports[0]), "--grpc-port", str(ports[1]), "--metrics-port", str(ports[2])]
        with servers.Server(line, lambda: servers.get(ports[0], "/v2/health/ready")[0] == 200) as server:
            numbers = tuple(options.model)
            wanted = (options.seed, numbers, options.requests)
            tally = asyncio.run(play(Ports(ports[0], ports[1]), Path(folder), *wanted))
            log = server.log_tail(1 << 30)
    command = f"python -m loadtest.fuzz --flags {shlex.quote(options.flags)}"
    for fault in tally.faults[:SHOWN]:
        print("\n" + reproduction(fault, command))
    found = result(tally, complaints(log, tally.failing))
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if options.out:
        written = {**provenance(), "seed": options.seed, "flags": options.flags, **found}
        options.out.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if found["faults"] or found["log"] else 0


async def play(ports: Ports, repository: Path, seed: int, numbers: tuple[int, ...], most: int) -> Tally:
    """Models of these numbers, or one after the other until so many requests were sent."""
    async with Wires(ports) as wires:
        session = Session(wires, repository)
        if numbers:
            for number in numbers:
                await session.play(seed, number, PER_MODEL)
        number = 0
        while not numbers and session.tally.requests < most:
            await session.play(seed, number, PER_MODEL)
            number += 1
        return session.tally


if __name__ == "__main__":
    sys.exit(main())
