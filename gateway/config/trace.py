"""`--trace-config` in Triton's form: `rate=N`, `level=L`, `count=N`, `mode=M`, `triton,file=PATH` and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LEVELS = ("TIMESTAMPS", "TENSORS")
MODES = ("triton", "opentelemetry")


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """What is traced until a client changes it; without a `file`, and without a level, nothing."""

    level: tuple[str, ...] = ()  # of `LEVELS`; empty is OFF
    rate: int = 1000
    count: int = -1
    mode: str = "triton"
    file: Path | None = None
    log_frequency: int = 0
    url: str = "http://localhost:4318/v1/traces"
    resource: tuple[tuple[str, str], ...] = (("service.name", "triton-inference-server"),)

    @property
    def possible(self) -> bool:
        """Whether there is a place for traces."""
        return self.mode != "triton" or self.file is not None


def read_trace_config(entries: Iterable[str]) -> TraceConfig:
    """All of the `--trace-config` given. Raises ValueError for one that means nothing here."""
    config = TraceConfig()
    for entry in entries:
        key, equals, value = entry.partition("=")
        read = _READERS.get(key)
        if read is None or not equals:
            raise ValueError(f"--trace-config {entry} is not known; expected one of {', '.join(_READERS)} and =VALUE")
        config = replace(config, **{_FIELDS.get(key, key): read(value, config)})
    if "TENSORS" in config.level and config.mode == "opentelemetry":
        raise ValueError("--trace-config level=TENSORS is of mode=triton only; spans have no tensors")
    if config.level and not config.possible:
        raise ValueError("--trace-config level needs --trace-config triton,file=PATH, where the traces go")
    return config


def _level(value: str, so_far: TraceConfig) -> tuple[str, ...]:
    if value == "OFF":
        return ()
    if value not in LEVELS:
        raise ValueError(f"--trace-config level={value}: expected OFF, {' or '.join(LEVELS)}")
    return tuple(level for level in LEVELS if level == value or level in so_far.level)


def _mode(value: str, _: TraceConfig) -> str:
    if value not in MODES:
        raise ValueError(f"--trace-config mode={value}: expected {' or '.join(MODES)}")
    return value


def _file(value: str, _: TraceConfig) -> Path:
    path = Path(value)
    if not path.name or not path.parent.is_dir():
        raise ValueError(f"--trace-config triton,file={value}: its folder does not exist; make it, or name another")
    return path


def _number(least: int) -> Callable[[str, TraceConfig], int]:
    def read(value: str, _: TraceConfig) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            raise ValueError(f"--trace-config: expected a number of {least} or more, got '{value}'")
        return number

    return read


def _resource(value: str, so_far: TraceConfig) -> tuple[tuple[str, str], ...]:
    key, equals, text = value.partition("=")
    if not key or not equals:
        raise ValueError(f"--trace-config opentelemetry,resource={value}: expected KEY=VALUE")
    return (*(pair for pair in so_far.resource if pair[0] != key), (key, text))


_READERS: dict[str, Callable[[str, TraceConfig], Any]] = {
    "level": _level,
    "rate": _number(1),
    "count": _number(-1),
    "mode": _mode,
    "triton,file": _file,
    "triton,log-frequency": _number(0),
    "opentelemetry,url": lambda value, _: value,
    "opentelemetry,resource": _resource,
}
_FIELDS = {
    "opentelemetry,url": "url",
    "opentelemetry,resource": "resource",
    "triton,file": "file",
    "triton,log-frequency": "log_frequency",
}
