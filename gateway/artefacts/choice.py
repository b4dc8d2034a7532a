"""Which of a version's artefacts a kind of device is given: the best that passed there, then the model itself.

An artefact that is not chosen has a reason, for people. Nothing is decided by what a file is called. Blocking.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from gateway import errors
from gateway.artefacts.folder import altered, read, stale
from gateway.artefacts.report import Artefact
from gateway.telemetry import log_event


class Candidate(NamedTuple):
    """An artefact of the promoted build, and why it is not run here; empty when it may be."""

    artefact: Artefact
    reason: str = ""
    alarming: bool = False  # something is wrong, and not only unsuitable


def choose(
    version: Path,
    device: str,
    precision: str = "",
    *,
    model_file: str = "model.onnx",
    backend: str = "onnxruntime",
) -> list[Artefact]:
    """What to run a version from on a kind of device (`device_kind`), best first; the model file itself is last.

    With a `precision` it is only what has that, and `Unavailable` is raised when there is none. What of the promoted
    build is left out is logged with the reason. `backend` is what runs the model file.
    """
    source = Artefact("fp32", model_file, backend, "FP32", device=device, verdict="passed")
    try:
        found = candidates(version, device, model_file)
        broken = ""
    except errors.Unavailable as problem:
        found, broken = [], problem.message
        log_event(
            "artefacts_unreadable", logging.WARNING, model=version.parent.name, version=version.name, reason=broken
        )
    for candidate in found:
        if candidate.reason:
            _say(version, candidate.artefact.name, candidate.reason, candidate.alarming)
    usable = [candidate.artefact for candidate in found if not candidate.reason]
    usable.sort(key=speedup, reverse=True)
    if not precision:
        return [*usable, source]
    pinned = [artefact for artefact in (*usable, source) if artefact.precision == precision.upper()]
    if not pinned:
        raise _nothing(version, device, precision, found, broken)
    return pinned


def candidates(version: Path, device: str, model_file: str = "model.onnx", build: int | None = None) -> list[Candidate]:
    """Every artefact of the promoted build, or of `build`, and why it is not run on this kind of device.

    Raises `Unavailable` when its report cannot be read.
    """
    report = read(version, build)
    if report is None:
        return []
    if reason := stale(version, report, model_file):
        return [Candidate(artefact, reason, alarming=True) for artefact in report.artefacts]
    return [_judge(version, device, artefact) for artefact in report.artefacts]


def speedup(artefact: Artefact) -> float:
    """How many times as fast as the model itself: the geometric mean over the batch sizes timed; 0 when none was."""
    ratios = [
        each.reference_seconds / each.seconds
        for each in artefact.speed
        if min(each.seconds, each.reference_seconds) > 0
    ]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0


def _judge(version: Path, device: str, artefact: Artefact) -> Candidate:
    if artefact.verdict == "failed":
        return Candidate(artefact, f"the gate failed it: {', '.join(artefact.reasons) or 'no reason given'}")
    if artefact.verdict == "unproven":
        return Candidate(artefact, "it was not proven on its device; run `gateway build --prove` there")
    if device.endswith("unknown"):
        return Candidate(artefact, f"what kind of device this is cannot be found out ({device})")
    if artefact.device != device:
        return Candidate(
            artefact, f"it was proven on {artefact.device} and this is {device}; run `gateway build --prove` here"
        )
    reason = altered(version, artefact)
    return Candidate(artefact, reason, alarming=bool(reason))


@lru_cache(1024)  # each is said once, however many instances ask
def _say(version: Path, artefact: str, reason: str, alarming: bool) -> None:
    log_event(
        "artefact_refused" if alarming else "artefact_not_chosen",
        logging.WARNING if alarming else logging.INFO,
        model=version.parent.name,
        version=version.name,
        artefact=artefact,
        reason=reason,
    )


def _nothing(version: Path, device: str, precision: str, found: list[Candidate], broken: str) -> errors.Unavailable:
    there = "; ".join(
        f"{each.artefact.name} ({each.artefact.precision}): {each.reason or 'it may be run'}" for each in found
    )
    return errors.Unavailable(
        f"model '{version.parent.name}' version {version.name} is pinned to precision {precision}, and nothing of that "
        f"may be run on {device}. There is: fp32 (FP32)"
        + (f"; {there}" if there else "")
        + (f"; {broken}" if broken else "")
        + ". Run `gateway build` and `gateway promote`, or remove the parameter 'precision' from config.pbtxt"
    )
