"""Every call of every client of tritonclient, the newest and 2.41, against a gateway and a fleet, in their own processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import client_models
from tests.system import client_calls
from tests.system.process import GatewayProcess, started

FLAGS = (
    "--model-control-mode", "explicit", "--load-model", "*", "--log-verbose", "1",
    "--http-header-forward-pattern", "^(x-forwarded-test|authorization)$",
    "--grpc-header-forward-pattern", "^(x-forwarded-test|authorization)$",
)  # fmt: skip
CALLS = [
    (kind, name) for kind in client_calls.KINDS for name, (_, kinds) in client_calls.CHECKS.items() if kind in kinds
]


@dataclass
class Served:
    """A gateway or a fleet, and the folder of its models."""

    process: GatewayProcess
    folder: Path


@pytest.fixture(scope="module", params=["alone", pytest.param("fleet", marks=pytest.mark.slow)])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A gateway by itself; or two that share their ports, with a worker behind a Redis."""
    with tempfile.TemporaryDirectory(prefix="gw") as name:
        flags = (*client_models.make(Path(name)), *FLAGS)
        if request.param == "fleet":
            flags += ("--queue", "embedded", "--queue-dir", f"{name}/redis", "--http-workers", "2")
        trace = ("--trace-config", f"triton,file={name}/trace.json", "--trace-config", "triton,log-frequency=50")
        with started(*flags, *trace) as process:
            process.wait_ready()
            if request.param == "fleet":
                process.wait_for("ready", gateways=2)
            yield Served(process, Path(name))


@pytest.fixture(scope="module", params=["newest", "2.41"])
def python(request: pytest.FixtureRequest) -> str:
    """A Python that has a tritonclient: this one, or one of a virtual environment of its own; see README.md."""
    if request.param == "newest":
        return sys.executable
    found = os.environ.get("LOCKGATE_TRITONCLIENT_PYTHON", "")
    if not found:
        pytest.skip("needs LOCKGATE_TRITONCLIENT_PYTHON, a Python that has tritonclient[all]==2.41.*")
    return found


@pytest.fixture(scope="module")
def reports(python: str, served: Served) -> Any:
    """What each of this tritonclient's clients found, by its name."""

    @cache
    def made(kind: str) -> dict[str, Any]:
        ports = [str(served.process.ports[wire]) for wire in ("http", "grpc")]
        version = served.folder / "examples" / "simple" / "1"
        done = subprocess.run(
            [python, client_calls.__file__, kind, *ports, str(version)], capture_output=True, text=True, timeout=80, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return made


@pytest.mark.parametrize(("kind", "name"), CALLS)
def test_a_client_gets_what_it_asks_for(reports: Any, kind: str, name: str):
    failure = reports(kind)["checks"][name]
    assert failure is None, failure


@pytest.mark.parametrize("kind", client_calls.KINDS)
def test_no_call_is_left_out(reports: Any, kind: str):
    assert reports(kind)["left"] == []
