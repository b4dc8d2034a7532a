"""Baseline (b): ONNX Runtime in its own process, with nothing around it.

    python -m loadtest.bench.rawort --file model.onnx --model add_sub --sessions 2 --threads 1 --batch 4 --seconds 5

Prints one line of JSON. Each session has one Python thread that calls `run` on the same batch again and again; ONNX Runtime
releases the GIL. Threads spin only where one session has the cores to itself, as its own default is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from loadtest.bench.statistics import percentile
from loadtest.record import ROOT
from loadtest.samples import Arrays, sample


@dataclass(frozen=True, slots=True)
class Shape:
    """How ONNX Runtime is run: sessions x threads, at one batch size."""

    sessions: int
    threads: int
    batch: int

    def __str__(self) -> str:
        """`2x1 b8`."""
        return f"{self.sessions}x{self.threads} b{self.batch}"


SHAPES = [Shape(sessions, threads, batch) for sessions, threads in ((2, 1), (1, 2)) for batch in (1, 4, 8)]
LONE = Shape(1, 2, 1)  # one request at a time on both cores


@dataclass(frozen=True, slots=True)
class Raw:
    """Rows per second over all sessions, and the time of one run."""

    rows_per_second: float
    p50_us: float
    p99_us: float
    cpu_us_per_row: float


def _session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _loop(session: ort.InferenceSession, feeds: Arrays, until: float, times: list[float]) -> None:
    names = [output.name for output in session.get_outputs()]
    while (start := time.perf_counter()) < until:
        session.run(names, feeds)
        times.append(time.perf_counter() - start)


def run(path: Path, model: str, shape: Shape, seconds: float) -> Raw:
    """Measure in this process."""
    feeds = {name: np.repeat(array, shape.batch, axis=0) for name, array in sample(model).inputs.items()}
    sessions = [_session(path, shape.threads) for _ in range(shape.sessions)]
    for session in sessions:
        _loop(session, feeds, time.perf_counter() + min(0.3, seconds / 4), [])
    times: list[list[float]] = [[] for _ in sessions]
    cpu, start = time.process_time(), time.perf_counter()
    threads = [
        threading.Thread(target=_loop, args=(session, feeds, start + seconds, mine))
        for session, mine in zip(sessions, times, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    cpu = time.process_time() - cpu
    ordered = sorted(value * 1e6 for mine in times for value in mine)
    rows = len(ordered) * shape.batch
    return Raw(rows / wall, percentile(ordered, 50), percentile(ordered, 99), cpu / rows * 1e6)


def measure(path: Path, model: str, shape: Shape, seconds: float, core: int | None = None) -> Raw:
    """Measure in a fresh process, pinned like the server it is compared with."""
    flags = ["--sessions", str(shape.sessions), "--threads", str(shape.threads), "--batch", str(shape.batch)]
    command = [sys.executable, "-m", "loadtest.bench.rawort", "--file", str(path), "--model", model, *flags]
    pin = [] if core is None else ["taskset", "-c", str(core)]
    text = subprocess.run(
        [*pin, *command, "--seconds", str(seconds)],
        cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return Raw(**json.loads(text))


def best(path: Path, model: str, seconds: float, core: int | None = None) -> dict[Shape, float]:
    """Rows per second of every shape, the better of two rounds, best first."""
    found = {
        shape: max(measure(path, model, shape, seconds, core).rows_per_second for _ in range(2)) for shape in SHAPES
    }
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def main() -> None:
    """Measure what the command line says and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    shape = Shape(args.sessions, args.threads, args.batch)
    sys.stdout.write(json.dumps(asdict(run(args.file, args.model, shape, args.seconds))) + "\n")


if __name__ == "__main__":
    main()
