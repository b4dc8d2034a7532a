"""Many models: how long an index of 10,000 takes, what 1,000 loaded ones need, and what 200 load/unload flaps lose and leave behind.

    python -m loadtest.repository_scale --out scale.json         # all parts
    python -m loadtest.repository_scale load flaps --models 500  # some of them, smaller

`index`: 10,000 model folders, nothing loaded; the first answer of the repository index and the next ones, over HTTP, and how long a look
at all the files takes in poll mode. `load`: 1,000 models loaded at the start, each asked once. `flaps`: under closed-loop traffic
one model is loaded anew after its configuration was touched, and another is unloaded and loaded, 200 times. It fails when an
index takes 5 s, when the loaded models need 4 GB, when a request is lost or answered wrong (who asks for the one that is
away may be told so), or when after the first tenth resident memory grew by 3 % + 8 MiB or descriptors, threads, tasks or processes did not come
back. One JSON document on standard output; exit status 0 or 1.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gateway.cli import main as gateway_main
from gateway.engines import describe
from gateway.repository import Fingerprint, Repository
from loadtest.bench.meter import Meter, wait_quiet
from loadtest.record import provenance
from loadtest.repository_rig import Rig, Sample, Traffic, ask, count_tasks, started, write_models

INDEX_SECONDS = 5.0
LOADED_BYTES = 4_000_000_000
GROWTH_SHARE, GROWTH_BYTES = 0.03, 8 << 20
PARTS = ("index", "load", "flaps")
STEADY, RELOADED, FLAPPING = "steady", "reloaded", "flapping"
_CLIENTS = 4
_TENTHS = 10
_INDEXES = 5
_REQUESTS = 1000
_LOAD_SECONDS = 600.0


def index(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The repository index of a gateway that has loaded nothing, and a look in poll mode."""
    repository = folder / "models"
    write_models(repository, _names(options.folders))
    with started(folder, repository, "--model-control-mode", "explicit") as rig:
        ready = rig.server.ready_seconds
        seconds, found = [], 0
        for _ in range(_INDEXES):
            status, body, took = rig.call("/v2/repository/index")
            found = len(json.loads(body)) if status == 200 else 0
            seconds.append(took)
    reader = Repository([repository], describe)
    looks, cpus = [], []
    previous: Mapping[str, Fingerprint] = {}
    for _ in range(3):
        began, cpu = time.monotonic(), time.process_time()
        previous = reader.changes(previous).now
        looks.append(time.monotonic() - began)
        cpus.append(time.process_time() - cpu)
    return {
        "folders": options.folders, "listed": found, "start_s": round(ready, 2), "index_s": _rounded(seconds),
        "poll_look_s": _rounded(looks), "poll_look_cpu_s": _rounded(cpus),
        "verdicts": {
            "all are listed": found == options.folders,
            "an index takes less than 5 s": max(seconds) < INDEX_SECONDS,
            "a look at all files takes less than 5 s": min(looks) < INDEX_SECONDS,
        },
    }  # fmt: skip


