"""Two gateways and two workers on a real Redis: whoever is asked tells the same of what all have done."""

import asyncio
import functools
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict

import pytest

from gateway import engines
from gateway.devices.cpu import CpuMeter
from gateway.devices.fake_nvml import FakeGpu, FakeNvml
from gateway.devices.monitor import Monitor
from gateway.devices.nvml import open_nvml
from gateway.placement import Device
from gateway.queues.base import Capacity, Lane, Load
from gateway.queues.figures import LaneFigures
from gateway.queues.redis.figures import look
from gateway.redis_client import RedisClient, RedisOptions
from gateway.repository import Repository
from gateway.service import Service
from gateway.service.reports import QUESTION as EXPLAIN
from gateway.service.reports import WorkerReports
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.statistics.fleet import QUESTION, FleetStatistics
from gateway.transport.device_metrics import DeviceMetrics
from gateway.transport.explanation import explanation, merged
from gateway.transport.metrics import MetricsApp, Own
from gateway.worker import Worker
from tests.api.test_metrics import get as scrape
from tests.redis_support import fleet_queue, options
from tests.support import background, request, until

pytestmark = pytest.mark.slow

CONFIG = """
backend: "fake"
max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: 2 }
output { name: "OUT" data_type: TYPE_FP32 dims: 2 }
instance_group { kind: KIND_CPU count: 1 }
dynamic_batching {}
"""


class Process:
    """One process of the fleet, as `app.py` puts it together."""

    def __init__(self, queue, role, folder):
        self.queue = queue
        self.statistics = Statistics()
        self.statistics.refreshers.append(lambda: self.statistics.totals.update(asdict(queue.counts)))
        self.fleet = FleetStatistics(
            self.statistics, queue.process, queue.ask, redis=queue._client, key=queue._client.keys.stats
        )
        queue.answers[QUESTION] = lambda _: self.fleet.answer()
        if role == "worker":
            read = Repository([folder], engines.describe).read
            self.worker = Worker(queue, read, [Device("cpu", "cpu", 2)], self.statistics)
            queue.answers[EXPLAIN] = functools.partial(self.worker.explain, queue.process)
        else:
            self.service = Service(
                queue,
                self.statistics,
                self.names,
                ServiceOptions(explicit_control=True),
                fleet=self.fleet,
                reports=WorkerReports(queue.ask),
            )

    async def names(self):
        return ["m"]

    async def infer(self, **more):
        async with aclosing(self.service.infer(request(**more))) as responses:
            return [response async for response in responses]

    async def stats(self):
        """Requests answered, and rows of the batches that ran."""
        (entry,) = await self.service.statistics("m")
        rows = sum(batch["batch_size"] * batch["compute_infer"]["count"] for batch in entry["batch_stats"])
        return entry["inference_stats"]["success"]["count"], rows


@asynccontextmanager
async def process(of: RedisOptions, role, folder=None):
    async with fleet_queue(of, role) as queue:
        made = Process(queue, role, folder)
        async with made.fleet:
            if role == "worker":
                async with background(made.worker.run()):
                    yield made
                    await made.worker.drain()
            else:
                yield made


async def holds(gateway, workers):
    """Wait until the gateway knows that so many workers serve the model."""

    def serve():
        pool = gateway.queue.pool("m")
        return pool is not None and [len(state.instances) for state in pool.versions] == [workers]

    await until(serve)


@pytest.fixture
async def fleet(redis_url, tmp_path):
    """The options, the folder, two gateways, and two workers that hold `m`."""
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "config.pbtxt").write_text(CONFIG)
    of = options(redis_url)
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(process(of, "gateway")) for _ in range(2)]
        workers = [await stack.enter_async_context(process(of, "worker", tmp_path)) for _ in range(2)]
        await until(lambda: all(len(gateway.queue._directory.workers()) == 2 for gateway in gateways))
        await gateways[0].queue.send(Load("m"))
        for gateway in gateways:
            await holds(gateway, 2)
        yield of, tmp_path, gateways, workers


