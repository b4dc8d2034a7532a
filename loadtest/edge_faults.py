"""What an edge box does when its link or the server behind it fails: each fault under load, every answer checked.

    python -m loadtest.edge_faults [--json FILE] [--seconds 5] [--deadline-ms 150] [--rate 100] [--scheme grpc|http] [FAULT ...]

An edge gateway whose model has the chain [remote, CPU], another gateway, and a TCP proxy between them. A table: what became of
the requests during the fault, which engine answered, the longest time without an answer, and how soon the far gateway answered
again once it could. Status 1 when a promise was broken: an answer that did not come by its deadline, was wrong, came twice or
not at all, or came from here more than five seconds after all was well again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.edge_rig import Edge
from loadtest.record import provenance

RETURN_SECONDS = 5.0
_SHARE = 0.95  # of the answers, that are the far gateway's again


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to the link or to the server, and how it ends; `where` must answer meanwhile."""

    text: str
    begin: Callable[[Edge], Awaitable[None]]
    end: Callable[[Edge], Awaitable[None]]
    where: str = "local"


async def _cut(edge: Edge) -> None:
    edge.proxy.up.paused = edge.proxy.down.paused = True


async def _mend(edge: Edge) -> None:
    edge.proxy.up.paused = edge.proxy.down.paused = False
    edge.proxy.up.latency = edge.proxy.down.latency = 0.0
    edge.proxy.refuse = False


async def _break(edge: Edge) -> None:
    edge.proxy.refuse = True
    edge.proxy.reset()


async def _slow(edge: Edge) -> None:
    edge.proxy.down.latency = max(0.2, 1.2 * edge.deadline_ms / 1e3)


async def _kill(edge: Edge) -> None:
    await asyncio.to_thread(edge.far.kill)


async def _nothing(edge: Edge) -> None:
    """All is well."""


FAULTS = {
    "nothing": Fault("nothing", _nothing, _nothing, "remote"),
    "cut": Fault("the link is cut: nothing comes, nothing breaks", _cut, _mend),
    "refused": Fault("every connection breaks, and none is to be had", _break, _mend),
    "slow": Fault("200 ms are added to the way back, or more where deadlines are long", _slow, _mend),
    "killed": Fault("kill -9 of the far gateway", _kill, Edge.restart_far),
}


@dataclass(slots=True)
class Outcome:
    """One fault's figures. `broken` are promises, and empty when all is well."""

    fault: str
    requests: int = 0
    remote: int = 0
    local: int = 0
    slowest_ms: float = 0.0
    gap_ms: float = 0.0
    first_ms: float = math.nan  # from the end of the fault to the first answer of the far gateway
    return_ms: float = math.nan  # and until 95 % of all answers, from then on, are its
    broken: list[str] = field(default_factory=list)


async def hurt(edge: Edge, name: str, seconds: float) -> Outcome:
    """Two seconds of load, the fault for so many seconds, and what comes after."""
    fault, outcome = FAULTS[name], Outcome(name)
    async with edge.load():
        await asyncio.sleep(2.0)
        begun = time.monotonic()
        await fault.begin(edge)
        await asyncio.sleep(seconds)
        await fault.end(edge)
        ended = time.monotonic()
        await edge.remote(ended, int(edge.rate), RETURN_SECONDS + 2.0)
        over = time.monotonic()
    during, all_of_it = edge.phase(begun, ended), edge.phase(begun - 2.0, over)
    engines, verdict = during.engines, all_of_it.verdict
    outcome.requests, outcome.remote, outcome.local = len(during.answers), engines["remote"], engines["local"]
    outcome.slowest_ms, outcome.gap_ms = 1e3 * verdict.slowest, 1e3 * verdict.gap
    outcome.broken += verdict.faults(late_share=0.0)
    bad = {status: count for status, count in verdict.statuses.items() if status != 200}
    if bad:
        outcome.broken.append(f"answers other than results: {bad} {verdict.errors.most_common(3)}")
    if engines[fault.where] < _SHARE * len(during.answers) * (0.8 if fault.where == "local" else 1.0):
        outcome.broken.append(f"{dict(engines)} answered, and it should have been the {fault.where} engine")
    _judge_return(edge, outcome, ended, over)
    return outcome


def _judge_return(edge: Edge, outcome: Outcome, ended: float, over: float) -> None:
    after = sorted(
        (each.record.received, each.remote)
        for each in edge.phase(ended, over).answers
        if each.record.received is not None
    )
    first = next((received for received, remote in after if remote), math.inf)
    outcome.first_ms = 1e3 * (first - ended)
    back, seen, remotes = math.inf, 0, 0
    for received, remote in reversed(after):
        seen, remotes = seen + 1, remotes + remote
        if remote and remotes >= _SHARE * seen:
            back = received
    outcome.return_ms = 1e3 * (back - ended)
    if back - ended > RETURN_SECONDS:
        outcome.broken.append(f"{back - ended:.1f} s after the fault the far gateway answered again")


def table(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """A line for each."""
    head = (
        "link",
        "fault",
        "requests",
        "remote",
        "local",
        "slowest",
        "longest gap",
        "remote again",
        "95 % remote",
        "kept",
    )
    rows = [head]
    for scheme, each in outcomes:
        times = [f"{value:.0f} ms" for value in (each.slowest_ms, each.gap_ms, each.first_ms, each.return_ms)]
        counts = [str(value) for value in (each.requests, each.remote, each.local)]
        rows.append((scheme, each.fault, *counts, *times, "no" if each.broken else "yes"))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{scheme} {each.fault}: {text}" for scheme, each in outcomes for text in each.broken)])


async def run(schemes: Sequence[str], names: Sequence[str], options: argparse.Namespace) -> list[tuple[str, Outcome]]:
    """Every fault over every kind of link."""
    outcomes = []
    for scheme in schemes:
        async with Edge(scheme, deadline_ms=options.deadline_ms, rate=options.rate) as edge:
            for name in names:
                outcomes.append((scheme, await hurt(edge, name, options.seconds)))
                print(table(outcomes[-1:]), file=sys.stderr)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all by default")
    parser.add_argument("--scheme", choices=("grpc", "http"), action="append")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each fault")
    parser.add_argument("--deadline-ms", type=float, default=150.0)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if unknown := set(options.faults) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(unknown)}")
    outcomes = asyncio.run(run(options.scheme or ("grpc", "http"), options.faults or list(FAULTS), options))
    print(table(outcomes))
    if options.json:
        rows: list[dict[str, Any]] = [
            {"scheme": scheme, **{name: getattr(each, name) for name in each.__slots__}} for scheme, each in outcomes
        ]
        options.json.write_text(json.dumps({**provenance(), "outcomes": rows}, indent=1))
    return 1 if any(each.broken for _, each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
