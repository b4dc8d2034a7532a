"""Devices, and which instances of a model live where with how many threads.

`cpu_cores` is what this process may use, not what the machine has. `plan` is a pure function of a model's
configuration and the devices. Nothing here loads anything.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway import errors
from gateway.config.model import InstanceGroup, ModelConfig, RateLimiter, may_leave_gpu
from gateway.devices.cgroup import cpu_quotas


@dataclass(frozen=True, slots=True)
class Device:
    """What batches compete for: `kind` is `cpu` or `gpu`; `cores` is how many one-core runs fit at once."""

    name: str  # "cpu", "gpu:0", ...
    kind: str
    cores: int


@dataclass(frozen=True, slots=True)
class Placement:
    """So many instances of a model on one device.

    `threads` is how many cores each run gets when the device is loaded, `cores` how many a lone run may use, and
    `cpu_cores` what a run gets that falls back to the CPU. `instead_of` names a GPU that is not there. `limiter` is
    what each instance needs to run, where rates are limited.
    """

    device: Device
    count: int
    threads: int
    cores: int
    cpu_cores: int = 1
    instead_of: str = ""
    limiter: RateLimiter | None = None


REMOTE = Device("remote", "remote", 1 << 16)
"""Where models run whose engine is another server: nothing here competes for it, so it has slots for all."""


def devices(cores: int = 0, gpus: Sequence[str] = ()) -> list[Device]:
    """The devices of this process: `cores` cores, or 0 for all that it may use, and these GPUs, each for one run at a time."""
    return [Device("cpu", "cpu", cores or cpu_cores()), *(Device(name, "gpu", 1) for name in gpus)]


def plan(config: ModelConfig, available: Sequence[Device]) -> list[Placement]:
    """Where the instances of a model live, one entry a device, in the order of its instance groups.

    On a CPU a group without a count gets an instance per core; a count k gets k instances that divide the
    cores. A remote model is one instance, which takes many runs at once. On a GPU it is one instance and one core, and a
    run of a Python model has one core. In place of a GPU that is not there it is the CPU, where the model may fall back
    to it; else `Unavailable` is raised.
    """
    cpu = max((device.cores for device in available if device.kind == "cpu"), default=1)
    groups = config.instance_groups or (InstanceGroup(),)
    if config.backend == "remote":
        return [Placement(REMOTE, 1, 1, 1, cpu, limiter=groups[0].limiter)]
    counts: dict[tuple[Device, str, RateLimiter | None], int] = {}
    there: Counter[tuple[Device, str]] = Counter()
    for group in groups:
        for device, missing in _devices_of(group, config, available):
            on_cpu = device.kind == "cpu" and not missing
            count = group.count or (device.cores if on_cpu else 1)
            counts[device, missing, group.limiter] = counts.get((device, missing, group.limiter), 0) + count
            there[device, missing] += count
    return [
        Placement(
            device,
            count,
            _threads(device.cores, there[device, missing], config),
            device.cores,
            _threads(cpu, there[device, missing], config),
            missing,
            limiter,
        )
        for (device, missing, limiter), count in counts.items()
    ]


def _threads(cores: int, count: int, config: ModelConfig) -> int:
    return 1 if config.is_code else max(1, cores // count)


def _devices_of(group: InstanceGroup, config: ModelConfig, available: Sequence[Device]) -> list[tuple[Device, str]]:
    """Devices, each with the missing GPU that it stands in for, if any."""
    gpus = {device.name: device for device in available if device.kind == "gpu"}
    cpus = [device for device in available if device.kind == "cpu"]
    wanted = [f"gpu:{index}" for index in group.gpus] or list(gpus)
    if group.kind == "cpu" or (group.kind == "auto" and (not gpus or not set(wanted) <= set(gpus))):
        return [(device, "") for device in cpus]
    missing = sorted(set(wanted) - set(gpus))
    if (missing or not wanted) and cpus and may_leave_gpu(config.backend, config.parameters.get("fallback", "")):
        wanted = wanted or ["gpu:0"]
        return [(gpus[name], "") if name in gpus else (cpus[0], name) for name in wanted]
    if missing or not wanted:
        which = ", ".join(name.removeprefix("gpu:") for name in missing) or "any"
        raise errors.Unavailable(
            f"instance group of model '{config.name}' specifies invalid or unsupported gpu id {which}. "
            f"GPUs this gateway can use: {', '.join(gpus) or 'none'}. Use kind: KIND_AUTO or KIND_CPU in its "
            "config.pbtxt to serve it without"
        )
    return [(gpus[name], "") for name in wanted]


def cpu_cores(root: Path = Path("/")) -> int:
    """How many cores this process may use: the least of its affinity and its control groups' quotas, at least 1.

    A quota of 2.5 cores counts as 2: a third thread would only wait for the next period. `root` is where
    /proc and /sys are.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([usable, *(int(quota) for quota in cpu_quotas(root))]))
