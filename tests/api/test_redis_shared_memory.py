"""Tensors of clients in a Redis: registered over HTTP, used over both wires, the same in every gateway of a fleet."""

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import tritonclient.grpc.aio
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from gateway.app import Gateway, running
from gateway.config.client_memory import CLIENT_KEYS
from gateway.config.settings import Settings
from gateway.engines.fake import Gate
from tests.api.test_ensembles import FAKE, add, parameter
from tests.redis_support import redis_server
from tests.support import background, until

pytestmark = pytest.mark.slow

LIBRARIES: dict[str, Any] = {"http": tritonclient.http.aio, "grpc": tritonclient.grpc.aio}
VALUES = np.array([[1, 2], [3, 4]], np.float32)


@asynccontextmanager
async def serving(folder: Path, url: str, **more: Any) -> AsyncIterator[Gateway]:
    add(folder, "echo", FAKE.format(more=""))
    add(folder, "held", FAKE.format(more=parameter("gate", folder / "gate")))
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    settings = Settings(
        model_repository=(folder / "models",), **ports, allow_client_shm=True, client_shm_redis=url, **more
    )
    async with running(settings) as gateway:
        await gateway.loaded.wait()
        yield gateway


@pytest.fixture
def keys(redis_url: str) -> Iterator[tuple[redis.Redis, str, str]]:
    """The Redis, a key with `VALUES` between other bytes, and one that is not there yet."""
    given, made = (f"{CLIENT_KEYS}{secrets.token_hex(8)}" for _ in range(2))
    with redis.Redis.from_url(redis_url) as store:
        store.set(given, b"####" + VALUES.tobytes() + b"####")
        yield store, given, made
        store.delete(given, made)


