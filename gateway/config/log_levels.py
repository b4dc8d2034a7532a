"""Which levels of log lines an operator has switched off."""

from __future__ import annotations

from gateway.config.settings import Settings


def levels_off(settings: Settings) -> tuple[str, ...]:
    """The levels of which no line is written: info, warning, error."""
    levels = {"info": settings.log_info, "warning": settings.log_warning, "error": settings.log_error}
    return tuple(level for level, on in levels.items() if not on)
