"""What went wrong, so that somebody can do it again: the model, its configuration and the request."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

import onnx
from onnx import printer

from loadtest.fuzz import messages
from loadtest.fuzz.session import Fault, Tally

_MOST = 5000  # characters of a tensor's values, which are made again from the seed
_BAD = ("batch_failed", "request_failed", "engine_died", "child_failed")


def reproduction(fault: Fault, command: str) -> str:
    """All there is to know of one fault. `command` runs its model again."""
    seed, number = fault.model.name.removeprefix("m").split("_")
    parts = [
        f"{fault.model.name}, {fault.wire}: {fault.text}",
        f"again: {command} --seed {seed} --model {number}",
        *([fault.alone] if fault.alone else []),
        "config.pbtxt:\n" + textwrap.indent(fault.model.config or "(none)", "  "),
        "model.onnx:\n" + textwrap.indent(printer.to_text(onnx.load_from_string(fault.model.file)), "  "),
    ]
    if fault.request is not None:
        for name, array in fault.request.inputs.items():
            parts.append(f"input {name!r} {array.dtype} {list(array.shape)}: {str(messages.typed(array))[:_MOST]}")
        parts.append(f"outputs: {list(fault.request.outputs) or 'all'}")
    return "\n".join(parts)


def complaints(log: str, failing: Collection[str]) -> list[str]:
    """What a gateway's log (`--log-format json`) says that no request explains; batches of `failing` models may fail.

    A batch that failed is run again in parts, so that its answers are right and only the log tells of it.
    """
    found = []
    for line in log.splitlines():
        event = json.loads(line) if line.startswith("{") else {"event": "text", "level": "INFO", "text": line}
        expected = event["event"] == "batch_failed" and event["model"] in failing
        if (
            "Traceback" in line
            or (event["event"] in _BAD and not expected)
            or event.get("level") in ("ERROR", "CRITICAL")
        ):
            found.append(line[:2000])
    return found


def result(tally: Tally, complained: Sequence[str]) -> dict[str, Any]:
    """The figures for a JSON file."""
    return {
        "models": tally.models,
        "requests": tally.requests,
        "malformed": sum(tally.wrong.values()),
        "refused_by_both": tally.refused,
        "rows": tally.rows,
        "batches": tally.batches,
        "shared_a_batch": tally.shared,
        "wires": dict(tally.wires.most_common()),
        "datatypes": dict(tally.datatypes.most_common()),
        "ranks": dict(sorted(tally.ranks.items())),
        "features": dict(tally.features.most_common()),
        "wrong": dict(tally.wrong.most_common()),
        "faults": [f"{each.model.name}, {each.wire}: {each.text}" for each in tally.faults],
        "log": list(complained),
    }
