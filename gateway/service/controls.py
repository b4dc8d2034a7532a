"""What clients may read and change while the gateway runs: logging and tracing."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from gateway.config.trace import TraceConfig
from gateway.errors import GatewayError
from gateway.service.log_settings import NOTHING, LogSettings, LogValue
from gateway.service.registers import Ask, Registers
from gateway.service.trace_settings import TraceSettings
from gateway.telemetry import log_event


class Controls:
    """The settings of one process, which `registers` keep the same in all."""

    def __init__(
        self,
        process: str = "",
        ask: Ask | None = None,
        *,
        logs: Mapping[str, LogValue] = NOTHING,
        traces: TraceConfig | None = None,
    ) -> None:
        """`logs` and `traces` are what the process was started with."""
        self.registers = Registers(process, ask)
        self.logs = LogSettings(self.registers, logs)
        self.traces = TraceSettings(self.registers, traces)

    async def informed(self) -> None:
        """Learn what clients changed before this process was there."""
        try:
            await self.registers.refresh()
        except GatewayError as problem:  # it learns with the next that somebody reads or changes
            log_event("settings_unknown", logging.WARNING, reason=problem.message)
