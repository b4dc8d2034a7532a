"""A gateway on a machine with GPUs, as far as that can be had without any: NVML is the shipped fake, and so is the backend."""

import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from gateway import artefacts, cli, engines
from gateway.app import running
from gateway.config.settings import Settings
from gateway.devices import nvml
from gateway.devices.fake_nvml import FakeGpu, FakeNvml
from gateway.devices.nvml import gpus
from tests.artefacts_support import built, made, write_adder
from tests.support import until

CONFIG = """backend: "fake" max_batch_size: 8 dynamic_batching {{ }} {group}
input {{ name: "IN" data_type: TYPE_FP32 dims: 2 }} output {{ name: "OUT" data_type: TYPE_FP32 dims: 2 }}"""


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="gw") as path:
        yield Path(path)


@pytest.fixture
def machine(monkeypatch):
    """Two GPUs, and a backend that could use them."""
    fake = FakeNvml(FakeGpu("GPU-a", utilization=25), FakeGpu("GPU-b"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(nvml, "_has_driver", lambda: True)
    monkeypatch.setattr(engines, "_has", lambda _: True)
    gpus.cache_clear()
    yield fake
    gpus.cache_clear()


@asynccontextmanager
async def serving(folder, group="", **more):
    (folder / "m" / "1").mkdir(parents=True, exist_ok=True)
    (folder / "m" / "config.pbtxt").write_text(CONFIG.format(group=group))
    settings = Settings(
        model_repository=(folder,), http_port=0, grpc_port=0, metrics_port=0, metrics_interval_ms=1, **more
    )
    async with running(settings) as gateway, httpx.AsyncClient() as client:
        await gateway.loaded.wait()

        async def scrape():
            return (await client.get(f"http://127.0.0.1:{gateway.ports['metrics']}/metrics")).text

        yield gateway, scrape


def places(gateway):
    (state,) = gateway.queue.pool("m").versions
    return [instance.device for instance in state.instances], state.reason


@pytest.mark.parametrize(
    ("group", "devices"),
    [
        ("", ["gpu:0", "gpu:1"]),
        ("instance_group { kind: KIND_GPU gpus: [ 1 ] }", ["gpu:1"]),
        ("instance_group { kind: KIND_CPU count: 1 }", ["cpu"]),
    ],
)
async def test_models_are_placed_on_the_gpus_there_are(folder, machine, group, devices):
    async with serving(folder, group) as (gateway, _):
        assert places(gateway) == (devices, "")


async def test_a_hidden_gpu_is_not_there(folder, machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    async with serving(folder) as (gateway, scrape):
        assert places(gateway) == (["gpu:0"], "")
        assert 'nv_gpu_utilization{gpu_uuid="GPU-b"} 0' in await scrape()


async def test_without_a_backend_for_them_gpus_are_watched_and_not_used(folder, machine, monkeypatch):
    monkeypatch.setattr(engines, "_has", lambda _: False)
    async with serving(folder) as (gateway, scrape):
        assert set(places(gateway)[0]) == {"cpu"}
        assert 'nv_gpu_utilization{gpu_uuid="GPU-a"} 0.25' in await scrape()


async def test_a_gpu_that_fails_is_a_metric(folder, machine):
    async with serving(folder) as (gateway, scrape):
        assert 'gateway_gpu_healthy{gpu_uuid="GPU-a"} 1' in await scrape()
        machine.gpus[0].xids.append(79)
        await until(lambda: gateway.monitor.verdict("gpu:0").state == "failed")
        text = await scrape()
        assert 'gateway_gpu_healthy{gpu_uuid="GPU-a"} 0' in text
        assert 'gateway_gpu_healthy{gpu_uuid="GPU-b"} 1' in text
        assert 'gateway_gpu_xid_errors_total{gpu_uuid="GPU-a",xid="79"} 1' in text


async def test_metrics_of_devices_can_be_left_out(folder, machine):
    async with serving(folder, allow_gpu_metrics=False, allow_cpu_metrics=False) as (_, scrape):
        text = await scrape()
    assert "nv_gpu_" not in text
    assert "nv_cpu_" not in text
    assert "gateway_cpu_" not in text


def test_artefacts_for_its_gpus_are_for_this_machine(folder, machine, capsys):
    version = write_adder(folder)
    artefacts.promote(version, built(version, made("fp16", "FP16", device="gpu:sm90"), made("fp8", device="gpu:sm89")))
    assert cli.main(["models", "--model-repository", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "artefact fp16 (FP16, 0.0 MB, 1.50x the speed of FP32): passed on gpu:sm90, which is here" in out
    assert "artefact fp8 (INT8, 0.0 MB, 1.50x the speed of FP32): it was proven on gpu:sm89 and this is cpu:" in out
