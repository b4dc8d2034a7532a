"""A fleet to be hurt: a proxy on its way to Redis, healing between one fault and the next, and what is measured of each.

Used by `loadtest.fleet_faults` and by the tests in tests/system.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from loadtest.fault_proxy import FaultProxy
from loadtest.fleet import Client, Fleet, FleetError, Process, Resources, wait_until
from loadtest.fleet_client import write_model
from loadtest.history import History, Verdict

LARGE = "large"  # a model for tensors of any size
SLOW = "slow"  # a model that 80 requests a second are too many for
RECOVERY = 2.0  # seconds after Redis has returned in which everything must be as before
LATE_SHARE = 0.01
_GROWTH, _SLACK = 0.03, 8 << 20  # of resident memory: a share of it, and bytes
_QUIET = 5.0  # seconds in which what was used is given back


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things last, in seconds, and how much is sent."""

    before: float = 2.0  # of load until the fault
    after: float = 5.0  # of load from its end
    frozen: float = 10.0  # Redis stands still
    cut: float = 5.0  # the network does
    rate: int = 150  # requests a second
    flood: int = 1000  # requests in flight
    timed: bool = True  # whether it is judged how quickly things go


SHORT = Pace(before=0.5, after=2.0, frozen=2.5, cut=2.5, rate=100, flood=200, timed=False)


@dataclass(slots=True)
class Outcome:
    """What came of a fault. `broken` are promises, and empty when all is well."""

    pace: Pace = field(default_factory=Pace)
    verdict: Verdict = field(default_factory=Verdict)
    history: History | None = None
    ended: float = math.inf  # when the fault was over, by the monotonic clock
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def require(self, kept: object, promise: str) -> None:
        """Note a promise that was not kept."""
        if not kept:
            self.broken.append(promise)

    def within(self, took: float, limit: float, what: str) -> None:
        """Note what took too many seconds; a machine that is not to be trusted has five times as long."""
        self.require(took <= limit * (1 if self.pace.timed else 5), f"{what} within {limit:g} s, not {took:.2f} s")

    def judge(self, *, errors: Collection[int] = (), recovery: float = math.inf, lost: int = 0) -> Self:
        """See what the history shows. Other statuses than 200 are allowed until `recovery` seconds after the fault."""
        verdict = self.verdict
        self.broken += verdict.faults(lost=lost)
        bad = {status: count for status, count in verdict.statuses.items() if status != 200}
        self.require(bad.keys() <= set(errors), f"answers other than results and {errors}: {bad}")
        if math.isfinite(self.ended):
            took = self.recovery()
            self.figures["recovery_s"] = round(took, 3)
            self.require(
                took <= recovery, f"as before {took:.2f} s after the fault, at most {recovery:g} s it may take"
            )
        return self

    def recovery(self) -> float:
        """Seconds from the end of the fault to the first good answer, and to the last request that failed."""
        records = [] if self.history is None else self.history.records
        good = [each.received for each in records if each.status == 200 and each.received is not None]
        first = min((received for received in good if received >= self.ended), default=math.inf)
        failed = [each.sent for each in records if each.sent >= self.ended and each.status != 200]
        return max(first, *failed, self.ended) - self.ended


