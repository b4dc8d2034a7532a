"""The metrics of models' code, of all processes of a fleet: each sample with the process that has it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TypeAlias

import msgspec

from gateway.engines.measures import Kind, Measures
from gateway.errors import GatewayError
from gateway.queues.base import PoolState
from gateway.service.registers import Ask
from gateway.telemetry import Buckets, Family, log_event

QUESTION = "measures"
_PATIENCE = 2.0  # seconds for what others have to say

_Number: TypeAlias = int | float  # which msgspec tells apart
_Histogram: TypeAlias = tuple[tuple[_Number, ...], tuple[int, ...], _Number]
_Sample: TypeAlias = tuple[dict[str, str], _Number | _Histogram]


class _Told(msgspec.Struct, array_like=True, gc=False):
    """One family of one process."""

    name: str
    kind: Kind
    help: str
    samples: list[_Sample]


_decode = msgspec.msgpack.Decoder(list[_Told]).decode


class FleetMeasures:
    """Called, it gives the families of all live processes; this one is called `process`. Alone there is no `ask`, and
    nobody is asked while there are no models that could keep any among the `pools`.
    """

    def __init__(
        self,
        measures: Measures,
        process: str = "",
        ask: Ask | None = None,
        pools: Callable[[], Iterable[PoolState]] = tuple,
    ) -> None:
        self._pools = pools
        self._measures = measures
        self._labels = {"process": process} if process else {}
        self._ask = ask

    def answer(self, _: str = "") -> bytes:
        """This process's own, for another."""
        return msgspec.msgpack.encode([_told(family, self._labels) for family in self._measures.families()])

    async def __call__(self) -> list[Family]:
        """What is known now: without an answer of the others this process's own."""
        answers = [self.answer()]
        if self._ask is not None and any(map(_may_keep, self._pools())):
            try:
                async with asyncio.timeout(_PATIENCE):
                    answers += [answer for answer in await self._ask(QUESTION) if answer]
            except (GatewayError, TimeoutError) as problem:
                log_event("measures_unknown", logging.WARNING, reason=str(problem))
        return _joined(told for answer in answers for told in _read(answer))


def _may_keep(pool: PoolState) -> bool:
    return any(state.config is not None and state.config.is_code for state in pool.versions)


def _told(family: Family, labels: dict[str, str]) -> _Told:
    samples: list[_Sample] = [
        (
            {**given, **labels},
            (value.bounds, value.counts, value.total) if isinstance(value, Buckets) else value,
        )
        for given, value in family.samples
    ]
    return _Told(family.name, family.kind, family.help, samples)


def _read(answer: bytes) -> list[_Told]:
    try:
        return _decode(answer)
    except msgspec.DecodeError:
        return []  # of a version that speaks otherwise


def _joined(told: Iterable[_Told]) -> list[Family]:
    """One family for each name; of another kind than the first, a model's is left out."""
    families: dict[str, Family] = {}
    for each in told:
        family = families.setdefault(each.name, Family(each.name, each.kind, each.help))
        if family.kind == each.kind:
            family.samples += [
                (labels, Buckets(*value) if isinstance(value, tuple) else value) for labels, value in each.samples
            ]
    return sorted(families.values(), key=lambda family: family.name)
