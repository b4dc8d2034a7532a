"""The gateway as a process: draining, forced stops, model control, refusals to start."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from gateway.engines.fake import Gate
from tests.system.process import CONFIG, ROOT, started, write_model

pytestmark = pytest.mark.slow


@pytest.fixture
def short():
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        yield Path(folder)


def tensor(module, value: float):
    each = module.InferInput("IN", [1, 2], "FP32")
    each.set_data_from_numpy(np.full((1, 2), value, np.float32))
    return each


async def infer(kind: str, port: int, value: float, model: str = "m") -> float:
    module = {"http": tritonclient.http.aio, "grpc": tritonclient.grpc.aio}[kind]
    async with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
        result = await client.infer(model, [tensor(module, value)])
        return float(result.as_numpy("OUT")[0, 0])


@pytest.mark.parametrize("kind", ["http", "grpc"])
async def test_sigterm_answers_what_was_accepted_and_exits_0(short: Path, kind: str):
    write_model(short / "repo", "m", gate=str(short / "gate"))
    with started("--model-repository", str(short / "repo"), "--log-verbose", "1") as gateway:
        await asyncio.to_thread(gateway.wait_ready)
        await asyncio.to_thread(gateway.wait_for, "measured")  # else the runs that measure stop at the gate too
        async with Gate(short / "gate") as gate, asyncio.TaskGroup() as tasks:
            port = gateway.ports[kind]
            running = tasks.create_task(infer(kind, port, 1.0))
            held = await gate.arrival()
            waiting = tasks.create_task(infer(kind, port, 2.0))
            while await waiting_requests(gateway) < 1:
                pass
            gateway.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(gateway.wait_for, "draining")
            with pytest.raises(InferenceServerException, match=r"Server not ready|shutting down"):
                await infer(kind, port, 3.0)
            assert await asyncio.to_thread(status_of, gateway.url("/v2/health/ready")) == 400
            held.release()
            (await gate.arrival()).release()
        assert (running.result(), waiting.result()) == (1.0, 2.0)
        assert await asyncio.to_thread(gateway.process.wait, 20) == 0


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


async def waiting_requests(gateway) -> int:
    """How many requests wait for a batch, by the gateway's metrics."""
    url = f"http://127.0.0.1:{gateway.ports['metrics']}/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.read().decode()

    text = await asyncio.to_thread(read)
    lines = [line for line in text.splitlines() if line.startswith("nv_inference_pending_request_count{")]
    return int(float(lines[0].rsplit(" ", 1)[1])) if lines else 0


async def test_a_second_signal_ends_it_at_once(short: Path):
    write_model(short / "repo", "m", gate=str(short / "gate"))
    with started("--model-repository", str(short / "repo"), "--log-verbose", "1") as gateway:
        await asyncio.to_thread(gateway.wait_ready)
        await asyncio.to_thread(gateway.wait_for, "measured")  # else the runs that measure stop at the gate too
        async with Gate(short / "gate") as gate, asyncio.TaskGroup() as tasks:
            caller = tasks.create_task(unanswered(gateway.ports["http"]))
            await gate.arrival()
            gateway.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(gateway.wait_for, "draining")
            gateway.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(gateway.process.wait, 20) == 1
            await caller
        gateway.wait_for("stop_forced")


async def unanswered(port: int) -> None:
    with pytest.raises(Exception, match=r"disconnect|closed|reset|Server"):
        await infer("http", port, 1.0)


def test_a_broken_model_is_unavailable_with_a_reason_and_the_others_serve(short: Path):
    write_model(short / "repo", "good")
    (short / "repo" / "bad" / "1").mkdir(parents=True)
    (short / "repo" / "bad" / "config.pbtxt").write_text('backend: "fake"\nmax_batch_size: "eight"\n')
    with started("--model-repository", str(short / "repo")) as gateway:
        gateway.wait_ready()
        assert gateway.get("/v2/models/good/ready") is not None
        index = urllib.request.Request(gateway.url("/v2/repository/index"), b"{}", method="POST")
        with urllib.request.urlopen(index, timeout=20) as response:
            entries = {entry["name"]: entry for entry in json.load(response)}
        assert entries["good"]["state"] == "READY"
        assert entries["bad"]["state"] == "UNAVAILABLE"
        assert "line 2" in entries["bad"]["reason"]
        assert status_of(gateway.url("/v2/health/ready")) == 400
        assert gateway.terminate() == 0


def test_exit_on_error_stops_with_status_1(short: Path):
    (short / "repo" / "bad" / "1").mkdir(parents=True)
    (short / "repo" / "bad" / "config.pbtxt").write_text('backend: "nonesuch"\n')
    with started("--model-repository", str(short / "repo"), "--exit-on-error") as gateway:
        assert gateway.process.wait(timeout=20) == 1
        assert gateway.wait_for("exit_on_error")["models"] == 1