async def test_every_gateway_tells_the_sum_until_the_model_is_unloaded(fleet):
    of, folder, gateways, _ = fleet
    await asyncio.gather(*(gateway.infer(rows=rows) for gateway in gateways for rows in (1, 2, 3)))
    assert [await gateway.stats() for gateway in gateways] == [(6, 12)] * 2
    async with process(of, "gateway") as third:
        await holds(third, 2)
        await third.infer()
        assert await third.stats() == (7, 13)
    async with process(of, "worker", folder):  # the third gateway has gone, another process has come
        assert [await gateway.stats() for gateway in gateways] == [(7, 13)] * 2
        await gateways[0].service.unload("m")
        await gateways[1].service.load("m", {})
        for gateway in gateways:
            await holds(gateway, 3)
        assert [await gateway.stats() for gateway in gateways] == [(0, 0)] * 2
        await asyncio.gather(*(gateway.infer() for gateway in gateways))
        assert [await gateway.stats() for gateway in gateways] == [(2, 2)] * 2
    assert [await gateway.stats() for gateway in gateways] == [(2, 2)] * 2


async def test_metrics_and_explanations_are_of_the_whole_fleet(fleet):
    _, _, gateways, workers = fleet
    await asyncio.gather(*(gateway.infer() for gateway in gateways))
    for gateway in gateways:
        text = (await scrape(MetricsApp(gateway.fleet, process=gateway.queue.process))).body.decode()
        assert '\nnv_inference_request_success{model="m",version="1"} 2\n' in text
        assert '\ngateway_predictions_trusted{model="m",version="1"} 1\n' in text
        assert "\ngateway_resubmitted_total 0\n" in text
        told = merged(await gateway.service.explain("m"))
        assert told["workers"] == sorted(worker.queue.process for worker in workers)
        assert (told["answered"], sum(told["closed"].values()), len(told["devices"])) == (2, told["batches"], 2)
        assert explanation(told).startswith("model m, version 1\n  2 x cpu Fake\nworkers that answered: 2\n")


async def test_figures_of_devices_are_of_one_machine_and_in_no_sum(fleet):
    _, _, gateways, _ = fleet
    texts = []
    for gateway in gateways:  # on one machine, each of which sees all of its GPUs
        nvml = open_nvml(FakeNvml(FakeGpu("GPU-a", utilization=50), FakeGpu("GPU-b")))
        async with Monitor(nvml).running() as monitor:
            own = Own(DeviceMetrics(monitor, CpuMeter()))
            texts.append((await scrape(MetricsApp(gateway.fleet, process="p", own=own))).body.decode())
    total = CpuMeter().read().memory_total
    for text in texts:
        assert text.count('\nnv_gpu_utilization{gpu_uuid="GPU-a"} 0.5\n') == 1
        assert text.count("\nnv_gpu_utilization{") == 2
        assert text.count(f"\nnv_cpu_memory_total_bytes {total}\n") == 1


async def test_the_figures_of_a_lane(redis_url):
    of, lane = options(redis_url), Lane("m", "1")
    known = {lane: [Capacity(0.01, 0.001, 1.2, 10, 2), None], Lane("m", "2"): []}
    async with fleet_queue(of, "gateway") as gateway, fleet_queue(of, "worker") as worker:
        client = gateway._client
        assert (await look(client, {lane: []})).lanes == {lane: LaneFigures()}
        async with background(*(submitted(gateway, lane) for _ in range(3))):
            consumer = worker.consumer([lane], 2)
            jobs = await consumer.take(2)
            while (figures := await look(client, known)).lanes[lane].lag + len(jobs) < 3:
                jobs += await consumer.take(2) if len(jobs) < 2 else []
            assert figures.connected
            assert figures.lanes[lane].pending == len(jobs) == 2
            # 20 rows in 20 ms by one worker, and the other is taken to be like it
            assert (figures.lanes[lane].lag, figures.lanes[lane].workers) == (1, 2)
            assert figures.lanes[lane].rows_per_second == pytest.approx(2000.0)
            assert figures.lanes[Lane("m", "2")] == LaneFigures()


async def submitted(queue, lane):
    async with aclosing(queue.submit(lane, request())) as answers:
        async for _ in answers:
            pass


async def test_figures_while_redis_is_away(redis_url):
    async with RedisClient(options(redis_url)) as client:
        pass
    figures = await look(client, {Lane("m", "1"): [None]})
    assert (figures.connected, figures.lanes) == (False, {})
