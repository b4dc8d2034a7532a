"""Whether a GPU may be relied on, from what it reports. Pure.

Errors that end one process's work, such as an access beyond an array (Xid 13, 31), say nothing of the GPU: the engine
notices them itself. Those of the table leave it unusable for everyone until it is reset. A power cap is no fault: it is
how a GPU under full load runs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from gateway.devices.nvml import Reading

FATAL_XIDS = {
    46: "it stopped processing",
    48: "a double-bit error in its memory",
    62: "its micro-controller halted",
    64: "its memory could not be repaired",
    79: "it has fallen off the bus",
    95: "an uncontained error in its memory",
    109: "it could not change to other work in time",
    110: "a security fault",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "an unrecovered error in its memory",
    143: "it could not be initialised",
}
"""Xid errors after which a GPU must be reset (NVIDIA, "Xid Errors"), in words."""

_SLOW = {
    "hw_slowdown": "its hardware slows it down",
    "hw_thermal": "it is too hot, and its hardware slows it down",
    "sw_thermal": "it is too hot, and its driver slows it down",
    "hw_power_brake": "its power supply slows it down",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ok`; `degraded`: it answers, slower than it could; `failed`: nothing should be sent there. With the reason."""

    state: Literal["ok", "degraded", "failed"] = "ok"
    reason: str = ""


def judge(reading: Reading, xids: Collection[int] = ()) -> Verdict:
    """The verdict on a GPU; `xids` are the errors that were ever reported of it."""
    fatal = sorted(FATAL_XIDS.keys() & {*xids, *reading.xids})
    if fatal:
        told = ", ".join(f"Xid {xid}: {FATAL_XIDS[xid]}" for xid in fatal)
        return Verdict("failed", f"{told}; reset the GPU, then restart the gateway")
    if reading.fault:
        return Verdict("failed", reading.fault)
    slow = [words for throttle, words in _SLOW.items() if throttle in reading.throttles]
    if slow:
        return Verdict("degraded", "; ".join(slow))
    heat, limit = reading.temperature, reading.slowdown_temperature
    if heat is not None and limit and heat >= limit:
        return Verdict("degraded", f"it is at {heat} degrees Celsius, and slows down from {limit}")
    return Verdict()
