"""A loaded version whose requests are of sequences: each stays with one instance from its first request to its last.

Every instance has a lane of its own among the slots. What is learned of plain batches, of measurements and of admission is
not for sequences: their requests are accepted, and wait for their turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from collections.abc import Sequence as List
from dataclasses import replace
from typing import Any

from gateway.config.model import ModelConfig
from gateway.engines.base import Engine
from gateway.placement import Placement
from gateway.queues.base import Consumer, Job, Keeps
from gateway.scheduling.base import Limits
from gateway.scheduling.sequences import Item, Placed, Rules, Sequence, Sequences
from gateway.types import InferRequest
from gateway.worker.host import Host
from gateway.worker.instance import Instance
from gateway.worker.lane import places
from gateway.worker.running import where
from gateway.worker.sequence_instance import SequenceInstance
from gateway.worker.sequence_line import SequenceLine
from gateway.worker.sequence_rows import Rows, States, initial_states
from gateway.worker.siblings import Siblings


class SequenceHost(Host):
    """See the module, and `Host`."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._measures = False
        self._initial: States = {}
        self._rows: list[Rows] = []
        self._line: SequenceLine | None = None

    async def load(self, placements: List[Placement]) -> None:
        """See `Host.load`."""
        config = self.source.config
        assert config.sequences is not None
        self._initial = await asyncio.to_thread(initial_states, config.sequences, self.source.path.parent)
        await super().load(placements)

    def admit(self, request: InferRequest) -> None:
        """See `Admission.admit`: whoever begins a sequence is heard to its end."""

    def turn_away(self, deadline: float) -> float | None:  # noqa: ARG002 - see `admit`
        """See `Admission.turn_away`."""
        return None

    def settle(self, request: InferRequest) -> None:
        """See `Admission.settle`."""

    # --- within

    def _open_places(self, engines: List[tuple[Engine, Placement]]) -> None:
        super()._open_places(engines)
        bounds = Limits()
        for engine, placement in engines:
            self._slots.open(
                self._lane_of(engine), bounds, [replace(each, count=1) for each in places([(engine, placement)])]
            )
        if self._line is None:
            config = self.source.config
            self._rows = [Rows(engine, config, self._initial) for engine, _ in engines]
            ends = self._statistics.sequences
            sequences: Sequences[Job] = Sequences(_rules(config), len(engines), self._alike, ends)
            lanes = [self._lane_of(engine) for engine, _ in engines]
            self._line = SequenceLine(config, sequences, self._slots, lanes)

    def _open_consumer(self) -> Consumer:
        line, config = self._line, self.source.config
        assert line is not None
        assert config.sequences is not None
        keeps = Keeps(lambda: line.places, config.sequences.idle_us / 1e6)
        consumer = self._queue.consumer([self.lane], contained=self._contained(), keeps=keeps)
        line.looked = keeps.freed
        return consumer

    def _lane_of(self, engine: Engine) -> Hashable:
        return self, id(engine)

    def _alike(self, sequence: Sequence[Job], item: Item[Job]) -> Hashable:
        return item.job.request.signature, self._rows[sequence.instance].shapes(Placed(item, sequence))

    async def _serve(self, engine: Engine, placement: Placement, siblings: Siblings[Instance]) -> None:  # noqa: ARG002 - an instance does no other's work
        assert self._line is not None
        index = next(index for index, (each, _) in enumerate(self._engines) if each is engine)
        source = self.source
        instance = SequenceInstance(engine, source.config, source.version, self._statistics, self._rows[index])
        seat = self._slots.seat(self._lane_of(engine), where(engine, placement)[0], engine)
        self._seats.append((seat, engine, placement))
        await instance.serve(index, self._line, seat)

    def _take_in(self, jobs: list[Job]) -> None:
        assert self._line is not None
        self._line.add(jobs)

    async def _settled(self) -> None:
        assert self._line is not None
        await self._line.settled()

    def _close_lane(self) -> None:
        assert self._line is not None
        self._line.close()
        for engine, _ in self._engines:
            self._slots.close(self._lane_of(engine))
        super()._close_lane()


def _rules(config: ModelConfig) -> Rules:
    given = config.sequences
    assert given is not None
    rows = max(config.max_batch_size, 1)
    delay = given.max_queue_delay_us / 1e6
    if given.candidates:
        return Rules(given.candidates, rows, given.idle_us / 1e6, delay, given.preferred_batch_sizes)
    share = given.minimum_slot_utilization
    # Triton's direct strategy waits for nothing unless it is told what for.
    return Rules(rows, rows, given.idle_us / 1e6, delay if share else 0.0, (), share)
