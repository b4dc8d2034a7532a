"""The model repository extension through tritonclient: index, load with a configuration and with files, unload, poll."""

import json
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient
import tritonclient.http.aio as httpclient
from tritonclient.utils import InferenceServerException

from gateway.app import Gateway, running
from gateway.config.settings import Settings
from gateway.redis_server import EmbeddedServer
from gateway.repository import Repository
from tests.artefacts_support import adder, write_adder
from tests.support import until
from tests.system.process import GatewayProcess, ending

pytestmark = pytest.mark.slow

CONFIG = json.dumps({"backend": "onnxruntime", "max_batch_size": "4"})
WIRES = ["http", "grpc"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gw") as path:
        yield Path(path)


@asynccontextmanager
async def serving(*folders: Path, **more: object) -> AsyncIterator[Gateway]:
    settings = Settings(
        model_repository=folders, http_port=0, grpc_port=0, metrics_port=0, cpu_cores=1, repository_poll_secs=1,
        **{"model_control_mode": "explicit", "allow_metrics": False, **more},
    )  # fmt: skip
    async with running(settings) as gateway:
        await gateway.loaded.wait()
        yield gateway


@asynccontextmanager
async def connected(gateway: Gateway, wire: str) -> AsyncIterator[object]:
    kind = {"http": httpclient, "grpc": grpcclient}[wire]
    async with kind.InferenceServerClient(f"127.0.0.1:{gateway.ports[wire]}") as client:
        yield client


async def added(client, wire: str, name: str = "adder", version: str = "") -> float:
    """What the model adds: which file it was loaded from."""
    kind = {"http": httpclient, "grpc": grpcclient}[wire]
    tensor = kind.InferInput("IN", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 2), np.float32))
    result = await client.infer(name, [tensor], model_version=version)
    return float(result.as_numpy("OUT")[0, 0]) - 1.0


async def index(gateway: Gateway) -> dict[tuple[str, str], tuple[str, str]]:
    """The repository index, the same on both wires."""
    async with connected(gateway, "http") as http, connected(gateway, "grpc") as grpc:
        told = {
            (entry["name"], entry.get("version", "")): (entry.get("state", ""), entry.get("reason", ""))
            for entry in await http.get_model_repository_index()
        }
        found = (await grpc.get_model_repository_index()).models
        assert {(each.name, each.version): (each.state, each.reason) for each in found} == told
    return told


async def refusal(call) -> str:
    with pytest.raises(InferenceServerException) as caught:
        await call
    return caught.value.message()


async def test_the_index_tells_what_is_there_and_what_became_of_it(folder: Path) -> None:
    write_adder(folder)
    write_adder(folder, "other")
    async with serving(folder) as gateway, connected(gateway, "grpc") as client:
        assert await index(gateway) == {("adder", ""): ("", ""), ("other", ""): ("", "")}
        await client.load_model("adder")
        assert (await index(gateway))["adder", "1"] == ("READY", "")
        assert [each.name for each in (await client.get_model_repository_index()).models] == ["adder", "other"]
        await client.unload_model("adder")
        assert (await index(gateway))["adder", "1"] == ("UNAVAILABLE", "unloaded")


@pytest.mark.parametrize("wire", WIRES)
async def test_a_configuration_in_the_request_serves_until_the_next_load(folder: Path, wire: str) -> None:
    write_adder(folder)
    async with serving(folder) as gateway, connected(gateway, wire) as client:
        await client.load_model("adder", config=json.dumps({"max_batch_size": "16"}))
        assert gateway.service.model_config("adder").max_batch_size == 16
        await client.load_model("adder")
        assert gateway.service.model_config("adder").max_batch_size == 4


@pytest.mark.parametrize("wire", WIRES)
async def test_files_in_the_request_are_the_model_until_the_next_load(
    folder: Path, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adder(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / ".tmp"))
    (folder / ".tmp").mkdir()
    async with serving(folder) as gateway, connected(gateway, wire) as client:
        await client.load_model("adder")
        assert await added(client, wire) == 0.0
        await client.load_model("adder", config=CONFIG, files={"file:3/model.onnx": adder(5.0)})
        assert await added(client, wire) == await added(client, wire, version="3") == 5.0
        assert await index(gateway) == {("adder", "1"): ("UNAVAILABLE", "unloaded"), ("adder", "3"): ("READY", "")}
        await client.load_model("adder", config=CONFIG, files={"file:3/model.onnx": adder(6.0)})
        assert await added(client, wire) == 6.0
        await until(lambda: len([*(folder / ".tmp").glob("gateway-model-*")]) == 1)  # that of the reloaded is gone
        await client.load_model("adder")
        assert await added(client, wire) == await added(client, wire, version="1") == 0.0
        await until(lambda: not [*(folder / ".tmp").glob("gateway-model-*")])


