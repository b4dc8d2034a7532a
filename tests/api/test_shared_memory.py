"""Clients' shared memory as `tritonclient` uses it: http, grpc and aio against a gateway process of its own."""

import asyncio
import os
import queue
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from gateway.engines.fake import Gate
from tests.system.process import ROOT, GatewayProcess, started, write_model

MODULES = {"http": tritonclient.http, "grpc": tritonclient.grpc}
STRINGS = """backend: "fake" max_batch_size: 8
input { name: "IN" data_type: TYPE_STRING dims: -1 } output { name: "OUT" data_type: TYPE_STRING dims: -1 }"""
VALUES = np.arange(16, dtype=np.float32).reshape(1, 16)
MISMATCH = "[request id: <id_unknown>] input byte size mismatch for input 'INPUT0' for model 'add_sub'"
TOO_SMALL = "shared memory size specified with the request for output 'OUTPUT0'"
DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gw") as name:
        write_model(Path(name) / "repo", "gated", gate=f"{name}/gate")
        (Path(name) / "repo" / "strings" / "1").mkdir(parents=True)
        (Path(name) / "repo" / "strings" / "config.pbtxt").write_text(STRINGS)
        yield Path(name)


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[GatewayProcess]:
    models = ("--model-repository", str(ROOT / "model_repo"), "--model-repository", str(folder / "repo"))
    flags = ("--allow-client-shm", "true", "--log-verbose", "1")
    with started(*models, *flags) as process:
        process.wait_ready()
        process.wait_for("measured", model="gated")  # else the runs that measure stop at the gate too
        yield process


def url(gateway: GatewayProcess, wire: str) -> str:
    return f"127.0.0.1:{gateway.ports[wire]}"


@pytest.fixture(params=["http", "grpc"])
def wire(request) -> str:
    return request.param


@pytest.fixture
def client(gateway: GatewayProcess, wire: str) -> Iterator[Any]:
    with MODULES[wire].InferenceServerClient(url(gateway, wire)) as made:
        yield made
        made.unregister_system_shared_memory()


@contextmanager
def memory(size: int) -> Iterator[tuple[str, Any]]:
    """A shared memory object: its key and its handle."""
    key = f"/gwtest-{secrets.token_hex(8)}"
    handle = shm.create_shared_memory_region("r", key, size)
    try:
        yield key, handle
    finally:
        shm.destroy_shared_memory_region(handle)


def placed_input(wire: str, name: str, size: int = 64, offset: int = 0, region: str = "in", shape=(1, 16)) -> Any:
    made = MODULES[wire].InferInput(name, list(shape), "FP32")
    made.set_shared_memory(region, size, offset)
    return made


def placed_output(wire: str, name: str, size: int = 64, offset: int = 0, region: str = "out") -> Any:
    made = MODULES[wire].InferRequestedOutput(name)
    made.set_shared_memory(region, size, offset)
    return made


def sent_input(wire: str, name: str, values: np.ndarray = VALUES) -> Any:
    made = MODULES[wire].InferInput(name, list(values.shape), "FP32")
    made.set_data_from_numpy(values)
    return made


def names(status: Any) -> list[str]:
    return sorted(each["name"] for each in status) if isinstance(status, list) else sorted(status.regions)


def refusal(call) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value


# --- regions


def test_regions_are_registered_told_and_forgotten(client: Any, wire: str):
    with memory(128) as (key, _):
        client.register_system_shared_memory("a/b %", key, 64, offset=32)
        client.register_system_shared_memory("c", key.lstrip("/"), 128)
        assert names(client.get_system_shared_memory_status()) == ["a/b %", "c"]
        told = client.get_system_shared_memory_status("a/b %")
        region = told[0] if wire == "http" else told.regions["a/b %"]
        value = region.get if wire == "http" else lambda field: getattr(region, field)
        assert [value(each) for each in ("name", "key", "offset", "byte_size")] == ["a/b %", key, 32, 64]
        again = refusal(lambda: client.register_system_shared_memory("c", key, 128))
        assert again.message() == "shared memory region 'c' already in manager"
        assert again.status() == {"http": "400", "grpc": "StatusCode.ALREADY_EXISTS"}[wire]
        client.unregister_system_shared_memory("a/b %")
        client.unregister_system_shared_memory("nobody")
        assert names(client.get_system_shared_memory_status()) == ["c"]
        client.unregister_system_shared_memory()
        assert names(client.get_system_shared_memory_status()) == []
        unknown = refusal(lambda: client.get_system_shared_memory_status("c"))
        assert unknown.message() == "Unable to find system shared memory region: 'c'"
        assert unknown.status() == {"http": "404", "grpc": "StatusCode.NOT_FOUND"}[wire]


