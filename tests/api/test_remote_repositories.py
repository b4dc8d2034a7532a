"""The whole gateway over a real S3-compatible server: moto's, where it and s3fs are installed."""

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as httpclient

from tests.artefacts_support import adder
from tests.system.process import GatewayProcess, ending, started

MISSING = [name for name in ("s3fs", "moto", "flask", "boto3") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install s3fs 'moto[server]'"),
]
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "models-bucket"


class S3:
    """moto's server, which may go away and come back with nothing in it at the same port."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        import boto3

        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{self.port}"
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url, timeout=5)
                break
            time.sleep(0.1)  # another program, which tells nobody that it listens
        self.client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="id", aws_secret_access_key="secret", region_name="us-east-1"
        )
        self.client.create_bucket(Bucket=BUCKET)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def put(self, path: str, content: bytes = b"") -> None:
        self.client.put_object(Bucket=BUCKET, Key=path, Body=content)

    def url(self, path: str) -> str:
        return f"s3://127.0.0.1:{self.port}/{BUCKET}/{path}"


@pytest.fixture
def s3() -> Iterator[S3]:
    server = S3()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory(prefix="gw") as path:
        yield Path(path)


def flags(s3: S3, cache: Path, *more: str) -> tuple[str, ...]:
    return ("--model-repository", s3.url("repo"), "--repository-cache-dir", str(cache), "--cpu-cores", "1", *more)


def added(gateway: GatewayProcess, name: str = "adder") -> float:
    with httpclient.InferenceServerClient(f"127.0.0.1:{gateway.ports['http']}") as client:
        tensor = httpclient.InferInput("IN", [1, 2], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 2), np.float32))
        return float(client.infer(name, [tensor]).as_numpy("OUT")[0, 0]) - 1.0


def metric(gateway: GatewayProcess, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{gateway.ports['metrics']}/metrics").text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{"))


POLL = ("--model-control-mode", "poll", "--repository-poll-secs", "1")


@pytest.mark.timeout(90)
def test_polling_follows_the_store_and_outlives_it(s3: S3, cache: Path) -> None:
    s3.put("repo/adder/config.pbtxt", b"version_policy { all {} }")
    s3.put("repo/adder/1/model.onnx", adder(1.0))
    with started(*flags(s3, cache, *POLL)) as gateway:
        gateway.wait_ready()
        assert added(gateway) == 1.0
        s3.put("repo/adder/2/model.onnx", adder(2.0))
        gateway.wait_for("model_ready", model="adder", version="2")
        assert added(gateway) == 2.0
        assert sum('"event": "model_ready"' in line.replace('":"', '": "') for line in gateway.lines) == 2  # no reload
        s3.stop()
        gateway.wait_for("repository_unreachable")
        assert added(gateway) == 2.0
        assert metric(gateway, "gateway_repository_reachable") == 0
        assert metric(gateway, "gateway_repository_failures_total") >= 1
        s3.start()
        s3.put("repo/adder/3/model.onnx", adder(3.0))
        gateway.wait_for("model_ready", model="adder", version="3")
        gateway.wait_for("repository_reachable")
        assert added(gateway) == 3.0
        assert metric(gateway, "gateway_repository_reachable") == 1
        assert gateway.terminate() == 0


@pytest.mark.timeout(60)
def test_explicit_loads_come_from_the_store_and_two_processes_share_a_cache(s3: S3, cache: Path) -> None:
    s3.put("repo/adder/1/model.onnx", adder(1.0))
    explicit = flags(s3, cache, "--model-control-mode", "explicit")
    with started(*explicit) as gateway, started(*explicit) as other:
        for each in (gateway, other):
            each.wait_ready()
            with httpclient.InferenceServerClient(f"127.0.0.1:{each.ports['http']}") as client:
                assert client.get_model_repository_index() == [{"name": "adder"}]
                client.load_model("adder")
            assert added(each) == 1.0
        assert metric(gateway, "gateway_repository_downloaded_bytes_total") == len(adder(1.0))
        assert metric(other, "gateway_repository_downloaded_bytes_total") == 0
        s3.put("repo/adder/1/model.onnx", adder(5.0))
        with httpclient.InferenceServerClient(f"127.0.0.1:{gateway.ports['http']}") as client:
            client.load_model("adder")
        assert (added(gateway), added(other)) == (5.0, 1.0)


@pytest.mark.timeout(60)
def test_a_fleet_of_processes_serves_from_the_store(s3: S3, cache: Path) -> None:
    s3.put("repo/adder/1/model.onnx", adder(1.0))
    with ending(GatewayProcess(*flags(s3, cache, "--queue", "embedded", "--workers", "2"))) as gateway:
        gateway.wait_listening()
        gateway.wait_ready()
        assert added(gateway) == 1.0
        assert sum("repository_download" in line for line in gateway.lines) == 1
        gateway.terminate()


@pytest.mark.timeout(60)
def test_a_store_that_is_away_at_start_follows_exit_on_error(s3: S3, cache: Path) -> None:
    s3.stop()
    with ending(GatewayProcess(*flags(s3, cache, "--exit-on-error", "true"))) as gateway:
        assert gateway.process.wait(timeout=50) == 1
        gateway._reader.join(timeout=20)
        assert "model repository 'repo' cannot be read: it cannot be reached" in "".join(gateway.lines)
    with started(*flags(s3, cache, *POLL)) as gateway:
        gateway.wait_ready()
        assert gateway.get("/v2/health/live")
        s3.start()
        s3.put("repo/adder/1/model.onnx", adder(4.0))
        gateway.wait_for("model_ready", model="adder")
        assert added(gateway) == 4.0


@pytest.mark.timeout(60)
def test_tritons_credential_file_signs_in(s3: S3, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("repo/adder/1/model.onnx", adder(1.0))
    for name in KEYS:
        monkeypatch.delenv(name)
    file = cache / "credentials.json"
    entry = {"key_id": "id", "secret_key": "secret", "region": "us-east-1", "session_token": "", "profile": ""}
    file.write_text(json.dumps({"s3": {f"s3://127.0.0.1:{s3.port}/{BUCKET}": entry}}))
    monkeypatch.setenv("TRITON_CLOUD_CREDENTIAL_PATH", str(file))
    with started(*flags(s3, cache)) as gateway:
        gateway.wait_ready()
        assert added(gateway) == 1.0
