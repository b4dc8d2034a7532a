"""The README's commands, run as it gives them against a gateway started as it says, on ports of its own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.config.arguments import flag
from gateway.config.settings import Settings
from tests.system.process import GatewayProcess, started

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks() for line in block.splitlines() if line and not line.startswith("make ")]


@pytest.fixture(scope="module")
def gateway():
    flags = re.search(r"gateway serve (.*)", (ROOT / "Makefile").read_text())
    assert flags is not None
    with started(*flags[1].split()) as process:
        process.wait_ready()
        yield process


def test_the_quickstart_starts_with_make_serve():
    assert blocks()[0].strip() == "make serve"
    assert "gateway serve --model-repository model_repo" in (ROOT / "Makefile").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_each_command_of_the_quickstart_gives_what_it_promises(gateway: GatewayProcess, command: str):
    line = command.replace(".venv/bin/python", shlex.quote(sys.executable))
    line = line.replace("localhost:8000", f"localhost:{gateway.ports['http']}")
    if "client.py" in line and "--url" not in line:
        line += f" --url localhost:{gateway.ports['grpc' if 'grpc' in line else 'http']}"
    done = subprocess.run(line, check=False, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if "client.py" in command:
        assert done.stdout.splitlines()[0] in ("espresso 0.94", "espresso 0.95")  # INT8, FP32
    else:
        assert '"model_name":"digits"' in done.stdout


def test_every_setting_is_in_the_help():
    done = subprocess.run(
        check=False,
        args=[sys.executable, "-m", "gateway", "serve", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    missing = [name for name in Settings.model_fields if flag(name) not in done.stdout]
    assert missing == []
