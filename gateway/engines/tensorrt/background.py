"""Has a plan built that is missing or stale, by a child process that runs `gateway build --plan`, while another engine
serves the version.

For the chain that runs the version: its link to TensorRT cannot be loaded until the plan is there. What the build does
is logged as it goes. A build that failed is not begun again for an hour, because it would fail again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path

from gateway import child, errors
from gateway.config.parse import config_json
from gateway.engines import driver
from gateway.engines.base import EngineSpec
from gateway.engines.tensorrt import packages, plan
from gateway.engines.tensorrt.plan import PlanMissing
from gateway.telemetry import log_event

_PATIENCE = 3600.0  # seconds
_LINE = 1 << 16  # bytes


class PlanKeeper:
    """Keeps the plan of one version for one device."""

    def __init__(self, spec: EngineSpec, clock: Callable[[], float] = time.monotonic) -> None:
        """`spec` is what will be loaded when the plan is there; `clock` gives seconds."""
        self._spec = spec
        self._clock = clock
        self._again = -1.0  # when a build may be begun
        self._why = ""

    async def prepare(self) -> bool:
        """Have the plan there; True when it was built now, False at once when that is not what is missing.

        Cancelling ends the build. Raises `Unavailable` when it failed, and for an hour after.
        """
        missing = await asyncio.to_thread(self._missing)
        if missing is None:
            return False
        if self._clock() < self._again:
            raise errors.Unavailable(self._why)
        log_event("plan_build_begins", **self._names(), reason=missing.message)
        begun = self._clock()
        status, last = await self._build()
        if status:
            self._again = self._clock() + _PATIENCE
            self._why = f"the plan of {self._spec.config.name}/{self._spec.version} could not be built: {last}"
            log_event("plan_build_failed", logging.WARNING, **self._names(), reason=last)
            raise errors.Unavailable(self._why)
        log_event("plan_built", **self._names(), seconds=round(self._clock() - begun, 1), plan=last)
        return True

    def _missing(self) -> PlanMissing | None:
        """Why there is no plan to load, if that is all that is missing. Blocking."""
        try:
            package = packages.chosen(self._spec.config)
            sm = "" if package.builtin else driver.probe().gpu(self._index()).sm
            plan.find(self._spec, sm)
        except PlanMissing as missing:
            return missing
        except errors.GatewayError:
            return None  # the load will say so
        return None

    async def _build(self) -> tuple[int, str]:
        """The exit status of a build, and the last line that it printed."""
        process = await asyncio.create_subprocess_exec(
            *child.mortal(self._command()), stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=_LINE
        )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(config_json(self._spec.config.proto)).encode())
            process.stdin.close()
            async with asyncio.TaskGroup() as tasks:
                said = tasks.create_task(self._follow(process))
                result = tasks.create_task(_last_line(process))
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return status, said.result() if status else result.result()

    def _command(self) -> list[str]:
        spec = self._spec
        nice = shutil.which("nice")  # what serves meanwhile goes first
        # As in the supervisor: without -P the folder that we happen to be in would be searched first.
        path = [] if Path(__file__).parents[3] == Path.cwd() else ["-P"]
        return [
            *([nice, "-n", "10"] if nice else []),
            sys.executable, *path, "-m", "gateway", "build", spec.config.name,
            "--model-repository", str(spec.path.parent.parent), "--version", spec.version, "--config", "-",
            "--plan", "--file", plan.source(spec), "--gpu", str(self._index()),
        ]  # fmt: skip

    async def _follow(self, process: Process) -> str:
        """Log what the build tells of its progress; returns its last line."""
        assert process.stderr is not None
        last = ""
        async for line in process.stderr:
            last = line.decode(errors="replace").strip()
            log_event("plan_build", **self._names(), progress=last)
        return last

    def _names(self) -> dict[str, str]:
        return {"model": self._spec.config.name, "version": self._spec.version}

    def _index(self) -> int:
        device = self._spec.device
        return int(device.removeprefix("gpu:")) if device.startswith("gpu:") else 0


async def _last_line(process: Process) -> str:
    assert process.stdout is not None
    text = (await process.stdout.read()).decode(errors="replace").strip()
    return text.splitlines()[-1] if text else ""
