"""What a fleet does when its parts die: each fault under load, with the history of every request checked.

    python -m loadtest.fleet_faults [--json FILE] [FAULT ...]

Prints a line for each fault: requests, errors, what must not happen and did, the slowest answer, and how long nothing was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtest.fault_proxy import FaultProxy
from loadtest.fleet import Fleet
from loadtest.history import Verdict
from loadtest.record import machine

_LOAD = {"rate": 150, "deadline_ms": 8000}
_SLOW = {"base_us": 15000.0}  # so that batches are under way when something dies


def worker_killed() -> tuple[Verdict, str]:
    """kill -9 of one worker of two."""
    with _fleet(2, 1) as fleet, fleet.client(**_LOAD) as client:
        time.sleep(2)
        fleet.workers[0].kill()
        time.sleep(5)
    return client.verdict, ""


def worker_stopped() -> tuple[Verdict, str]:
    """SIGTERM of one worker of two."""
    with _fleet(2, 1) as fleet, fleet.client(**_LOAD) as client:
        time.sleep(2)
        fleet.workers[0].stop()
        time.sleep(2)
    return client.verdict, ""


def worker_frozen() -> tuple[Verdict, str]:
    """SIGSTOP of one worker of two for 6 s: dead to the others, and back again."""
    with _fleet(2, 1) as fleet, fleet.client(**_LOAD) as client:
        time.sleep(2)
        fleet.workers[0].send(signal.SIGSTOP)
        time.sleep(6)
        fleet.workers[0].send(signal.SIGCONT)
        time.sleep(3)
    return client.verdict, ""


def gateway_stopped() -> tuple[Verdict, str]:
    """SIGTERM of one gateway of two; the client goes to the other one when it is told to."""
    with _fleet(1, 2) as fleet, fleet.client(**_LOAD, retries=3) as client:
        time.sleep(2)
        fleet.gateways[0].stop()
        time.sleep(2)
    return client.verdict, ""


def gateway_killed() -> tuple[Verdict, str]:
    """kill -9 of one gateway of two with many requests in flight; the other one's client must not notice."""
    with _fleet(1, 2, base_us=100_000.0, rows=4) as fleet:
        first, second = fleet.ports
        with fleet.client(rate=20, deadline_ms=30_000, ports=[second.http]) as calm:
            with fleet.client(requests=1000, rate=2000, concurrency=1000, ports=[first.http]):
                time.sleep(2)
                fleet.gateways[0].kill()
                time.sleep(5)
            left = _entries(fleet)
            time.sleep(12)
            replies = fleet.ask("KEYS", "lockgate:r:*")  # a test may look; the gateway never does
    return calm.verdict, f"entries left {left}, reply streams {len(replies)}"


def redis_restarted() -> tuple[Verdict, str]:
    """kill -9 of Redis and a start from its append-only file."""
    with _fleet(2, 1, aof=True) as fleet, fleet.client(**_LOAD) as client:
        time.sleep(2)
        fleet.redis.kill()
        time.sleep(1)
        fleet.start_redis()
        time.sleep(4)
    return client.verdict, ""


def redis_emptied() -> tuple[Verdict, str]:
    """kill -9 of Redis and a start with nothing."""
    with _fleet(2, 1) as fleet, fleet.client(**_LOAD) as client:
        time.sleep(2)
        fleet.redis.kill()
        time.sleep(1)
        fleet.start_redis()
        time.sleep(4)
    return client.verdict, ""


def redis_frozen() -> tuple[Verdict, str]:
    """SIGSTOP of Redis for 10 s; deadlines are shorter than that."""
    with _fleet(2, 1) as fleet, fleet.client(rate=150, deadline_ms=3000) as client:
        time.sleep(2)
        fleet.redis.send(signal.SIGSTOP)
        time.sleep(10)
        fleet.redis.send(signal.SIGCONT)
        time.sleep(5)
    return client.verdict, ""


