"""What is measured, for how long and in which order.

Order: for each model and number of connections, pair by pair, every system once (A B A B ...), so that a slow minute of the
machine falls on all of them. Raw ONNX Runtime sits between gRPC and binary, which are compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GATEWAY = ("json", "binary", "grpc")
ORDER = ("grpc", "ort", "binary", "fastapi", "json")
MODELS = ("add_sub", "efficientnet_lite0", "minilm")
PINNED = ("add_sub",)  # tiny: the server is pinned to one core and the generator to the other
SLOW = ("efficientnet_lite0", "minilm")  # answers come in few large batches: a longer run, or the last batch shows
CELL_OVERHEAD = 0.9  # seconds beside the load itself: calibration, two probes, start of the generator
MODEL_OVERHEAD = 12.0  # starts and stops of two servers


@dataclass(frozen=True, slots=True)
class Options:
    """One run of the benchmark."""

    repository: Path
    command: tuple[str, ...]
    models: tuple[str, ...] = MODELS
    connections: tuple[int, ...] = (32, 1, 8)
    pairs: int = 5
    seconds: float = 5.0
    probe_seconds: float = 0.8
    minutes: float = 25.0
    inline: bool = False
    quiet: float = 0.0
    instructions: bool = False
    systems: tuple[str, ...] = ORDER


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: a system under a number of connections, in one pair."""

    model: str
    connections: int
    pair: int
    system: str
    seconds: float

    @property
    def key(self) -> str:
        """Its name in the progress log."""
        return f"{self.model}/{self.connections}/{self.pair}/{self.system}"

    @property
    def lone(self) -> bool:
        """Whether it is about one request at a time."""
        return self.connections == 1


def _weight(model: str, connections: int) -> float:
    """Length of a run relative to `seconds`."""
    return 1.6 if model in SLOW and connections == max(32, connections) else 1.0


def _systems(options: Options, connections: int) -> list[str]:
    """Raw ONNX Runtime knows no connections: it is measured next to one (latency) and to the most (throughput)."""
    ends = (1, max(options.connections))
    return [s for s in ORDER if s in options.systems and (s != "ort" or connections in ends)]


def cells(options: Options) -> list[Cell]:
    """Every measurement, in order, shortened where the time allowed would not hold them all."""
    rows = [
        (model, connections, pair, system)
        for model in options.models
        for connections in options.connections
        for pair in range(options.pairs)
        for system in _systems(options, connections)
    ]
    load = sum(_weight(model, connections) for model, connections, _, _ in rows)
    # the probe of baseline (b): six shapes, two rounds, about 0.7 s to start each
    fixed = len(rows) * CELL_OVERHEAD + len(options.models) * (MODEL_OVERHEAD + 12 * (options.probe_seconds + 0.7))
    # wrk runs for whole seconds
    fits = max(1, int((options.minutes * 60 - fixed) / max(load, 1)))
    seconds = min(options.seconds, fits)
    return [
        Cell(model, connections, pair, system, round(seconds * _weight(model, connections)))
        for model, connections, pair, system in rows
    ]
