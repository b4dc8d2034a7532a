"""Ensembles with decoupled steps, as clients meet them: a stream of responses, each through the steps after."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from gateway.app import running
from gateway.config.settings import Settings
from gateway.engines.fake import Gate
from tests.api.test_ensembles import FAKE, App, add, add_onnx, ensemble, parameter, serving, step
from tests.python_support import CONFIG, write
from tests.support import until

pytestmark = pytest.mark.slow

DECOUPLED = CONFIG + "model_transaction_policy { decoupled: true } dynamic_batching {}"
COUNTS = """def execute(self, requests):
    FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    for each in requests:
        sender = each.get_response_sender()
        wanted, last = each.inputs()[0].as_numpy()[0]
        for n in range(1, int(wanted) + 1):
            out = pb_utils.Tensor("OUT", np.array([[n, last]], np.float32))
            sender.send(pb_utils.InferenceResponse([out]), flags=FINAL if last and n == wanted else 0)
        if not (wanted and last):
            sender.send(flags=FINAL)
"""
Seen = list[tuple[float | None, bool]]


def repository(folder: Path) -> Path:
    """`counts` tells 1 to N and, with a second element, says with the last that it is; `held` has a gate."""
    write(folder / "models" / "counts", COUNTS, DECOUPLED)
    add_onnx(folder, "double", "Mul", 2.0)
    add_onnx(folder, "plus", "Add", 0.0)
    add(folder, "held", FAKE.format(more=parameter("gate", folder / "held")))
    add(folder, "sick", FAKE.format(more=parameter("poison", 4)))
    add(folder, "stream", ensemble(step("plus", "IN", "x"), step("counts", "x", "y"), step("double", "y")))
    add(folder, "bare", ensemble(step("counts")))
    add(folder, "twice", ensemble(step("counts", "IN", "x"), step("counts", "x")))
    add(folder, "around", ensemble(step("stream", "IN", "x"), step("plus", "x")))
    add(folder, "slow", ensemble(step("counts", "IN", "x"), step("held", "x")))
    add(folder, "ill", ensemble(step("counts", "IN", "x"), step("double", "x", "y"), step("sick", "y")))
    add(folder, "worse", ensemble(step("ill")))
    return folder


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with serving(repository(tmp_path), "grpc", allow_python_models=True) as made:
        yield made


def inputs(*values: float) -> list[Any]:
    data = tritonclient.grpc.aio.InferInput("IN", [1, 2], "FP32")
    data.set_data_from_numpy(np.array([values], np.float32))
    return [data]


async def stream(app: App, model: str, *requests: tuple[float, float], **more: Any) -> dict[str, Seen]:
    """Each request's responses, the first element and whether it was told to be the last, by its place."""

    async def send() -> AsyncIterator[dict[str, Any]]:
        for place, values in enumerate(requests):
            yield {"model_name": model, "inputs": inputs(*values), "request_id": str(place), **more}

    seen: dict[str, Seen] = {str(place): [] for place in range(len(requests))}
    async for result, error in app.client.stream_infer(send()):
        if error is not None:
            raise error
        told = result.get_response()
        out = result.as_numpy("OUT")
        final = told.parameters["triton_final_response"].bool_param
        seen[told.id].append((None if out is None else float(out[0, 0]), final))
    return seen


async def test_each_response_runs_the_steps_after_it(app: App) -> None:
    assert await stream(app, "stream", (3, 0), (0, 0), (2, 1), (1, 1)) == {
        "0": [(2, False), (4, False), (6, False)],
        "1": [],
        "2": [(2, False), (4, True)],
        "3": [(2, True)],
    }
    assert await stream(app, "bare", (2, 1)) == {"0": [(1, False), (2, True)]}


async def test_the_end_is_told_where_it_is_wanted(app: App) -> None:
    def ask(*requests: tuple[float, float]) -> list[tuple[str, int, bool]]:
        told: list[Any] = []
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{app.gateway.ports['grpc']}") as client:
            client.start_stream(lambda result, error: told.append(error or result.get_response()))
            for place, values in enumerate(requests):
                more = {"request_id": str(place), "enable_empty_final_response": True}
                client.async_stream_infer("stream", inputs(*values), **more)
            client.stop_stream()
        ends = [(each.id, len(each.outputs), each.parameters["triton_final_response"].bool_param) for each in told]
        return sorted(ends, key=lambda end: end[0])

    ends = await asyncio.to_thread(ask, (1, 0), (0, 0), (1, 1))
    assert ends == [("0", 1, False), ("0", 0, True), ("1", 0, True), ("2", 1, True)]


async def test_decoupled_steps_may_follow_each_other(app: App) -> None:
    seen = await stream(app, "twice", (3, 0), (2, 1))
    assert seen["0"] == [(1, False), (1, False), (2, False), (1, False), (2, False), (3, False)]
    assert seen["1"] == [(1, False), (1, False), (2, True)]


async def test_a_decoupled_ensemble_may_be_a_step(app: App) -> None:
    assert await stream(app, "around", (2, 1)) == {"0": [(2, False), (4, True)]}


async def test_more_responses_than_run_at_once(app: App) -> None:
    (seen,) = (await stream(app, "stream", (200, 1))).values()
    assert seen == [(2.0 * n, n == 200) for n in range(1, 201)]


