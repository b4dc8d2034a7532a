"""NVIDIA's perf_analyzer runs to its end against a gateway, and what it reads of the server adds up.

`LOCKGATE_PERF_ANALYZER` is its path; README.md says where it comes from.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import client_models
from tests.system.process import GatewayProcess, started

pytestmark = pytest.mark.slow

# A machine that others use too is never steady: three windows are enough, however far apart they are.
WINDOWS = ("--measurement-mode", "count_windows", "--measurement-request-count", "40", "-s", "99999", "-r", "4", "-v")
PARTS = ("overhead", "queue", "compute input", "compute infer", "compute output")

HTTP = {
    "sync": ("-m", "simple", "--concurrency-range", "2"),
    "async": ("-m", "batched", "--async", "--concurrency-range", "4", "-b", "8"),
    "shared_memory": ("-m", "batched", "--shared-memory", "system", "-b", "8"),
    "request_rate": ("-m", "batched", "--request-rate-range", "40"),
    "sequences": ("-m", "simple_sequence", "--concurrency-range", "2", "--sequence-length", "5"),
    "strings": ("-m", "simple_identity", "--shape", "INPUT0:4", "--string-length", "9"),
}
GRPC = {
    "sync": ("-m", "simple", "--concurrency-range", "2"),
    "async": ("-m", "batched", "--async", "--concurrency-range", "4", "-b", "8"),
    "streaming": ("-m", "batched", "--streaming", "--concurrency-range", "2"),
    "shared_memory": ("-m", "batched", "--shared-memory", "system", "-b", "8"),
    "request_rate": ("-m", "batched", "--async", "--request-rate-range", "40"),
    "sequences": ("-m", "simple_sequence", "--streaming", "--concurrency-range", "2", "--sequence-length", "5"),
    "oldest_sequences": (
        "-m",
        "simple_dyna_sequence",
        "--async",
        "--request-rate-range",
        "40",
        "--sequence-length",
        "5",
    ),
    "gzip": ("-m", "batched", "--grpc-compression-algorithm", "gzip"),
}


@pytest.fixture(scope="module")
def perf_analyzer() -> str:
    found = os.environ.get("LOCKGATE_PERF_ANALYZER", "")
    if not found:
        pytest.skip("needs LOCKGATE_PERF_ANALYZER, the path of perf_analyzer 2.60 or newer")
    return found


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gw") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def gateway(perf_analyzer: str, folder: Path) -> Iterator[GatewayProcess]:
    with started(*client_models.make(folder)) as process:
        process.wait_ready()
        yield process


def run(perf_analyzer: str, gateway: GatewayProcess, wire: str, *flags: str) -> str:
    """What it printed, having ended well."""
    done = subprocess.run(
        [perf_analyzer, "-i", wire, "-u", f"127.0.0.1:{gateway.ports[wire]}", *flags, *WINDOWS],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=80, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def number(text: str, name: str) -> int:
    found = re.search(rf"{name}: (\d+)", text)
    assert found is not None, (name, text)
    return int(found[1])


def adds_up(table: str, *, rows: int = 1, inflight: int = 8) -> None:
    """The counts belong together, and the parts of a request's time are all of it.

    What is under way while statistics are read may be counted in one figure and not yet in another.
    """
    requests = number(table, "Successful request count")
    assert requests > 0
    assert abs(number(table, "Inference count") - rows * requests) <= rows * inflight
    assert 0 < number(table, "Execution count") <= requests + inflight
    found = re.search(r"Avg request latency: (\d+) usec \((.*)\)", table)
    assert found is not None
    parts = {name: int(usec) for name, usec in re.findall(r"([a-z ]+?) (\d+) usec", found[2].replace("+ ", ""))}
    assert {name.strip() for name in parts} in ({*PARTS}, {"overhead", "queue", "compute"}), table
    assert abs(sum(parts.values()) - int(found[1])) <= len(parts), table  # each is rounded


def both_sides(printed: str) -> tuple[str, str]:
    """The client's figures and the server's."""
    client, found, server = printed.partition("  Server: ")
    assert found, printed
    return client, server


@pytest.mark.parametrize(("wire", "name"), [*(("http", name) for name in HTTP), *(("grpc", name) for name in GRPC)])
def test_it_runs_to_its_end_and_the_table_adds_up(perf_analyzer: str, gateway: GatewayProcess, wire: str, name: str):
    flags = (HTTP if wire == "http" else GRPC)[name]
    printed = run(perf_analyzer, gateway, wire, *flags)
    client, server = both_sides(printed)
    adds_up(server, rows=8 if "-b" in flags else 1)
    # The server counts what lies across a window's edge, too; windows are three and at most four requests are open.
    assert abs(number(client, "Request count") - number(server, "Successful request count")) <= 3 * 4, printed
    # Of nearly the same requests: one across a window's edge may be the slowest of all, and the server's alone.
    assert number(server, "Avg request latency") <= 2 * number(client, "Avg latency"), printed


@pytest.mark.parametrize("wire", ["http", "grpc"])
def test_the_models_of_an_ensemble_have_tables_of_their_own(perf_analyzer: str, gateway: GatewayProcess, wire: str):
    printed = run(perf_analyzer, gateway, wire, "-m", "ensemble_add_sub_int32_int32_int32")
    _, server = both_sides(printed)
    whole, found, models = server.partition("Composing models:")
    assert found
    adds_up(whole)
    name, found, step = models.partition(", version: 1")
    assert (name.strip(), found) == ("simple", ", version: 1")
    adds_up(step)
    assert number(step, "Avg request latency") <= number(whole, "Avg request latency")


def test_a_decoupled_model(perf_analyzer: str, gateway: GatewayProcess, folder: Path):
    data = folder / "square.json"
    data.write_text(json.dumps({"data": [{"IN": {"content": [3], "shape": [1]}}]}))
    printed = run(perf_analyzer, gateway, "grpc", "-m", "square_int32", "--streaming", "--input-data", str(data))
    assert "Detected decoupled model" in printed
    client, server = both_sides(printed)
    requests, responses = (
        float(each) for each in re.findall(r"Throughput: ([\d.]+) infer/sec", client.split("Request count:")[1])
    )
    assert responses == pytest.approx(3 * requests, rel=0.1)
    adds_up(server)
