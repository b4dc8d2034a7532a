"""Which models have trace settings."""

from __future__ import annotations

from gateway.errors import GatewayError, InvalidArgument
from gateway.service import Service


def require_traceable(service: Service, model: str) -> None:
    """Raise `InvalidArgument` for a model that is not ready; all models together have no name."""
    try:
        ready = not model or service.model_ready(model)
    except GatewayError:
        ready = False
    if not ready:
        raise InvalidArgument(f"Request for unknown model : {model}")
