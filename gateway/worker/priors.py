"""What was learned of a version's batch times, kept beside the model: `.gateway-latency.json` in its folder.

A prior bridges the time until a version is measured, or until an unmeasurable one has run often enough. It counts only
where all that the times depend on is the same: see `key`. The file is a cache: it may be deleted at any time, what
cannot be read is ignored, and what cannot be written does not hold up the server. Both are logged once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import uuid
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from gateway import __version__
from gateway.artefacts import Artefact
from gateway.placement import Device
from gateway.scheduling.latency import LatencyModel
from gateway.telemetry import log_event

Prior: TypeAlias = Mapping[str, float]
"""What `LatencyModel.to_prior` gives."""

NAME = ".gateway-latency.json"
_ENTRIES = 16  # the newest are kept: machines that share the folder, versions of the packages
_BYTES = 64 << 10  # a larger file is not ours
_LONGEST = 1e6  # seconds


def key(device: Device, provider: str, runtime: str, fingerprint: object, artefact: Artefact | None = None) -> str:
    """All that batch times depend on, as text; `artefact` is the file that is run, where there was a choice.

    Reads /proc: call it off the event loop.
    """
    files = hashlib.sha256(str(fingerprint).encode(errors="surrogateescape")).hexdigest()[:32]
    made = f"{artefact.name} {artefact.sha256[:12]}" if artefact is not None and artefact.sha256 else ""
    cores = f"{device.cores} cores"
    parts = (device.name, _processor(), cores, provider, runtime, f"lockgate {__version__}", made, files)
    return ", ".join(part for part in parts if part)


class Priors:
    """The priors of one version folder, by device."""

    def __init__(self, folder: Path, keys: Mapping[str, str]) -> None:
        """`keys` has the `key` of each device."""
        self._path = folder / NAME
        self._keys = keys
        self._writes = True

    async def read(self) -> dict[str, Prior]:
        """What was kept for each of the devices; nothing for those that are new."""
        entries = await asyncio.to_thread(self._entries)
        return {device: entries[key] for device, key in self._keys.items() if key in entries}

    async def keep(self, learned: Mapping[str, Prior]) -> None:
        """Write what was learned of these devices."""
        if learned and self._writes:
            await asyncio.to_thread(self._write, {self._keys[device]: prior for device, prior in learned.items()})

    def _entries(self, *, says: bool = True) -> dict[str, Prior]:
        try:
            return _checked(json.loads(_bounded(self._path)))
        except FileNotFoundError:
            return {}
        except (OSError, LookupError, ValueError, ArithmeticError, RecursionError) as problem:
            if says:
                self._say("latency_prior_ignored", problem)
            return {}

    def _write(self, learned: Mapping[str, Prior]) -> None:
        others = {known: prior for known, prior in self._entries(says=False).items() if known not in learned}
        kept = dict([*others.items(), *learned.items()][-_ENTRIES:])
        unfinished = self._path.with_name(f"{NAME}.{uuid.uuid4().hex}")
        try:
            try:
                with unfinished.open("x", encoding="utf-8") as file:
                    json.dump({"priors": kept}, file, indent=1)
                unfinished.replace(self._path)
            finally:
                unfinished.unlink(missing_ok=True)
        except FileNotFoundError:
            return  # the folder is gone: the model is being removed
        except OSError as problem:
            self._writes = False
            self._say("latency_not_kept", problem)

    def _say(self, event: str, problem: Exception) -> None:
        folder = self._path.parent
        reason = getattr(problem, "strerror", None) or str(problem)
        log_event(event, logging.WARNING, model=folder.parent.name, version=folder.name, reason=reason)


def _bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        text = file.read(_BYTES + 1)
    if len(text) > _BYTES:
        raise ValueError("it is too large")
    return text


def _checked(document: Any) -> dict[str, Prior]:
    """The entries of a file's document. Raises LookupError, ValueError or ArithmeticError for what was not written here."""
    priors = document.get("priors") if isinstance(document, dict) else None
    if not isinstance(priors, dict) or not all(isinstance(prior, dict) for prior in priors.values()):
        raise ValueError("it has no priors")
    for prior in priors.values():
        if not all(type(value) in (int, float) and 0 <= value < _LONGEST for value in prior.values()):
            raise ValueError("it has values that are no times")
        LatencyModel.from_prior(1, prior)  # whose format it is
    return priors


@lru_cache(1)
def _processor() -> str:
    """The processor's name; empty where /proc does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")
