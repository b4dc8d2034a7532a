"""A recording of a real gateway, with tenants from a header and deadlines from the settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import requests
import tritonclient.grpc

from tests.system.process import started

CONFIG = """backend: "fake" max_batch_size: 8 dynamic_batching {{ default_queue_policy {{ max_queue_size: 100 }} }} {more}
input {{ name: "IN" data_type: TYPE_FP32 dims: 2 }} output {{ name: "OUT" data_type: TYPE_FP32 dims: 2 }}"""
OWN = 'parameters { key: "default_deadline_ms" value { string_value: "0" } }'


def test_what_came_is_written_down_by_the_time_the_gateway_ends(tmp_path: Path) -> None:
    for name, more in (("m", ""), ("patient", OWN)):
        (tmp_path / "models" / name / "1").mkdir(parents=True)
        (tmp_path / "models" / name / "config.pbtxt").write_text(CONFIG.format(more=more))
    recorded = tmp_path / "recorded"
    flags = ("--record", str(recorded), "--record-inputs", "--tenant-header", "X-Tenant")
    with started("--model-repository", str(tmp_path / "models"), "--default-deadline-ms", "9000", *flags) as gateway:
        gateway.wait_ready()
        body = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]}
        for model, headers in (("m", {"x-tenant": "acme"}), ("patient", {}), ("m", {"x-request-timeout-ms": "8000"})):
            url = gateway.url(f"/v2/models/{model}/infer")
            assert requests.post(url, json=body, headers=headers, timeout=20).status_code == 200
        wrong = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
        assert requests.post(gateway.url("/v2/models/m/infer"), json=wrong, timeout=20).status_code == 400
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
            tensor = tritonclient.grpc.InferInput("IN", [1, 2], "FP32")
            tensor.set_data_from_numpy(np.array([[5, 6]], np.float32))
            client.infer("m", [tensor], priority=1, headers={"x-tenant": "acme"})
        assert gateway.terminate() == 0
        assert gateway.wait_for("recording_closed", written=4, dropped=0)
    (file,) = recorded.glob("arrivals-*.jsonl")
    header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert header["lockgate_recording"] == 1
    assert [(line["model"], line["rows"], line["bytes"], line["priority"], line["tenant"]) for line in lines] == [
        ("m", 2, 16, 0, "acme"),
        ("patient", 2, 16, 0, ""),
        ("m", 2, 16, 0, ""),
        ("m", 1, 8, 1, "acme"),
    ]
    default, own, asked, over_grpc = [line["deadline_ms"] for line in lines]
    assert own is None
    # Each is measured from arrival, and fixed a little before or after it.
    for left, wanted in ((default, 9000), (asked, 8000), (over_grpc, 9000)):
        assert wanted - 1000 < left < wanted + 1000
    with np.load(recorded / lines[-1]["inputs"], allow_pickle=False) as kept:
        np.testing.assert_array_equal(kept["IN"], [[5, 6]])
