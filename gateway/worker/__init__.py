"""The worker side: loads models, takes jobs from the queue and runs them in batches. `Worker` is the entry."""

from gateway.worker.start import open_worker
from gateway.worker.worker import Worker

__all__ = ["Worker", "open_worker"]
