"""Statistics of a decoupled model's responses: of the first of every request, of the second, and so on.

Triton's `response_stats`. A response's time runs from the one before it, or from when the request was accepted; what
of that went into its outputs nobody says, so all of it is `compute_infer`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Outcome: TypeAlias = Literal["success", "fail", "empty_response", "cancel"]
"""An answer with outputs, an error, a flag that there is no more, or nothing because the caller left."""

MOST = 1000
"""Responses of a request that are counted. What comes after them is not: a stream may be endless."""

_NAMES = ("compute_infer", "compute_output", "success", "fail", "empty_response", "cancel")
_COUNTED: dict[Outcome, tuple[str, ...]] = {
    "success": ("compute_infer", "compute_output", "success"),
    "fail": ("compute_infer", "compute_output", "fail"),
    "empty_response": ("compute_infer", "empty_response"),
    "cancel": ("cancel",),
}


def record(responses: dict[int, list[int]], index: int, outcome: Outcome, ns: int) -> None:
    """Count the response of this number, the first is 0, that came after `ns`."""
    if index >= MOST:
        return
    figures = responses.setdefault(index, [0] * (2 * len(_NAMES)))
    for name in _COUNTED[outcome]:
        at = 2 * _NAMES.index(name)
        figures[at] += 1
        figures[at + 1] += ns if name != "compute_output" else 0


def to_triton(responses: dict[int, list[int]]) -> dict[str, dict[str, dict[str, int]]]:
    """These as Triton has them."""
    return {
        str(index): {
            name: {"count": count, "ns": ns}
            for name, count, ns in zip(_NAMES, figures[::2], figures[1::2], strict=True)
        }
        for index, figures in sorted(responses.items())
    }
