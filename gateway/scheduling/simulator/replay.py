"""Recorded arrivals as a workload: what `--record DIR` of the server wrote, played again.

A recording is a file `arrivals-*.jsonl`: a first line `{"lockgate_recording": 1, ...}` and then one request a line with
`t` (seconds since the start), `model`, `rows`, `bytes`, `deadline_ms` or null, `priority` and `tenant`, in any order.
Of a recording that took a sample, the sample is played: a tenth of the requests at ten times the speed is not the same load.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from gateway import errors
from gateway.scheduling.simulator.scenario import Arrival, Model, Scenario
from gateway.scheduling.simulator.workloads import DEVICE, Setup

_FORMAT = 1


def read(folder: Path) -> list[Arrival]:
    """The requests of every recording in a folder, by time; recordings are laid over each other, each from its start.

    A model is named with its version. Raises `InvalidArgument` naming the file and line that cannot be read.
    """
    files = sorted(folder.glob("arrivals-*.jsonl"))
    if not files:
        raise errors.InvalidArgument(
            f"no recording in {folder}: expected files named arrivals-*.jsonl, as --record makes"
        )
    arrivals = [arrival for file in files for arrival in _read_file(file)]
    if not arrivals:
        raise errors.InvalidArgument(f"the recordings in {folder} hold no request")
    return sorted(arrivals, key=lambda arrival: arrival.time)


def _read_file(file: Path) -> list[Arrival]:
    arrivals: list[Arrival] = []
    with file.open(encoding="utf-8") as lines:
        if not _is_header(lines.readline()):
            raise errors.InvalidArgument(f"{file} is not a recording of format {_FORMAT}, as this version reads it")
        for number, line in enumerate(lines, start=2):
            try:
                arrivals.append(_arrival(json.loads(line)))
            except (ValueError, KeyError, TypeError) as problem:
                if not line.endswith("\n"):
                    break  # the server was killed in the middle of its last line
                raise errors.InvalidArgument(f"{file}, line {number}: not a recorded request: {problem!r}") from problem
    return arrivals


def _is_header(line: str) -> bool:
    try:
        content = json.loads(line)
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("lockgate_recording") == _FORMAT


def _arrival(content: dict[str, Any]) -> Arrival:
    deadline = content.get("deadline_ms")
    version = content.get("version")
    return Arrival(
        time=float(content["t"]),
        model=str(content["model"]) + (f":{version}" if version else ""),
        deadline=None if deadline is None else float(deadline) / 1000,
        rows=max(1, int(content.get("rows", 1))),
        size=int(content.get("bytes", 0)),
        priority=int(content.get("priority", 0)),
        tenant=str(content.get("tenant", "")),
    )


def replayed(arrivals: list[Arrival], setup: Setup, speed: float = 1.0) -> Scenario:
    """Recorded requests `speed` times as fast, on the setup's device. Its deadline is that of requests without one.

    Every model has the setup's latency: a recording says what was asked for and not how long it took. The load of
    the scenario is the speed.
    """
    counts = Counter(arrival.model for arrival in arrivals)
    models = tuple(
        Model(name, setup.latency, setup.max_rows, setup.deadline, count / len(arrivals))
        for name, count in sorted(counts.items())
    )
    played = [
        replace(
            arrival,
            time=arrival.time / speed,
            deadline=setup.deadline if arrival.deadline is None else arrival.deadline,
        )
        for arrival in arrivals
    ]
    seconds = max(played[-1].time, 1e-3)
    return Scenario("recorded", speed, seconds, models, (DEVICE,), lambda _: played, noise=setup.noise)
