"""The soak: is the server's memory flat after a few hundred thousand good and bad requests?

    python -m loadtest.flat --good 200000 --bad 100000 --out flat.json

It starts a gateway with `add_sub` (or takes one that runs: `--pid --http-port --grpc-port`), mixes good and bad requests over
pipelined HTTP, broken HTTP connections and gRPC, and samples resident memory, open files and threads of the process tree at the
start, after each tenth and at the end. It fails when memory grew by 3 % + 8 MiB or more since the first tenth, when files or
threads did not come back, when a good request was refused or wrong, when a bad one was accepted, or when the server's own count of
successes does not agree with ours. One JSON document on standard output; exit status 0 or 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from loadtest import flat_clients, flat_requests
from loadtest.bench import servers
from loadtest.flat_clients import Tally
from loadtest.flat_requests import Request
from loadtest.record import ROOT, provenance

GROWTH_SHARE, GROWTH_BYTES = 0.03, 8 << 20
PARTS = 10
SETTLE_SECONDS = 3.0
SETTLE_SECONDS_AT_THE_END = 20.0
PIPES, LONERS, CALLERS = 12, 4, 4


@dataclass(frozen=True, slots=True)
class Sample:
    """The process tree at one moment."""

    after: int
    rss: int
    fds: int
    threads: int
    processes: int


@dataclass(frozen=True, slots=True)
class Mix:
    """The requests to choose from, by the client that sends them."""

    good_http: Sequence[Request]
    good_grpc: Sequence[Request]
    bad_http: Sequence[Request]
    broken_http: Sequence[Request]
    bad_grpc: Sequence[Request]

    def draw(self, good: int, bad: int, share: float, seed: int) -> tuple[list[Request], list[Request], list[Request]]:
        """A shuffled part of the soak: for the pipes, for connections of their own, for gRPC."""
        rng = random.Random(seed)
        rpc_good, rpc_bad, lone = round(good * share), round(bad * share), round(bad * 0.1)
        pipes = rng.choices(self.good_http, k=good - rpc_good)
        pipes += rng.choices(self.bad_http, k=bad - rpc_bad - lone)
        calls = rng.choices(self.good_grpc, k=rpc_good) + rng.choices(self.bad_grpc, k=rpc_bad)
        rng.shuffle(pipes)
        rng.shuffle(calls)
        return pipes, rng.choices(self.broken_http, k=lone), calls


def take(pid: int, after: int) -> Sample:
    """Look at the tree under a process."""
    rss = fds = threads = processes = 0
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
            rss += process.memory_info().rss
            fds += process.num_fds()
            threads += process.num_threads()
            processes += 1
    return Sample(after, rss, fds, threads, processes)


def take_settled(pid: int, after: int, like: Sample, limit: float) -> Sample:
    """Wait until files and threads are back to those of an earlier sample, or give up; then look."""
    deadline = time.monotonic() + limit
    time.sleep(1.0)
    while True:
        sample = take(pid, after)
        if (sample.fds <= like.fds and sample.threads <= like.threads) or time.monotonic() > deadline:
            return sample
        time.sleep(0.5)


async def _part(http_port: int, grpc_port: int, drawn: tuple[list[Request], ...], tally: Tally) -> None:
    """Send one part from all clients at once; every connection is closed when it returns."""
    pipes, loners, calls = (iter(requests) for requests in drawn)
    async with asyncio.TaskGroup() as group:
        for _ in range(PIPES):
            group.create_task(flat_clients.pipeline(http_port, pipes, tally))
        for _ in range(LONERS):
            group.create_task(flat_clients.alone(http_port, loners, tally))
        for _ in range(CALLERS):
            group.create_task(flat_clients.rpc(grpc_port, calls, tally))


def soak(pid: int, ports: servers.Ports, good: int, bad: int, share: float) -> tuple[list[Sample], Tally]:
    """Run the soak; a sample before it and after each tenth."""
    tally = Tally()
    mix = Mix(
        flat_requests.good_http(), flat_requests.good_grpc(), flat_requests.bad_http(), flat_requests.broken_http(),
        flat_requests.bad_grpc() if share else (),
    )  # fmt: skip
    samples = [take(pid, 0)]
    for part in range(PARTS):
        before, now = (
            (good * part // PARTS, bad * part // PARTS),
            (good * (part + 1) // PARTS, bad * (part + 1) // PARTS),
        )
        drawn = mix.draw(now[0] - before[0], now[1] - before[1], share, seed=part)
        start = time.monotonic()
        asyncio.run(_part(ports.http, ports.grpc, drawn, tally))
        wall = time.monotonic() - start
        # threads and files that pools open once are open after the first tenth; from there on they must not grow
        limit = SETTLE_SECONDS_AT_THE_END if part == PARTS - 1 else SETTLE_SECONDS
        samples.append(take_settled(pid, sum(now), samples[min(1, part)], limit))
        last = samples[-1]
        sys.stderr.write(
            f"{sum(now):>7} requests, {(sum(now) - sum(before)) / wall:>6.0f}/s, RSS {last.rss / 2**20:.1f} MiB, "
            f"{last.fds} files, {last.threads} threads, {last.processes} processes, {sum(tally.wrong.values())} wrong\n"
        )
    return samples, tally


def verdicts(samples: Sequence[Sample], tally: Tally, counted: int) -> dict[str, bool]:
    """What must hold; `counted` is how many successes the server counted meanwhile."""
    first, last = samples[1], samples[-1]
    # a request whose client left before the answer may be counted or not
    left = sum(n for kind, n in tally.statuses.items() if kind.startswith("hang up before the answer"))
    return {
        "memory is flat": last.rss - first.rss < first.rss * GROWTH_SHARE + GROWTH_BYTES,
        "files are back": last.fds <= first.fds,
        "threads are back": last.threads <= first.threads,
        "no process was lost or added": last.processes == first.processes,
        "every answer is as it should be": not tally.wrong,
        "the server counted the same": tally.good_right <= counted <= tally.good_right + left,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.flat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--good", type=int, default=200_000)
    parser.add_argument("--bad", type=int, default=100_000)
    parser.add_argument("--grpc-share", type=float, default=0.1, help="share of the requests that go over gRPC")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repo")
    parser.add_argument("--gateway", default=f"{shlex.quote(sys.executable)} -m gateway", help="the gateway's command")
    parser.add_argument("--pid", type=int, help="soak the running server with this process id instead of starting one")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser


def main() -> int:
    """Run the soak and judge it."""
    args = _parser().parse_args()
    with contextlib.ExitStack() as stack:
        ports, pid = servers.Ports(args.http_port, args.grpc_port, 0), args.pid
        if pid is None:
            ports = servers.Ports(*servers.free_ports(3))
            command = shlex.split(args.gateway)
            server = servers.gateway(command, args.repository.resolve(), "add_sub", ports, None)
            pid = stack.enter_context(server).pid
        counted, start = servers.success_count(ports.http, "add_sub"), time.monotonic()
        samples, tally = soak(pid, ports, args.good, args.bad, args.grpc_share)
        seconds = time.monotonic() - start
        counted = servers.success_count(ports.http, "add_sub") - counted
    judged = verdicts(samples, tally, counted)
    document = {
        "kind": "lockgate-flat/1", **provenance(),
        "good": args.good, "bad": args.bad, "seconds": round(seconds, 1), "passed": all(judged.values()),
        "verdicts": judged, "samples": [asdict(sample) for sample in samples],
        "good_right": tally.good_right, "bad_refused": tally.bad_refused, "counted_by_server": counted,
        "wrong": dict(tally.wrong), "examples": tally.examples, "statuses": dict(sorted(tally.statuses.items())),
    }  # fmt: skip
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 0 if all(judged.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
