"""What went wrong, so that somebody can do it again: the model, its configuration and the request."""

from __future__ import annotations

import textwrap
from typing import Any

import onnx
from onnx import printer

from loadtest.fuzz import messages
from loadtest.fuzz.session import Fault, Tally


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
            parts.append(f"input {name!r} {array.dtype} {list(array.shape)}: {messages.typed(array)}")
        parts.append(f"outputs: {list(fault.request.outputs) or 'all'}")
    return "\n".join(parts)


def result(tally: Tally) -> dict[str, Any]:
    """The figures for a JSON file."""
    return {
        "models": tally.models,
        "requests": tally.requests,
        "malformed": sum(tally.wrong.values()),
        "refused_by_both": tally.refused,
        "rows": tally.rows,
        "batches": tally.batches,
        "wires": dict(tally.wires.most_common()),
        "datatypes": dict(tally.datatypes.most_common()),
        "ranks": dict(sorted(tally.ranks.items())),
        "features": dict(tally.features.most_common()),
        "wrong": dict(tally.wrong.most_common()),
        "faults": [f"{each.model.name}, {each.wire}: {each.text}" for each in tally.faults],
    }