@pytest.mark.parametrize("wire", WIRES)
async def test_files_in_the_request_make_a_model_that_no_repository_has(folder: Path, wire: str) -> None:
    async with serving(folder) as gateway, connected(gateway, wire) as client:
        await client.load_model("new", config=CONFIG, files={"file:1/model.onnx": adder(7.0)})
        assert await added(client, wire, "new") == 7.0
        assert (await index(gateway))["new", "1"] == ("READY", "")
        await client.unload_model("new")
        assert await refusal(client.load_model("new")) == "failed to load 'new', failed to poll from model repository"


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # the client's
@pytest.mark.parametrize("wire", WIRES)
async def test_large_files_arrive_as_they_were_and_go_with_their_model(
    folder: Path, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "files"))
    (folder / "files").mkdir()
    data = bytes(range(256)) * 12_345 + b"x"
    async with serving(folder) as gateway, connected(gateway, wire) as client:
        await client.load_model("new", config=CONFIG, files={"file:1/model.onnx": adder(7.0), "file:more": data})
        (file,) = (folder / "files").glob("gateway-model-*/new/more")
        assert file.read_bytes() == data
        await client.unload_model("new")
        await until(lambda: not [*(folder / "files").glob("gateway-model-*")])
        await refusal(client.load_model("new", config=CONFIG, files={"file:1/model.onnx": b"x"}))
        assert not [*(folder / "files").glob("gateway-model-*")]


NOT_POLLED = "failed to load 'adder', failed to poll from model repository: "


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"files": {"file:1/model.onnx": b"x"}},
            NOT_POLLED + "Load parameter 'config' must be specified for model file override",
        ),
        (
            {"config": CONFIG, "files": {"file:../1/model.onnx": b"x"}},
            NOT_POLLED + "Invalid file parameter 'file:../1/model.onnx' must stay within model directory.",
        ),
        (
            {"config": CONFIG, "files": {"file:1": b"x", "file:1/model.onnx": b"x"}},
            NOT_POLLED + "Invalid file parameter 'file:1/model.onnx', directory has been created as a file",
        ),
        (
            {"config": CONFIG, "files": {"file:.": b"x"}},
            NOT_POLLED + "Invalid file parameter 'file:.', directory has been created as a file",
        ),
        (
            {"config": CONFIG, "files": {f"file:1/{'x' * 256}": b"x"}},
            NOT_POLLED + f"Invalid file path '1/{'x' * 78}...': it is too long",
        ),
        (
            {"config": CONFIG, "files": {f"file:{1 << 63}/model.onnx": b"x"}},
            "model 'adder' has no version folder; put its model file into adder/1/",
        ),
        ({"config": '{"backend": "python"}', "files": {"file:1/model.py": b"x"}}, "not by an override"),
        ({"config": CONFIG, "files": {"file:1/model.onnx": b"x"}}, "load failed for model 'adder'"),
    ],
)  # fmt: skip
async def test_files_that_are_no_model_leave_what_serves_alone(folder: Path, wire: str, more, message: str) -> None:
    write_adder(folder)
    async with serving(folder, allow_python_models=True) as gateway, connected(gateway, wire) as client:
        await client.load_model("adder")
        assert message in await refusal(client.load_model("adder", **more))
        assert await added(client, wire) == 0.0
        assert gateway.service.ready()


@pytest.mark.parametrize("wire", WIRES)
async def test_a_name_that_no_folder_can_have_is_refused(folder: Path, wire: str) -> None:
    async with serving(folder) as gateway, connected(gateway, wire) as client:
        name = "m" * 256
        files = {"file:1/model.onnx": adder(1.0)}
        assert (await refusal(client.load_model(name, config=CONFIG, files=files))).endswith("has more than 255 bytes")


async def test_a_file_that_is_not_base64_is_refused(folder: Path) -> None:
    write_adder(folder)
    body = {"parameters": {"config": CONFIG, "file:1/model.onnx": "?"}}
    async with serving(folder) as gateway, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{gateway.ports['http']}/v2/repository/models/adder/load"
        answer = await client.post(url, json=body)
        assert answer.status_code == 500
        assert answer.json()["error"] == NOT_POLLED + "file parameter 'file:1/model.onnx' is not base64"


@asynccontextmanager
async def workers(front: Gateway, folder: Path, url: str, count: int) -> AsyncIterator[None]:
    """Workers of a fleet that the gateway knows of."""
    async with AsyncExitStack() as stack:
        for _ in range(count):
            await stack.enter_async_context(serving(folder, queue=url, role="worker"))
        await until(lambda: len(front.queue._directory.workers()) == count)
        yield


@pytest.mark.parametrize("wire", WIRES)
async def test_files_reach_the_workers_of_a_fleet_and_those_that_join_later(folder: Path, wire: str) -> None:
    write_adder(folder)
    async with (
        EmbeddedServer(None, persistent=False) as server,
        serving(folder, queue=server.url, role="gateway") as front,
        connected(front, wire) as client,
    ):
        async with workers(front, folder, server.url, 2):
            await client.load_model("adder", config=CONFIG, files={"file:1/model.onnx": adder(5.0)})
            assert [await added(client, wire) for _ in range(8)] == [5.0] * 8
            broken = {"file:1/model.onnx": b"x"}
            assert "load failed" in await refusal(client.load_model("adder", config=CONFIG, files=broken))
            assert await added(client, wire) == 5.0
        await until(lambda: not front.queue._directory.workers())
        async with workers(front, folder, server.url, 1):
            await until(lambda: front.service.ready_versions("adder") == ["1"])
            assert await added(client, wire) == 5.0
            await client.load_model("adder")
            assert await added(client, wire) == 0.0


