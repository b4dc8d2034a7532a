"""The fake TensorRT's loggers."""

from __future__ import annotations


class ILogger:
    """What messages are told to; derived classes override `log`."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, msg: str) -> None:
        """Take a message."""
        raise NotImplementedError


class Logger(ILogger):
    """One that keeps nothing."""

    def __init__(self, min_severity: int = ILogger.WARNING) -> None:
        self.min_severity = min_severity

    def log(self, severity: int, msg: str) -> None:
        """Take a message."""
