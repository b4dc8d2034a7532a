"""Instructions that a process tree executes, counted by Linux `perf stat`: the one figure a busy neighbour does not move.

Optional (`--instructions`): perf is not everywhere. Counting makes each thread switch dear (on a virtual machine requests/s fell to a
third), so it has a run of its own and no time is taken from that run.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

EVENTS = "instructions:u,instructions:k"


class Counted:
    """The result; filled in when the block ends, zero when perf could not count."""

    total = 0.0


def parse(text: str) -> float:
    """Add up the counts in the output of `perf stat -x,`; what was not counted adds nothing."""
    rows = (line.split(",") for line in text.splitlines() if "instructions" in line)
    return float(sum(int(row[0]) for row in rows if row[0].isdigit()))


@contextlib.contextmanager
def counting(pids: Iterable[int]) -> Iterator[Counted]:
    """Count while the block runs, in these processes and the threads they start."""
    counted = Counted()
    with tempfile.NamedTemporaryFile(prefix="loadtest-perf-") as out:
        command = ["perf", "stat", "-x,", "-e", EVENTS, "-o", out.name, "-p", ",".join(map(str, pids))]
        try:
            perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            yield counted
            return
        try:
            yield counted
        finally:
            perf.send_signal(signal.SIGINT)
            perf.wait()
        counted.total = parse(Path(out.name).read_text(encoding="utf-8"))