async def post(gateway: Gateway, path: str, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.post(f"http://127.0.0.1:{gateway.ports['http']}/v2/redissharedmemory/{path}", json=body)


async def register(gateway: Gateway, name: str, key: str, offset: int = 0, byte_size: int = 64) -> None:
    answer = await post(gateway, f"region/{name}/register", key=key, offset=offset, byte_size=byte_size)
    assert (answer.status_code, answer.text) == (200, "")


async def refused(gateway: Gateway, name: str, **body: Any) -> tuple[int, str]:
    answer = await post(gateway, f"region/{name}/register", **body)
    return answer.status_code, answer.json()["error"]


async def status(gateway: Gateway, name: str = "") -> Any:
    path = f"region/{name}/status" if name else "status"
    async with httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{gateway.ports['http']}/v2/redissharedmemory/{path}"
        answer = await client.get(url)
        return answer.json()


async def infer(
    gateway: Gateway, wire: str, model: str, given: str, made: str = "", size: int = 16, **more: Any
) -> Any:
    """VALUES in the region `given`, the output to the region `made` where it is named."""
    library = LIBRARIES[wire]
    data = library.InferInput("IN", [2, 2], "FP32")
    data.set_shared_memory(given, 16, **more)
    out = library.InferRequestedOutput("OUT")
    if made:
        out.set_shared_memory(made, size)
    async with library.InferenceServerClient(f"127.0.0.1:{gateway.ports[wire]}") as client:
        return await client.infer(model, [data], outputs=[out])


@pytest.mark.parametrize("wire", LIBRARIES)
async def test_inputs_are_read_and_outputs_written(tmp_path: Path, redis_url: str, keys: Any, wire: str) -> None:
    store, given, made = keys
    async with serving(tmp_path, redis_url) as gateway:
        await register(gateway, "in", given, offset=4, byte_size=16)
        await register(gateway, "out", made, offset=8)
        await infer(gateway, wire, "echo", "in", "out")
        assert store.get(made) == bytes(8) + VALUES.tobytes()
        assert (await infer(gateway, wire, "echo", "in")).as_numpy("OUT").tolist() == VALUES.tolist()
        assert await status(gateway, "in") == [{"name": "in", "key": given, "offset": 4, "byte_size": 16}]
        assert [each["name"] for each in await status(gateway)] == ["in", "out"]
        assert (await post(gateway, "region/in/unregister")).status_code == 200
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'in'"):
            await infer(gateway, wire, "echo", "in")
        assert (await post(gateway, "unregister")).status_code == 200
        assert await status(gateway) == []
        assert (await status(gateway, "in"))["error"] == "Unable to find redis shared memory region: 'in'"
        assert store.get(made) is not None  # it is the client's


async def test_what_may_not_be_registered(tmp_path: Path, redis_url: str, keys: Any) -> None:
    store, given, made = keys
    async with serving(tmp_path, redis_url) as gateway:
        for key in (
            "lockgate:q:{m/1}:1",
            "{lockgate}:models",
            CLIENT_KEYS,
            "",
            given.upper(),
            f"{CLIENT_KEYS}{'x' * 1024}",
        ):
            text = (
                f"cannot register shared memory region 'r' with key '{key}': keys of clients begin with '{CLIENT_KEYS}'"
            )
            assert await refused(gateway, "r", key=key, byte_size=1) == (400, text)
        bounds = "failed to register shared memory region 'r': invalid args"
        for offset, size in ((0, 0), (0, (512 << 20) + 1), (512 << 20, 1)):
            assert await refused(gateway, "r", key=given, offset=offset, byte_size=size) == (400, bounds)
        assert (await refused(gateway, "r", key=given))[1] == "Shared memory register request has no 'byte_size' field"
        store.rpush(made, "1")
        assert (await refused(gateway, "r", key=made, byte_size=1))[1].startswith(f"Redis refuses key '{made}'")
        await register(gateway, "r", given)
        exists = "shared memory region 'r' already in manager"
        assert await refused(gateway, "r", key=given, byte_size=1) == (400, exists)
        assert [each["name"] for each in await status(gateway)] == ["r"]


@pytest.mark.parametrize("wire", LIBRARIES)
async def test_what_a_request_cannot_have(tmp_path: Path, redis_url: str, keys: Any, wire: str) -> None:
    store, given, made = keys
    async with serving(tmp_path, redis_url) as gateway:
        await register(gateway, "in", given, offset=16, byte_size=32)
        await register(gateway, "out", made, byte_size=8)
        for given_region, made_region, size, text in (
            ("in", "", 0, f"key '{given}' of shared memory region 'in' holds 8 bytes where the request says 16"),
            ("in", "out", 16, "Invalid offset + byte size for shared memory region: 'out'"),
            ("out", "", 0, "Invalid offset + byte size for shared memory region: 'out'"),
        ):
            with pytest.raises(InferenceServerException) as raised:
                await infer(gateway, wire, "echo", given_region, made_region, size)
            assert text in raised.value.message()
        store.set(given, bytes(64))
        with pytest.raises(InferenceServerException, match=r"\(8 bytes\) should be at least 16 bytes to hold the res"):
            await infer(gateway, wire, "echo", "in", "out", 8)
        assert store.get(made) is None


async def test_a_region_in_use_is_forgotten_when_its_request_has_ended(
    tmp_path: Path, redis_url: str, keys: Any
) -> None:
    store, given, made = keys
    async with serving(tmp_path, redis_url) as gateway, Gate(tmp_path / "gate") as gate:
        await register(gateway, "in", given, 4)
        await register(gateway, "out", made)
        async with background(infer(gateway, "grpc", "held", "in", "out")) as (asked,):
            run = await gate.arrival()
            await post(gateway, "unregister")
            assert [each["name"] for each in await status(gateway)] == ["in", "out"]
            run.release()
            await asked
        assert store.get(made) == VALUES.tobytes()
        assert await status(gateway) == []


async def test_kinds_are_told_apart_and_share_their_names(tmp_path: Path, redis_url: str, keys: Any) -> None:
    _, given, _ = keys
    async with serving(tmp_path, redis_url) as gateway, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{gateway.ports['http']}/v2"
        await register(gateway, "r", given)
        taken = await client.post(f"{url}/systemsharedmemory/region/r/register", json={"key": "/x", "byte_size": 1})
        assert taken.json()["error"] == "shared memory region 'r' already in manager"
        assert (await client.get(f"{url}/systemsharedmemory/status")).json() == []
        await client.post(f"{url}/systemsharedmemory/unregister")
        assert [each["name"] for each in await status(gateway)] == ["r"]
        assert {"system_shared_memory", "redis_shared_memory"} <= set((await client.get(url)).json()["extensions"])


async def test_it_is_off_by_default(tmp_path: Path) -> None:
    async with serving(tmp_path, "") as gateway, httpx.AsyncClient() as client:
        answer = await client.get(f"http://127.0.0.1:{gateway.ports['http']}/v2/redissharedmemory/status")
        remedy = "Start the server with '--allow-client-shm=true --client-shm-redis=URL' to enable."
        assert (answer.status_code, answer.json()["error"]) == (501, f"Redis shared memory is disabled. {remedy}")
        told = (await client.get(f"http://127.0.0.1:{gateway.ports['http']}/v2")).json()["extensions"]
        assert "redis_shared_memory" not in told
    with pytest.raises(ValueError, match="--client-shm-redis needs --allow-client-shm"):
        Settings(model_repository=(tmp_path,), client_shm_redis="redis://localhost")


def test_a_queue_may_not_have_the_keys_of_clients(tmp_path: Path) -> None:
    given: Any = {"model_repository": (tmp_path,), "allow_client_shm": True, "client_shm_redis": "redis://localhost"}
    for prefix in (CLIENT_KEYS[:-1], f"{CLIENT_KEYS}x"):
        with pytest.raises(ValueError, match="begins as the keys of clients in --client-shm-redis do"):
            Settings(queue_prefix=prefix, **given)
    assert Settings(queue_prefix="lockgate", **given).client_shm_redis


async def test_a_redis_that_is_away_is_said(tmp_path: Path) -> None:
    with redis_server() as url:
        async with serving(tmp_path, url) as gateway:
            await register(gateway, "in", f"{CLIENT_KEYS}a")
    async with serving(tmp_path, url) as gateway:
        code, text = await refused(gateway, "in", key=f"{CLIENT_KEYS}a", byte_size=1)
        assert code == 503
        assert text.startswith("the Redis of shared memory does not answer")
        assert await status(gateway) == []


async def test_it_is_the_same_in_every_gateway_of_a_fleet(tmp_path: Path, redis_url: str, keys: Any) -> None:
    store, given, made = keys
    fleet: Any = {"queue": redis_url, "queue_prefix": f"test-{secrets.token_hex(8)}"}
    async with (
        serving(tmp_path, redis_url, **fleet) as one,
        serving(tmp_path, redis_url, role="gateway", **fleet) as other,
    ):
        await until(lambda: bool(other.service.ready_versions("echo")))
        await register(one, "in", given, 4)
        await register(other, "out", made)
        await infer(other, "grpc", "echo", "in", "out")
        assert store.get(made) == VALUES.tobytes()
        assert [each["name"] for each in await status(one)] == ["in", "out"]
        assert (await refused(other, "in", key=given, byte_size=1))[0] == 400
        await post(other, "unregister")
        assert await status(one) == []
