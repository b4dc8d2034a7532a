"""The command `gateway`: `serve`, `models`, `explain`, `jobs`, `simulate` and `--version`. Turns errors into one line and an exit status."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gateway import __version__, errors, supervisor
from gateway.config import tritonserver as triton
from gateway.config.arguments import parse_args
from gateway.config.log_levels import levels_off
from gateway.config.settings import Settings
from gateway.telemetry import configure_logging, log_event, send_to_file

# What only some commands need is imported by them: a supervisor is half as large for it, and starts its processes sooner.
if TYPE_CHECKING:
    from gateway.app import Gateway
    from gateway.queues.base import InstanceState, PoolState

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h

USAGE = """usage: gateway COMMAND [options]

commands:
  serve     serve a folder of models over HTTP and gRPC
  worker    run models for gateways that share a queue in Redis; `serve --role worker`
  models    show what a folder of models would serve, and what is wrong with the rest; lint, config, new
  build     make smaller and faster files of a model, and judge them against it
  promote   serve a build of a model, its newest unless told
  rollback  serve what was served before that
  explain   show why a running server batched, refused or was late
  jobs      list, show, cancel and run again async jobs
  simulate  simulate the scheduling under load, and that of other servers beside it

options:
  --version   show the version
  --help      show this; `gateway COMMAND --help` shows a command's options
"""


# Each is a module with `run(arguments)`, or the function that is named, imported for its command only.
_ELSEWHERE = {
    "build": "gateway.build.cli",
    "explain": "gateway.transport.explain",
    "jobs": "gateway.jobs.cli",
    "models": "gateway.models.cli",
    "promote": "gateway.repository.promotion:promote",
    "rollback": "gateway.repository.promotion:rollback",
    "simulate": "gateway.scheduling.simulator.cli",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 done, 1 failed, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command == "worker":
        arguments += ["--role", "worker"]
    if command in ("serve", "worker"):
        return _serve(parse_args(arguments, prog=f"gateway {command}"), arguments)
    if command in _ELSEWHERE:
        module, _, function = _ELSEWHERE[command].partition(":")
        return int(getattr(importlib.import_module(module), function or "run")(arguments))
    if command in ("--version", "-V", "version"):
        print(f"gateway {__version__}")
        return 0
    if command in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    print(f"gateway: unknown command '{command}'\n\n{USAGE}", end="", file=sys.stderr)
    return 2


def tritonserver(argv: Sequence[str] | None = None) -> int:
    """The command `tritonserver`: `gateway serve` by NVIDIA's flags and defaults. Status 1 for wrong usage, as there."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words:
        print(triton.usage(), end="")
        return 0
    try:
        arguments = triton.translate(words)
        settings = parse_args(arguments, prog="tritonserver")
    except errors.InvalidArgument as problem:
        print(f"tritonserver: {problem}", file=sys.stderr)
        return 1
    except SystemExit:  # what was wrong is printed
        return 1
    if settings.exposed and settings.token_file is None:
        print(triton.OPEN, file=sys.stderr)
    return _serve(settings, arguments)


def _serve(settings: Settings, arguments: Sequence[str]) -> int:
    several = supervisor.plan(settings) is not None
    name = "supervisor" if several else settings.process_name
    try:
        if settings.log_file is not None:
            send_to_file(settings.log_file)
        configure_logging(settings.log_format, settings.log_verbose, name, levels_off(settings))
        if several:
            return _run(supervisor.supervise(settings, arguments, _show))
        _keep_freed_memory()
        _let_threads_finish()
        return _run(serve(settings))
    except (OSError, errors.GatewayError) as problem:
        print(f"gateway: {problem}", file=sys.stderr)
    except ExceptionGroup as group:
        expected, fault = group.split((OSError, errors.GatewayError))
        if expected is None or fault is not None:
            raise
        print(f"gateway: {_leaf(expected)}", file=sys.stderr)
    return 1