def test_what_cannot_be_registered(client: Any, wire: str):
    ours = "triton_python_backend_shm_region_x"
    reserved = refusal(lambda: client.register_system_shared_memory("r", ours, 8))
    assert "as the key contains the reserved prefix 'triton_python_backend_shm_region_'" in reserved.message()
    outside = refusal(lambda: client.register_system_shared_memory("r", "/../../etc/passwd", 8))
    assert outside.message() == "Unable to open shared memory region: '/../../etc/passwd'"
    assert outside.status() == {"http": "500", "grpc": "StatusCode.INTERNAL"}[wire]
    with memory(8) as (key, _):
        large = refusal(lambda: client.register_system_shared_memory("r", key, 9))
        assert large.message() == "failed to register shared memory region 'r': invalid args"
        assert large.status() == {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"}[wire]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"byte_size": 8}, 400, "Shared memory register request has no 'key' field"),
        ({"key": "k"}, 400, "Shared memory register request has no 'byte_size' field"),
        ({"key": 1, "byte_size": 8}, 500, "Unable to parse 'key': attempt to access JSON non-string as string"),
        (
            {"key": "k", "byte_size": -8},
            500,
            "Unable to parse 'byte_size': attempt to access JSON non-unsigned-integer",
        ),
    ],
)
def test_a_registration_over_http_is_well_formed(gateway: GatewayProcess, body: dict, status: int, text: str):
    answer = requests.post(gateway.url("/v2/systemsharedmemory/region/r/register"), json=body, timeout=10)
    assert (answer.status_code, text in answer.json()["error"]) == (status, True), answer.text


def test_there_is_no_cuda_memory(client: Any, wire: str):
    refused = refusal(lambda: client.register_cuda_shared_memory("c", b"aGFuZGxl", 0, 64))
    assert refused.message() == "failed to register CUDA shared memory region: 'c', GPUs not supported"
    assert refused.status() == {"http": "503", "grpc": "StatusCode.UNAVAILABLE"}[wire]
    assert names(client.get_cuda_shared_memory_status()) == []
    unknown = refusal(lambda: client.get_cuda_shared_memory_status("c"))
    assert unknown.message() == "Unable to find cuda shared memory region: 'c'"
    client.unregister_cuda_shared_memory()
    client.unregister_cuda_shared_memory("c")


def test_metadata_names_the_extension(client: Any, wire: str):
    told = client.get_server_metadata()
    extensions = told["extensions"] if wire == "http" else told.extensions
    assert "system_shared_memory" in extensions
    assert "cuda_shared_memory" not in extensions


@pytest.mark.slow
def test_it_is_off_unless_allowed():
    with started("--model-repository", str(ROOT / "model_repo")) as gateway:
        for wire, code in (("http", "501"), ("grpc", "StatusCode.UNIMPLEMENTED")):
            with MODULES[wire].InferenceServerClient(url(gateway, wire)) as client:
                for call in (
                    lambda client=client: client.register_system_shared_memory("r", "/key", 8),
                    client.get_system_shared_memory_status,
                    client.unregister_cuda_shared_memory,
                ):
                    error = refusal(call)
                    assert (error.message(), error.status()) == (DISABLED, code)
                told = client.get_server_metadata()
                extensions = told["extensions"] if wire == "http" else told.extensions
                assert "system_shared_memory" not in extensions


# --- inference


