"""Load generators written in C, so that the client does not take the cores the server needs: wrk for HTTP/1.1, h2load for gRPC.

Both are closed loops: each connection sends the next request when the last answer is there, so their p99 says what a waiting client
sees at that concurrency and nothing about requests that were not sent meanwhile. h2load cannot see a `grpc-status` in the
trailers: its count is of answered streams, and `runner` checks it against the server's own success counter. Nor does it report
a refused or dropped connection; a run whose answers stop early has an error here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.bench.bodies import Wire
from loadtest.bench.statistics import percentile

_LUA = Path(__file__).with_name("post.lua")
_DEBIAN = {"wrk": "wrk", "h2load": "nghttp2-client", "taskset": "util-linux"}


class GeneratorError(RuntimeError):
    """A generator is missing, failed, or printed what we cannot read."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of a generator saw from outside."""

    requests: int
    seconds: float
    errors: int
    p50_us: float
    p99_us: float
    client_cpu_s: float = 0.0
    note: str = ""


def missing(tools: Iterable[str] = _DEBIAN) -> str | None:
    """The command that installs what is not there, or None."""
    packages = sorted({_DEBIAN[tool] for tool in tools if shutil.which(tool) is None})
    return f"apt-get update && apt-get install -y {' '.join(packages)}" if packages else None


def parse_wrk(text: str) -> Load:
    """Read the line that post.lua prints; a status of 400 and above, a timeout and a socket error are errors."""
    line = next((line for line in text.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        message = f"no result in wrk's output: {text[-300:]!r}"
        raise GeneratorError(message)
    found = json.loads(line.removeprefix("RESULT "))
    errors = sum(found[kind] for kind in ("connect", "read", "write", "timeout", "status"))
    note = "" if found["requests"] else "no answers"
    seconds = found["duration_us"] / 1e6
    return Load(found["requests"], seconds, errors + bool(note), found["p50_us"], found["p99_us"], note=note)


def parse_h2load(text: str, log: str) -> Load:
    """Read h2load's summary for the counts and its log file (start, status, microseconds) for the percentiles."""
    finished = re.search(r"^finished in ([\d.]+)(us|ms|s)\b", text, re.MULTILINE)
    counts = re.search(r"(\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", text)
    if finished is None or counts is None:
        message = f"cannot read h2load's output: {text[-300:]!r}"
        raise GeneratorError(message)
    seconds = float(finished[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[finished[2]]
    done, succeeded, failed, errored, timeout = (int(value) for value in counts.groups())
    rows = [line.split("\t") for line in log.splitlines() if line]
    times = sorted(float(row[2]) for row in rows if row[1] == "200")
    note = _silence(rows, seconds)
    errors = max(done - succeeded, failed + errored + timeout) + bool(note)
    return Load(done, seconds, errors, percentile(times, 50), percentile(times, 99), note=note)


def _silence(rows: Sequence[Sequence[str]], seconds: float) -> str:
    """What to say when answers stopped half-way: h2load reports no error when a server refuses or drops connections."""
    if not rows:
        return "no answers"
    begin = min(int(row[0]) for row in rows)
    end = max(int(row[0]) + int(row[2]) for row in rows)
    slowest = max(int(row[2]) for row in rows)
    silent = seconds - (end - begin) / 1e6
    return f"no answers in the last {silent:.1f} s" if silent > max(seconds / 2, 3e-6 * slowest) else ""


def _pinned(core: int | None) -> list[str]:
    return [] if core is None else ["taskset", "-c", str(core)]


def _call(command: Sequence[str], limit: float) -> tuple[str, float]:
    """Run a generator; what it printed and the CPU seconds it used."""
    before = os.times()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except FileNotFoundError:
        message = f"{command[0]} is missing: {missing()}"
        raise GeneratorError(message) from None
    after = os.times()
    if done.returncode:
        message = f"{' '.join(command)} ended with {done.returncode}: {(done.stderr or done.stdout)[-300:]}"
        raise GeneratorError(message)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, cpu


def run(base: str, wire: Wire, connections: int, seconds: float, core: int | None) -> Load:
    """Load one address: with h2load when the body is a gRPC message, with wrk otherwise."""
    with tempfile.TemporaryDirectory(prefix="loadtest-") as folder:
        body = Path(folder, "body")
        body.write_bytes(wire.body)
        pairs = [f"{name}: {value}" for name, value in wire.headers.items()]
        url = f"{base}{wire.path}"
        if wire.headers.get("content-type") == "application/grpc":
            log = Path(folder, "log")
            flags = ["-t1", f"-c{connections}", "-m1", "-D", f"{round(seconds * 1000)}ms", "-d", str(body)]
            headers = [part for pair in pairs for part in ("-H", pair)]
            command = [*_pinned(core), "h2load", *flags, *headers, "--log-file", str(log), url]
            text, cpu = _call(command, seconds + 60)
            load = parse_h2load(text, log.read_text(encoding="ascii"))
        else:
            # wrk takes whole seconds only
            flags = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(_LUA)]
            text, cpu = _call([*_pinned(core), "wrk", *flags, url, "--", str(body), *pairs], seconds + 60)
            load = parse_wrk(text)
    return replace(load, client_cpu_s=cpu)
