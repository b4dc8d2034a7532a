"""Where the requests of a version's sequences wait: `Sequences` with a clock, timers and the slots of the devices.

For an instance whose next batch is due a `Turn` waits in line for the device, as any job does; the batch itself is made when
that turn comes, of all that has come until then.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List

from gateway import errors
from gateway import sequence as refusals
from gateway.config.model import ModelConfig
from gateway.queues.base import Job
from gateway.scheduling.base import LaneKey
from gateway.scheduling.sequences import Item, Placed, Sequence, Sequences
from gateway.sequence import flag, id_of
from gateway.types import DataType, InferRequest, InferResponse
from gateway.worker.slots import Slots


class Turn:
    """The `Job` that waits for a device so that an instance can run its next batch."""

    def __init__(self, model: str, released: Callable[[], object]) -> None:
        self.request = InferRequest(model, {})
        self.enqueued = time.monotonic()
        self.done = False
        self._released = released

    def reply(self, response: InferResponse) -> bool:  # noqa: ARG002 - nobody waits for one
        """See `Job.reply`."""
        return False

    def fail(self, error: errors.GatewayError) -> bool:  # noqa: ARG002 - nobody waits for one
        """See `Job.fail`: the device has no place for it, and its requests still wait."""
        self._released()
        return True

    def release(self) -> None:
        """See `Job.release`: the device is another now."""
        self._released()


class SequenceLine:
    """The requests of all instances; `lanes` are those of the instances among the slots."""

    def __init__(self, config: ModelConfig, sequences: Sequences[Job], slots: Slots, lanes: List[LaneKey]) -> None:
        assert config.sequences is not None
        self._model = config.name
        told = [control for control in config.sequences.controls if control.kind == "corrid"]
        self._corrid = told[0] if told else None
        self._sequences = sequences
        self._slots = slots
        self._lanes = lanes
        self._busy = [False] * len(lanes)  # it runs, or its turn will come
        self._timers: dict[int, asyncio.TimerHandle] = {}  # when the batch of an instance is due
        self._reaper: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._closed = False
        self.looked: Callable[[], None] = lambda: None  # told when `places` may be more

    @property
    def places(self) -> int:
        """How many more sequences could begin at once."""
        return self._sequences.places

    def add(self, jobs: Iterable[Job]) -> None:
        """Requests have come; those of no sequence are refused."""
        for job in jobs:
            try:
                self._add(job)
            except errors.GatewayError as error:
                job.fail(error)
        self._look()

    def _add(self, job: Job) -> None:
        request = job.request
        if request.rows > 1:
            raise refusals.of_one_row(self._model)
        id_ = id_of(request)
        if not id_:
            raise refusals.no_id(self._model)
        told = self._corrid
        if told is not None and isinstance(id_, str) is not (told.datatype is DataType.BYTES):
            given = DataType.BYTES if isinstance(id_, str) else DataType.UINT64
            raise refusals.wrong_id(self._model, told.name, given.value, told.datatype.value)
        item = Item(job, flag(request, "sequence_start"), flag(request, "sequence_end"))
        if not self._sequences.add(id_, item, time.monotonic()):
            raise refusals.not_started(id_, self._model)

    def take(self, instance: int) -> list[Placed[Job]]:
        """An instance's turn has come: its batch, which may be empty. `finished` ends it."""
        batch = self._sequences.take(instance)
        self._refuse_lost()
        return batch

    def finished(self, instance: int, failed: Iterable[Sequence[Job]], *, forgot: bool) -> None:
        """The batch is over, and with it the sequences that failed; all of the instance if it `forgot` them."""
        if forgot:
            self._sequences.lose(instance)
        self._sequences.finished(instance, failed, time.monotonic())
        self._busy[instance] = False
        self._look()

    async def settled(self) -> None:
        """Wait until nothing waits or runs."""
        while not self._sequences.quiet:
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """Hand back what waits."""
        self._closed = True
        for timer in (*self._timers.values(), self._reaper):
            if timer is not None:
                timer.cancel()
        for job in reversed(self._sequences.close()):
            job.release()

    # --- within

    def _look(self) -> None:
        """Have every instance that is free run what is due, now or later."""
        if self._closed:
            return
        now = time.monotonic()
        if self._reaper is None and (due := self._sequences.reap(now)) < math.inf:
            self._reaper = asyncio.get_running_loop().call_later(due - now, self._reap)
        for instance, busy in enumerate(self._busy):
            if not busy:
                self._look_at(instance, now)
        self._refuse_lost()
        self._changed.set()
        self.looked()

    def _look_at(self, instance: int, now: float) -> None:
        if (timer := self._timers.pop(instance, None)) is not None:
            timer.cancel()
        due = self._sequences.ready_at(instance, now)
        if due <= now:
            self._busy[instance] = True
            self._slots.add(self._lanes[instance], [Turn(self._model, lambda: self._again(instance))])
        elif due < math.inf:
            self._timers[instance] = asyncio.get_running_loop().call_later(due - now, self._look)

    def _again(self, instance: int) -> None:
        self._busy[instance] = False
        asyncio.get_running_loop().call_soon(self._look)

    def _reap(self) -> None:
        self._reaper = None
        self._look()

    def _refuse_lost(self) -> None:
        for id_, job in self._sequences.take_lost():
            if not job.done:
                job.fail(refusals.broken(id_, self._model))
