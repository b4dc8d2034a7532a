"""`Children`: all child processes of this gateway, which instance lives in which, and what is told of them.

An instance has a child of its own until there are `most` of them; from then on small CPU models share those that may be
shared. All tasks of the engines in children are in its group, and all children end with it.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway.config.log_levels import levels_off
from gateway.config.settings import Settings
from gateway.engines.isolated.home import Home, least_crowded
from gateway.engines.isolated.limits import Isolation
from gateway.engines.isolated.nursery import Nursery
from gateway.engines.measures import Measures
from gateway.statistics import Statistics
from gateway.telemetry import Family, log_event
from gateway.types import Infer

SUPPORTED = sys.platform == "linux"
"""Elsewhere instances live on threads: forks, descriptors in packets and deaths that follow the parent's are Linux."""

_BEAT = 5.0  # seconds


class Children:
    """A context manager. `wanted` is what the setting `--isolation` says, `most` what `--max-children` does."""

    def __init__(
        self,
        statistics: Statistics,
        wanted: Isolation = "auto",
        most: int = 0,
        *,
        log_format: str = "text",
        verbose: int = 0,
        off: Sequence[str] = (),
        beat: float = _BEAT,
    ) -> None:
        """0 children are four for each core that this process may use. `beat` is in seconds."""
        self.statistics = statistics
        self.wanted = wanted
        self.infer: Infer | None = None  # how models call models, set before anything is loaded
        self.tasks = asyncio.TaskGroup()
        self.measures = Measures()  # of the code of models
        self.nursery = Nursery(log_format, verbose, off)
        self._most = most or 4 * len(os.sched_getaffinity(0) if SUPPORTED else (0,))
        self._beat = beat
        self.homes: list[Home] = []  # those that are there
        self._placing = asyncio.Lock()
        self._closing: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self.shortages = 0

    @classmethod
    def of(cls, settings: Settings, statistics: Statistics) -> Self:
        """As the settings say."""
        return cls(
            statistics,
            settings.isolation,
            settings.max_children,
            log_format=settings.log_format,
            verbose=settings.log_verbose,
            off=levels_off(settings),
        )

    async def __aenter__(self) -> Self:
        await self.tasks.__aenter__()
        self._timer = asyncio.get_running_loop().call_later(self._beat, self._on_beat)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for close in list(self._closing):  # each takes itself back
            close()
        try:
            await self.tasks.__aexit__(kind, error, trace)
        finally:
            for home in self.homes:
                home.close()
            await self.nursery.close()

    def at_end(self, close: Callable[[], None]) -> None:
        """Have `close` called before the tasks are waited for, so that they end."""
        self._closing.append(close)

    def not_at_end(self, close: Callable[[], None]) -> None:
        """Take `at_end` back."""
        self._closing.remove(close)

    async def home(self, name: str, preload: Sequence[str], *, shares: bool) -> Home:
        """A home for an instance, which is in it from now on. Raises `Unavailable` when none can be started."""
        async with self._placing:
            if shares and len(self.homes) >= self._most and (found := least_crowded(self.homes)):
                found.names.add(name)
                return found
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                child = await self.nursery.spawn(name, preload, theirs)
            except BaseException:
                ours.close()
                raise
            home = Home(child, self.nursery, ours, shared=shares)
            home.names.add(name)
            self.homes.append(home)
            child.exited.add_done_callback(lambda _: self._forget(home))
            return home

    def short(self, why: str) -> None:
        """Shared memory could not be had: the arrays go by the line, which takes longer."""
        self.shortages += 1
        if self.shortages == 1:
            log_event("shared_memory_short", 30, reason=why, action="tensors go through a socket, which is slower")

    def metrics(self) -> list[Family]:
        """How many children there are and their memory. Reads /proc: call it off the event loop."""
        homes = [home for home in list(self.homes) if home.child.pid]
        text = "Memory that the child process keeps in RAM, in bytes"
        return [
            Family("gateway_children", "gauge", "Child processes that run models", [({}, len(homes))]),
            Family("gateway_child_memory_bytes", "gauge", text, list(_memory(homes))),
            Family(
                "gateway_shared_memory_shortages_total",
                "counter",
                "Times that tensors went through a socket because there was no shared memory for them",
                [({}, self.shortages)],
            ),
        ]

    def _forget(self, home: Home) -> None:
        home.close()
        self.homes.remove(home)

    def _on_beat(self) -> None:
        for home in self.homes:
            if home.child.pid and not home.beat():
                home.kill("silent")
        self._timer = asyncio.get_running_loop().call_later(self._beat, self._on_beat)


def _memory(homes: list[Home]) -> Iterator[tuple[dict[str, str], float]]:
    for home in homes:
        try:
            pages = int(Path(f"/proc/{home.child.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # it has just ended
        yield {"child": home.child.name, "pid": str(home.child.pid)}, pages * resource.getpagesize()