async def test_responses_go_through_the_steps_side_by_side_and_keep_their_order(app: App) -> None:
    async with Gate(app.folder / "held") as held:
        asked = asyncio.create_task(stream(app, "slow", (3, 1)))
        first = await held.arrival()
        service = app.gateway.service
        await until(lambda: service._statistics.of("held", "1").pending == 3)
        first.release()
        rows = first.rows
        while rows < 3:
            run = await held.arrival()
            rows += run.rows
            run.release()
        assert await asked == {"0": [(1, False), (2, False), (3, True)]}


async def test_who_can_take_one_answer_only_is_refused(app: App) -> None:
    refused = "doesn't support models with decoupled transaction policy"
    with pytest.raises(InferenceServerException, match=f"ModelInfer RPC {refused}"):
        await app.client.infer("stream", inputs(1, 1))
    url = f"http://127.0.0.1:{app.gateway.ports['http']}/v2/models/stream"
    body = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{url}/infer", json=body)
        assert (answer.status_code, answer.json()["error"]) == (501, f"HTTP end point {refused}")
        assert (await client.get(f"{url}/config")).json()["model_transaction_policy"] == {"decoupled": True}
        streamed = await client.post(f"{url}/generate_stream", json={"IN": [2, 0]})
        told = [json.loads(line[5:]) for line in streamed.text.split("\n\n") if line]
        assert [each["OUT"] for each in told] == [[2.0, 0.0], [4.0, 0.0]]


async def test_the_first_error_ends_the_request(app: App) -> None:
    with pytest.raises(InferenceServerException) as raised:
        await stream(app, "ill", (3, 0))
    assert raised.value.message().startswith("in ensemble 'ill', ")
    assert "'sick'" in raised.value.message()
    await until(lambda: app.gateway.service._statistics.of("ill", "1").pending == 0)
    assert (await app.counts("ill"))["fail"] == 1


async def test_an_error_of_a_nested_ensemble_names_both(app: App) -> None:
    with pytest.raises(InferenceServerException) as raised:
        await stream(app, "worse", (3, 0))
    assert raised.value.message().startswith("in ensemble 'worse', in ensemble 'ill', ")


async def test_a_deadline_holds_for_all_steps_together(app: App) -> None:
    async with Gate(app.folder / "held"):
        with pytest.raises(InferenceServerException) as raised:
            await stream(app, "slow", (1, 1), timeout=200_000)
    assert raised.value.message().startswith("in ensemble 'slow', ")
    assert "Request timeout expired" in raised.value.message()


async def test_a_client_that_leaves_ends_all_that_is_under_way(app: App) -> None:
    async with Gate(app.folder / "held") as held:
        asked = asyncio.create_task(stream(app, "slow", (3, 0)))
        await held.arrival()
        asked.cancel()
        counted = app.gateway.service._statistics
        await until(lambda: all(counted.of(name, "1").pending == 0 for name in ("slow", "held", "counts")))
        assert (await app.counts("slow"))["fail"] == 1


async def test_statistics_count_a_request_once_and_each_run_of_a_step(app: App) -> None:
    await stream(app, "stream", (3, 0), (2, 1))
    counted = await app.counts("stream")
    assert (counted["success"], counted["inferences"], counted["executions"]) == (2, 2, 2)
    assert [(await app.counts(model))["success"] for model in ("plus", "counts", "double")] == [2, 2, 5]
    spent = 0
    for model in ("plus", "counts", "double"):
        (entry,) = await app.gateway.service.statistics(model)
        spent += entry["inference_stats"]["compute_infer"]["ns"]
    (entry,) = await app.gateway.service.statistics("stream")
    (batch,) = entry["batch_stats"]
    assert batch["compute_infer"] == {"count": 2, "ns": spent}


async def test_what_a_model_leaves_out_the_next_does_without(tmp_path: Path) -> None:
    nothing = """def execute(self, requests):
    return [pb_utils.InferenceResponse([]) for _ in requests]
"""
    write(tmp_path / "models" / "nothing", nothing, CONFIG)
    add_onnx(tmp_path, "double", "Mul", 2.0)
    add(tmp_path, "e", ensemble(step("nothing", "IN", "x"), step("double", "x")))
    async with serving(tmp_path, "grpc", allow_python_models=True) as app:
        assert "expected 1 inputs but got 0 inputs for model 'double'" in (await app.refusal("e")).message()


async def test_a_gateway_without_models_streams_from_workers(tmp_path: Path, redis_url: str) -> None:
    fleet: Any = {"queue": redis_url, "queue_prefix": f"test-{secrets.token_hex(8)}", "allow_python_models": True}
    repositories = (repository(tmp_path) / "models",)
    async with (
        running(Settings(model_repository=repositories, role="worker", metrics_port=0, **fleet)) as workers,
        serving(tmp_path, "grpc", role="gateway", **fleet) as app,
    ):
        await workers.loaded.wait()
        await until(
            lambda: bool(app.gateway.service.ready_versions("around"))
        )  # the gateway hears of it a moment later
        assert await stream(app, "around", (2, 0), (2, 1)) == {
            "0": [(2, False), (4, False)],
            "1": [(2, False), (4, True)],
        }
