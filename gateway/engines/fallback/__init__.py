"""The engine that is a chain: what one link cannot do the next one does, and it is never kept silent."""

from gateway.engines.fallback.engine import FallbackEngine, open_chain

__all__ = ["FallbackEngine", "open_chain"]
