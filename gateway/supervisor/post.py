"""`Post`: a place for one process, filled again whenever that process dies."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

from gateway.child import mortal
from gateway.telemetry import log_event

State: TypeAlias = Literal["starting", "ready", "leaving", "ended"]

_FIRST_DELAY, _LAST_DELAY = 0.1, 5.0  # seconds before a process that died is started again
_STEADY = 10.0  # seconds a process must have run for its end to be no repetition of the one before
_REFUSED = (1, 2)  # exit statuses of a command line or a configuration that cannot work
_ASKED = (-signal.SIGTERM, -signal.SIGKILL)  # of a process that was ended before it came to handle signals, or at once
_MAX_NEWS = 1 << 16


class Backoff:
    """How long to wait before a process is started again: twice as long each time, unless it ran for a while."""

    def __init__(self) -> None:
        self._next = _FIRST_DELAY

    def after(self, ran: float) -> float:
        """The seconds to wait after a run of so many."""
        if ran >= _STEADY:
            self._next = _FIRST_DELAY
        delay, self._next = self._next, min(2 * self._next, _LAST_DELAY)
        return delay


class Post:
    """Keeps one process of `gateway serve` with these arguments.

    `changed` is called whenever `state` has changed, `failed` with the exit status when the process cannot start, or
    did not stop as it should.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        descriptors: Sequence[int],
        changed: Callable[[], None],
        failed: Callable[[int], None],
    ) -> None:
        """The process is given these `descriptors`, which stay open here."""
        self.name = name
        self.state: State = "starting"
        self.table = ""  # of the models that it serves
        self.restarts = 0
        self._arguments = arguments
        self._descriptors = descriptors
        self._changed = changed
        self._failed = failed
        self._process: Process | None = None
        self._was_ready = False
        self._stopping = asyncio.Event()
        self._unread = b""

    async def keep(self) -> None:
        """Run the process, again and again until `stop`. Cancelling kills it."""
        backoff = Backoff()
        while not self._stopping.is_set():
            started = time.monotonic()
            status = await self._run()
            if self._stopping.is_set():
                if status not in (0, *_ASKED):
                    log_event("process_ended_badly", logging.ERROR, name=self.name, exit_code=status)
                    self._failed(1)
                break
            if status in _REFUSED and not self._was_ready:
                log_event("process_cannot_start", logging.ERROR, name=self.name, exit_code=status)
                self._failed(status)
                break
            delay = backoff.after(time.monotonic() - started)
            self.restarts += 1
            log_event(
                "process_died",
                logging.ERROR,
                name=self.name,
                exit_code=status,
                restarts=self.restarts,
                restart_in=delay,
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()

    def stop(self, number: signal.Signals) -> None:
        """Ask the process to end, and start it no more."""
        self._stopping.set()
        # A process that has not come to handle its signals ends quietly by SIGTERM only.
        self._signal(number if self.state != "starting" else signal.SIGTERM)

    def kill(self) -> None:
        """End the process now, and start it no more."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _run(self) -> int:
        """One life of the process; its exit status, negative for a signal."""
        self._become("starting")
        news, told = os.pipe()
        os.set_blocking(news, False)
        loop = asyncio.get_running_loop()
        try:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *command([*self._arguments, "--status-fd", str(told)]),
                    stdin=DEVNULL,
                    pass_fds=(told, *self._descriptors),
                    start_new_session=True,  # a signal from the terminal is for us, who pass it on in order
                )
            finally:
                os.close(told)
            loop.add_reader(news, self._read, news)
            if self._stopping.is_set():
                self._signal(signal.SIGTERM)
            status = await self._process.wait()
            self._read(news)
            return status
        finally:
            self._signal(signal.SIGKILL)
            self._become("ended")
            loop.remove_reader(news)
            os.close(news)
            self._process = None
            self._unread = b""

    def _read(self, descriptor: int) -> None:
        """Take in what the process tells us, a line of JSON each time."""
        with suppress(BlockingIOError):
            said = os.read(descriptor, _MAX_NEWS)
            if not said:
                asyncio.get_running_loop().remove_reader(descriptor)
            *lines, self._unread = (self._unread + said).split(b"\n")
            for line in lines:
                told = json.loads(line)
                self.table = told.get("table", self.table)
                self._become(told["state"])

    def _become(self, state: State) -> None:
        self.state = state
        if state == "ready":
            self._was_ready = True
            if self.restarts:
                log_event("process_restarted", name=self.name, restarts=self.restarts)
        self._changed()


def command(arguments: Sequence[str]) -> list[str]:
    """What starts `gateway serve` with these arguments from the package that we are."""
    package = Path(__file__).parents[2]
    # Without -P the folder that we happen to be in would be searched for a package of this name first.
    path = [] if package == Path.cwd() else ["-P"]
    return mortal([sys.executable, *path, "-m", "gateway", "serve", *arguments])
