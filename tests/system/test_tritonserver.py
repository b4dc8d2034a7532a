"""The command `tritonserver` as its users know it: the table, the server's name, the statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.system.process import ROOT, write_model

START = "import sys; from gateway.cli import tritonserver; sys.exit(tritonserver())"
PORTS = (
    "--http-port=0",
    "--grpc-port",
    "0",
    "--metrics-port=0",
    "--http-address=127.0.0.1",
    "--grpc-address",
    "127.0.0.1",
)


def tritonserver(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, *PORTS, *flags],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "GATEWAY_LOG_FORMAT": "json"},
    )  # fmt: skip


def test_it_shows_tritons_table_serves_and_ends_well(tmp_path: Path):
    write_model(tmp_path, "m")
    lines = []
    with tritonserver(f"--model-store={tmp_path}", "--strict-readiness", "false", "--id=edge") as process:
        assert process.stderr is not None
        port = 0
        for line in process.stderr:
            lines.append(line.rstrip())
            if '"listening"' in line:
                port = json.loads(line)["http"]
            if line.startswith("| m"):
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2", timeout=20) as answer:
            assert json.load(answer)["name"] == "edge"
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 0
    assert not [line for line in lines if "whoever reaches it may use it" in line]  # these addresses are loopback
    assert [line for line in lines if line[0] in "|+"] == [
        "+-------+---------+--------+",
        "| Model | Version | Status |",
        "+-------+---------+--------+",
        "| m     | 1       | READY  |",
    ]


@pytest.mark.parametrize("more", [(), ("--exit-on-error=false",)])
def test_a_model_that_does_not_load_ends_it_unless_told_otherwise(tmp_path: Path, more: tuple[str, ...]):
    (tmp_path / "bad" / "1").mkdir(parents=True)
    (tmp_path / "bad" / "config.pbtxt").write_text('backend: "vllm"')
    with tritonserver("--model-repository", str(tmp_path), *more) as process:
        assert process.stderr is not None
        table = next(line for line in process.stderr if line.startswith("| bad "))
        assert "Not loaded: bad/config.pbtxt line 1: backend 'vllm' is not supported" in table
        if more:
            process.terminate()
        process.stderr.read()
    assert process.returncode == (0 if more else 1)
