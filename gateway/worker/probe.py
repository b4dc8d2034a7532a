"""Measures a version's batches once it is ready, so that admission knows them before the first overload.

A measurement is a job like any other, of rows of zeros, that no batch joins and no statistics count. It gives way
to work with a deadline. Sizes double until the largest, or until larger ones gain nothing or take too long to be
worth a caller's wait; a size that fails is the device's limit.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator

from gateway.config.model import ModelConfig
from gateway.errors import GatewayError, stopping
from gateway.queues.base import Job
from gateway.scheduling.base import Run
from gateway.telemetry import log_event
from gateway.types import InferRequest, InferResponse
from gateway.worker.slots import Slots
from gateway.worker.warmup import zeros

_TIMES = 3  # runs of each size, of which the quickest counts: noise only ever adds
_LONG = 0.25  # seconds; a caller may have to wait for one such run
_GAIN = 1.9  # a batch twice as large that takes this many times as long gains next to nothing
_LOWEST = 1 << 30  # Triton's priorities grow less urgent with their number


class Probe:
    """The `Job` of a measurement."""

    def __init__(self, request: InferRequest) -> None:
        self.request = request
        self.enqueued = time.monotonic()
        self.done = False
        self.run: Run[Job] | None = None  # the one it was in, and how long that took
        self.seconds = 0.0
        self.answer: asyncio.Future[GatewayError | None] = asyncio.get_running_loop().create_future()

    def ran(self, run: Run[Job]) -> None:
        """It was computed in this run, which has ended."""
        self.run, self.seconds = run, run.ended - run.started

    def reply(self, response: InferResponse) -> bool:  # noqa: ARG002 - what zeros give is of no interest
        """See `Job.reply`."""
        return self._end(None)

    def fail(self, error: GatewayError) -> bool:
        """See `Job.fail`."""
        return self._end(error)

    def release(self) -> None:
        """See `Job.release`: there is no queue to go back to."""
        self._end(None)

    def _end(self, error: GatewayError | None) -> bool:
        if self.done:
            return False
        self.done = True
        if not self.answer.done():
            self.answer.set_result(error)
        return True


def sizes(config: ModelConfig) -> Iterator[int]:
    """1, 2, 4 ... and the largest batch."""
    rows, most = 1, config.max_batch_size if config.batching is not None else 1
    while rows < most:
        yield rows
        rows *= 2
    yield max(most, 1)


async def measure(slots: Slots, lane: object, config: ModelConfig, instances: int, row: float) -> int:
    """Run every size on all `instances` at once, as under load; one row takes about `row` seconds.

    Returns the rows of the largest that ran.
    """
    quickest: dict[tuple[int, str], float] = {}

    async def run(rows: int, times: int) -> float:
        """Tell the scheduler what a size takes; returns the seconds on the slowest device."""
        measured = await _measure_size(slots, lane, config, rows, instances, times=times)
        for device, seconds in measured.items():
            if seconds < quickest.get((rows, device), math.inf):
                quickest[rows, device] = seconds
                slots.scheduler.measured(lane, device, rows, seconds)
        return max(measured.values())

    done: list[int] = []
    before, last = math.inf, row / 2
    try:
        for rows in sizes(config):
            if 2 * last > _LONG or last > _GAIN * before:
                break
            before, last = last if done else math.inf, await run(rows, _TIMES)
            done.append(rows)
        # Once more: what else kept the machine busy, as a start does, kept it so for all runs of a size.
        for rows in done:
            await run(rows, 1)
    except Exception as problem:  # noqa: BLE001 - a size may be more than memory holds; that ends the measuring only
        log_event("measuring_ended", logging.WARNING, model=config.name, rows=rows, reason=str(problem))
    return max(done, default=0)


async def _measure_size(
    slots: Slots, lane: object, config: ModelConfig, rows: int, instances: int, *, times: int
) -> dict[str, float]:
    """The seconds of the quickest run on each device. Raises `GatewayError` when a run fails."""
    quickest: dict[str, float] = {}
    for _ in range(times):
        probes = [Probe(_request(config, rows)) for _ in range(instances)]
        slots.add(lane, probes)
        try:
            for probe in probes:
                if (error := await probe.answer) is not None:
                    raise error
                if probe.run is None:
                    raise stopping()  # handed back: the version is on its way out
                quickest[probe.run.device] = min(probe.seconds, quickest.get(probe.run.device, math.inf))
        finally:
            for probe in probes:
                probe.release()  # given up, those that still wait: nobody is to wait for them
    return quickest


def _request(config: ModelConfig, rows: int) -> InferRequest:
    request = zeros(config, rows)
    request.rows = rows
    request.size = sum(tensor.nbytes for tensor in request.inputs.values())
    request.priority = _LOWEST
    request.signature = object()  # equal to no other: it shares its batch with nobody
    return request
