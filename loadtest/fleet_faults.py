"""What a fleet does when its parts die: each fault under load, with the history of every request checked.

    python -m loadtest.fleet_faults [--json FILE] [FAULT ...]

Prints a line for each fault: what became of the requests, how long until all was as before, and what must not happen and did.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.bench import servers
from loadtest.fleet import wait_until
from loadtest.fleet_client import MODEL
from loadtest.fleet_rig import LARGE, LATE_SHARE, RECOVERY, SLOW, Outcome, Pace, Rig, Watched
from loadtest.fleet_storm import rage
from loadtest.record import machine

POISON = 13
_REFUSALS = (429, 503, 504)

Scenario = Callable[[Rig, Pace], Outcome]


@dataclass(frozen=True, slots=True)
class Fault:
    """A scenario, and the fleet it needs."""

    run: Scenario
    rig: dict[str, Any]


FAULTS: dict[str, Fault] = {}


def fault(**rig: Any) -> Callable[[Scenario], Scenario]:
    """Put a scenario into the list; `rig` are arguments of `Rig`."""

    def add(scenario: Scenario) -> Scenario:
        FAULTS[scenario.__name__] = Fault(scenario, rig)
        return scenario

    return add


# --- workers


@fault()
def nothing(rig: Rig, pace: Pace) -> Outcome:
    """No fault at all: nobody is late, and the statistics count what the client has seen."""
    ports = rig.fleet.ports[0]
    before = servers.success_count(ports.http, MODEL)
    with rig.load(pace) as (_, outcome):
        time.sleep(pace.before + pace.after)
    outcome.judge().require(outcome.verdict.late_share <= LATE_SHARE, "at most 1 % of the accepted are late")
    counted = servers.success_count(ports.http, MODEL) - before
    answered = outcome.verdict.statuses[200]
    outcome.require(counted == answered, f"the statistics count {counted} answers, the client has seen {answered}")
    return outcome


@fault()
def worker_killed(rig: Rig, pace: Pace) -> Outcome:
    """kill -9 of one worker of two."""
    return _worker_dies(rig, pace, rig.fleet.workers[0].kill)


@fault(base_us=100_000.0)
def worker_killed_in_a_batch(rig: Rig, pace: Pace) -> Outcome:
    """kill -9 of one worker of two, both of which run batches all the time."""
    return _worker_dies(rig, pace, rig.fleet.workers[0].kill, rate=60, deadline_ms=20_000)


@fault(base_us=400_000.0, isolation="process")
def worker_killed_in_long_runs(rig: Rig, pace: Pace) -> Outcome:
    """kill -9 of one worker of two, both of which run batches of 0.4 s all the time, as models do by default: in child
    processes."""
    return _worker_dies(rig, pace, rig.fleet.workers[0].kill, rate=60, deadline_ms=20_000)


@fault()
def worker_stopped(rig: Rig, pace: Pace) -> Outcome:
    """SIGTERM of one worker of two."""
    return _worker_dies(rig, pace, lambda: rig.fleet.workers[0].stop())  # noqa: PLW0108 - its result


@fault()
def worker_frozen(rig: Rig, pace: Pace) -> Outcome:
    """SIGSTOP of one worker of two for 6 s: dead to the others, and back again."""
    worker = rig.fleet.workers[0]

    def freeze() -> None:
        worker.send(signal.SIGSTOP)
        time.sleep(6)
        worker.send(signal.SIGCONT)

    return _worker_dies(rig, pace, freeze)


@fault()
def worker_dies_reading(rig: Rig, pace: Pace) -> Outcome:
    """A third worker dies with the first requests it is given."""
    return _third_dies(rig, pace, "dies_reading")


@fault()
def worker_dies_unacknowledged(rig: Rig, pace: Pace) -> Outcome:
    """A third worker dies when its answer is stored and the request not yet acknowledged."""
    return _third_dies(rig, pace, "dies_unacknowledged")


@fault()
def worker_dies_unread(rig: Rig, pace: Pace) -> Outcome:
    """A third worker dies before its first read."""
    return _third_dies(rig, pace, "dies_unread")


def _worker_dies(rig: Rig, pace: Pace, die: Callable[[], object], **plan: Any) -> Outcome:
    with rig.load(pace, **plan) as (_, outcome):
        time.sleep(pace.before)
        die()
        time.sleep(pace.after)
    outcome.judge()
    _require_quick(outcome, rig)
    return outcome


def _third_dies(rig: Rig, pace: Pace, hook: str) -> Outcome:
    with rig.load(pace) as (_, outcome):
        third = rig.fleet.add_worker(hook=hook)
        wait_until(lambda: not third.alive, "the worker has died")
        time.sleep(pace.after)
    rig.fleet.workers.remove(third)
    outcome.judge()
    _require_quick(outcome, rig)
    return outcome


def _require_quick(outcome: Outcome, rig: Rig) -> None:
    usual = rig.base_seconds * 4  # one batch runs, one waits, and those alone
    outcome.within(outcome.verdict.slowest, 3 + usual, "answered")
    wait_until(lambda: not rig.fleet.entries(), "the streams are empty")


@fault(workers=3, base_us=50_000.0, crash=str(POISON), allow_crash="true")
def worker_poisoned(rig: Rig, pace: Pace) -> Outcome:
    """A request that kills its worker: tried alone by a second one, and a dead letter after that. All others are answered."""
    port = rig.fleet.ports[0].http
    letters = rig.fleet.ask("XLEN", "lockgate:d:{fleet/1}")
    with rig.load(pace, rate=60, deadline_ms=20_000) as (_, outcome):
        time.sleep(pace.before)
        status, text = _ask(port, POISON)
        dead = [worker for worker in rig.fleet.workers if not worker.alive]
        time.sleep(pace.after)
    outcome.judge()
    outcome.require(status == 500 and "has lost 2 workers" in text, f"a typed 500, not {status} {text}")
    outcome.require(len(dead) == 2, f"it kills two workers, not {len(dead)}")
    outcome.require(rig.fleet.ask("XLEN", "lockgate:d:{fleet/1}") == letters + 1, "it alone is a dead letter")
    return outcome


def _ask(port: int, number: int) -> tuple[int, str]:
    """One request without a deadline."""
    tensor = {"name": "IN", "shape": [1, 1], "datatype": "INT64", "data": [number]}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", f"/v2/models/{MODEL}/infer", json.dumps({"inputs": [tensor]}))
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


# --- clients


@fault(gateways=2, base_us=20_000.0, rows=8)
def cancel_storm(rig: Rig, pace: Pace) -> Outcome:
    """Clients go at any moment, over HTTP and gRPC, with small and large tensors; nothing stays behind of what they asked."""
    outcome = Outcome(pace)
    sizes = ((MODEL, 10 * pace.flood, 1), (LARGE, pace.flood // 2, 1 << 16))
    for model, requests, elements in sizes:  # what it takes of memory and connections, before anything is measured
        asyncio.run(rage(rig.fleet.ports, model, requests=min(requests, pace.flood), elements=elements))
    watched = Watched([*rig.fleet.workers, *rig.fleet.gateways])
    for model, requests, elements in sizes:
        storm = asyncio.run(rage(rig.fleet.ports, model, requests=requests, elements=elements))
        # A worker's scheduler looks at what is over when something new comes.
        asyncio.run(rage(rig.fleet.ports, model, requests=100, staying=1.0))
        outcome.figures[model] = dict(storm.counts)
        outcome.require(not storm.wrong, f"answers of others: {storm.wrong[:5]}")
        outcome.require(not storm.unanswered, f"never answered: {storm.unanswered[:5]}")
        outcome.require(not storm.errors, f"errors: {storm.errors.most_common(5)}")
    ended = time.monotonic()
    for model in (MODEL, LARGE):
        wait_until(lambda model=model: not rig.fleet.entries(model) + rig.fleet.pending(model), "the queue is empty")  # type: ignore[misc]
    outcome.figures["emptied_s"] = round(time.monotonic() - ended, 2)
    wait_until(lambda: not rig.payloads(spare=pace.timed), "no payload is left")
    watched.settle(outcome)
    return outcome


# --- Redis


@fault()
def redis_restarted(rig: Rig, pace: Pace) -> Outcome:
    """kill -9 of Redis and a start from its append-only file a second later."""
    return _redis_fails(rig, pace, rig.fleet.redis.kill, 1.0, rig.fleet.start_redis, deadline_ms=8000)


@fault()
def redis_emptied(rig: Rig, pace: Pace) -> Outcome:
    """kill -9 of Redis and a start with nothing a second later."""
    return _redis_fails(rig, pace, rig.empty_redis, 1.0, rig.fleet.start_redis, deadline_ms=8000)


@fault()
def redis_flushed(rig: Rig, pace: Pace) -> Outcome:
    """FLUSHALL on a live Redis, which nobody can notice by the connection."""
    return _redis_fails(rig, pace, lambda: rig.fleet.ask("FLUSHALL"), 0.0, lambda: None, deadline_ms=8000)


@fault()
def redis_frozen(rig: Rig, pace: Pace) -> Outcome:
    """SIGSTOP of Redis for 10 s, while deadlines are 3 s."""
    redis = rig.fleet.redis
    stop, go = lambda: redis.send(signal.SIGSTOP), lambda: redis.send(signal.SIGCONT)
    return _redis_fails(rig, pace, stop, pace.frozen, go, errors=_REFUSALS)


@fault()
def redis_frozen_again(rig: Rig, pace: Pace) -> Outcome:
    """Five times SIGSTOP of Redis for 10 s: what each leaves behind would add up."""
    watched = Watched([*rig.fleet.workers, *rig.fleet.gateways])
    for _ in range(5):
        outcome = redis_frozen(rig, pace)
        if outcome.broken:
            return outcome
    watched.settle(outcome)
    return outcome


@fault()
def redis_cut(rig: Rig, pace: Pace) -> Outcome:
    """Replies of Redis are held back for 5 s."""

    def hold(held: bool) -> None:
        rig.call(lambda: setattr(rig.proxy.down, "paused", held))

    return _redis_fails(rig, pace, lambda: hold(True), pace.cut, lambda: hold(False), errors=_REFUSALS)


@fault()
def redis_unheard(rig: Rig, pace: Pace) -> Outcome:
    """What is sent to Redis is held back for 5 s."""

    def hold(held: bool) -> None:
        rig.call(lambda: setattr(rig.proxy.up, "paused", held))

    return _redis_fails(rig, pace, lambda: hold(True), pace.cut, lambda: hold(False), errors=_REFUSALS)


@fault()
def redis_swallowed(rig: Rig, pace: Pace) -> Outcome:
    """Replies of Redis vanish for 5 s, and with them the connections that lost them."""

    def swallow() -> None:
        rig.call(lambda: setattr(rig.proxy.down, "swallow", True))

    def mend() -> None:
        rig.call(lambda: (setattr(rig.proxy.down, "swallow", False), rig.proxy.reset()))

    return _redis_fails(rig, pace, swallow, pace.cut, mend, errors=_REFUSALS)


@fault()
def redis_slow(rig: Rig, pace: Pace) -> Outcome:
    """200 ms to Redis, and one connection in twenty breaks each second."""

    def slow() -> None:
        rig.call(lambda: setattr(rig.proxy.up, "latency", 0.2))

    def mend() -> None:
        rig.call(lambda: setattr(rig.proxy.up, "latency", 0.0))

    def suffer() -> None:
        end = time.monotonic() + 2 * pace.cut
        while time.monotonic() < end:
            time.sleep(1.0)
            rig.call(lambda: rig.proxy.reset(0.05))

    return _redis_fails(rig, pace, slow, 0.0, mend, meanwhile=suffer, deadline_ms=8000)


@fault()
def redis_reset(rig: Rig, pace: Pace) -> Outcome:
    """Every connection breaks, again and again."""

    def suffer() -> None:
        for _ in range(5):
            rig.call(rig.proxy.reset)
            time.sleep(pace.cut / 5)

    return _redis_fails(rig, pace, lambda: None, 0.0, lambda: None, meanwhile=suffer, deadline_ms=8000)


@fault()
def redis_full(rig: Rig, pace: Pace) -> Outcome:
    """maxmemory is reached, and there is room again after 4 s."""
    ask = rig.fleet.ask
    full, room = (lambda: ask("CONFIG", "SET", "maxmemory", 1)), (lambda: ask("CONFIG", "SET", "maxmemory", 0))
    return _redis_fails(rig, pace, full, pace.cut - 1, room, errors=_REFUSALS)


def _redis_fails(
    rig: Rig,
    pace: Pace,
    fail: Callable[[], object],
    seconds: float,
    mend: Callable[[], object],
    *,
    meanwhile: Callable[[], object] = lambda: None,
    errors: Collection[int] = (),
    deadline_ms: float = 3000,
) -> Outcome:
    with rig.load(pace, deadline_ms=deadline_ms) as (_, outcome):
        time.sleep(pace.before)
        watched = Watched([*rig.fleet.workers, *rig.fleet.gateways])
        fail()
        meanwhile()
        time.sleep(seconds)
        mend()
        outcome.ended = time.monotonic()
        time.sleep(pace.after)
    outcome.judge(errors=errors, recovery=RECOVERY)
    watched.settle(outcome)
    wait_until(lambda: not rig.fleet.entries(), "the streams are empty")
    return outcome


# --- gateways


@fault(gateways=2)
def gateway_stopped(rig: Rig, pace: Pace) -> Outcome:
    """SIGTERM of one gateway of two; the client goes to the other one when it is told to."""
    with rig.load(pace, retries=3) as (_, outcome):
        time.sleep(pace.before)
        status = rig.fleet.gateways[0].stop()
        time.sleep(pace.after)
    outcome.require(status == 0, f"the gateway stops with status 0, not {status}")
    return outcome.judge()


@fault(gateways=2)
def gateway_stopped_at_once(rig: Rig, pace: Pace) -> Outcome:
    """SIGTERM of the only gateway that a client has: what it has accepted is answered, the rest is told to go elsewhere."""
    with rig.load(pace, ports=[rig.fleet.ports[0].http]) as (client, outcome):
        time.sleep(pace.before)
        client.send(signal.SIGTERM)
        status = rig.fleet.gateways[0].stop()
    outcome.require(status == 0, f"the gateway stops with status 0, not {status}")
    return outcome.judge(errors=(503,))


@fault(gateways=2)
def gateway_killed(rig: Rig, pace: Pace) -> Outcome:
    """kill -9 of one gateway of two with 1,000 in flight; the other one's client must not notice, nor the queue keep anything."""
    first, second = rig.fleet.ports
    replies = _replies(rig)
    with rig.load(pace, ports=[second.http]) as (_, outcome):
        time.sleep(pace.before)
        flood = {"model": SLOW, "requests": pace.flood, "rate": 10.0 * pace.flood, "concurrency": pace.flood}
        with rig.fleet.client(**flood, ports=[first.http]):
            wait_until(lambda: rig.fleet.entries(SLOW) > pace.flood / 2, "most of it is in flight")
            rig.fleet.gateways[0].kill()
        ended = time.monotonic()
        wait_until(lambda: not rig.fleet.entries(SLOW), "the orphans are gone")
        outcome.figures["orphans_gone_s"] = round(time.monotonic() - ended, 2)
        time.sleep(pace.after)
    outcome.judge().within(outcome.verdict.slowest, 1.0, "the other gateway's clients are answered")
    if pace.timed:
        wait_until(lambda: _replies(rig) < replies, "its reply stream has expired")
    return outcome


