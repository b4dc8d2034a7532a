"""`pb_utils.Logger` and the metrics of `pb_utils`: what the code of a model tells operators.

Lines go to the gateway's log as events. Metrics count in the process of the instance and are not exported by this
version, which is said once in the log.
"""

from __future__ import annotations

import enum
import logging
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import ClassVar

from gateway.engines.python.errors import TritonModelException
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
    """What a metric is."""

    COUNTER = enum.auto()
    GAUGE = enum.auto()
    HISTOGRAM = enum.auto()


class Metric:
    """One number of a family, or the counts of a histogram."""

    def __init__(self, kind: MetricKind, buckets: Sequence[float]) -> None:
        self._kind = kind
        self._value = 0.0
        self._buckets = sorted(buckets)
        self._counts = [0] * (len(self._buckets) + 1)
        self._lock = threading.Lock()

    def increment(self, value: float) -> None:
        """Add to it. A counter only grows."""
        self._require(MetricKind.COUNTER, MetricKind.GAUGE)
        if self._kind is MetricKind.COUNTER and value < 0:
            raise TritonModelException("a counter cannot be incremented by a negative value")
        with self._lock:
            self._value += value

    def set(self, value: float) -> None:
        """Set it."""
        self._require(MetricKind.GAUGE)
        self._value = value

    def observe(self, value: float) -> None:
        """Count a value in its bucket."""
        self._require(MetricKind.HISTOGRAM)
        with self._lock:
            self._counts[bisect_left(self._buckets, value)] += 1

    def value(self) -> float:
        """Its number."""
        self._require(MetricKind.COUNTER, MetricKind.GAUGE)
        return self._value

    def _require(self, *kinds: MetricKind) -> None:
        if self._kind not in kinds:
            raise TritonModelException(f"a metric of kind {self._kind.name} cannot do this")


class MetricFamily:
    """Metrics of one name and different labels."""

    COUNTER = MetricKind.COUNTER
    GAUGE = MetricKind.GAUGE
    HISTOGRAM = MetricKind.HISTOGRAM
    model: ClassVar[str] = ""  # set in a subclass of each model's own

    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        self._kind = kind
        reason = "custom metrics of Python models are not exported by this version"
        log_event(
            "model_metric_ignored", logging.WARNING, model=self.model, metric=name, help=description, reason=reason
        )

    def Metric(self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None) -> Metric:  # noqa: N802, ARG002 - Triton's names; nobody reads the labels
        """A new metric of the family."""
        if (self._kind is MetricKind.HISTOGRAM) != bool(buckets):
            raise TritonModelException("buckets are for histograms, which need them")
        return Metric(self._kind, buckets or ())
