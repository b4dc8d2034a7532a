"""The metrics that the code of models keeps (`pb_utils.MetricFamily`), those of all instances of this process together.

As with Triton there is one registry: a family is known by its name and has one kind, and instances that ask for the same
labels share one metric. It is there until the last family object that asked for it is gone, or its instance.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from gateway.errors import InvalidArgument, ResourceExhausted
from gateway.telemetry import Buckets, Family

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]
Act: TypeAlias = Literal["open", "close", "make", "add", "set", "observe", "read"]
Labels: TypeAlias = tuple[tuple[str, str], ...]

_MOST = 10_000  # metrics of a process
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OURS = ("nv_", "gateway_", "process_")


class Measure(msgspec.Struct, array_like=True, gc=False):
    """What the code of a model does to a metric.

    `family` is the family object's number in its instance. `act` is `open` or `close` of the family, `make` of the
    metric with these labels, `add`, `set` and `observe` of a value, or `read`.
    """

    act: Act
    family: int
    name: str = ""
    help: str = ""
    kind: Kind = "counter"
    labels: Labels = ()
    buckets: tuple[float, ...] = ()
    value: float = 0.0


@dataclass(slots=True)
class _Metric:
    bounds: tuple[float, ...]
    value: float = 0.0  # of a histogram the sum
    counts: list[int] = field(default_factory=list)
    users: int = 0


@dataclass(slots=True)
class _Known:
    """A family; `users` are the family objects."""

    help: str
    kind: Kind
    users: int = 0
    metrics: dict[Labels, _Metric] = field(default_factory=dict)


class Measures:
    """The registry. For one event loop, but for `families`."""

    def __init__(self) -> None:
        self.known: dict[str, _Known] = {}
        self.count = 0  # of metrics

    def families(self) -> list[Family]:
        """What they are now, to be shown. From any thread."""
        return [
            Family(name, known.kind, known.help, [(dict(labels), _shown(each, known)) for labels, each in metrics])
            for name, known in list(self.known.items())
            if (metrics := sorted(known.metrics.copy().items()))
        ]


class Owner:
    """One instance, and what it has in the registry. What it may not do raises `GatewayError`."""

    def __init__(self, measures: Measures) -> None:
        self._measures = measures
        self._families: dict[int, tuple[str, set[Labels]]] = {}  # by number: its name, and the metrics it asked for

    def act(self, measure: Measure) -> float:
        """Do it; gives the value that was read."""
        if measure.act == "open":
            self._open(measure)
            return 0.0
        name, mine = self._families[measure.family]
        if measure.act == "close":
            self._close(measure.family)
            return 0.0
        known = self._measures.known[name]
        if measure.act == "make":
            self._make(known, mine, measure)
            return 0.0
        metric = known.metrics[measure.labels]
        if measure.act == "add":
            metric.value += measure.value
        elif measure.act == "set":
            metric.value = measure.value
        elif measure.act == "observe":
            metric.value += measure.value
            metric.counts[bisect_left(metric.bounds, measure.value)] += 1
        return metric.value

    def close(self) -> None:
        """The instance is gone."""
        for number in [*self._families]:
            self._close(number)

    def _open(self, measure: Measure) -> None:
        if _NAME.fullmatch(measure.name) is None or measure.name.startswith(_OURS):
            raise InvalidArgument(
                f"'{measure.name}' cannot be a metric's name: letters, digits, '_' and ':', and {', '.join(_OURS)} are "
                "the server's own"
            )
        known = self._measures.known.setdefault(measure.name, _Known(_line(measure.help), measure.kind))
        if known.kind != measure.kind:
            raise InvalidArgument(f"metric family '{measure.name}' is there already, as a {known.kind}")
        known.users += 1
        self._families[measure.family] = measure.name, set()

    def _make(self, known: _Known, mine: set[Labels], measure: Measure) -> None:
        names = [name for name, _ in measure.labels]
        if bad := [name for name in names if _LABEL.fullmatch(name) is None or _taken(name, known.kind)]:
            raise InvalidArgument(f"'{bad[0]}' cannot be a label's name")
        metric = known.metrics.get(measure.labels)
        if metric is None:
            if self._measures.count >= _MOST:
                raise ResourceExhausted(f"models keep {_MOST} metrics, which is as many as there may be")
            counts = [0] * (len(measure.buckets) + 1) if known.kind == "histogram" else []
            metric = known.metrics[measure.labels] = _Metric(measure.buckets, counts=counts)
            self._measures.count += 1
        if measure.labels not in mine:
            mine.add(measure.labels)
            metric.users += 1

    def _close(self, number: int) -> None:
        name, mine = self._families.pop(number)
        known = self._measures.known[name]
        for labels in mine:
            metric = known.metrics[labels]
            metric.users -= 1
            if not metric.users:
                del known.metrics[labels]
                self._measures.count -= 1
        known.users -= 1
        if not known.users:
            del self._measures.known[name]


def _taken(label: str, kind: Kind) -> bool:
    """Whether Prometheus has a use of its own for the label: whoever reads the metrics would refuse all of them."""
    return label.startswith("__") or (kind == "histogram" and label == "le")


def _line(text: str) -> str:
    """A description as Prometheus wants it, on one line."""
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _shown(metric: _Metric, known: _Known) -> float | Buckets:
    if known.kind != "histogram":
        return _plain(metric.value)
    return Buckets(tuple(map(_plain, metric.bounds)), tuple(metric.counts), _plain(metric.value))


def _plain(value: float) -> float:
    """As Triton writes it: a whole number without a fraction."""
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def sorted_labels(labels: Sequence[tuple[str, str]]) -> Labels:
    """Labels by which a metric is known."""
    return tuple(sorted((str(name), str(value)) for name, value in labels))