def test_inputs_and_outputs_in_shared_memory(client: Any, wire: str):
    """Beside what is sent as usual, at offsets of a region that is itself not at its object's beginning."""
    with memory(512) as (key_in, handle_in), memory(512) as (key_out, handle_out):
        client.register_system_shared_memory("in", key_in, 256, offset=16)
        client.register_system_shared_memory("out", key_out, 256, offset=32)
        for round_ in range(3):
            first = VALUES + round_
            shm.set_shared_memory_region(handle_in, [first], offset=16 + 8)
            result = client.infer(
                "add_sub",
                [placed_input(wire, "INPUT0", offset=8), sent_input(wire, "INPUT1")],
                outputs=[placed_output(wire, "OUTPUT0", offset=4), MODULES[wire].InferRequestedOutput("OUTPUT1")],
            )
            sums = shm.get_contents_as_numpy(handle_out, np.float32, [1, 16], offset=32 + 4)
            assert np.array_equal(sums, first + VALUES)
            assert np.array_equal(result.as_numpy("OUTPUT1"), first - VALUES)
            output = result.get_output("OUTPUT0")
            shape = output["shape"] if wire == "http" else list(output.shape)
            assert shape == [1, 16]
            del sums


def test_everything_in_shared_memory(client: Any, wire: str):
    with memory(256) as (key, handle):
        client.register_system_shared_memory("all", key, 256)
        shm.set_shared_memory_region(handle, [VALUES, VALUES])
        client.infer(
            "add_sub",
            [placed_input(wire, "INPUT0", region="all"), placed_input(wire, "INPUT1", offset=64, region="all")],
            outputs=[
                placed_output(wire, "OUTPUT0", offset=128, region="all"),
                placed_output(wire, "OUTPUT1", offset=192, region="all"),
            ],
        )
        found = shm.get_contents_as_numpy(handle, np.float32, [4, 16])
        assert np.array_equal(found, np.concatenate([VALUES, VALUES, VALUES + VALUES, VALUES - VALUES]))
        del found


def test_strings_in_shared_memory(client: Any, wire: str):
    words = np.array([[b"", b"\xff\x00", b"abc" * 50]], dtype=object)
    size = len(serialize_byte_tensor(words).item())
    with memory(512) as (key, handle):
        client.register_system_shared_memory("in", key, 256)
        client.register_system_shared_memory("out", key, 256, offset=256)
        shm.set_shared_memory_region(handle, [serialize_byte_tensor(words)])
        given = MODULES[wire].InferInput("IN", [1, 3], "BYTES")
        given.set_shared_memory("in", size)
        client.infer("strings", [given], outputs=[placed_output(wire, "OUT", 256)])
        found = shm.get_contents_as_numpy(handle, np.object_, [1, 3], offset=256)
        assert found.tolist() == words.tolist()


@pytest.mark.parametrize("wire_aio", ["http", "grpc"])
async def test_the_asyncio_clients(gateway: GatewayProcess, wire_aio: str):
    module = {"http": tritonclient.http.aio, "grpc": tritonclient.grpc.aio}[wire_aio]
    with memory(128) as (key, handle):
        shm.set_shared_memory_region(handle, [VALUES])
        async with module.InferenceServerClient(url(gateway, wire_aio)) as client:
            await client.register_system_shared_memory("aio", key, 128)
            inputs = [placed_input(wire_aio, "INPUT0", region="aio"), sent_input(wire_aio, "INPUT1")]
            outputs = [placed_output(wire_aio, "OUTPUT0", offset=64, region="aio")]
            await asyncio.gather(*(client.infer("add_sub", inputs, outputs=outputs) for _ in range(8)))
            await client.unregister_system_shared_memory("aio")
        found = shm.get_contents_as_numpy(handle, np.float32, [1, 16], offset=64)
        assert np.array_equal(found, VALUES + VALUES)
        del found


def infer_with(client: Any, wire: str, given: Any, *outputs: Any) -> InferenceServerException:
    return refusal(lambda: client.infer("add_sub", [given, sent_input(wire, "INPUT1")], outputs=list(outputs) or None))


