"""`pb_utils.Logger` and the metrics of `pb_utils`: what the code of a model tells operators.

Lines go to the gateway's log as events. Metrics are kept in the gateway's process, where those of all instances meet; a
model that says something of one does not wait for that, unless it wants to know the value.
"""

from __future__ import annotations

import enum
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from gateway.engines.measures import Act, Labels, Measure, sorted_labels
from gateway.engines.python.errors import TritonModelException
from gateway.errors import GatewayError
from gateway.telemetry import log_event


class Level(enum.IntEnum):
    """How grave a line is: `LogLevel` to the model's code."""

    INFO = logging.INFO
    WARNING = logging.WARNING
    ERROR = logging.ERROR
    VERBOSE = logging.DEBUG


class Logger:
    """Writes lines to the gateway's log."""

    LogLevel = Level
    INFO = Level.INFO
    WARNING = Level.WARNING
    ERROR = Level.ERROR
    VERBOSE = Level.VERBOSE
    model: ClassVar[str] = ""  # set in a subclass of each model's own

    @classmethod
    def log(cls, message: str, level: Level = Level.INFO) -> None:
        """Write a line of this level."""
        log_event("model_log", int(level), model=cls.model, message=str(message))

    @classmethod
    def log_info(cls, message: str) -> None:
        """Write an INFO line."""
        cls.log(message, Level.INFO)

    @classmethod
    def log_warn(cls, message: str) -> None:
        """Write a WARNING line."""
        cls.log(message, Level.WARNING)

    @classmethod
    def log_error(cls, message: str) -> None:
        """Write an ERROR line."""
        cls.log(message, Level.ERROR)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        """Write a line that appears with `--log-verbose` only."""
        cls.log(message, Level.VERBOSE)


class MetricKind(enum.Enum):
    """What a metric is, by its name in Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


_CAN = {
    MetricKind.COUNTER: ("Increment", "Value"),
    MetricKind.GAUGE: ("Increment", "Set", "Value"),
    MetricKind.HISTOGRAM: ("Observe",),
}


class Metric:
    """One number of a family, or the counts of a histogram; it can be used for as long as its family is there."""

    def __init__(self, family: MetricFamily, labels: Labels) -> None:
        self._family = weakref.ref(family)
        self._labels = labels

    def increment(self, value: float) -> None:
        """Add to it. A counter only grows."""
        family = self._usable("Increment", "increment metric value")
        if family.kind is MetricKind.COUNTER and value < 0:
            raise TritonModelException(
                "Failed to increment metric value: TRITONSERVER_METRIC_KIND_COUNTER can only be incremented monotonically "
                "by non-negative values."
            )
        family.tell("add", labels=self._labels, value=float(value))

    def set(self, value: float) -> None:
        """Set it."""
        self._usable("Set", "set metric value").tell("set", labels=self._labels, value=float(value))

    def observe(self, value: float) -> None:
        """Count a value in its bucket."""
        self._usable("Observe", "observe metric value").tell("observe", labels=self._labels, value=float(value))

    def value(self) -> float:
        """Its number, to which other instances may have added."""
        return self._usable("Value", "get metric value").tell("read", wait=True, labels=self._labels)

    def _usable(self, wish: str, doing: str) -> MetricFamily:
        family = self._family()
        if family is None:
            raise TritonModelException(
                "Invalid metric operation as the corresponding 'MetricFamily' has been deleted. The 'MetricFamily' object "
                "should be kept alive while the 'Metric' is used."
            )
        if wish not in _CAN[family.kind]:
            raise TritonModelException(
                f"Failed to {doing}: TRITONSERVER_METRIC_KIND_{family.kind.name} does not support {wish}"
            )
        return family


class MetricFamily:
    """Metrics of one name and different labels, shown at `/metrics` while this is there."""

    COUNTER = MetricKind.COUNTER
    GAUGE = MetricKind.GAUGE
    HISTOGRAM = MetricKind.HISTOGRAM
    measure: ClassVar[Callable[..., float]]  # set in a subclass of each model's own: `Channel.measure`
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        if not isinstance(kind, MetricKind):
            raise TritonModelException("kind must be one of MetricFamily.COUNTER, GAUGE and HISTOGRAM")
        self.kind = kind
        self._number = -1
        number = next(self._numbers)
        try:
            type(self).measure(Measure("open", number, name, description, kind.value))
        except GatewayError as error:
            raise TritonModelException(f"Error when creating MetricFamily: {error.message}") from None
        self._number = number

    def __del__(self) -> None:
        if getattr(self, "_number", -1) >= 0:
            self.tell("close")

    def Metric(self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None) -> Metric:  # noqa: N802 - Triton's name
        """The metric of the family with these labels; one for the same labels is the same."""
        wrong = ""
        if self.kind is not MetricKind.HISTOGRAM and buckets is not None:
            wrong = f"Unexpected args found in {self.kind.value} Metric constructor."
        elif self.kind is MetricKind.HISTOGRAM and buckets is None:
            wrong = "Bucket boundaries not found in Metric args."
        bounds = tuple(map(float, buckets or ()))
        if any(low >= high for low, high in itertools.pairwise(bounds)):
            wrong = "Bucket boundaries must be strictly increasing."
        if wrong:
            raise TritonModelException(f"Error when creating Metric: {wrong}")
        known = sorted_labels([*(labels or {}).items()])
        try:
            self.tell("make", wait=True, labels=known, buckets=bounds)
        except GatewayError as error:
            raise TritonModelException(f"Error when creating Metric: {error.message}") from None
        return Metric(self, known)

    def tell(self, act: Act, *, wait: bool = False, **more: Any) -> float:
        """Have it done to the family, or to a metric of it."""
        return type(self).measure(Measure(act, self._number, **more), wait=wait)
