"""A job outlives the gateway that accepted it, on one machine with nothing to install."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from loadtest.fleet_client import MODEL, write_model
from tests.system.process import GatewayProcess, started

BODY = {"inputs": [{"name": "IN", "datatype": "INT64", "shape": [1, 1], "data": [7]}]}


def post(gateway: GatewayProcess, path: str) -> Any:
    request = urllib.request.Request(gateway.url(path), json.dumps(BODY).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.status == 202
        return json.load(response)


def test_a_job_survives_a_stop_and_a_start_of_everything(tmp_path: Path) -> None:
    write_model(tmp_path / "models")
    flags = ("--model-repository", str(tmp_path / "models"), "--queue", "embedded", "--queue-dir", str(tmp_path / "q"))
    with started(*flags) as gateway:
        gateway.wait_ready()
        done = post(gateway, f"/v2/models/{MODEL}/infer?async=1")["id"]
        assert b"event: end" in gateway.get(f"/v2/jobs/{done}/events")
        sync = json.loads(gateway.get(f"/v2/jobs/{done}/result"))
        assert sync["outputs"][0]["data"] == [7]
        late = post(gateway, f"/v2/models/{MODEL}/infer?async=1")["id"]  # run by whichever process gets to it
        assert gateway.terminate() == 0
    with started(*flags) as gateway:
        assert json.loads(gateway.get(f"/v2/jobs/{done}/result")) == sync
        assert b"event: end" in gateway.get(f"/v2/jobs/{late}/events")
        assert json.loads(gateway.get(f"/v2/jobs/{late}"))["state"] == "done"
        assert gateway.terminate() == 0
