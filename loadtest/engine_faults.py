"""What a gateway does when its engines fail: each fault under load, 32 requests in flight, with the history of each request checked.

    python -m loadtest.engine_faults [--out FILE] [--short] [FAULT ...]

Prints a line for each fault: how many requests without poison there were, the slowest of them, how often the engine's process ended and
how soon after that answers came again; and below it what must not happen and did.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.engine_images import ImageClient, Pictures
from loadtest.engine_rig import FIRST_TAG, FLOATS, GROWTH, IMAGES, IN_FLIGHT, SLACK, VALUES, Outcome, Rig, Told
from loadtest.fleet import FleetError, wait_until
from loadtest.history import check
from loadtest.record import provenance

RECOVERY = 2.0  # seconds
MOST_CRASHES = int(math.log2(IN_FLIGHT)) + 1
DEADLINE_MS = 5000.0
_WATCHDOG = 5.0  # seconds
_QUIET = 10.0  # seconds in which what was used is given back


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is done of each."""

    poisons: int = 10
    hangs: int = 2
    kills: int = 20
    between: float = 0.3  # seconds
    crashes: int = 200  # of the one that looks at memory
    patience_ms: int = 0  # of the watchdog; 0: as it is
    timed: bool = True  # whether it is judged how quickly things go


SHORT = Pace(poisons=3, hangs=1, kills=3, between=0.1, crashes=30, patience_ms=700, timed=False)

Scenario = Callable[[Rig, Pace], Outcome]


@dataclass(frozen=True, slots=True)
class Fault:
    """A scenario, and the gateway it needs."""

    run: Scenario
    rig: dict[str, Any] = field(default_factory=dict)


FAULTS: dict[str, Fault] = {}


def fault(**rig: Any) -> Callable[[Scenario], Scenario]:
    """Put a scenario into the list; `rig` are arguments of `Rig`."""

    def add(scenario: Scenario) -> Scenario:
        FAULTS[scenario.__name__] = Fault(scenario, rig)
        return scenario

    return add


# --- requests that end the process of their engine


@fault()
def segfault(rig: Rig, pace: Pace) -> Outcome:
    """A request that reads where no memory is."""
    return _crashes(rig, pace, "segfault")


@fault()
def abort(rig: Rig, pace: Pace) -> Outcome:
    """A request on which a library calls abort()."""
    return _crashes(rig, pace, "abort")


@fault()
def exits(rig: Rig, pace: Pace) -> Outcome:
    """A request on which a library ends the process."""
    return _crashes(rig, pace, "exit")


@fault()
def killed(rig: Rig, pace: Pace) -> Outcome:
    """A request that has its process killed by signal 9, as the machine does when memory is short."""
    return _crashes(rig, pace, "kill")


@fault()
def sticky(rig: Rig, pace: Pace) -> Outcome:
    """A request that breaks its device until the process is another."""
    return _crashes(rig, pace, "sticky")


@fault()
def hang(rig: Rig, pace: Pace) -> Outcome:
    """A request whose run never ends, without the interpreter's lock."""
    return _hangs(rig, pace, "hang")


@fault()
def hang_with_lock(rig: Rig, pace: Pace) -> Outcome:
    """A request whose run never ends, with the interpreter's lock."""
    return _hangs(rig, pace, "hang_gil")


def _crashes(rig: Rig, pace: Pace, way: str, deadline_ms: float = DEADLINE_MS, count: int = 0) -> Outcome:
    worst, took = 0, [0.0]
    with rig.load(deadline_ms) as outcome:
        for tag in range(count or pace.poisons):
            time.sleep(pace.between)
            before = len(rig.deaths())
            told = rig.send(VALUES[way], tag)
            took.append(told.seconds)
            _require_error(outcome, told, "this request crashed model 'fleet'")
            worst = max(worst, len(rig.deaths()) - before)
        ends = _ends(rig, pace)
        _require_error(outcome, rig.send(VALUES[way], 0), "crashed model 'fleet'; it is not tried again")
        outcome.require(_ends(rig, pace) == ends, "the same request again does not reach the engine")
        time.sleep(pace.between)
    outcome.require(0 < worst <= MOST_CRASHES, f"a request crashes at most {MOST_CRASHES} times, not {worst}")
    outcome.figures |= {"most_crashes": worst, "poison_ms": round(1e3 * max(took), 1)}
    return outcome.judge(RECOVERY if pace.timed else math.inf)


