"""What TensorRT says went wrong: a refusal of its interface is a None or a False, and the reason is in its log."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

_PATH = re.compile(r"(?<![\w.])(?:/[\w.+-]+){2,}")
_SOURCE = re.compile(r"[. ]*\(?In \w+ at <path>:\d+\)?")
_MOST = 600  # characters


class ErrorLog:
    """The last errors of what was made with its `logger`, which must outlive all that."""

    def __init__(self, trt: Any) -> None:
        """`trt` is TensorRT's module."""
        self._errors: deque[str] = deque(maxlen=5)
        self.logger = _logger(trt, self._errors)

    def clear(self) -> None:
        """Begin anew."""
        self._errors.clear()

    def __str__(self) -> str:
        """The errors, without paths; empty for none."""
        return "; ".join(plain(text) for text in self._errors)[:_MOST]


def plain(text: str) -> str:
    """A message of TensorRT without paths and places in its source."""
    return _SOURCE.sub("", _PATH.sub("<path>", " ".join(text.split())))


def _logger(trt: Any, found: deque[str]) -> Any:
    """TensorRT's class must be its base, so it is made when that is there."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            """Part of trt.ILogger."""
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                found.append(msg)

    return Logger()
