"""Several processes of one machine as one command: `supervise` is the entry."""

from gateway.supervisor.supervisor import plan, supervise

__all__ = ["plan", "supervise"]
