"""Ensembles as clients meet them: the real app and the real tritonclient, over HTTP and gRPC."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import onnx
import pytest
import tritonclient.grpc.aio
import tritonclient.http.aio
from onnx import TensorProto, helper
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from gateway.app import Gateway, running
from gateway.config.settings import Settings
from gateway.engines.fake import Gate, HeldRun
from gateway.middleware.flights import first
from gateway.service import Service
from gateway.types import InferRequest, RequestedOutput
from tests.python_support import CONFIG as PYTHON
from tests.python_support import write as write_code
from tests.support import tensor, until

FAKE = """backend: "fake" max_batch_size: 8 {more}
dynamic_batching {{ default_queue_policy {{ max_queue_size: 99 }} }}
input {{ name: "IN" data_type: TYPE_FP32 dims: 2 }} output {{ name: "OUT" data_type: TYPE_FP32 dims: 2 }}"""
IO = 'input { name: "IN" data_type: TYPE_FP32 dims: 2 } output { name: "OUT" data_type: TYPE_FP32 dims: 2 }'
TRIPLE = """def execute(self, requests):
    return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", each.inputs()[0].as_numpy() * 3)]) for each in requests]
"""
WIRES = ("http", "grpc")


def step(model: str, given: str = "IN", made: str = "OUT", more: str = "") -> str:
    outputs = f'output_map {{ key: "OUT" value: "{made}" }}'
    return f'step {{ model_name: "{model}" {more} input_map {{ key: "IN" value: "{given}" }} {outputs} }}'


def ensemble(*steps: str, rows: int = 8, io: str = IO, more: str = "") -> str:
    return f'platform: "ensemble" max_batch_size: {rows} {io} {more} ensemble_scheduling {{ {" ".join(steps)} }}'


def add(folder: Path, name: str, config: str) -> None:
    (folder / "models" / name / "1").mkdir(parents=True, exist_ok=True)
    (folder / "models" / name / "config.pbtxt").write_text(config)


def add_onnx(folder: Path, name: str, operator: str, value: float) -> None:
    shape: Sequence[Any] = ["n", 2]
    graph = helper.make_graph(
        [helper.make_node(operator, ["IN", "c"], ["OUT"])],
        "g",
        [helper.make_tensor_value_info("IN", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("OUT", TensorProto.FLOAT, shape)],
        [helper.make_tensor("c", TensorProto.FLOAT, [1], [value])],
    )
    path = folder / "models" / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    (folder / "models" / name / "config.pbtxt").write_text(f"max_batch_size: 8 dynamic_batching {{ }} {IO}")


def parameter(key: str, value: object) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


@dataclass
class App:
    """The whole gateway in this process, a client of it, and the gates of its models `left` and `right`."""

    gateway: Gateway
    client: Any
    library: Any
    folder: Path

    async def infer(
        self, model: str, value: float = 1.0, *, rows: int = 1, outputs: Sequence[str] = (), **more: Any
    ) -> Any:
        data = self.library.InferInput("IN", [rows, 2], "FP32")
        data.set_data_from_numpy(np.full((rows, 2), value, np.float32))
        wanted = [self.library.InferRequestedOutput(name) for name in outputs] or None
        return await self.client.infer(model, [data], outputs=wanted, **more)

    async def refusal(self, model: str, value: float = 1.0, **more: Any) -> InferenceServerException:
        with pytest.raises(InferenceServerException) as raised:
            await self.infer(model, value, **more)
        return raised.value

    async def counts(self, model: str) -> dict[str, int]:
        (entry,) = await self.gateway.service.statistics(model)
        counted = {name: each["count"] for name, each in entry["inference_stats"].items()}
        return counted | {"inferences": entry["inference_count"], "executions": entry["execution_count"]}


@asynccontextmanager
async def serving(folder: Path, wire: str, **more: Any) -> AsyncIterator[App]:
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    settings = Settings(model_repository=(folder / "models",), **ports, **more)
    library = tritonclient.http.aio if wire == "http" else tritonclient.grpc.aio
    async with running(settings) as gateway:
        await gateway.loaded.wait()
        url = f"127.0.0.1:{gateway.ports[wire]}"
        async with library.InferenceServerClient(url) as client:
            yield App(gateway, client, library, folder)


def repository(folder: Path) -> Path:
    """`chain` is (x * 2) + 1, `around` twice that; `fork` runs `left` and `right` at once and gives both."""
    add_onnx(folder, "double", "Mul", 2.0)
    add_onnx(folder, "plus", "Add", 1.0)
    add(folder, "echo", FAKE.format(more=""))
    for side in ("left", "right"):
        add(folder, side, FAKE.format(more=parameter("gate", folder / side)))
    add(folder, "sick", FAKE.format(more=parameter("poison", 13)))
    add(folder, "chain", ensemble(step("double", "IN", "x"), step("plus", "y"), step("echo", "x", "y")))
    add(folder, "around", ensemble(step("chain", "IN", "x", "model_version: 1"), step("double", "x")))
    two = 'input { name: "IN" data_type: TYPE_FP32 dims: 2 } ' + " ".join(
        f'output {{ name: "{name}" data_type: TYPE_FP32 dims: 2 }}' for name in ("L", "R")
    )
    sides = (step("left", "IN", "l"), step("double", "l", "L"), step("right", "IN", "r"), step("plus", "r", "R"))
    add(folder, "fork", ensemble(*sides, io=two))
    add(folder, "ill", ensemble(step("double", "IN", "x"), step("sick", "x")))
    return folder


@pytest.fixture(params=WIRES)
async def app(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[App]:
    async with serving(repository(tmp_path), request.param) as made:
        yield made


async def test_the_steps_run_one_after_the_other(app: App) -> None:
    result = await app.infer("chain", 3.0, rows=2, request_id="r")
    assert result.as_numpy("OUT").tolist() == [[7.0, 7.0]] * 2
    response = result.get_response()
    told = response if isinstance(response, dict) else {"id": response.id, "model_name": response.model_name}
    assert (told["id"], told["model_name"]) == ("r", "chain")


async def test_an_ensemble_may_be_a_step(app: App) -> None:
    assert (await app.infer("around", 3.0)).as_numpy("OUT").tolist() == [[14.0, 14.0]]


async def test_a_step_may_be_code(tmp_path: Path) -> None:
    write_code(tmp_path / "models" / "triple", TRIPLE, PYTHON)
    add(tmp_path, "e", ensemble(step("triple", "IN", "x"), step("triple", "x")))
    async with serving(tmp_path, "grpc", allow_python_models=True) as app:
        assert (await app.infer("e", 2.0)).as_numpy("OUT").tolist() == [[18.0, 18.0]]


async def test_steps_that_need_each_other_not_run_at_once(app: App) -> None:
    async with Gate(app.folder / "left") as left, Gate(app.folder / "right") as right:
        asked = asyncio.create_task(app.infer("fork", 3.0))
        runs = [await left.arrival(), await right.arrival()]
        for run in runs:
            run.release()
        result = await asked
    assert result.as_numpy("L").tolist() == [[6.0, 6.0]]
    assert result.as_numpy("R").tolist() == [[4.0, 4.0]]


async def test_steps_of_outputs_that_nobody_asked_for_do_not_run(app: App) -> None:
    result = await app.infer("fork", 3.0, outputs=["R"])
    assert result.as_numpy("R").tolist() == [[4.0, 4.0]]
    assert result.as_numpy("L") is None
    assert [(await app.counts(model))["success"] for model in ("left", "double", "right", "plus")] == [0, 0, 1, 1]


async def test_requests_of_an_ensemble_share_batches_of_its_models(app: App) -> None:
    async with Gate(app.folder / "left") as left, Gate(app.folder / "right"):
        asked = [asyncio.create_task(app.infer("fork", float(value), outputs=["L"])) for value in range(4)]
        await until(lambda: _pending(app, "left") == 4)
        held = []
        while sum(held) < 4:
            run = await left.arrival()
            held.append(run.rows)
            run.release()
        assert max(held) > 1
        results = [await each for each in asked]
    assert [each.as_numpy("L")[0, 0] for each in results] == [0.0, 2.0, 4.0, 6.0]


def _pending(app: App, model: str) -> int:
    return app.gateway.service._statistics.of(model, "1").pending


async def test_an_error_names_ensemble_and_step(app: App) -> None:
    error = await app.refusal("ill", 6.5)
    assert error.message().startswith("in ensemble 'ill', ")
    assert "'sick'" in error.message()
    assert (await app.counts("ill"))["fail"] == 1
    assert (await app.counts("sick"))["fail"] == 1
    assert (await app.counts("double"))["success"] == 1


async def test_what_does_not_fit_the_ensemble_is_refused_before_any_step(app: App) -> None:
    error = await app.refusal("chain", rows=9)
    assert "inference request batch-size must be <= 8 for 'chain'" in error.message()
    assert (await app.counts("double"))["fail"] == 0


async def test_a_deadline_holds_for_all_steps_together(app: App) -> None:
    async with Gate(app.folder / "left"), Gate(app.folder / "right"):
        error = await app.refusal("fork", timeout=200_000)
    assert "in ensemble 'fork', " in error.message()
    assert "Request timeout expired" in error.message()


async def test_a_client_that_leaves_ends_the_step_under_way(tmp_path: Path) -> None:
    async with serving(repository(tmp_path), "grpc") as app, Gate(tmp_path / "left") as left, Gate(tmp_path / "right"):
        asked = asyncio.create_task(app.infer("fork"))
        await left.arrival()
        asked.cancel()
        await until(lambda: _pending(app, "left") == _pending(app, "right") == _pending(app, "fork") == 0)
        assert (await app.counts("fork"))["fail"] == 1
        assert (await app.counts("left"))["fail"] == 1
        assert (await app.counts("double"))["success"] == 0


async def test_statistics_are_tritons(app: App) -> None:
    for _ in range(2):
        await app.infer("chain", rows=3)
    for model in ("double", "echo", "plus"):
        counted = await app.counts(model)
        assert (counted["success"], counted["inferences"]) == (2, 6)
    (entry,) = await app.gateway.service.statistics("chain")
    assert (entry["inference_count"], entry["execution_count"]) == (6, 2)
    assert entry["inference_stats"]["success"]["count"] == 2
    (batch,) = entry["batch_stats"]
    assert (batch["batch_size"], batch["compute_infer"]["count"]) == (3, 2)
    spent = 0
    for model in ("double", "echo", "plus"):
        (of_step,) = await app.gateway.service.statistics(model)
        spent += of_step["inference_stats"]["compute_infer"]["ns"]
    assert batch["compute_infer"]["ns"] == entry["inference_stats"]["compute_infer"]["ns"] == spent


async def test_metadata_and_configuration_are_there(app: App) -> None:
    more = {} if app.library is tritonclient.http.aio else {"as_json": True}
    metadata = await app.client.get_model_metadata("chain", **more)
    assert metadata["platform"] == "ensemble"
    assert [(each["name"], [int(size) for size in each["shape"]]) for each in metadata["inputs"]] == [("IN", [-1, 2])]
    config = await app.client.get_model_config("chain", **more)
    config = config.get("config", config)
    assert [each["model_name"] for each in config["ensemble_scheduling"]["step"]] == ["double", "plus", "echo"]
    assert not config.get("instance_group")
    assert await app.client.is_model_ready("chain")


async def test_batches_meet_models_without(tmp_path: Path) -> None:
    flat = 'backend: "fake" input { name: "IN" data_type: TYPE_FP32 dims: [ -1, 2 ] }'
    add(tmp_path, "flat", f'{flat} output {{ name: "OUT" data_type: TYPE_FP32 dims: [ -1, 2 ] }}')
    add(tmp_path, "row", f'backend: "fake" {IO}')
    add(tmp_path, "echo", FAKE.format(more=""))
    add(tmp_path, "whole", ensemble(step("echo", "IN", "x"), step("flat", "x", "y"), step("echo", "y")))
    add(tmp_path, "one", ensemble(step("row", "IN", "x"), step("echo", "x", "y"), step("row", "y")))
    async with serving(tmp_path, "http") as app:
        assert (await app.infer("whole", 2.0, rows=3)).as_numpy("OUT").tolist() == [[2.0, 2.0]] * 3
        assert (await app.infer("one", 2.0)).as_numpy("OUT").tolist() == [[2.0, 2.0]]
        error = await app.refusal("one", rows=2)
        assert "in ensemble 'one', " in error.message()
        assert "unexpected shape for input 'IN' for model 'row'" in error.message()


async def test_an_optional_input_may_be_left_out(tmp_path: Path) -> None:
    optional = 'input { name: "MORE" data_type: TYPE_FP32 dims: 2 optional: true }'
    add(tmp_path, "picky", FAKE.format(more="") + optional)
    mapped = 'input_map { key: "MORE" value: "MORE" }'
    add(tmp_path, "e", ensemble(step("picky", more=mapped), io=f"{IO} {optional}"))
    async with serving(tmp_path, "http") as app:
        assert (await app.infer("e", 2.0)).as_numpy("OUT").tolist() == [[2.0, 2.0]]


async def test_steps_of_an_accepted_request_have_room(tmp_path: Path) -> None:
    async with serving(repository(tmp_path), "http", max_inflight_bytes=4) as app:  # a lone request may be larger
        assert (await app.infer("chain", 3.0)).as_numpy("OUT").tolist() == [[7.0, 7.0]]


# --- what cannot be loaded


async def test_cycles_are_refused_with_the_path(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        add(tmp_path, name, ensemble(step(other)))
    add(tmp_path, "narcissus", ensemble(step("narcissus")))
    async with serving(tmp_path, "http") as app:
        failures = "\n".join(app.gateway.failures())
        for path in ("a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c", "narcissus -> narcissus"):
            assert f"circular dependency between ensembles: {path}" in failures
        assert not await app.client.is_server_ready()


async def test_why_an_ensemble_cannot_be_loaded_is_in_the_index(tmp_path: Path) -> None:
    add(tmp_path, "echo", FAKE.format(more=""))
    add(tmp_path, "broken", "nonsense")
    add(tmp_path, "lonely", ensemble(step("nobody")))
    add(tmp_path, "leaning", ensemble(step("broken")))
    add(tmp_path, "old", ensemble(step("echo", more="model_version: 7")))
    add(tmp_path, "wide", ensemble(step("echo"), rows=9))
    async with serving(tmp_path, "http") as app:
        reasons = {each["name"]: each.get("reason", "") for each in await app.client.get_model_repository_index()}
        assert reasons["lonely"] == "ensemble 'lonely' contains models that are not available or ambiguous: nobody"
        assert reasons["leaning"].startswith(
            "ensemble 'leaning' depends on 'broken' which has no loaded version. Model 'broken' loading failed with error: "
        )
        assert reasons["old"] == "ensemble 'old' depends on 'echo' whose required version 7 is not loaded"
        assert reasons["wide"].startswith("ensemble 'wide' allows maximum batch size 9, but it contains model 'echo'")
        error = await app.refusal("lonely")
        assert error.message() == "Request for unknown model: 'lonely' has no available versions"


# --- explicit control


async def test_loading_an_ensemble_loads_its_models_and_unloading_may_take_them_along(tmp_path: Path) -> None:
    async with serving(repository(tmp_path), "grpc", model_control_mode="explicit") as app:
        service = app.gateway.service
        await app.client.load_model("around")
        ready = {each.name for each in await service.index(ready=True)}
        assert ready == {"around", "chain", "double", "plus", "echo"}
        await app.client.load_model("echo")  # asked for by name, and so it stays
        await app.client.unload_model("around")
        assert {each.name for each in await service.index(ready=True)} == ready - {"around"}
        await app.client.load_model("around")
        await app.client.unload_model("around", unload_dependents=True)
        assert {each.name for each in await service.index(ready=True)} == {"echo"}


async def test_models_that_others_need_stay(tmp_path: Path) -> None:
    async with serving(repository(tmp_path), "http", model_control_mode="explicit") as app:
        await app.client.load_model("chain")
        await app.client.load_model("ill")
        await app.client.unload_model("ill", unload_dependents=True)
        assert {each.name for each in await app.gateway.service.index(ready=True)} == {
            "chain",
            "double",
            "plus",
            "echo",
        }
        assert (await app.infer("chain")).as_numpy("OUT").tolist() == [[3.0, 3.0]]


async def test_unload_dependents_must_be_a_boolean(tmp_path: Path) -> None:
    async with serving(repository(tmp_path), "grpc", model_control_mode="explicit") as app:
        url = f"http://127.0.0.1:{app.gateway.ports['http']}/v2/repository/models/chain/unload"
        async with httpx.AsyncClient() as client:
            answer = await client.post(url, json={"parameters": {"unload_dependents": "yes"}})
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("Unable to parse 'unload_dependents'")
        request = service_pb2.RepositoryModelUnloadRequest(model_name="chain")
        request.parameters["unload_dependents"].string_param = "yes"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.gateway.ports['grpc']}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await service_pb2_grpc.GRPCInferenceServiceStub(channel).RepositoryModelUnload(request)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        expected = "invalid value type for 'unload_dependents' parameter, expected bool_param."
        assert raised.value.details() == expected


async def test_an_ensemble_is_as_ready_as_its_models(tmp_path: Path) -> None:
    async with serving(repository(tmp_path), "http", model_control_mode="explicit") as app:
        await app.client.load_model("around")
        await app.client.unload_model("plus")
        for model in ("around", "chain"):
            assert not await app.client.is_model_ready(model)
        assert await app.client.is_server_ready()  # nothing failed: it was taken away
        await app.client.load_model("plus")
        assert (await app.infer("around")).as_numpy("OUT").tolist() == [[6.0, 6.0]]
        narrow = {"max_batch_size": 4, "backend": "onnxruntime", **_io(), "name": "plus"}
        await app.client.load_model("plus", config=json.dumps(narrow))
        (entry,) = (each for each in await app.gateway.service.index() if each.name == "chain")
        assert "which only allows maximum batch size to be 4" in entry.reason


def _io() -> dict[str, Any]:
    return {
        "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": [2]}],
        "output": [{"name": "OUT", "data_type": "TYPE_FP32", "dims": [2]}],
    }


async def test_an_unloaded_ensemble_answers_what_it_had_accepted(tmp_path: Path) -> None:
    async with serving(repository(tmp_path), "grpc", model_control_mode="explicit") as app:
        await app.client.load_model("fork")
        async with Gate(tmp_path / "left") as left:  # not before: it is warmed up
            asked = asyncio.create_task(app.infer("fork", 3.0, outputs=["L"]))
            run = await left.arrival()
            unloading = asyncio.create_task(app.client.unload_model("fork", unload_dependents=True))
            await until(lambda: not app.gateway.service.ready_versions("fork"))
            run.release()
            assert (await asked).as_numpy("L").tolist() == [[6.0, 6.0]]
            await unloading
        assert not await app.gateway.service.index(ready=True)


async def test_a_server_that_stops_answers_ensembles_first(tmp_path: Path) -> None:
    async def release(run: HeldRun, service: Service) -> None:
        await until(lambda: not service.live())
        run.release()

    request = InferRequest("fork", {"IN": tensor([[3.0, 3.0]])}, outputs=(RequestedOutput("L"),))
    async with AsyncExitStack() as later, asyncio.TaskGroup() as tasks, serving(repository(tmp_path), "grpc") as app:
        service = app.gateway.service
        left = await later.enter_async_context(Gate(tmp_path / "left"))  # not before: it is warmed up
        asked = tasks.create_task(first(service.infer, request))
        tasks.create_task(release(await left.arrival(), service))
    assert asked.result().outputs["L"].array.tolist() == [[6.0, 6.0]]


# --- a fleet


@pytest.mark.slow
async def test_a_gateway_without_models_runs_ensembles_on_workers(tmp_path: Path, redis_url: str) -> None:
    fleet: Any = {"queue": redis_url, "queue_prefix": f"test-{secrets.token_hex(8)}", "model_control_mode": "explicit"}
    repositories = (repository(tmp_path) / "models",)
    async with (
        running(Settings(model_repository=repositories, role="worker", metrics_port=0, **fleet)),
        serving(tmp_path, "grpc", role="gateway", **fleet) as app,
    ):
        service = app.gateway.service
        await app.client.load_model("around")
        await until(lambda: bool(service.ready_versions("around")))  # the gateway hears of it a moment later
        assert (await app.infer("around", 3.0, rows=2)).as_numpy("OUT").tolist() == [[14.0, 14.0]] * 2
        assert service.model_ready("around")
        (entry,) = await service.statistics("chain")
        assert (entry["inference_count"], entry["execution_count"]) == (2, 1)
        await app.client.unload_model("around", unload_dependents=True)
        await until(lambda: not any(service.ready_versions(name) for name in ("around", "chain", "double")))
        error = await app.refusal("around")
        assert "Request for unknown model: 'around'" in error.message()
