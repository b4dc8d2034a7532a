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

from tests.python_support import write
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


SPEAKS = """def initialize(self, args):
    for log in (pb_utils.Logger.log_warn, pb_utils.Logger.log_info, pb_utils.Logger.log_error):
        log("hello")

def execute(self, requests):
    return []
"""


def test_lines_go_to_the_file_but_for_the_levels_that_are_off(tmp_path: Path):
    write(tmp_path / "models" / "speaks", SPEAKS)
    pipe = tmp_path / "log"
    os.mkfifo(pipe)  # a file whose end can be waited for
    flags = (f"--model-repository={tmp_path / 'models'}", f"--log-file={pipe}", "--log-warning=off", "--log-info", "1")
    with tritonserver(*flags) as process:
        assert process.stderr is not None
        lines = []
        with pipe.open() as log:
            for line in log:
                lines.append(json.loads(line) if line.startswith("{") else {})
                if lines[-1].get("level") == "ERROR":
                    break
            port = next(line["http"] for line in lines if line.get("event") == "listening")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/logging", timeout=20) as answer:
                told = json.load(answer)
            process.send_signal(signal.SIGTERM)
            log.read()
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
    spoken = [(line["level"], line["message"]) for line in lines if line.get("event") == "model_log"]
    assert spoken == [("INFO", "hello"), ("ERROR", "hello")]
    assert (told["log_file"], told["log_info"], told["log_warning"], told["log_error"]) == (
        str(pipe),
        True,
        False,
        True,
    )


def test_a_log_file_that_cannot_be_is_said(tmp_path: Path):
    with tritonserver(f"--model-store={tmp_path}", f"--log-file={tmp_path}/nowhere/log") as process:
        assert process.stderr is not None
        assert "No such file or directory" in process.stderr.read()
    assert process.returncode == 1
