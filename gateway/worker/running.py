"""What the engines of a version run on and from: as it is published, as it is counted, and what they compute."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from gateway.artefacts import Artefact
from gateway.engines.base import Engine
from gateway.engines.fallback import FallbackEngine
from gateway.placement import Placement
from gateway.queues.base import InstanceState
from gateway.statistics import VersionStatistics


def where(engine: Engine, placement: Placement) -> tuple[str, int]:
    """The device whose slots an engine's runs take now, and how many cores each when it is loaded."""
    if isinstance(engine, FallbackEngine) and engine.device != placement.device.name:
        return engine.device, engine.threads
    return placement.device.name, placement.threads


def state(engine: Engine, placement: Placement) -> InstanceState:
    """One instance as gateways are told of it."""
    artefact = engine.artefact
    made = ("", "") if artefact is None else (artefact.precision, artefact.name)
    link = (engine.link, engine.reason) if isinstance(engine, FallbackEngine) else ("", "")
    return InstanceState(where(engine, placement)[0], engine.provider, *made, *link)


def count(engines: Iterable[Engine], statistics: VersionStatistics) -> None:
    """Add what chains have counted since the last time."""
    for engine in engines:
        if isinstance(engine, FallbackEngine):
            answered, fallbacks = engine.counted()
            for table, counts in ((statistics.links, answered), (statistics.fallbacks, fallbacks)):
                for name, number in counts.items():
                    table[name] = table.get(name, 0) + number


def digest(source: str, engines: Iterable[Engine]) -> str:
    """What these compute; empty when they differ, because nobody knows which one answers next.

    The integer kernels of one kind of device round otherwise than those of another. A chain computes what its first link
    does: answers of the others are not to be kept.
    """
    made = {_made(engine.intended if isinstance(engine, FallbackEngine) else engine.artefact) for engine in engines}
    if not source or len(made) != 1:
        return ""
    return hashlib.sha256(f"{source} {made.pop()}".encode()).hexdigest()


def _made(artefact: Artefact | None) -> str:
    return "" if artefact is None or not artefact.sha256 else f"{artefact.sha256} {artefact.device}"