def redis_cut() -> tuple[Verdict, str]:
    """Replies of Redis are held back for 5 s."""
    with _proxied() as (fleet, proxy, call), fleet.client(rate=150, deadline_ms=3000) as client:
        time.sleep(2)
        call(lambda: setattr(proxy.down, "paused", True))
        time.sleep(5)
        call(lambda: setattr(proxy.down, "paused", False))
        time.sleep(5)
    return client.verdict, ""


def redis_flaky() -> tuple[Verdict, str]:
    """200 ms to Redis, and one connection in twenty breaks each second."""
    with _proxied() as (fleet, proxy, call), fleet.client(rate=50, deadline_ms=8000) as client:
        call(lambda: setattr(proxy.up, "latency", 0.2))
        for _ in range(8):
            time.sleep(1)
            call(proxy.reset)
        call(lambda: setattr(proxy.up, "latency", 0.0))
        time.sleep(5)
    return client.verdict, ""


def redis_full() -> tuple[Verdict, str]:
    """maxmemory is reached, and there is room again after 4 s."""
    with _fleet(2, 1) as fleet, fleet.client(rate=150, deadline_ms=3000) as client:
        time.sleep(2)
        fleet.ask("CONFIG", "SET", "maxmemory", 1)
        time.sleep(4)
        fleet.ask("CONFIG", "SET", "maxmemory", 0)
        time.sleep(5)
    return client.verdict, ""


FAULTS: dict[str, Callable[[], tuple[Verdict, str]]] = {
    each.__name__: each
    for each in (
        worker_killed, worker_stopped, worker_frozen, gateway_stopped, gateway_killed, redis_restarted, redis_emptied,
        redis_frozen, redis_cut, redis_flaky, redis_full,
    )
}  # fmt: skip


@contextmanager
def _fleet(workers: int, gateways: int, *, aof: bool = False, **model: Any) -> Iterator[Fleet]:
    with Fleet(aof=aof, model=_SLOW | model) as fleet:
        yield _begun(fleet, workers, gateways)


def _begun(fleet: Fleet, workers: int, gateways: int) -> Fleet:
    for _ in range(workers):
        fleet.add_worker()
    for _ in range(gateways):
        fleet.add_gateway()
    fleet.ready()
    return fleet


@contextmanager
def _proxied() -> Iterator[tuple[Fleet, FaultProxy, Callable[[Callable[[], object]], None]]]:
    """A fleet whose way to Redis is a proxy, on a thread of its own, and what calls something there."""
    with Fleet(model=_SLOW) as fleet:
        started = threading.Event()
        shared: dict[str, Any] = {}

        async def run() -> None:
            async with FaultProxy(str(fleet.socket)) as proxy:
                shared.update(proxy=proxy, loop=asyncio.get_running_loop(), stop=asyncio.Event())
                started.set()
                await shared["stop"].wait()

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        started.wait()
        try:
            fleet.via = f"redis://{shared['proxy'].address}"
            yield _begun(fleet, 2, 1), shared["proxy"], shared["loop"].call_soon_threadsafe
            for process in (*fleet.gateways, *fleet.workers):
                process.stop()
        finally:
            shared["loop"].call_soon_threadsafe(shared["stop"].set)
            thread.join()


def _entries(fleet: Fleet) -> int:
    """Requests in the streams of the model."""
    return sum(fleet.ask("XLEN", f"lockgate:q:{{fleet/1}}:{klass}") for klass in (1, 2, 3))


def main() -> int:
    """Run the faults that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], default=[])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    bad = 0
    for name in given.faults or FAULTS:
        verdict, remark = FAULTS[name]()
        faults = verdict.faults()
        bad += bool(faults)
        print(f"{name}: {(FAULTS[name].__doc__ or '').strip()}\n{verdict}\n{remark}\n", flush=True)
        found[name] = {
            "requests": verdict.requests,
            "statuses": dict(verdict.statuses),
            "errors": dict(verdict.errors),
            "faults": faults,
            "late_share": verdict.late_share,
            "slowest_s": verdict.slowest,
            "gap_s": verdict.gap,
            "remark": remark,
        }
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine(), "faults": found}, indent=1))
    return bad


if __name__ == "__main__":
    sys.exit(main())
