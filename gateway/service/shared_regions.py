"""Clients' shared memory regions, the same in every process of this host.

A client registers with the process that the kernel gives it, and its next request may go to another. So each process
opens what was registered with any of them, and tells the others before the client is answered. Of other hosts' regions
nothing is known: their memory is not here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gateway.errors import GatewayError
from gateway.service.registers import Registers
from gateway.shm import Memory, Regions
from gateway.telemetry import log_event


class SharedRegions:
    """The `regions` of this process, kept like those of all others on `host`. Every method may raise `GatewayError`."""

    kind = "system"
    word = "region"

    def __init__(self, regions: Regions, registers: Registers, host: str) -> None:
        self.regions = regions
        self.redis: SharedRegions | None = None  # those whose memory is in a Redis, if there is one for them
        self._registers = registers
        self._prefix = f"{self.word}:{host}:"
        registers.on(self.word, self._changed)

    async def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """See `Regions.register`."""
        await self._registers.refresh()
        self._open(name, key, offset, byte_size)
        try:
            await self._registers.set(self._prefix + name, [key, offset, byte_size])
        except GatewayError:
            self.regions.unregister(name, self.kind)
            raise

    async def unregister(self, name: str = "") -> None:
        """See `Regions.unregister`."""
        for region in await self.status():
            if name in ("", region.name):
                self.regions.unregister(region.name, self.kind)
                await self._registers.set(self._prefix + region.name, None)

    async def status(self, name: str = "") -> Sequence[Memory]:
        """See `Regions.status`."""
        await self._registers.refresh()
        return self.regions.status(name, self.kind)

    def _open(self, name: str, key: str, offset: int, byte_size: int) -> None:
        self.regions.register(name, key, offset, byte_size)

    def _changed(self, entry: str, value: Any) -> None:
        """A region was registered or forgotten, in this process or elsewhere."""
        if not entry.startswith(self._prefix):
            return
        name = entry.removeprefix(self._prefix)
        known = next((each for each in self.regions.status(kind=self.kind) if each.name == name), None)
        if known is not None and value == [known.key, known.offset, known.byte_size]:
            return
        if known is not None:
            self.regions.unregister(name, self.kind)
        if value is None:
            return
        try:
            self._open(name, *value)
        except GatewayError as problem:  # its client has removed it meanwhile, or may open more files there than here
            log_event("region_not_shared", logging.WARNING, region=name, reason=problem.message)
