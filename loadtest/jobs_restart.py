"""Async jobs through the end of every process: gateways, workers and Redis are killed while jobs are submitted and run.

    python -m loadtest.jobs_restart [--jobs 500] [--how kill|term] [--json FILE]

Each job carries a tag that its result must bring back. Every job that was accepted must have ended once, done or in the dead letters with
a reason; that a job ended once is read from the stream of events, which has an entry for each change of state. With `term` the processes
are asked to stop, and Redis is restarted; with `kill` nobody is asked.
"""

from __future__ import annotations

import argparse
import http.client
import json
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.fleet import Fleet, FleetError, wait_until
from loadtest.fleet_client import MODEL
from loadtest.record import machine

_SLOW = {"base_us": 60_000.0, "rows": 4}  # so that all is over in the middle of it
_FINAL = ("done", "failed", "cancelled", "dead")
_PATIENCE = 120.0  # seconds in which all jobs must have ended


@dataclass
class Outcome:
    """What became of the jobs; `faults` is empty when every promise was kept."""

    jobs: int = 0
    states: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)  # jobs by the number of their runs
    refused: int = 0  # submissions that were answered with an error, or not at all, and made again
    ended_before: int = 0  # jobs that had ended when the processes were
    seconds: float = 0.0  # from when every process was there again until the last job had ended
    faults: list[str] = field(default_factory=list)


class Submitter(threading.Thread):
    """Submits jobs through the gateways in turn until so many were accepted; `tags` has the tag of each by id."""

    def __init__(self, ports: list[int], jobs: int) -> None:
        super().__init__(daemon=True)
        self.tags: dict[str, int] = {}
        self.refused = 0
        self._ports = ports
        self._jobs = jobs

    def run(self) -> None:
        """Part of Thread."""
        while len(self.tags) < self._jobs:
            tag = secrets.randbits(62)
            data = {"name": "IN", "datatype": "INT64", "shape": [1, 1], "data": [tag]}
            port = self._ports[(len(self.tags) + self.refused) % len(self._ports)]
            status, told = ask(port, "POST", f"/v2/models/{MODEL}/infer?async=1", {"inputs": [data]})
            if status == 202:
                self.tags[told["id"]] = tag
            else:
                self.refused += 1
                time.sleep(0.02)


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of an answer; status 0 when none came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    except (OSError, http.client.HTTPException, ValueError):
        return 0, None
    finally:
        connection.close()


def restart_everything(jobs: int, how: str) -> Outcome:
    """Run it once."""
    outcome = Outcome(jobs)
    with _fleet() as fleet:
        ports = [each.http for each in fleet.ports]
        submitter = Submitter(ports, jobs)
        submitter.start()
        wait_until(lambda: len(submitter.tags) >= jobs // 2, "half of the jobs are submitted", _PATIENCE)
        wait_until(lambda: _count(fleet, _FINAL) >= jobs // 10, "a tenth of them has ended", _PATIENCE)
        _end_all(fleet, how)
        fleet.start_redis()
        outcome.ended_before = _count(fleet, _FINAL)
        for process in (*fleet.workers, *fleet.gateways):
            process.start()
        _ready(fleet)
        started = time.monotonic()
        submitter.join(_PATIENCE)
        # A submission whose answer was lost may be a job too.
        wait_until(lambda: not _count(fleet, ("queued", "running")), "every job has ended", _PATIENCE)
        outcome.seconds = time.monotonic() - started
        outcome.refused = submitter.refused
        _judge(fleet, ports[0], submitter.tags, outcome)
    return outcome


@contextmanager
def _fleet() -> Iterator[Fleet]:
    with Fleet(aof=True, model=_SLOW) as fleet:
        for _ in range(2):
            fleet.add_worker()
            fleet.add_gateway()
        _ready(fleet)
        yield fleet


def _ready(fleet: Fleet) -> None:
    """Four processes may take their time to start on a busy machine."""
    try:
        fleet.ready()
    except FleetError:
        fleet.ready()


def _end_all(fleet: Fleet, how: str) -> None:
    processes = (*fleet.gateways, *fleet.workers)
    if how == "kill":
        for process in (*processes, fleet.redis):
            process.kill()
        return
    threads = [threading.Thread(target=process.stop) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fleet.redis.stop()


def _count(fleet: Fleet, states: tuple[str, ...]) -> int:
    return sum(fleet.ask("ZCARD", f"lockgate:jobs:{{jobs}}:{state}") for state in states)


def _judge(fleet: Fleet, port: int, tags: dict[str, int], outcome: Outcome) -> None:
    """Look at every job, and at all that was told of it."""
    told_of = [dict(zip(words[::2], words[1::2], strict=True)) for _, words in _events(fleet)]
    ends = Counter(each[b"job"].decode() for each in told_of if each[b"state"].decode() in _FINAL)
    outcome.faults += [f"{job} ended {count} times" for job, count in ends.items() if count > 1]
    for job, tag in tags.items():
        status, told = ask(port, "GET", f"/v2/jobs/{job}")
        state = told["state"] if status == 200 else f"status {status}"
        outcome.states[state] += 1
        outcome.attempts[told["attempts"] if status == 200 else -1] += 1
        if state == "done":
            if told["result"]["outputs"][0]["data"] != [tag]:
                outcome.faults.append(f"{job} has another job's result")
        elif state != "dead" or not told.get("error"):
            outcome.faults.append(f"{job} is {state}: {told}")


def _events(fleet: Fleet) -> list[tuple[bytes, list[bytes]]]:
    entries = fleet.ask("XRANGE", "lockgate:jobs:{jobs}:events", "-", "+")
    return [(identity, _words(fields)) for identity, fields in entries]


def _words(fields: Any) -> list[bytes]:
    return [word for pair in fields.items() for word in pair] if isinstance(fields, dict) else fields


def main() -> int:
    """Print what became of the jobs; 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--how", choices=("kill", "term"), default="kill")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    outcome = restart_everything(given.jobs, given.how)
    told = vars(outcome)
    print(json.dumps(told, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine(), "how": given.how, **told}, indent=1))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