def test_mistakes(client: Any, wire: str):
    bad = {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"}[wire]
    with memory(64) as (key, handle):
        client.register_system_shared_memory("in", key, 64)
        for given, output, status, text in (
            (placed_input(wire, "INPUT0", region="x"), None, {"http": "404", "grpc": "StatusCode.NOT_FOUND"}[wire],
             "Unable to find shared memory region: 'x'"),
            (placed_input(wire, "INPUT0", offset=64), None, bad, "Invalid offset for shared memory region: 'in'"),
            (placed_input(wire, "INPUT0", offset=60), None, bad,
             "Invalid offset + byte size for shared memory region: 'in'"),
            (placed_input(wire, "INPUT0", size=60), None, bad,
             f"{MISMATCH}. Expected 64, got 60"),
            (placed_input(wire, "INPUT0"), placed_output(wire, "OUTPUT0", 8, region="in"),
             {"http": "500", "grpc": "StatusCode.INTERNAL"}[wire],
             f"{TOO_SMALL} (8 bytes) should be at least 64 bytes to hold the results"),
        ):  # fmt: skip
            error = infer_with(client, wire, given, *([output] if output else []))
            assert (error.message(), error.status()) == (text, status)
        os.truncate(f"/dev/shm{key}", 0)
        error = infer_with(client, wire, placed_input(wire, "INPUT0"))
        assert "'in' has become smaller than it was registered" in error.message()
        error = infer_with(client, wire, sent_input(wire, "INPUT0"), placed_output(wire, "OUTPUT0", region="in"))
        assert "'in' has become smaller than it was registered" in error.message()
        assert client.is_server_live()
        os.truncate(f"/dev/shm{key}", 64)
        assert handle is not None


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            {"shared_memory_offset": 2**64 - 32, "shared_memory_byte_size": 64},
            "Invalid offset for shared memory region",
        ),
        ({"shared_memory_offset": 32, "shared_memory_byte_size": 2**64 - 32}, "Integer overflow detected: byte_size "),
    ],
)
def test_numbers_beyond_all_measure(gateway: GatewayProcess, parameters: dict[str, int], text: str):
    tensor = {"datatype": "FP32", "shape": [1, 16], "data": VALUES.tolist()}
    inputs = [{"name": name, **tensor} for name in ("INPUT0", "INPUT1")]
    outputs = [{"name": "OUTPUT0", "parameters": {"shared_memory_region": "big", **parameters}}]
    base = gateway.url("/v2/systemsharedmemory/region/big")
    with memory(64) as (key, _):
        assert requests.post(f"{base}/register", json={"key": key, "byte_size": 64}, timeout=10).status_code == 200
        body = {"inputs": inputs, "outputs": outputs}
        answer = requests.post(gateway.url("/v2/models/add_sub/infer"), json=body, timeout=10)
        assert requests.post(f"{base}/unregister", timeout=10).status_code == 200
    assert (answer.status_code, answer.json()["error"][: len(text)]) == (400, text)


def test_json_beside_shared_memory(gateway: GatewayProcess):
    """Without binary data there is no header length, and the whole body is JSON."""
    base = gateway.url("/v2/systemsharedmemory/region/json")
    with memory(64) as (key, handle):
        shm.set_shared_memory_region(handle, [VALUES])
        assert requests.post(f"{base}/register", json={"key": key, "byte_size": 64}, timeout=10).status_code == 200
        place = {"shared_memory_region": "json", "shared_memory_byte_size": 64}
        tensor = {"datatype": "FP32", "shape": [1, 16]}
        inputs = [{"name": "INPUT0", **tensor, "parameters": place}, {"name": "INPUT1", **tensor, "data": [1.0] * 16}]
        body = {"inputs": inputs, "outputs": [{"name": "OUTPUT0"}, {"name": "OUTPUT1", "parameters": place}]}
        answer = requests.post(gateway.url("/v2/models/add_sub/infer"), json=body, timeout=10).json()
        found = shm.get_contents_as_numpy(handle, np.float32, [1, 16])
        assert np.array_equal(found, VALUES - 1)
        del found
        assert requests.post(f"{base}/unregister", timeout=10).status_code == 200
    assert answer["outputs"][0]["data"] == (VALUES + 1).flatten().tolist()
    assert answer["outputs"][1] == {"name": "OUTPUT1", **tensor}


