"""What a worker makes of a chain of engines: what it publishes, counts and answers when another link runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import numpy as np

from gateway import engines, errors
from gateway.artefacts import Artefact
from gateway.engines.base import EngineSpec
from gateway.engines.fallback import FallbackEngine
from gateway.placement import Device, Placement
from gateway.queues.base import InstanceState, PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.queues.redis.announce import pack_holding, read_holding
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.transport.http.control import health
from gateway.transport.instances import instance_metrics
from gateway.types import Batch, BatchResult
from gateway.worker.host import Host, Source
from gateway.worker.running import digest
from gateway.worker.slots import Slots
from tests.support import ask, background, model_config, request, until

CPU = Placement(Device("cpu", "cpu", 4), 1, 1, 4)
WHY = "not on fake: it cannot be reached, or says that it cannot run: the fake model 'm' is not to be reached, as its "


class Rig:
    """A host of a model whose engines are a chain of two fakes, the first of which breaks by a file."""

    def __init__(self, folder: Path, **parameters: str) -> None:
        self.fault = folder / "fault"
        named = {"fallback": "fake,fake:b", "fake.fault_file": str(self.fault)} | parameters
        self.queue = MemoryQueue()
        self.statistics = Statistics()
        self.slots = Slots(DeadlineScheduler({"cpu": 4, "remote": 1 << 16}, max_bytes=1 << 30))
        source = Source(model_config(parameters=named), "1", folder / "1", "x", "files")
        self.host = Host(source, self.queue, self.statistics, self.slots, measures=False, persists=False)
        self.host.changed = self.publish
        self.published: list[str] = []
        self.service = Service(self.queue, self.statistics, self._names, ServiceOptions())
        self.service.start()

    async def _names(self) -> list[str]:
        return ["m"]

    def publish(self) -> None:
        states = (VersionState("1", "READY", "", self.host.source.config, self.host.instances, self.host, 0, "d"),)
        self.queue.publish(PoolState("m", states))
        self.published.append(self.host.instances[0].link)

    async def start(self) -> None:
        await self.host.load([CPU])
        self.publish()


async def test_pools_statistics_answers_and_readiness_tell_what_runs(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.start()
    async with background(rig.host.serve()):
        first = await ask(rig.queue, request(1.0))
        assert (dict(first.parameters), first.digest) == ({}, rig.host.digest)
        assert health(rig.service, "ready")[2] == b'{"ready":true}'
        rig.fault.write_text("unavailable")
        second = await ask(rig.queue, request(2.0))
        assert second.outputs["OUT"].array.tolist() == [[2.0, 2.0]]
        assert second.parameters == {"engine": "Fake", "link": "fake:b", "fallback": "unavailable"}
        assert second.digest == ""  # not to be kept for later requests
        assert rig.host.instances == (InstanceState("cpu", "Fake", "", "", "fake:b", WHY + "fault_file says"),)
        assert b'"degraded":[{"model":"m","version":"1","instances":[{"device":"cpu"' in health(rig.service, "ready")[2]
        _, degraded = instance_metrics(rig.queue.pools())
        assert degraded.samples == [({"model": "m", "version": "1"}, 1)]
        rig.host.report()
        counted = rig.statistics.of("m", "1")
        assert (counted.links, counted.fallbacks) == ({"fake": 1, "fake:b": 1}, {"unavailable": 1})
        rig.fault.unlink()
        await until(lambda: rig.published[-1] == "fake")
        assert (await ask(rig.queue, request(3.0))).digest == rig.host.digest
        assert rig.published == ["fake", "fake:b", "fake"]
        await rig.host.retire()
    assert counted.links == {"fake": 2, "fake:b": 1}
    merged = Statistics.merge([rig.statistics.snapshot(), rig.statistics.snapshot()]).of("m", "1")
    assert (merged.links, merged.fallbacks) == ({"fake": 4, "fake:b": 2}, {"unavailable": 2})


async def test_what_was_learned_of_two_engines_is_not_kept_for_the_next_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.start()
    async with background(rig.host.serve()):
        for number in range(5):
            await ask(rig.queue, request(float(number)))
        assert rig.host._learned()
        rig.fault.write_text("unavailable")
        await ask(rig.queue, request(6.0))
        assert rig.host._learned() == {}
        await rig.host.retire()


class Wide:
    """An engine that may run so many batches at once, and holds them until told."""

    provider, artefact, warnings, widest, ahead, contained = "Wide", None, (), 1, False, True

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.running = 0
        self.go = asyncio.Event()

    async def run(self, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        self.running += 1
        array = batch.stack()["IN"]
        if batch.rows == 8:
            await self.go.wait()
        self.running -= 1
        yield BatchResult({"OUT": array}, 0, 0, 0)

    async def close(self) -> None:
        """Nothing to close."""


async def test_a_link_that_comes_back_gets_as_many_runs_at_once_as_it_can_have(tmp_path: Path, monkeypatch) -> None:
    remote, there = Wide(3), asyncio.Event()

    async def start(spec: EngineSpec, count: int):
        if spec.config.parameters.get("wide"):
            if not there.is_set():
                raise OSError("no route to host")
            return [remote]
        return [Wide(1)]

    monkeypatch.setattr(engines, "_start", start)
    rig = Rig(tmp_path, **{"fake.wide": "1"})
    await rig.start()
    async with background(rig.host.serve()):
        assert rig.host.instances[0].reason == "not on fake: it does not load: no route to host"
        there.set()
        await until(lambda: rig.published[-1] == "fake")
        calls = [ask(rig.queue, request(float(number), rows=8)) for number in range(3)]
        async with background(*calls) as asked:
            await until(lambda: remote.running == 3)
            remote.go.set()
            answers = await asyncio.gather(*asked)
        assert sorted(each.outputs["OUT"].array[0, 0] for each in answers) == [0.0, 1.0, 2.0]
        await rig.host.retire()


async def test_an_instance_takes_the_slots_of_the_device_that_its_link_runs_on(tmp_path: Path, monkeypatch) -> None:
    """When a server or a GPU is gone, its work competes for the cores of the CPU, and no more when it is back."""
    away, remote, started = asyncio.Event(), Wide(3), engines._start

    class Remote(Wide):
        async def run(self, batch: Batch) -> AsyncGenerator[BatchResult, None]:
            if away.is_set():
                raise errors.Unavailable("the link is cut")
            async with aclosing(remote.run(batch)) as results:
                async for result in results:
                    yield result

    async def start(spec: EngineSpec, count: int):
        return [Remote(3)] if spec.config.backend == "remote" else await started(spec, count)

    monkeypatch.setattr(engines, "_start", start)
    rig = Rig(tmp_path, fallback="remote,fake")
    await rig.start()
    remote.go.set()

    def places() -> list[tuple[str, int]]:
        return [(place.device, place.count) for place in rig.host._places]

    async with background(rig.host.serve()):
        assert (rig.host.instances[0].device, places()) == ("remote", [("remote", 3)])
        await ask(rig.queue, request(1.0))
        away.set()
        answer = await ask(rig.queue, request(2.0))
        assert answer.parameters["link"] == "fake"
        assert (rig.host.instances[0].device, places()) == ("cpu", [("cpu", 1)])
        for number in range(5):  # idle seats have moved with it
            assert (await ask(rig.queue, request(float(number)))).parameters["link"] == "fake"
        assert rig.host.explain(0.0)["devices"]["cpu"]["batches_seen"] >= 5
        away.clear()
        await until(lambda: rig.published[-1] == "remote")
        assert (rig.host.instances[0].device, places()) == ("remote", [("remote", 3)])
        remote.go.clear()
        async with background(*(ask(rig.queue, request(float(n), rows=8)) for n in range(3))) as asked:
            await until(lambda: remote.running == 3)
            away.set()  # while all its runs are busy
            remote.go.set()
            assert [dict(each.parameters) for each in await asyncio.gather(*asked)] == [{}] * 3
        assert (await ask(rig.queue, request(9.0))).parameters["link"] == "fake"
        await rig.host.retire()


def test_what_runs_travels_between_processes() -> None:
    instances = (
        InstanceState("cpu", "Fake", "FP32", "fp32", "b", "not on a: it is gone"),
        InstanceState("cpu", "Fake"),
    )
    pool = PoolState("m", (VersionState("1", "READY", instances=instances),))
    pools, _ = read_holding(pack_holding([pool], []))
    assert pools["m"].versions[0].instances == instances


async def test_a_chain_computes_what_its_first_link_does() -> None:
    """So that what is cached stays valid while another link runs, whose answers are not cached."""
    made = Artefact("int8", "x", "fake", "INT8", sha256="abc", device="cpu:x")
    spec = EngineSpec(model_config(parameters={"fallback": "fake,fake:b"}), "1", Path("m/1"), "cpu")
    (chain,) = await engines.create(spec)
    (plain,) = await engines.create(EngineSpec(model_config(), "1", Path("m/1"), "cpu", artefact=made))
    assert isinstance(chain, FallbackEngine)
    assert digest("files", [chain]) == digest("files", [chain, chain]) != ""
    assert digest("files", [plain]) not in ("", digest("files", [chain]))
    assert digest("files", [plain, chain]) == digest("", [chain]) == ""
    async with aclosing(chain.run(Batch(1, lambda: {"IN": np.ones((1, 2), "<f4")}))) as results:
        assert [result.parameters async for result in results] == [None]
    for engine in (chain, plain):
        await engine.close()
