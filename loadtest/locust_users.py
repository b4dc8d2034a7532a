"""What every locust user of ours shares: the sample it sends, the check of the answer, the pacing, the report to locust.

A protocol (`http_users.py`, `grpc_users.py`) adds two methods: `connect`, and `send`, which turns arrays into arrays.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import gevent
import numpy as np
from locust import User, constant, task

from loadtest import samples
from loadtest.pacing import LATE_SECONDS, Level, Levels
from loadtest.samples import Arrays, Sample

LEVELS = Levels()


class WrongAnswerError(Exception):
    """The server answered, and the values are wrong."""


class References:
    """Right answers of the models whose input is fixed, from ONNX Runtime in this process, computed once."""

    _known: ClassVar[dict[tuple[Path, str], Arrays]] = {}

    @classmethod
    def of(cls, repository: Path, sample: Sample) -> Arrays:
        """The expected outputs of a sample."""
        key = (repository, sample.model)
        if key not in cls._known:
            cls._known[key] = samples.expected(samples.model_file(repository, sample.model), sample.inputs)
        return cls._known[key]


class InferUser(User):
    """Sends one request after another to one model and checks every answer."""

    abstract = True
    wait_time = constant(0)
    protocol = ""

    def connect(self) -> None:
        """Open this user's own connection."""
        raise NotImplementedError

    def send(self, sample: Sample) -> Arrays:
        """Send one request and read the answer; raises on anything but a success."""
        raise NotImplementedError

    def on_start(self) -> None:
        """Prepare what does not belong in a measurement."""
        options = self.environment.parsed_options
        self._rng = np.random.default_rng()
        self.fixed = None if options.model == "add_sub" else samples.sample(options.model)
        self._want: Arrays = {}
        if self.fixed is not None:
            self._want = References.of(Path(options.repository), self.fixed)
        self.connect()

    def _next(self) -> tuple[Sample, Arrays]:
        """A sample with its right answer: fresh numbers for add_sub, so that answers cannot be mixed up unseen."""
        if self.fixed is not None:
            return self.fixed, self._want
        low, high = (self._rng.integers(-9999, 9999, (1, 16)).astype(np.float32) for _ in range(2))
        return Sample("add_sub", {"INPUT0": low, "INPUT1": high}), {"OUTPUT0": low + high, "OUTPUT1": low - high}

    @task
    def infer(self) -> None:
        """Take the next request of the present level, send it when it is due, judge the answer."""
        if not LEVELS.started:
            gevent.sleep(0.02)
            return
        level = LEVELS.now
        start = _wait_until_due(level)
        if start is None:
            return
        level.sent += 1
        sample, want = self._next()
        failure: Exception | None = None
        try:
            if not samples.matches(self.send(sample), want):
                failure = WrongAnswerError(f"wrong values from {sample.model}")
        except Exception as error:  # noqa: BLE001 - whatever a client library raises is a failed request
            failure = error
        seconds = time.perf_counter() - start
        if failure is None:
            level.latencies.append(seconds)
        else:
            level.fail(f"{type(failure).__name__}: {failure}"[:200])
        self._tell_locust(f"{sample.model} @{level.name}", seconds, failure)

    def _tell_locust(self, name: str, seconds: float, failure: Exception | None) -> None:
        event: dict[str, Any] = {"request_type": self.protocol, "name": name, "response_length": 0, "context": {}}
        self.environment.events.request.fire(**event, response_time=seconds * 1e3, exception=failure)


def _wait_until_due(level: Level) -> float | None:
    """Sleep until the request is due; the time its response time counts from, None when the level ended meanwhile."""
    due = level.claim()
    if due is None:
        return time.perf_counter()
    while (ahead := due - time.perf_counter()) > 0:
        gevent.sleep(min(ahead, 0.25))
        if level.ended:
            return None
    level.late += ahead < -LATE_SECONDS
    return due
