"""An edge gateway whose far one fails: every request is answered right and once, and the far one is used again. Real processes.

`python -m loadtest.edge_faults` is the same with a deadline of 150 ms, at more load, and timed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import requests

from loadtest.edge_faults import hurt, table
from loadtest.edge_rig import Edge
from tests import deploy_files as deploy
from tests.remote_support import SCHEMES
from tests.system.process import ROOT, started

FAULTS = ("cut", "refused", "slow", "killed")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_answers_never_stop_and_say_which_engine_gave_them(scheme: str) -> None:
    async with Edge(scheme, deadline_ms=1000.0, rate=30.0) as edge:
        outcomes = [(scheme, await hurt(edge, name, 3.0)) for name in FAULTS]
        log = [json.loads(line) for line in edge.near.log.read_text().splitlines() if line.startswith("{")]
    assert [text for _, each in outcomes for text in each.broken] == [], table(outcomes)
    assert all(each.local for _, each in outcomes)
    changes = [line["now"] for line in log if line["event"] == "engine_changed"]
    assert changes.count("cpu") >= 3  # a link that is only slow stays in use for those who can wait
    assert changes.count("remote") >= 3


def test_the_units_command_line_serves_its_model_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = [each for each in deploy.commands() if each.where == "lockgate-edge.service"]
    for name, value in command.variables.items():
        if name.startswith("GATEWAY_"):
            monkeypatch.setenv(name, value)
    (tmp_path / "tokens").write_text("camera:" + 40 * "c" + "\n")
    (tmp_path / "tokens").chmod(0o600)
    (tmp_path / "remote-token").write_text(40 * "r")
    folder = tmp_path / "models" / "classifier"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes((ROOT / "model_repo/add_sub/1/model.onnx").read_bytes())
    text = (deploy.DEPLOY / "edge/config.pbtxt").read_text()
    text = text.replace("/run/credentials/lockgate-edge.service", str(tmp_path)).replace(
        "gateway.example:8001", "127.0.0.1:1"
    )
    (folder / "config.pbtxt").write_text(text)
    places = {"/var/lib/lockgate/models": str(tmp_path / "models"), "%d/tokens": str(tmp_path / "tokens")}
    with started(*(places.get(word, word) for word in command.words[1:])) as gateway:
        gateway.wait_ready()
        tensors = [
            {"name": name, "shape": [1, 16], "datatype": "FP32", "data": [float(number)] * 16}
            for number, name in enumerate(("INPUT0", "INPUT1"))
        ]
        answer = requests.post(
            gateway.url("/v2/models/classifier/infer"),
            json={"inputs": tensors},
            headers={"Authorization": f"Bearer {40 * 'c'}"},
            timeout=20,
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["data"] == [1.0] * 16
        assert answer.json()["parameters"]["link"] == "cpu"
        assert gateway.terminate() == 0
