"""The trace extension: which requests are traced and how, read and changed while the gateway runs.

A setting is a model's own, else the global one, else what the gateway was started with; null takes one back. Each
process samples for itself: every `trace_rate`-th of the requests that come to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gateway.config.trace import LEVELS, TraceConfig
from gateway.errors import InvalidArgument, Unsupported
from gateway.service.registers import Registers

TraceValue: TypeAlias = str | list[str]
News: TypeAlias = Mapping[str, list[str] | None]
"""Settings by name, each the values that a client gave, or None to take it back."""

_NAME = "trace"
_INT = re.compile(r"\s*([+-]?\d+)")
_LIMITS = {"trace_rate": (0, (1 << 32) - 1), "trace_count": (-1, (1 << 31) - 1), "log_frequency": (0, (1 << 32) - 1)}
_NAMES = ("trace_file", "trace_level", *_LIMITS)


@dataclass(slots=True)
class Sampling:
    """The settings of a model in force, and what was sampled by them."""

    level: tuple[str, ...]
    rate: int
    count: int  # that are left; -1 for any number
    log_frequency: int
    _seen: int = field(default=0, repr=False)

    @property
    def on(self) -> bool:
        """Whether a request may be traced at all."""
        return bool(self.level) and self.rate > 0 and self.count != 0

    def sample(self) -> bool:
        """Whether to trace this request."""
        self._seen += 1
        if not self.on or self._seen % self.rate:
            return False
        if self.count > 0:
            self.count -= 1
        return True


class TraceSettings:
    """Triton's trace settings. `on` says whether any request may be traced, so that nobody need ask while none is."""

    def __init__(self, registers: Registers, config: TraceConfig | None = None) -> None:
        self._registers = registers
        self._config = config or TraceConfig()
        self._models: set[str] = set()  # with settings of their own
        self._samplings: dict[str, Sampling] = {}
        self.on = bool(self._config.level)
        registers.on(_NAME, self._on_changed)

    def sample(self, model: str) -> Sampling | None:
        """By which settings to trace this request of a model; None not to."""
        sampling = self._of(model)
        return sampling if sampling.sample() else None

    async def read(self, model: str = "") -> dict[str, TraceValue]:
        """The settings of a model, or the global ones. Raises `GatewayError`."""
        await self._registers.refresh()
        return self._told(model)

    async def change(self, model: str, news: News) -> dict[str, TraceValue]:
        """Change some in every process. Raises `GatewayError`."""
        read = {name: _read(name, values) for name, values in news.items() if name in _NAMES}
        await self._registers.refresh()
        if read:
            kept = {**self._own(model), **read}
            kept = {name: value for name, value in kept.items() if value is not None}
            self._check(self._sampling(model, kept), kept)
            await self._registers.set(f"{_NAME}:{model}" if model else _NAME, kept)
        return self._told(model)

    def _check(self, sampling: Sampling, own: Mapping[str, Any]) -> None:
        if sampling.level and not sampling.rate:
            raise InvalidArgument("Attempting to set invalid trace setting :sample rate must be non-zero")
        if "TENSORS" in sampling.level and self._config.mode == "opentelemetry":
            raise InvalidArgument("Attempting to set invalid trace setting :spans have no tensors, use TIMESTAMPS")
        if sampling.level and not self._config.possible:
            raise InvalidArgument("Attempting to set invalid trace setting :trace file name is not given")
        if own.get("trace_count", -1) >= 0 and not self._registers.alone:
            raise Unsupported(
                "'trace_count' cannot be counted over several gateways; set it to -1, and use 'trace_rate'"
            )

    def _told(self, model: str) -> dict[str, TraceValue]:
        sampling = self._of(model)
        told: dict[str, TraceValue] = {
            "trace_level": [*sampling.level] or ["OFF"],
            "trace_rate": str(sampling.rate),
            "trace_count": str(sampling.count),
        }
        if self._config.mode == "triton":
            file = "" if self._config.file is None else str(self._config.file)
            return told | {
                "log_frequency": str(sampling.log_frequency),
                "trace_file": file,
                "trace_mode": "triton",
            }
        return told | {"trace_mode": self._config.mode, "url": self._config.url}

    def _of(self, model: str) -> Sampling:
        key = model if model in self._models else ""
        sampling = self._samplings.get(key)
        if sampling is None:
            sampling = self._samplings[key] = self._sampling(key, self._own(key))
        return sampling

    def _own(self, model: str) -> dict[str, Any]:
        return self._registers.get(f"{_NAME}:{model}" if model else _NAME) or {}

    def _sampling(self, model: str, own: Mapping[str, Any]) -> Sampling:
        settings = {**(self._own("") if model else {}), **own}
        return Sampling(
            tuple(settings.get("trace_level", self._config.level)),
            settings.get("trace_rate", self._config.rate),
            settings.get("trace_count", self._config.count),
            settings.get("log_frequency", self._config.log_frequency),
        )

    def _on_changed(self, name: str, own: Mapping[str, Any]) -> None:
        model = name[len(_NAME) + 1 :]
        if model and own:
            self._models.add(model)
        else:
            self._models.discard(model)
        self._samplings.clear()  # with what they have counted, as in Triton
        self.on = any(self._of(each).on for each in ("", *self._models))


def _read(name: str, values: list[str] | None) -> Any:
    """What is kept for the values that a client gave."""
    if name == "trace_file":
        raise Unsupported("trace file location can not be updated through network protocol")
    if values is None:
        return None
    if name == "trace_level":
        return _levels(values)
    if len(values) != 1:
        raise InvalidArgument(f"expect only 1 value for '{name}'")
    return _number(name, values[0])


def _levels(values: list[str]) -> list[str]:
    if "OFF" in values:
        if len(values) > 1:
            raise InvalidArgument("Expect only one trace level 'OFF' is specified")
        return []
    if unknown := [value for value in values if value not in LEVELS]:
        raise InvalidArgument(f"unknown trace level '{unknown[0]}'; expected OFF, {', '.join(LEVELS)}")
    return [level for level in LEVELS if level in values]


def _number(name: str, text: str) -> int:
    """The number that a text begins with, as `std::stoi` reads it."""
    found = _INT.match(text)
    if found is None:
        raise InvalidArgument(f"Unable to parse '{name}', got: {text}")
    number = int(found[1]) if len(found[1]) < 12 else 1 << 40
    least, most = _LIMITS[name]
    if name == "trace_count" and number < least:
        raise InvalidArgument(f"Unable to parse '{name}'. Expecting value >= {least}, got:{text}")
    if not least <= number <= most:
        raise InvalidArgument(f"Unable to parse '{name}', value is out of range [ {least}, {most} ], got: {text}")
    return number