def test_a_stream_and_shared_memory(gateway: GatewayProcess):
    with memory(128) as (key, handle), tritonclient.grpc.InferenceServerClient(url(gateway, "grpc")) as client:
        client.register_system_shared_memory("stream", key, 128)
        shm.set_shared_memory_region(handle, [VALUES])
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        inputs = [placed_input("grpc", "INPUT0", region="stream"), sent_input("grpc", "INPUT1")]
        outputs = [placed_output("grpc", "OUTPUT0", offset=64, region="stream")]
        client.async_stream_infer("add_sub", inputs, outputs=outputs, request_id="7")
        result, error = answers.get(timeout=10)
        inputs[0].set_shared_memory("nowhere", 64)
        client.async_stream_infer("add_sub", inputs, outputs=outputs, request_id="8")
        _, second = answers.get(timeout=10)
        client.stop_stream()
        client.unregister_system_shared_memory("stream")
        found = shm.get_contents_as_numpy(handle, np.float32, [1, 16], offset=64)
        assert np.array_equal(found, VALUES + VALUES)
        del found
    assert (error, result.get_response().id) == (None, "7")
    assert second.message() == "Unable to find shared memory region: 'nowhere'"


def test_an_unknown_model_is_told_before_an_unknown_region(client: Any, wire: str):
    error = refusal(lambda: client.infer("nobody", [placed_input(wire, "INPUT0", region="x")]))
    assert error.message() == "Request for unknown model: 'nobody' is not found"


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_workers_of_a_fleet_get_what_the_gateway_read(wire: str):
    models = ("--model-repository", str(ROOT / "model_repo"), "--model-control-mode", "explicit")
    fleet = ("--queue", "embedded", "--workers", "2", "--allow-client-shm", "true")
    with started(*models, "--load-model", "add_sub", *fleet) as gateway, memory(128) as (key, handle):
        gateway.wait_ready()
        with MODULES[wire].InferenceServerClient(url(gateway, wire)) as client:
            client.register_system_shared_memory("r", key, 128)
            shm.set_shared_memory_region(handle, [VALUES])
            inputs = [placed_input(wire, "INPUT0", region="r"), sent_input(wire, "INPUT1")]
            client.infer("add_sub", inputs, outputs=[placed_output(wire, "OUTPUT0", offset=64, region="r")])
        found = shm.get_contents_as_numpy(handle, np.float32, [1, 16], offset=64)
        assert np.array_equal(found, VALUES + VALUES)
        del found


def other_client_unregisters(gateway: GatewayProcess) -> None:
    assert requests.post(gateway.url("/v2/systemsharedmemory/unregister"), timeout=10).status_code == 200


async def test_a_region_in_use_is_forgotten_when_its_last_request_has_ended(
    gateway: GatewayProcess, folder: Path, client: Any, wire: str
):
    with memory(64) as (key, handle):
        client.register_system_shared_memory("in", key, 8)
        client.register_system_shared_memory("out", key, 8, offset=8)
        shm.set_shared_memory_region(handle, [np.array([1.5, 2.5], np.float32)])
        module = {"http": tritonclient.http.aio, "grpc": tritonclient.grpc.aio}[wire]
        async with Gate(folder / "gate") as gate, module.InferenceServerClient(url(gateway, wire)) as other:
            inputs, outputs = [placed_input(wire, "IN", 8, shape=(1, 2))], [placed_output(wire, "OUT", 8)]
            call = asyncio.create_task(other.infer("gated", inputs, outputs=outputs))
            held = await gate.arrival()
            await asyncio.to_thread(other_client_unregisters, gateway)
            assert names(await other.get_system_shared_memory_status()) == ["in", "out"]
            held.release()
            await call
            assert names(await other.get_system_shared_memory_status()) == []
        assert shm.get_contents_as_numpy(handle, np.float32, [2], offset=8).tolist() == [1.5, 2.5]