def load(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Many models loaded at once, and one request to each."""
    repository = folder / "models"
    names = _names(options.models)
    write_models(repository, names)
    with started(folder, repository, "--isolation", options.isolation) as rig:
        began = time.monotonic()
        peak = _wait_ready(rig)
        loaded = time.monotonic() - began + rig.server.ready_seconds
        connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=60)
        with contextlib.closing(connection):
            wrong = [f"{name}: {said}" for name in names if (said := ask(connection, name, 7.0)[1])]
            before = rig.server.cpu_seconds()
            for number in range(_REQUESTS):
                ask(connection, names[number % len(names)], 7.0)
            cpu = (rig.server.cpu_seconds() - before) / _REQUESTS
        sample = rig.sample()
        began = time.monotonic()
        rig.server.stop()
        stopped = time.monotonic() - began
    return {
        "models": options.models, "isolation": options.isolation, "loaded_s": round(loaded, 1), "stopped_s": round(stopped, 1),
        "peak_pss": peak, "request_cpu_us": round(1e6 * cpu), "loaded": asdict(sample), "wrong": wrong[:5],
        "verdicts": {
            "every model answers": not wrong,
            "they need less than 4 GB": max(peak, sample.pss) < LOADED_BYTES,
        },
    }  # fmt: skip


def _wait_ready(rig: Rig) -> int:
    """Until all models are loaded; the most memory that was seen meanwhile."""
    peak, deadline = 0, time.monotonic() + _LOAD_SECONDS
    while time.monotonic() < deadline:
        peak = max(peak, rig.sample().pss)
        connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return peak
        time.sleep(0.5)
    raise RuntimeError(f"the models are not loaded after {_LOAD_SECONDS:g} s")


def flaps(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Loads and unloads under traffic."""
    repository = folder / "models"
    models = (STEADY, RELOADED, FLAPPING)
    write_models(repository, models)
    flags = ["--model-control-mode", "explicit", "--isolation", options.isolation]
    for model in models:
        flags += ["--load-model", model]
    samples: list[Sample] = []
    seconds: list[float] = []
    with started(folder, repository, *flags) as rig:
        _wait_ready(rig)
        rig.fill_pools()
        meter = Meter(rig.server.cpu_seconds)
        with Traffic(rig.port, models, _CLIENTS) as traffic:
            for tenth in range(_TENTHS):
                for number in range(options.flaps * tenth // _TENTHS, options.flaps * (tenth + 1) // _TENTHS):
                    seconds += _flap(rig, repository, number)
                with traffic.paused():
                    samples.append(rig.settled(options.flaps * (tenth + 1) // _TENTHS, samples[0] if samples else None))
                _say(samples[-1], traffic)
        _, _, others = meter.read()
    return {
        "flaps": options.flaps, "isolation": options.isolation, "control_p50_s": round(statistics.median(seconds), 4),
        "control_max_s": round(max(seconds), 4), "other_cores": round(others, 2), "samples": list(map(asdict, samples)),
        "models": {
            model: {"requests": tally.requests, "statuses": dict(tally.statuses), "slowest_s": round(tally.slowest, 3),
                    "refusals": dict(tally.wrong.most_common(5))}
            for model, tally in traffic.tallies.items()
        },
        "verdicts": flat(samples) | kept(traffic),
    }  # fmt: skip


def _flap(rig: Rig, repository: Path, number: int) -> list[float]:
    """Once around: a model is replaced while it serves, and another goes and comes back."""
    os.utime(repository / RELOADED / "config.pbtxt", (number, number))
    return [rig.control(RELOADED, "load"), rig.control(FLAPPING, "unload"), rig.control(FLAPPING, "load")]


def kept(traffic: Traffic) -> dict[str, bool]:
    """Of which models a request was lost."""
    away = traffic.tallies[FLAPPING]
    refused = sum(count for text, count in away.wrong.items() if text.startswith("Request for unknown model: "))
    return {
        "no request of the other models was lost": not any(traffic.tallies[name].wrong for name in (STEADY, RELOADED)),
        "those of the model that goes were answered right or that it is away": away.wrong.total() == refused,
    }


def flat(samples: Sequence[Sample]) -> dict[str, bool]:
    """What did not grow since the first sample."""
    first, last = samples[0], samples[-1]
    return {
        "memory is flat": last.rss - first.rss < first.rss * GROWTH_SHARE + GROWTH_BYTES,
        "descriptors are back": last.fds <= first.fds,
        "threads are back": last.threads <= first.threads,
        "tasks are back": last.tasks <= first.tasks,
        "processes are back": last.processes <= first.processes,
    }


def _say(sample: Sample, traffic: Traffic) -> None:
    requests = sum(tally.requests for tally in traffic.tallies.values())
    sys.stderr.write(
        f"{sample.after:>5} flaps, {requests} requests, RSS {sample.rss / 2**20:.1f} MiB, PSS {sample.pss / 2**20:.1f} MiB, "
        f"{sample.fds} files, {sample.threads} threads, {sample.tasks} tasks, {sample.processes} processes\n"
    )


def _names(count: int) -> list[str]:
    return [f"model_{number:05}" for number in range(count)]


def _rounded(seconds: Sequence[float]) -> list[float]:
    return [round(each, 3) for each in seconds]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.repository_scale", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--folders", type=int, default=10_000, help="of the index")
    parser.add_argument("--models", type=int, default=1000, help="that are loaded at once")
    parser.add_argument("--flaps", type=int, default=200)
    parser.add_argument("--isolation", choices=("auto", "thread", "process"), default="auto")
    parser.add_argument("--wait-quiet", type=float, default=0.0, metavar="SECONDS", help="before each part")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser


def main() -> int:
    """Run the parts and judge them; or be the gateway that they run against."""
    if sys.argv[1:2] == ["gateway"]:
        count_tasks()
        return gateway_main(sys.argv[2:])
    parser = _parser()
    options = parser.parse_args()
    wanted = options.parts or PARTS
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    document: dict[str, Any] = {"kind": "lockgate-repository-scale/1", **provenance()}
    for part in wanted:
        others = wait_quiet(options.wait_quiet)
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            document[part] = globals()[part](Path(folder), options) | {"other_cores_before": round(others, 2)}
    document["passed"] = all(held for part in wanted for held in document[part]["verdicts"].values())
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0 if document["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