def test_a_model_to_load_that_is_not_there_is_a_failure(short: Path):
    write_model(short / "repo", "m")
    flags = ("--model-control-mode", "explicit", "--load-model", "misspelt", "--exit-on-error")
    with started("--model-repository", str(short / "repo"), *flags) as gateway:
        assert gateway.process.wait(timeout=20) == 1
        assert "misspelt" in gateway.wait_for("exit_on_error")["first"]


def test_sigterm_does_not_wait_for_a_client_that_stalls_in_its_body(short: Path):
    write_model(short / "repo", "m")
    with started("--model-repository", str(short / "repo")) as gateway:
        gateway.wait_ready()
        with socket.create_connection(("127.0.0.1", gateway.ports["http"])) as stalled:
            stalled.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
            gateway.get("/v2/health/live")
            assert gateway.terminate() == 0


async def test_explicit_mode_loads_and_unloads_on_request(short: Path):
    write_model(short / "repo", "m")
    write_model(short / "repo", "other")
    flags = ("--model-repository", str(short / "repo"), "--model-control-mode", "explicit", "--load-model", "m")
    with started(*flags) as gateway:
        await asyncio.to_thread(gateway.wait_ready)
        async with tritonclient.http.aio.InferenceServerClient(f"127.0.0.1:{gateway.ports['http']}") as client:
            assert await client.is_model_ready("m")
            assert not await client.is_model_ready("other")
            await client.load_model("other")
            assert await infer("grpc", gateway.ports["grpc"], 5.0, "other") == 5.0
            await client.unload_model("m")
            states = {entry["name"]: entry for entry in await client.get_model_repository_index()}
            assert (states["m"]["state"], states["m"]["reason"]) == ("UNAVAILABLE", "unloaded")
            with pytest.raises(InferenceServerException, match="failed to load 'nope'"):
                await client.load_model("nope")
        assert await asyncio.to_thread(gateway.terminate) == 0


def test_poll_mode_follows_the_folder(short: Path):
    write_model(short / "repo", "first")
    flags = ("--model-repository", str(short / "repo"), "--model-control-mode", "poll", "--repository-poll-secs", "1")
    with started(*flags) as gateway:
        gateway.wait_ready()
        write_model(short / "repo", "second")
        gateway.wait_for("model_ready", model="second", version="1")
        (short / "repo" / "first" / "2").mkdir()
        gateway.wait_for("model_ready", model="first", version="2")
        shutil.rmtree(short / "repo" / "second")
        gateway.wait_for("model_unloaded", model="second")
        assert gateway.terminate() == 0


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        check=False,
        args=[sys.executable, "-m", "gateway", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_address_others_can_reach_is_refused_without_a_token(short: Path):
    write_model(short / "repo", "m")
    done = run("serve", "--model-repository", str(short / "repo"), "--http-address", "0.0.0.0")
    assert done.returncode == 2
    assert "--token-file" in done.stderr
    assert "--insecure" in done.stderr


def test_a_taken_port_is_one_line_and_status_1(short: Path):
    write_model(short / "repo", "m")
    with started("--model-repository", str(short / "repo")) as gateway:
        done = run(
            "serve", "--model-repository", str(short / "repo"), "--http-port", str(gateway.ports["http"]),
            "--grpc-port", "0", "--metrics-port", "0",
        )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(gateway.ports["http"]) in done.stderr


def test_models_shows_what_would_load_and_what_would_not(short: Path):
    write_model(short / "repo", "good")
    (short / "repo" / "bad" / "1").mkdir(parents=True)
    (short / "repo" / "bad" / "config.pbtxt").write_text("max_batch_size: x\n")
    done = run("models", "--model-repository", str(short / "repo"))
    assert done.returncode == 1
    assert "good: version 1, backend fake, max_batch_size 8, 1 instance(s)" in done.stdout
    assert "bad: UNAVAILABLE" in done.stdout
    (short / "repo" / "junk" / "1").mkdir(parents=True)
    (short / "repo" / "junk" / "1" / "model.onnx").write_bytes(b"junk")
    tensors = CONFIG.replace('backend: "fake"', 'backend: "onnxruntime"')
    (short / "repo" / "junk" / "config.pbtxt").write_text(tensors)
    assert "junk: UNAVAILABLE" in run("models", "--model-repository", str(short / "repo")).stdout
    assert run("--version").stdout.startswith("gateway ")
    assert run("nonsense").returncode == 2
