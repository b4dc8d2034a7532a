"""Clients' shared memory: its regions, and what is said of them."""

from gateway.shm.regions import Region, Regions, registered

__all__ = ["Region", "Regions", "registered"]