def _ends(rig: Rig, pace: Pace) -> int:
    # A watchdog made impatient for a short test also ends processes that a busy machine keeps waiting.
    return sum(death.cause != "hang" or not pace.patience_ms for death in rig.deaths())


def _hangs(rig: Rig, pace: Pace, way: str) -> Outcome:
    return _crashes(rig, pace, way, 60_000.0, pace.hangs)


def _require_error(outcome: Outcome, told: Told, text: str) -> None:
    outcome.require(told.status == 500 and text in told.error, f"500 and '{text}', not {told.status} {told.error}")


# --- requests that fail, or spoil their batch


@fault()
def error(rig: Rig, pace: Pace) -> Outcome:
    """A request on which the model raises."""
    return _fails(rig, pace, "poison", "failed on its poison value")


@fault()
def out_of_memory(rig: Rig, pace: Pace) -> Outcome:
    """A request for which there is not enough memory."""
    return _fails(rig, pace, "oom", "(MemoryError)")


@fault()
def wrong_rows(rig: Rig, pace: Pace) -> Outcome:
    """A request with which the model gives a row too few for the batch."""
    return _fails(rig, pace, "short", "gave 1 rows in output 'OUT' for a batch of 2")


@fault()
def nan(rig: Rig, pace: Pace) -> Outcome:
    """A request whose row comes out as NaN."""
    with rig.load(DEADLINE_MS, FLOATS) as outcome:
        for tag in range(1, pace.poisons + 1):
            time.sleep(pace.between)
            told = rig.send(VALUES["nan"], tag, FLOATS)
            rows = np.frombuffer(told.body[-16:], "<f8")
            right = told.status == 200 and np.isnan(rows[0]) and rows[1] == FIRST_TAG + tag
            outcome.require(right, f"NaN in its own row and the other as it was, not {told.status} {rows}")
    outcome.require(not outcome.deaths, f"no process ends of it: {outcome.deaths}")
    return outcome.judge(RECOVERY)


def _fails(rig: Rig, pace: Pace, way: str, text: str) -> Outcome:
    with rig.load(DEADLINE_MS) as outcome:
        for tag in [*range(pace.poisons), 0]:  # the last is one that comes again
            time.sleep(pace.between)
            _require_error(outcome, rig.send(VALUES[way], tag), text)
    outcome.require(not outcome.deaths, f"no process ends of it: {outcome.deaths}")
    return outcome.judge(RECOVERY)


# --- processes that are killed from outside


@fault()
def killed_from_outside(rig: Rig, pace: Pace) -> Outcome:
    """kill -9 of the engine's process, again and again: nobody is to blame, and nobody goes without an answer."""
    with rig.load(DEADLINE_MS) as outcome:
        for _ in range(pace.kills):
            time.sleep(pace.between)
            rig.strike(signal.SIGKILL)
        time.sleep(pace.between)
    outcome.require(len(outcome.deaths) >= pace.kills, f"{pace.kills} ends of a process, not {len(outcome.deaths)}")
    return outcome.judge(RECOVERY if pace.timed else math.inf)