def _leaf(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit status. A second signal ends the process at once.

    On SIGTERM a process that shares its ports leaves its callers to the others; on SIGINT it refuses them.
    """
    from gateway.app import running

    stop = asyncio.Event()
    received: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log_event("stop_forced", logging.WARNING, signal=number.name)
            os._exit(1)
        received.append(number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    async with running(settings) as gateway, asyncio.TaskGroup() as tasks:
        outcome = tasks.create_task(_announce(gateway, settings, stop))
        await stop.wait()
        outcome.cancel()
        if settings.share_ports and signal.SIGTERM in received:
            _tell(settings, state="leaving")
            await gateway.leave()
    return outcome.result() if not outcome.cancelled() else 0


async def _announce(gateway: Gateway, settings: Settings, stop: asyncio.Event) -> int:
    """Once the first loads have ended, show what is served; stop with status 1 if that is not all and must be."""
    await gateway.loaded.wait()
    _settle_memory()
    models = _TABLES[settings.startup_table](gateway.queue.pools())
    failures = gateway.failures() if settings.exit_on_error else []
    if failures or settings.status_fd is None:
        _show(models)
    if failures:
        log_event("exit_on_error", logging.ERROR, models=len(failures), first=failures[0])
        stop.set()
        return 1
    _tell(settings, state="ready", table=models)
    return 0


def _tell(settings: Settings, **news: str) -> None:
    """Tell whoever started this process, if it wants to know."""
    if settings.status_fd is not None:
        os.write(settings.status_fd, json.dumps(news).encode() + b"\n")


def _show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of the last requests' bodies for the next ones.

    Given back and asked for again, each image of 600 KB costs a quarter of a millisecond of page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # another C library, which has ways of its own
    for option, size in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 256 << 20), (_M_TOP_PAD, 16 << 20)):
        mallopt(option, size)


def _let_threads_finish() -> None:
    """Ask Linux not to interrupt one of this process's threads when another one wakes.

    Each arriving packet would else stop the thread that holds Python's lock for one that must wait for the lock.
    On one core at 32 connections that makes 2.2 switches a small request, so 0.4, and a fifth less CPU (medians of
    7 interleaved runs: 149 and 117 us; the best pair 133 and 75).
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):  # a sandbox may forbid it
            if os.sched_getscheduler(0) == os.SCHED_OTHER:  # else somebody has chosen
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _settle_memory() -> None:
    """Take what start-up made out of the garbage collector's sight, and have it look less often.

    A request makes no reference cycles, so collecting finds nothing; at Python's own thresholds it took a
    third of the CPU time of a small request.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def table(pools: Sequence[PoolState]) -> str:
    """Models, versions, states, devices and execution providers, as aligned text."""
    rows = [("MODEL", "VERSION", "STATE", "RUNS ON", "")]
    for pool in pools:
        if not pool.versions:
            rows.append((pool.model, "-", "UNAVAILABLE", "-", pool.reason))
        for state in pool.versions:
            places = Counter(map(_place, state.instances))
            where = ", ".join(f"{count} x {place}" for place, count in places.items()) or "-"
            reasons = [instance.reason for instance in state.instances if instance.reason]
            rows.append(
                (pool.model, state.version, state.state, where, state.reason or "; ".join(dict.fromkeys(reasons)))
            )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def triton_table(pools: Sequence[PoolState]) -> str:
    """Models, versions and states in the box that tritonserver draws."""
    rows = [("Model", "Version", "Status")]
    for pool in pools:
        if not pool.versions:
            rows.append((pool.model, "-", f"Not loaded: {pool.reason}"))
        rows += [
            (pool.model, state.version, state.state + (f": {state.reason}" if state.reason else ""))
            for state in pool.versions
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    head, *lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([rule, head, rule, *lines, *([rule] if lines else [])])


_TABLES = {"gateway": table, "triton": triton_table}


def _place(instance: InstanceState) -> str:
    """The device, what it runs on and, unless it is the model's own file, from what."""
    own = instance.artefact in ("", "fp32")
    return f"{instance.device} {instance.provider}" + ("" if own else f" {instance.artefact}")


def _run(serving: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:  # not on this platform; asyncio's own loop serves too, more slowly
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(serving)
