"""Rate limiting as unmodified tritonclient meets it, over HTTP and gRPC: a whole gateway, and models held at a gate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

from gateway.app import Gateway, running
from gateway.config.settings import Settings
from gateway.engines.fake import Gate
from tests.sequence_support import accumulator
from tests.support import settle, until

# An open dimension: nobody measures such a model, so each run at the gate is a client's. Two instances: each takes one core of two.
CONFIG = """backend: "fake" max_batch_size: 1
input {{ name: "IN" data_type: TYPE_FP32 dims: -1 }} output {{ name: "OUT" data_type: TYPE_FP32 dims: -1 }}
instance_group {{ kind: KIND_CPU count: 2 {more} }}
parameters {{ key: "gate" value {{ string_value: "{gate}" }} }}
parameters {{ key: "isolation" value {{ string_value: "thread" }} }}"""
NEEDS = 'rate_limiter {{ resources {{ name: "R" count: {count} }} priority: {priority} }}'


@asynccontextmanager
async def serving(folder: Path, models: dict[str, str], **more: Any) -> AsyncIterator[Gateway]:
    for name, limiter in models.items():
        (folder / "models" / name / "1").mkdir(parents=True)
        text = CONFIG.format(more=limiter, gate=folder / name)
        (folder / "models" / name / "config.pbtxt").write_text(text)
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    async with running(Settings(model_repository=(folder / "models",), cpu_cores=2, **ports, **more)) as gateway:
        await gateway.loaded.wait()
        yield gateway


@asynccontextmanager
async def client(module: ModuleType, gateway: Gateway) -> AsyncIterator[Any]:
    port = gateway.ports["http" if module is http_aio else "grpc"]
    async with module.InferenceServerClient(f"127.0.0.1:{port}") as opened:
        yield opened


def inputs(module: ModuleType) -> list[Any]:
    given = module.InferInput("IN", [1, 2], "FP32")
    given.set_data_from_numpy(np.ones((1, 2), np.float32))
    return [given]


async def executions(gateway: Gateway, model: str) -> int:
    (entry,) = await gateway.service.statistics(model)
    return int(entry["execution_count"])


@pytest.mark.parametrize("module", [http_aio, grpc_aio], ids=["http", "grpc"])
async def test_models_that_need_the_same_run_one_after_the_other(tmp_path: Path, module: ModuleType) -> None:
    models = {"a": NEEDS.format(count=2, priority=1), "b": NEEDS.format(count=1, priority=1), "free": ""}
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(serving(tmp_path, models, rate_limit="execution_count"))
        triton = await stack.enter_async_context(client(module, gateway))
        gates = {name: await stack.enter_async_context(Gate(tmp_path / name)) for name in models}
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        first = tasks.create_task(triton.infer("a", inputs(module)))
        held = await gates["a"].arrival()
        second = tasks.create_task(triton.infer("b", inputs(module)))
        await until(lambda: gateway.service._open == 2)
        third = tasks.create_task(triton.infer("free", inputs(module)))
        (await gates["free"].arrival()).release()  # on the slot that b does not hold while it waits
        assert (await third).as_numpy("OUT").tolist() == [[1, 1]]
        await settle()
        assert not second.done()
        assert not first.done()
        held.release()
        (await gates["b"].arrival()).release()
        assert [(await each).as_numpy("OUT").tolist() for each in (first, second)] == [[[1, 1]]] * 2


async def test_without_rate_limiting_they_run_side_by_side_and_the_operator_is_told(tmp_path: Path) -> None:
    models = {"a": NEEDS.format(count=1, priority=1), "b": NEEDS.format(count=1, priority=1)}
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(serving(tmp_path, models))
        triton = await stack.enter_async_context(client(http_aio, gateway))
        gates = [await stack.enter_async_context(Gate(tmp_path / name)) for name in models]
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        for name in models:
            tasks.create_task(triton.infer(name, inputs(http_aio)))
        for run in [await gate.arrival() for gate in gates]:
            run.release()


@pytest.mark.parametrize("module", [http_aio, grpc_aio], ids=["http", "grpc"])
async def test_turns_are_inverse_to_priorities(tmp_path: Path, module: ModuleType) -> None:
    models = {"first": NEEDS.format(count=1, priority=1), "third": NEEDS.format(count=1, priority=3)}
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(serving(tmp_path, models, rate_limit="execution_count"))
        triton = await stack.enter_async_context(client(module, gateway))
        started = {name: await executions(gateway, name) for name in models}
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        async with Gate(tmp_path / "third") as gate:
            asked = [tasks.create_task(triton.infer("third", inputs(module)))]
            held = await gate.arrival()  # so that all others wait when the turns begin
            asked += [tasks.create_task(triton.infer(name, inputs(module))) for name in models for _ in range(12)]
            await until(lambda: gateway.service._open == 25)
            held.release()
        firsts, thirds = asked[1:13], asked[13:]
        await asyncio.gather(*firsts)
        assert (await executions(gateway, "first")) - started["first"] == 12
        assert sum(task.done() for task in thirds) <= 5
        await asyncio.gather(*thirds)


async def test_a_model_that_could_never_run_is_not_loaded_in_tritons_words(tmp_path: Path) -> None:
    models = {"modest": NEEDS.format(count=1, priority=1), "greedy": NEEDS.format(count=4, priority=1)}
    settings = {"rate_limit": "execution_count", "rate_limit_resource": "R:3", "model_control_mode": "explicit"}
    async with serving(tmp_path, models, **settings) as gateway, client(http_aio, gateway) as triton:
        await triton.load_model("modest")
        with pytest.raises(InferenceServerException) as caught:
            await triton.load_model("greedy")
        assert (
            'Resource count for "R" is limited to 3 which will prevent scheduling of one or more model instances, the minimum '
            "required count is 4"
        ) in caught.value.message()
        assert (await triton.infer("modest", inputs(http_aio))).as_numpy("OUT").tolist() == [[1, 1]]


async def test_sequences_wait_for_resources_too(tmp_path: Path) -> None:
    needs = NEEDS.format(count=1, priority=1)
    (tmp_path / "models").mkdir()
    accumulator(tmp_path / "models", "sums", "direct {}", more=f"instance_group {{ kind: KIND_CPU count: 1 {needs} }}")
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(serving(tmp_path, {"a": needs}, rate_limit="execution_count"))
        triton = await stack.enter_async_context(client(grpc_aio, gateway))
        gate = await stack.enter_async_context(Gate(tmp_path / "a"))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        first = tasks.create_task(triton.infer("a", inputs(grpc_aio)))
        held = await gate.arrival()
        given = grpc_aio.InferInput("IN", [1, 1], "FP32")
        given.set_data_from_numpy(np.full((1, 1), 3, np.float32))
        step = tasks.create_task(triton.infer("sums", [given], sequence_id=7, sequence_start=True))
        await until(lambda: gateway.service._open == 2)
        await settle()
        assert not step.done()
        held.release()
        await first
        assert (await step).as_numpy("OUT").tolist() == [[3]]
        assert (await triton.infer("sums", [given], sequence_id=7)).as_numpy("OUT").tolist() == [[6]]