class Rig:
    """Workers and gateways that reach Redis through a proxy, on a thread of its own. A context manager."""

    def __init__(
        self, workers: int = 2, gateways: int = 1, *, aof: bool = True, flags: Sequence[str] = (), **model: Any
    ) -> None:
        """`flags` are for gateways and workers; `model` is how the model behaves that `load` asks."""
        model = {"base_us": 15_000.0} | model
        self.base_seconds = model["base_us"] / 1e6  # of a batch
        self.fleet = Fleet(aof=aof, model=model)
        self.flags = flags
        self._workers = workers
        self._gateways = gateways
        self._stack = ExitStack()
        self._loop: asyncio.AbstractEventLoop
        self.proxy: FaultProxy

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.fleet)
            stack.enter_context(self._proxied())
            self.fleet.via = f"redis://{self.proxy.address}"
            write_model(self.fleet.models, LARGE, dims=-1)
            write_model(self.fleet.models, SLOW, base_us=50_000, rows=2)
            stack.callback(self._stop_processes)  # before the proxy: they say good-bye through it
            for _ in range(self._workers):
                self.fleet.add_worker(*self.flags)
            for _ in range(self._gateways):
                self.fleet.add_gateway(*self.flags)
            self.fleet.ready()
            # All the connections, and what a request takes of memory, once before anything is measured.
            with self.fleet.client(requests=1000, concurrency=512):
                pass
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def call(self, change: Callable[[], object]) -> None:
        """Do something to the proxy, and wait until it is done."""
        done = threading.Event()

        def run() -> None:
            try:
                change()
            finally:
                done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait()

    def heal(self) -> None:
        """Everything lives, knows the others, and has nothing to do."""
        if not self.fleet.redis.alive:
            self.fleet.start_redis()
        for process in (*self.fleet.workers, *self.fleet.gateways):
            if not process.alive:
                process.start()
        self.fleet.ready()
        wait_until(lambda: not self.fleet.entries(), "the streams are empty")

    def payloads(self, *, spare: bool = True) -> list[str]:
        """The files in shared memory of the fleet's processes, with those kept some seconds for what comes next."""
        pids = {str(process.pid) for process in (*self.fleet.workers, *self.fleet.gateways)}
        found = [path.name for path in Path("/dev/shm").glob("lockgate-*.*")]
        return [name for name in found if name.split(".")[1] in pids and (spare or ".spare." not in name)]

    def empty_redis(self) -> None:
        """Kill Redis, and start it with nothing."""
        self.fleet.redis.kill()
        for kept in self.fleet.folder.glob("appendonly*"):
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink()

    @contextmanager
    def load(self, pace: Pace, **plan: Any) -> Iterator[tuple[Client, Outcome]]:
        """Load while the block runs, which says in the outcome when the fault is `ended`; and the verdict on it."""
        outcome = Outcome(pace)
        with self.fleet.client(**({"rate": pace.rate, "deadline_ms": 8000, "concurrency": 512} | plan)) as client:
            yield client, outcome
        outcome.verdict, outcome.history = client.verdict, client.history
        outcome.figures |= {
            "requests": client.verdict.requests,
            "statuses": {str(status): count for status, count in sorted(client.verdict.statuses.items())},
            "doubles": len(client.verdict.twice),
            "wrong": len(client.verdict.wrong),
            "slowest_s": round(client.verdict.slowest, 3),
            "gap_s": round(client.verdict.gap, 3),
            "late_share": round(client.verdict.late_share, 5),
        }

    def _stop_processes(self) -> None:
        for process in (*self.fleet.gateways, *self.fleet.workers):
            process.stop()

    @contextmanager
    def _proxied(self) -> Iterator[None]:
        started = threading.Event()
        shared: dict[str, Any] = {}

        async def run() -> None:
            async with FaultProxy(str(self.fleet.socket)) as self.proxy:
                self._loop, shared["stop"] = asyncio.get_running_loop(), asyncio.Event()
                started.set()
                await shared["stop"].wait()

        thread = threading.Thread(target=lambda: asyncio.run(run()), name="proxy")
        thread.start()
        started.wait()
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(shared["stop"].set)
            thread.join()


class Watched:
    """What processes used before a fault and what they use once it is over and they are quiet."""

    def __init__(self, processes: Sequence[Process]) -> None:
        for process in processes:
            process.resources()  # the first scrape opens what the next ones use
        self._before = {process: (process.pid, process.resources()) for process in processes}

    def settle(self, outcome: Outcome) -> None:
        """Wait until it is as before, and note where it does not come to be."""
        with suppress(FleetError):
            wait_until(lambda: not self._grown(), "as before", _QUIET)
        grown = self._grown()
        outcome.broken += grown if outcome.pace.timed else []
        outcome.figures["tasks"] = {
            process.log.stem: f"{before.tasks} -> {process.resources().tasks}" for process, before in self._alive()
        }
        outcome.figures["growth_mb"] = {
            process.log.stem: round((process.resources().memory - before.memory) / 2**20, 1)
            for process, before in self._alive()
        }

    def _grown(self) -> list[str]:
        found = []
        for process, before in self._alive():
            now = process.resources()
            name = process.log.stem
            if now.memory > before.memory * (1 + _GROWTH) + _SLACK:
                found.append(f"{name} has {(now.memory - before.memory) / 2**20:.1f} MiB more than before")
            if now.descriptors > before.descriptors:
                kinds = process.descriptors()
                found.append(f"{name} has {now.descriptors} descriptors and had {before.descriptors}: {kinds}")
            if now.threads > before.threads:
                found.append(f"{name} has {now.threads} threads and had {before.threads}")
            if now.tasks > before.tasks:
                found.append(f"{name} has {now.tasks} tasks and had {before.tasks}")
        return found

    def _alive(self) -> list[tuple[Process, Resources]]:
        return [
            (process, before)
            for process, (pid, before) in self._before.items()
            if process.pid == pid and psutil.pid_exists(pid)
        ]


def sleep_until(moment: float) -> None:
    """By the monotonic clock."""
    time.sleep(max(0.0, moment - time.monotonic()))
