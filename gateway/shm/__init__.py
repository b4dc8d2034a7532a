"""Clients' shared memory: its regions, and what is said of them."""

from gateway.shm.regions import Memory, Region, Regions, registered

__all__ = ["Memory", "Region", "Regions", "registered"]
