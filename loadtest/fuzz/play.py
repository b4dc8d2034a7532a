"""Starts a gateway on an empty repository of its own and plays a plan on it."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench import servers
from loadtest.fuzz.report import complaints
from loadtest.fuzz.session import Session, Tally
from loadtest.fuzz.wires import Ports, Wires


@dataclass(frozen=True, slots=True)
class Plan:
    """So many requests with a seed, or the models of these `numbers`, each once; `flags` are for the gateway.

    `per_model` are the good requests to each model.
    """

    seed: int
    requests: int
    numbers: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()
    per_model: int = 24


def play(plan: Plan, gateway: Sequence[str] = (sys.executable, "-m", "gateway")) -> tuple[Tally, list[str]]:
    """What came of a plan, and what the gateway's log complains of. Raises `servers.ServerError`."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        http, grpc, metrics = servers.free_ports(3)
        line = [
            *gateway,
            "serve",
            "--model-repository",
            folder,
            "--model-control-mode",
            "explicit",
            "--log-format",
            "json",
        ]
        line += ["--allow-client-shm", "true", "--persist-latency", "false", *plan.flags]
        line += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
        with servers.Server(line, lambda: servers.get(http, "/v2/health/ready")[0] == 200) as server:
            tally = asyncio.run(_play(plan, Ports(http, grpc), Path(folder)))
            return tally, complaints(server.log_tail(1 << 30), tally.failing)


async def _play(plan: Plan, ports: Ports, repository: Path) -> Tally:
    async with Wires(ports) as wires:
        session = Session(wires, repository)
        for number in plan.numbers:
            await session.play(plan.seed, number, plan.per_model)
        number = 0
        while not plan.numbers and session.tally.requests < plan.requests:
            await session.play(plan.seed, number, plan.per_model)
            number += 1
        return session.tally