def _replies(rig: Rig) -> int:
    """How many reply streams there are; a test may look for keys, a gateway never does."""
    return len(rig.fleet.ask("KEYS", "lockgate:r:*"))


@fault(workers=1, gateways=1)
def mixed_versions(rig: Rig, pace: Pace) -> Outcome:
    """A gateway and a worker of the next release beside those of this one: its requests go to its worker."""
    rig.fleet.add_worker(hook="newer")
    rig.fleet.add_gateway(hook="newer")
    rig.fleet.ready()
    with rig.load(pace) as (_, outcome):
        time.sleep(pace.before + pace.after)
    for among in (rig.fleet.gateways, rig.fleet.workers):
        among.pop().stop()
    rig.fleet.ports.pop()
    wait_until(lambda: not rig.fleet.entries(), "the streams are empty")
    return outcome.judge()


# --- commands


@fault(gateways=2, flags=("--model-control-mode", "explicit", "--load-model", MODEL))
def commands(rig: Rig, pace: Pace) -> Outcome:
    """Models come and go by command under load: every worker does it, also one that joins later, and one may die of it."""
    first, second = (ports.http for ports in rig.fleet.ports)
    with rig.load(pace) as (_, outcome):
        outcome.require(_command(first, LARGE, "load") == 200, "a model is loaded by command")
        outcome.require(rig.fleet.holding(LARGE) == 2, "both workers have loaded it")
        time.sleep(pace.before)
        outcome.require(_command(second, MODEL, "unload") == 200, "a model is unloaded under load")
        outcome.require(not rig.fleet.holding(), "no worker holds it")
        outcome.require(not rig.fleet.entries(), "nothing is left in its streams")
        outcome.require(_command(first, MODEL, "load") == 200, "it is loaded again")
        outcome.ended = time.monotonic()
        time.sleep(pace.after)
    outcome.judge(errors=(404,), recovery=RECOVERY)
    late = rig.fleet.add_worker(*rig.flags)
    wait_until(lambda: rig.fleet.holding(LARGE) == 3, "a worker that joins has what was loaded by command")
    threading.Timer(0.02, late.kill).start()
    began = time.monotonic()
    outcome.require(_command(first, SLOW, "load") == 200, "a command does not fail for a worker that died")
    outcome.within(time.monotonic() - began, 3.0, "nor does it wait for one")
    rig.fleet.workers.remove(late)
    return outcome


def _command(port: int, model: str, what: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", f"/v2/repository/models/{model}/{what}", "{}")
        return connection.getresponse().status
    finally:
        connection.close()


def main() -> int:
    """Run the faults that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], default=[])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    bad = 0
    for name in given.faults or FAULTS:
        each = FAULTS[name]
        with Rig(**each.rig) as rig:
            outcome = each.run(rig, Pace())
        bad += bool(outcome.broken)
        print(f"{name}: {(each.run.__doc__ or '').strip()}\n{outcome.verdict}\n{outcome.figures}", flush=True)
        print(*(f"BROKEN: {each}" for each in outcome.broken), "", sep="\n", flush=True)
        found[name] = {"broken": outcome.broken, "errors": dict(outcome.verdict.errors), **outcome.figures}
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine(), "faults": found}, indent=1))
    return bad


if __name__ == "__main__":
    sys.exit(main())
