"""Which models are loaded: those that are wanted at start and, in poll mode, those that the repository has since."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from gateway import errors
from gateway.config.settings import Settings
from gateway.queues.base import Command, Load, PoolState, Queue, Unload
from gateway.repository import Changes, Fingerprint, Repository
from gateway.telemetry import log_event


async def keep_models(
    settings: Settings, repository: Repository, queue: Queue, names: Sequence[str], loaded: Callable[[], None]
) -> None:
    """Load what is wanted at start and, in poll mode, follow the repository for as long as this runs.

    `names` are the models that the repository has; `loaded` is called once the first loads have ended.
    """
    if settings.role == "gateway":
        loaded()
        return
    polls = settings.model_control_mode == "poll"
    changes = await _changes(repository, {}) if polls else None
    previous = changes.now if changes else {}
    loads = [Load(name) for name in names]
    if settings.model_control_mode == "explicit":
        loads = await _wanted(settings, queue, names)
    for load in loads:
        queue.publish(PoolState(load.model, reason="waiting to be loaded"))
    await _send_all(queue, [*loads])
    loaded()
    while polls:
        await asyncio.sleep(settings.repository_poll_secs)
        changes = await _changes(repository, previous)
        if changes is None:
            continue
        previous = changes.now
        commands: list[Command] = [Load(name) for name in (*changes.added, *changes.changed)]
        await _send_all(queue, [*commands, *(Unload(name) for name in changes.removed)])


async def _wanted(settings: Settings, queue: Queue, names: Sequence[str]) -> list[Load]:
    """What to load where commands say it: what the settings name, but for what the last command for a model was."""
    wanted = {name: Load(name) for name in (names if "*" in settings.load_model else settings.load_model)}
    try:
        commands = await queue.wanted()
    except errors.GatewayError as problem:
        log_event("wanted_models_unknown", logging.WARNING, reason=problem.message, loads="what --load-model names")
        commands = ()
    for command in commands:
        if isinstance(command, Load):
            wanted[command.model] = command
        else:
            wanted.pop(command.model, None)
    return [*wanted.values()]


async def _changes(repository: Repository, previous: Mapping[str, Fingerprint]) -> Changes | None:
    """What has changed, or None when the folders cannot be read now: what is loaded goes on serving."""
    try:
        return await asyncio.to_thread(repository.changes, previous)
    except (errors.GatewayError, OSError) as problem:
        log_event("repository_unreadable", logging.ERROR, reason=str(problem))
        return None


async def _send_all(queue: Queue, commands: Sequence[Command]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for command in commands:
            tasks.create_task(_send(queue, command))


async def _send(queue: Queue, command: Command) -> None:
    try:
        await queue.send(command, everywhere=False)
    except errors.GatewayError as problem:
        # The worker has logged it and published the reason, unless it knows no such model: --load-model misspelt.
        if isinstance(command, Load) and queue.pool(command.model) is None:
            queue.publish(PoolState(command.model, reason=problem.message))