async def test_several_repositories_are_one_but_for_names_that_two_have(folder: Path) -> None:
    for place, name in (("one", "a"), ("one", "both"), ("two", "b"), ("two", "both")):
        write_adder(folder / place, name)
    async with serving(folder / "one", folder / "two") as gateway, connected(gateway, "http") as client:
        for name in ("a", "b"):
            await client.load_model(name)
        message = "load failed for model 'both': model 'both' appears in two or more repositories ('one', 'two')"
        assert message in await refusal(client.load_model("both"))
        assert {entry[0] for entry in await index(gateway)} == {"a", "b", "both"}
        (folder / "two" / "both").rename(folder / "gone")
        await client.load_model("both")
        assert await added(client, "http", "both") == 0.0


async def test_poll_mode_changes_adds_and_removes_and_takes_no_commands(folder: Path) -> None:
    version = write_adder(folder)
    async with serving(folder, model_control_mode="poll") as gateway, connected(gateway, "http") as client:
        assert "if polling is enabled" in await refusal(client.load_model("adder"))
        write_adder(folder, "new")
        (version / "model.onnx.new").write_bytes(adder(2.0))
        (version / "model.onnx.new").rename(version / "model.onnx")
        await until(lambda: gateway.service.ready_versions("new") == ["1"])
        while await added(client, "http") != 2.0:
            pass  # the test's own time limit ends a wait in vain
        (folder / "new").rename(folder / ".new")
        await until(lambda: not gateway.service.ready_versions("new"))


async def test_readiness_is_strict_unless_told(folder: Path) -> None:
    write_adder(folder)
    (write_adder(folder, "broken") / "model.onnx").write_bytes(b"x")
    for strict in (True, False):
        options = {"model_control_mode": "none", "strict_readiness": strict}
        async with serving(folder, **options) as gateway, connected(gateway, "http") as client:
            assert await client.is_server_ready() is not strict
            assert await added(client, "http") == 0.0


async def test_so_many_models_are_read_side_by_side_as_the_setting_says(folder: Path, monkeypatch) -> None:
    for name in "abcdef":
        write_adder(folder, name)
    counting, both, reading, most = threading.Lock(), threading.Barrier(2), 0, 0
    read = Repository.read

    def counted(*arguments: object) -> object:
        nonlocal reading, most
        with counting:
            reading += 1
            most = max(most, reading)
        both.wait(10)  # two at a time there must be
        try:
            return read(*arguments)
        finally:
            with counting:
                reading -= 1

    monkeypatch.setattr(Repository, "read", counted)
    async with serving(folder, model_control_mode="none", model_load_thread_count=2) as gateway:
        assert {entry[0] for entry, told in (await index(gateway)).items() if told[0] == "READY"} == set("abcdef")
    assert most == 2


@pytest.mark.parametrize("exits", [True, False])
def test_a_model_that_fails_at_start_ends_the_server_if_it_shall(folder: Path, exits: bool) -> None:
    write_adder(folder)
    (write_adder(folder, "broken") / "model.onnx").write_bytes(b"x")
    flags = ("--model-repository", str(folder), "--exit-on-error", str(exits).lower(), "--cpu-cores", "1")
    with ending(GatewayProcess(*flags)) as gateway:
        gateway.wait_for("exit_on_error" if exits else "listening")
        if exits:
            assert gateway.process.wait(timeout=20) == 1
        else:
            gateway.wait_ready()
            assert gateway.terminate() == 0


async def test_dependents_are_unloaded_when_it_is_asked_for(folder: Path) -> None:
    write_adder(folder)
    step = 'input_map { key: "IN" value: "IN" } output_map { key: "OUT" value: "OUT" }'
    tensors = 'input { name: "IN" data_type: TYPE_FP32 dims: 2 } output { name: "OUT" data_type: TYPE_FP32 dims: 2 }'
    (folder / "whole" / "1").mkdir(parents=True)
    (folder / "whole" / "config.pbtxt").write_text(
        f'platform: "ensemble" max_batch_size: 4 {tensors} '
        f'ensemble_scheduling {{ step {{ model_name: "adder" model_version: -1 {step} }} }}'
    )
    async with serving(folder) as gateway:
        for wire in WIRES:
            async with connected(gateway, wire) as client:
                await client.load_model("whole")
                assert await added(client, wire, "whole") == await added(client, wire) == 0.0
                await client.unload_model("whole")
                assert await client.is_model_ready("adder")
                await client.load_model("whole")
                await client.unload_model("whole", unload_dependents=True)
                await until(lambda: not gateway.service.ready_versions("adder"))
