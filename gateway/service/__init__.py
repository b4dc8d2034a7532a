"""The gateway side of an inference and of model control. Transports call `Service` and nothing else."""

from gateway.service.service import Behind, Service

__all__ = ["Behind", "Service"]
