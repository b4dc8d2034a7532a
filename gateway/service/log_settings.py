"""The logging extension: which lines are written, read and changed while the gateway runs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

from gateway.service.registers import Registers
from gateway.telemetry import switch_logging

LogValue: TypeAlias = str | int | bool

LOG_NAMES = ("log_file", "log_info", "log_warning", "log_error", "log_verbose_level", "log_format")
FORMATS = ("default", "ISO8601")
NOTHING: Mapping[str, LogValue] = MappingProxyType({})
_NAME = "logging"


class LogSettings:
    """Triton's log settings by name. `log_file` is empty where lines go to standard error; it cannot be changed.

    `log_format` is kept for clients that read it back: every line has its time in ISO 8601, whatever it says.
    """

    def __init__(self, registers: Registers, first: Mapping[str, LogValue] = NOTHING) -> None:
        """`first` are those that the process was started with."""
        self._registers = registers
        self._first: dict[str, LogValue] = {
            "log_file": "",
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "default",
            **first,
        }
        registers.on(_NAME, lambda _, value: _apply(self._first | value))

    async def read(self) -> Mapping[str, LogValue]:
        """The settings in force. Raises `GatewayError`."""
        await self._registers.refresh()
        return self._now()

    async def change(self, news: Mapping[str, LogValue]) -> Mapping[str, LogValue]:
        """Change some, whose types the transport has checked, in every process. Raises `GatewayError`."""
        await self._registers.refresh()
        if news:
            await self._registers.set(_NAME, {**(self._registers.get(_NAME) or {}), **news})
        return self._now()

    def _now(self) -> Mapping[str, LogValue]:
        return self._first | (self._registers.get(_NAME) or {})


def _apply(settings: Mapping[str, LogValue]) -> None:
    switch_logging(
        info=bool(settings["log_info"]),
        warning=bool(settings["log_warning"]),
        error=bool(settings["log_error"]),
        verbose=int(settings["log_verbose_level"]),
    )
