"""A chain of engines in real processes: the first link breaks under load and comes back, and nobody goes unanswered."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.process import GatewayProcess, started, write_model

pytestmark = pytest.mark.slow

CALLERS = 16
FLEET = ("--queue", "embedded", "--workers", "2", "--http-workers", "2")


class Load:
    """Callers that ask one after the other, each for its own numbers, and check what comes back."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.answers = 0
        self.wrong: list[str] = []
        self.told: list[tuple[Any, Any]] = []  # link and reason, of each answer in turn

    async def caller(self, client: httpx.AsyncClient, number: int) -> None:
        while True:
            value = [float(number), float(self.answers)]
            body = {"inputs": [{"name": "IN", "shape": [1, 2], "datatype": "FP32", "data": value}]}
            answer = await client.post(self._url, json=body, headers={"x-request-timeout-ms": "5000"})
            self.answers += 1
            if answer.status_code != 200 or answer.json()["outputs"][0]["data"] != value:
                self.wrong.append(f"{answer.status_code} {answer.text}")
            parameters = answer.json().get("parameters", {})
            self.told.append((parameters.get("link"), parameters.get("fallback")))

    async def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Until more answers have come and this is true."""
        seen = self.answers
        for _ in range(1000):
            await asyncio.sleep(0.02)
            if self.answers > seen + CALLERS and (found := condition()):
                return found
        raise AssertionError(f"never: {what}; wrong: {self.wrong[:3]}")

    async def later(self, look: Callable[[], Any], condition: Callable[[Any], bool], what: str) -> Any:
        """What a look at the server gives, once it is so."""
        for _ in range(200):
            if condition(seen := await asyncio.to_thread(look)):
                return seen
            await asyncio.sleep(0.05)
        raise AssertionError(f"never: {what}: {seen}")


@pytest.fixture
def repository() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        yield Path(folder)


def metric(gateway: GatewayProcess, name: str, label: str) -> dict[str, float]:
    """The samples of a metric of the model, by one of its labels."""
    with httpx.Client() as client:
        text = client.get(f"http://127.0.0.1:{gateway.ports['metrics']}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    found = [dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in lines]
    assert {each["model"] for each in found} == {"m"}
    return {labels[label]: float(line.split()[-1]) for labels, line in zip(found, lines, strict=True)}


def ready(gateway: GatewayProcess) -> dict[str, Any]:
    return json.loads(gateway.get("/v2/health/ready"))


@pytest.mark.parametrize(
    ("flags", "isolation", "fault", "reason"),
    [
        pytest.param((), "thread", "lost", "crash", id="threads"),
        # A device that is gone for good is no batch's fault: the process ends, and does not start again.
        pytest.param((), "process", "lost", "unavailable", id="processes"),
        pytest.param(FLEET, "thread", "unavailable", "unavailable", id="fleet"),
    ],
)
async def test_the_first_link_breaks_under_load_and_comes_back(
    repository: Path, flags: tuple[str, ...], isolation: str, fault: str, reason: str
) -> None:
    file = repository / "fault"
    parameters = {"fallback": "fake,fake:spare", "fake.fault_file": str(file), "isolation": isolation}
    write_model(repository / "models", "m", a_us="1000", **parameters)
    with started("--model-repository", str(repository / "models"), *flags) as gateway:
        if flags:
            gateway.wait_for("ready", gateways=2, workers=2)
        else:
            gateway.wait_ready()
        load = Load(gateway.url("/v2/models/m/infer"))
        limits = httpx.Limits(max_connections=CALLERS)
        async with httpx.AsyncClient(timeout=30, limits=limits) as client, asyncio.TaskGroup() as tasks:
            callers = [tasks.create_task(load.caller(client, number)) for number in range(CALLERS)]
            await load.until(lambda: set(load.told) == {(None, None)}, "all is well")
            assert ready(gateway) == {"ready": True}

            file.write_text(fault)
            await load.until(lambda: set(load.told[-CALLERS:]) == {("fake:spare", reason)}, "all on the spare")
            workers = 2 if flags else 1
            told = await load.later(
                lambda: ready(gateway),
                lambda seen: (
                    sum(each["count"] for each in seen.get("degraded", [{}])[0].get("instances", [])) == workers
                ),
                "readiness tells",
            )
            (degraded,) = told["degraded"]
            assert (told["ready"], degraded["model"], degraded["version"]) == (True, "m", "1")
            assert {each["link"] for each in degraded["instances"]} == {"fake:spare"}
            assert all(each["reason"].startswith("not on fake: ") for each in degraded["instances"])
            explained = json.loads(gateway.get("/v2/models/m/explain"))
            assert {each["link"] for each in explained["instances"]} == {"fake:spare"}
            assert metric(gateway, "gateway_instances_degraded", "version") == {"1": workers}
            assert metric(gateway, "gateway_instances", "link") == {"fake:spare": workers}
            assert metric(gateway, "gateway_fallbacks_total", "reason")[reason] >= CALLERS

            file.unlink()
            mended = time.monotonic()
            await load.until(lambda: set(load.told[-CALLERS:]) == {(None, None)}, "all on the first again")
            back = time.monotonic() - mended
            await load.later(lambda: ready(gateway), lambda seen: seen == {"ready": True}, "readiness is well again")
            for caller in callers:
                caller.cancel()
        assert load.wrong == []
        assert back < 10, f"back after {back:.2f} s"
        assert metric(gateway, "gateway_instances_degraded", "version") == {"1": 0}
        assert metric(gateway, "gateway_instances", "link") == {"fake": workers}
        requests = metric(gateway, "gateway_link_requests_total", "link")
        assert set(requests) == {"fake", "fake:spare"}
        assert sum(requests.values()) >= load.answers
        gateway.wait_for("engine_out_of_use", engine="fake")
        gateway.wait_for("engine_back_in_use", engine="fake")
