"""How long a start takes: from the start of the process to the first answer, for a repository holding only `digits`.

`python -m loadtest.startup [--rounds 5] [--out FILE]` prints every round and writes JSON with the machine, commit and versions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from loadtest.bench.servers import free_ports
from loadtest.record import ROOT, provenance

LIMIT = 2.0  # seconds, the bar


def first_answer(repository: Path) -> float:
    """Seconds from starting the process to a 200 for an inference."""
    body = (ROOT / "model_repo" / "digits" / "sample_request.json").read_bytes()
    http, grpc, metrics = free_ports(3)
    ports = ("--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics))
    command = (sys.executable, "-m", "gateway", "serve", "--model-repository", str(repository), *ports)
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while time.monotonic() - started < 60:
            if _answers(http, body):
                return time.monotonic() - started
            time.sleep(0.005)
    finally:
        process.terminate()
        process.wait()
    raise RuntimeError("the gateway gave no answer within a minute")


def _answers(port: int, body: bytes) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v2/models/digits/infer", body)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def main() -> int:
    """Run the rounds; 1 when their median misses the bar."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "model_repo" / "digits", Path(folder) / "digits")
        seconds = [first_answer(Path(folder)) for _ in range(options.rounds)]
    median = statistics.median(seconds)
    print("first answer after", " ".join(f"{each:.2f}" for each in seconds), f"s; median {median:.2f} s, bar {LIMIT} s")
    if options.out:
        result = {"kind": "startup", **provenance(), "seconds": seconds, "median": median, "limit": LIMIT}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if median <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
