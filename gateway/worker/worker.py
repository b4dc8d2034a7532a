"""Carries out load and unload commands and publishes what this worker holds.

Owns the order of a model's life: a new version is loaded and warm before it takes over its lane, and an old
one leaves only after it has answered what it took. Commands for one model are carried out one at a time;
models load side by side, `load_threads` at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.config.rate_limit import ResourceCounts
from gateway.engines.isolated.children import Children
from gateway.placement import REMOTE, Device, plan
from gateway.queues.base import Load, Order, PoolState, Queue, VersionState
from gateway.repository import ModelSource
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.statistics import Statistics
from gateway.telemetry import log_event
from gateway.worker.ensemble import UNLOADED, Drained, EnsembleHost
from gateway.worker.host import Host
from gateway.worker.limited_slots import LimitedSlots
from gateway.worker.needs import Needs
from gateway.worker.resources import Resources
from gateway.worker.sequence_host import SequenceHost
from gateway.worker.slots import Slots
from gateway.worker.source import Source

_UNLOAD_REPORTED = 0.5  # seconds; nearly every model is gone by then, and who asked finds it gone

ReadModel = Callable[[str, Mapping[str, str]], ModelSource]
"""Reads a model from the repository; blocking, so it is called in a thread. Raises `GatewayError`."""
_WIRE = 0.001  # seconds of a deadline: the caller's clock begins before ours, and ends when it has read the answer


@dataclass(slots=True)
class _Model:
    """One model on this worker: its versions as published, and the hosts of those that are loaded."""

    name: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    hosts: dict[str, Host | EnsembleHost] = field(default_factory=dict)
    states: dict[str, VersionState] = field(default_factory=dict)
    reason: str = ""
    epoch: int = 0  # of the command under way
    along: bool = False  # loaded because an ensemble needs it

    @property
    def ready(self) -> bool:
        """Whether any version of it answers."""
        return any(state.state == "READY" for state in self.states.values())


class Worker:
    """The models of this process. `run` until cancelled, after `drain`."""

    def __init__(
        self,
        queue: Queue,
        read: ReadModel,
        devices: Sequence[Device],
        statistics: Statistics,
        load_threads: int = 4,
        *,
        measures: bool = False,
        persists: bool = False,
    ) -> None:
        """With `measures` the batch sizes of each version are timed once it is ready; with `persists` what was learned
        of them is kept in its folder.
        """
        self._queue = queue
        self._read = read
        self._devices = devices
        # The bytes that wait are the service's to bound, which knows of all of them.
        cores = {device.name: device.cores for device in (*devices, REMOTE)}
        self._slots = Slots(DeadlineScheduler(cores, max_bytes=1 << 62, way=_WIRE))
        self.children: Children | None = None  # where engines may live, set before anything is loaded
        self.ensembles_drained: Drained | None = None  # set before anything is loaded
        self._needs = Needs()
        self._measures = measures
        self._persists = persists
        self._statistics = statistics
        statistics.refreshers.append(self._report)
        self._loading = asyncio.Semaphore(load_threads)
        self._models: dict[str, _Model] = {}
        self._tasks: asyncio.TaskGroup | None = None

    def limit_rates(self, given: ResourceCounts) -> None:
        """Have instances wait for the resources that they claim; before anything is loaded."""
        self._slots = LimitedSlots(self._slots.scheduler, Resources(given))

    async def run(self) -> None:
        """Carry out the queue's commands until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            async for order in self._queue.commands():
                self._tasks.create_task(self._carry_out(order))

    async def drain(self) -> None:
        """Answer everything accepted and stop every model, first those that may call others."""
        for turn in range(3):
            async with asyncio.TaskGroup() as tasks:
                for model in self._models.values():
                    for host in model.hosts.values():
                        if _turn(host.source.config) == turn:
                            tasks.create_task(host.drain())

    def explain(self, process: str, target: str) -> bytes:
        """What this worker, called `process`, knows of `model:version`, as JSON; see `Admission.explain`.

        Raises KeyError when it does not hold the version.
        """
        model, _, version = target.rpartition(":")
        return msgspec.json.encode({"worker": process, **self._models[model].hosts[version].explain(0.0)})

    async def _carry_out(self, order: Order) -> None:
        try:
            model = self._models.setdefault(order.command.model, _Model(order.command.model))
            async with model.lock:
                model.epoch = order.epoch
                if isinstance(order.command, Load):
                    model.along = False
                    await self._load(model, order.command)
                else:
                    # As in Triton, who unloads a model does not wait for requests that take their time.
                    reported = asyncio.get_running_loop().call_later(_UNLOAD_REPORTED, order.finish, None)
                    try:
                        await self._unload(model, dependents=order.command.dependents)
                    finally:
                        reported.cancel()
        except asyncio.CancelledError:
            order.finish(errors.stopping())
            raise
        except errors.GatewayError as error:
            log_event("command_failed", logging.ERROR, model=order.command.model, reason=error.message)
            order.finish(error)
        except Exception as error:  # noqa: BLE001 - a model's own code or file may raise anything; the caller must hear of it
            log_event("command_failed", logging.ERROR, error, model=order.command.model)
            order.finish(errors.Internal(f"{type(error).__name__} while handling model '{order.command.model}'"))
        else:
            order.finish(None)

    # --- load

    async def _load(self, model: _Model, command: Load) -> None:
        try:
            async with self._loading:  # a model of a remote repository is brought here first
                source = await asyncio.to_thread(self._read, model.name, command.parameters)
            await self._gather(model, source.config)
        except errors.GatewayError as problem:
            raise self._unreadable(model, problem) from None
        wanted = {
            str(number): Source(
                source.config,
                str(number),
                path,
                source.fingerprint.of(number),
                source.digests.get(number, ""),
                [source.lease],
            )
            for number, path in source.versions.items()
        }
        changed = [w for w in wanted.values() if not _same(model.hosts.get(w.version), w)]
        for new in changed:
            if new.version not in model.hosts:
                model.states[new.version] = VersionState(new.version, "LOADING")
        # What is neither wanted nor loaded, e.g. a broken version whose folder is gone, is forgotten.
        model.states = {v: state for v, state in model.states.items() if v in wanted or v in model.hosts}
        model.reason = ""
        self._publish(model)
        for warning in source.warnings:
            log_event("model_warning", logging.WARNING, model=model.name, warning=warning)
        async with asyncio.TaskGroup() as tasks:
            for new in changed:
                tasks.create_task(self._replace(model, new))
        await self._remove_unwanted(model, wanted)
        self._report_failures(model, wanted)

    async def _gather(self, model: _Model, config: ModelConfig) -> None:
        """Have the models that an ensemble needs here, as Triton does. Raises `InvalidArgument` if it needs itself."""
        needs = self._needs.note(config)
        # Whoever waits for a model that waits for it would wait for ever.
        self._needs.refuse_cycle(model.name, lambda name: name in self._models and self._models[name].lock.locked())
        async with asyncio.TaskGroup() as tasks:
            for name in needs:
                tasks.create_task(self._load_along(self._models.setdefault(name, _Model(name)), model.epoch))
        self._needs.refuse_cycle(model.name)

    async def _load_along(self, model: _Model, epoch: int) -> None:
        async with model.lock:
            if model.ready:
                return
            model.along, model.epoch = True, epoch
            try:
                await self._load(model, Load(model.name))
            except errors.GatewayError as problem:  # published, and the ensemble says so too
                log_event("command_failed", logging.ERROR, model=model.name, reason=problem.message)

    def _unreadable(self, model: _Model, problem: errors.GatewayError) -> errors.GatewayError:
        """The error for a model that does not even read; what is loaded of it goes on serving."""
        if isinstance(problem, errors.NoConfiguration):
            return errors.not_polled(model.name, problem.message)
        if isinstance(problem, errors.NotFound) and not model.hosts:
            model.reason = ""
            model.states.clear()
            self._queue.withdraw(model.name)
            return errors.not_polled(model.name)
        if isinstance(problem, errors.Internal):
            return problem  # the request's own files; nothing of the repository was read
        if not model.hosts:
            model.reason = problem.message
            model.states.clear()
            self._publish(model)
        return errors.InvalidArgument(f"load failed for model '{model.name}': {problem.message}")

    async def _replace(self, model: _Model, source: Source) -> None:
        """Load one version and, once it is warm, let it take over the lane from its predecessor."""
        predecessor = model.hosts.get(source.version)
        host = self._host(source, replaces=predecessor is not None)
        try:
            async with self._loading:
                await host.load(() if source.config.steps else plan(source.config, self._devices))
        except Exception as problem:  # noqa: BLE001 - engines raise what they like; the reason is published
            source.release()
            reason = _explain(problem, model.name, source.version)
            if predecessor is None:
                model.states[source.version] = VersionState(source.version, "UNAVAILABLE", reason)
                self._publish(model)
            else:
                model.reason = reason
            return
        self._open(model, host)
        if predecessor is not None:
            await predecessor.retire()

    def _host(self, source: Source, *, replaces: bool) -> Host | EnsembleHost:
        if source.config.steps:
            return EnsembleHost(source, self._queue.pool, self.ensembles_drained, replaces=replaces)
        kind = Host if source.config.sequences is None else SequenceHost
        return kind(
            source,
            self._queue,
            self._statistics,
            self._slots,
            measures=self._measures,
            persists=self._persists,
            children=self.children,
        )

    def _open(self, model: _Model, host: Host | EnsembleHost) -> None:
        assert self._tasks is not None
        version = host.source.version
        host.changed = partial(self._move, model, host)
        self._tasks.create_task(self._serve(model, host))
        model.hosts[version] = host
        model.states[version] = self._state(model, host)
        self._publish(model)
        for warning in host.warnings:
            log_event("model_warning", logging.WARNING, model=model.name, version=version, warning=warning)
        for instance in dict.fromkeys(host.instances):
            log_event(
                "model_ready", model=model.name, version=version, device=instance.device, provider=instance.provider
            )

    def _state(self, model: _Model, host: Host | EnsembleHost) -> VersionState:
        state, version = "UNAVAILABLE" if host.reason else "READY", host.source.version
        epoch = self._statistics.epoch(model.name, version)
        return VersionState(version, state, host.reason, host.source.config, host.instances, host, epoch, host.digest)

    def _move(self, model: _Model, host: Host | EnsembleHost) -> None:
        """A version's engines run on something else now."""
        version = host.source.version
        if model.hosts.get(version) is host and model.states[version].state == "READY":
            model.states[version] = replace(model.states[version], instances=host.instances)
            self._publish(model)

    async def _serve(self, model: _Model, host: Host | EnsembleHost) -> None:
        try:
            await host.serve()
        except Exception as fault:  # noqa: BLE001 - a fault of ours in one version must not end the others
            version = host.source.version
            log_event("version_failed", logging.ERROR, fault, model=model.name, version=version)
            if model.hosts.get(version) is host:
                del model.hosts[version]
                reason = "it stopped serving by a fault of the gateway; the server's log has it. Load the model again"
                model.states[version] = VersionState(version, "UNAVAILABLE", reason)
                self._publish(model)
                await self._refuse_rest(host, reason)
        finally:
            host.source.release()

    async def _refuse_rest(self, host: Host | EnsembleHost, reason: str) -> None:
        """Answer what was accepted for a version that will never run it."""
        consumer = self._queue.consumer([host.lane])
        async with asyncio.TaskGroup() as tasks:
            drained = tasks.create_task(self._queue.drained(host.lane))
            drained.add_done_callback(lambda _: consumer.close())
            while jobs := await consumer.take(1 << 30):
                for job in jobs:
                    job.fail(errors.Unavailable(f"model '{host.lane.model}' version {host.lane.version}: {reason}"))

    def _report_failures(self, model: _Model, wanted: Mapping[str, Source]) -> None:
        failed = [
            f"version {version} is at UNAVAILABLE state: {model.states[version].reason};"
            for version in wanted
            if model.states[version].state != "READY"
        ]
        if model.reason:
            failed.append(f"{model.reason}; the version loaded before goes on serving")
        if failed:
            raise errors.InvalidArgument(f"load failed for model '{model.name}': {' '.join(failed)}")

    # --- unload

    async def _remove_unwanted(self, model: _Model, wanted: Mapping[str, Source]) -> None:
        # A new version that does not load must not cost the model the old one.
        if all(version in model.hosts for version in wanted):
            for version in [version for version in model.hosts if version not in wanted]:
                await self._remove(model, version)

    async def _unload(self, model: _Model, *, dependents: bool = False) -> None:
        """Unload a model and, if they were loaded along with it and nobody else needs them, what it depends on."""
        if not model.states and not model.reason:
            return
        needs = self._needs.of(model.name) if dependents else ()
        self._needs.forget(model.name)
        for version in list(model.hosts):
            await self._remove(model, version)
        model.states = {v: VersionState(v, "UNAVAILABLE", UNLOADED) for v in model.states}
        model.reason = ""
        self._publish(model)
        log_event("model_unloaded", model=model.name)
        for need in map(self._models.__getitem__, needs):
            async with need.lock:
                if need.along and not any(self._needs.users(need.name)):
                    need.epoch = model.epoch
                    await self._unload(need, dependents=True)

    async def _remove(self, model: _Model, version: str) -> None:
        model.states[version] = VersionState(version, "UNLOADING")
        self._publish(model)
        await model.hosts[version].drain()
        del model.hosts[version]  # not sooner: a shutdown that begins meanwhile must wait for it too
        model.states[version] = VersionState(version, "UNAVAILABLE", UNLOADED)
        self._statistics.forget(model.name, version, model.epoch)
        self._publish(model)

    def _report(self) -> None:
        for model in self._models.values():
            for host in model.hosts.values():
                host.report()

    def _publish(self, model: _Model) -> None:
        states = tuple(model.states[version] for version in sorted(model.states, key=int))
        self._queue.publish(PoolState(model.name, states, model.reason))
        for user in self._needs.users(model.name):
            self._refit(self._models[user])

    def _refit(self, model: _Model) -> None:
        """What an ensemble needs has changed."""
        before = dict(model.states)
        for version, host in model.hosts.items():
            if isinstance(host, EnsembleHost) and model.states[version].state in ("READY", "UNAVAILABLE"):
                host.refit()
                model.states[version] = self._state(model, host)
        if model.states != before:
            self._publish(model)


def _turn(config: ModelConfig) -> int:
    """When a model may stop, among those that call others and those that are called."""
    if config.steps:
        return 0
    return 1 if config.is_code else 2


def _same(host: Host | EnsembleHost | None, source: Source) -> bool:
    return host is not None and host.source.fingerprint == source.fingerprint and host.source.path == source.path


def _explain(problem: Exception, model: str, version: str) -> str:
    """Why a version does not load, as its clients may read it; the rest goes to the log."""
    if isinstance(problem, errors.GatewayError):
        return problem.message
    log_event("load_failed", logging.ERROR, problem, model=model, version=version)
    return f"{type(problem).__name__} while it was loaded; the server's log has the details"