@fault(images=True)
def classifier(rig: Rig, pace: Pace) -> Outcome:
    """The image classifier on ONNX Runtime: its process is killed, made to fault and to abort, and stopped for good."""
    deadline_ms = 30_000.0
    with _pictures(rig, deadline_ms) as (client, outcome):
        for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT) * max(1, pace.kills // 5) + (signal.SIGSTOP,):
            _await_answers(client)
            ends = len(rig.deaths())
            rig.strike(number, IMAGES)
            wait_until(lambda ends=ends: len(rig.deaths()) > ends, "the process has ended")  # type: ignore[misc]
        _await_answers(client)
    return outcome.judge(RECOVERY if pace.timed else math.inf)


def _await_answers(client: ImageClient) -> None:
    """Wait until each of those in flight has had its answer.

    They do not overtake each other by as much as this: a batch that is run again in parts stands behind the one that was
    laid out after it, and whoever is in three processes that are struck while it is at it is taken for the cause.
    """
    there = len(client.history.records)
    wait_until(lambda: len(client.history.records) >= there + 4 * IN_FLIGHT, "the requests in flight are answered")


@contextmanager
def _pictures(rig: Rig, deadline_ms: float) -> Iterator[tuple[ImageClient, Outcome]]:
    outcome = Outcome()
    before = len(rig.deaths())
    client = ImageClient(rig.ports.http, Pictures(rig.models, IMAGES, deadline_ms), deadline_ms, IN_FLIGHT)
    thread = threading.Thread(target=lambda: asyncio.run(client.run()), name="pictures")
    thread.start()
    try:
        yield client, outcome
    finally:
        client.stop()
        thread.join()
    outcome.history, outcome.verdict = client.history, check([client.history])
    outcome.deaths = rig.deaths()[before:]


# --- many of them


@fault()
def many(rig: Rig, pace: Pace) -> Outcome:
    """Crashes of every kind, one after another: memory, descriptors and threads of the gateway are as before."""
    ways = ("segfault", "abort", "kill", "sticky", "exit")
    rig.process.resources()  # the first scrape starts a thread
    before = rig.process.resources()
    with rig.load(DEADLINE_MS) as outcome:
        tag, early = 0, None
        while (ends := len(rig.deaths())) < pace.crashes:
            told = rig.send(VALUES[ways[tag % len(ways)]], tag)
            _require_error(outcome, told, "this request crashed model 'fleet'")
            tag += 1
            if early is None and ends >= pace.crashes / 10:
                early = rig.process.resources()
        late = rig.process.resources()
    assert early is not None
    after = late

    def quiet() -> bool:
        nonlocal after  # to look once more would find the connection of the last look, which may not have ended yet
        after = rig.process.resources()
        return all(now <= was for now, was in zip(after[1:], before[1:], strict=True))

    with suppress(FleetError):
        wait_until(quiet, "quiet", _QUIET)
    outcome.figures |= {
        "poisons": tag,
        "mib_at_start_a_tenth_end": [round(each[0] / 2**20, 1) for each in (before, early, late)],
        "descriptors": [before[1], after[1]],
        "threads": [before[2], after[2]],
    }
    grown = late[0] - early[0]
    outcome.require(grown < early[0] * GROWTH + SLACK, f"memory is flat: {grown / 2**20:.1f} MiB more")
    outcome.require(after[1] <= before[1], f"descriptors are back: {before[1]}, then {after[1]}")
    outcome.require(after[2] <= before[2], f"threads are back: {before[2]}, then {after[2]}")
    outcome.require(
        tag * MOST_CRASHES >= len(outcome.deaths), f"{tag} requests crash at most {MOST_CRASHES} times each"
    )
    return outcome.judge(RECOVERY if pace.timed else math.inf)


def carry_out(name: str, pace: Pace) -> Outcome:
    """One fault, on a gateway of its own."""
    each = FAULTS[name]
    more = {"watchdog_ms": str(pace.patience_ms)} if pace.patience_ms else {}
    with Rig(**each.rig, **more) as rig:
        try:
            return each.run(rig, pace)
        except FleetError as problem:
            message = f"{problem}\n{rig.process.tail()}"
            raise FleetError(message) from None


_COLUMNS = ("requests", "slowest_ms", "gap_ms", "deaths", "most_crashes", "recovery_ms", "poison_ms")


def _row(name: str, outcome: Outcome) -> str:
    figures = [str(outcome.figures.get(column, "-")) for column in _COLUMNS]
    return f"{name:<20}" + "".join(f"{figure:>13}" for figure in figures) + ("   BROKEN" if outcome.broken else "   ok")


def main() -> int:
    """Carry out the faults that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], default=[])
    parser.add_argument("--short", action="store_true", help="fewer of each, as in the tests")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    print(" " * 20 + "".join(f"{column:>13}" for column in _COLUMNS), flush=True)
    for name in given.faults or FAULTS:
        outcome = carry_out(name, SHORT if given.short else Pace())
        print(_row(name, outcome), flush=True)
        extra = {key: value for key, value in outcome.figures.items() if key not in _COLUMNS}
        for line in ([extra] if extra else []) + [f"BROKEN: {each}" for each in outcome.broken]:
            print(f"  {line}", flush=True)
        found[name] = {"broken": outcome.broken, "statuses": dict(outcome.verdict.statuses), **outcome.figures}
    if given.out is not None:
        given.out.write_text(
            json.dumps({"kind": "lockgate-engine-faults/1", **provenance(), "faults": found}, indent=1)
        )
    return int(any(each["broken"] for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
