"""What a CUDA error means for an engine: no memory, a process that is lost, or a run that failed.

After a sticky error every further CUDA call of the process fails (CUDA runtime documentation, `cudaError_t`: "the
process must be terminated and relaunched"), so only a new process helps. Works on codes and on the texts of
libraries that only give text. Imports no CUDA.
"""

from __future__ import annotations

import re

from gateway import errors
from gateway.engines.base import DeviceOutOfMemory, EngineCrashed

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

STICKY = {
    4: "the CUDA runtime is unloading",
    214: "an ECC error in GPU memory that cannot be corrected",
    220: "an NVLink error that cannot be corrected",
    226: "a hardware error that the GPU contained",
    700: "an illegal memory access",
    702: "a kernel that ran into the display's time limit",
    709: "its CUDA context was destroyed",
    710: "an assertion in a kernel",
    714: "a hardware stack error",
    715: "an illegal instruction",
    716: "a misaligned address",
    717: "an address in the wrong memory space",
    718: "an invalid program counter",
    719: "a kernel that failed on the GPU",
    721: "a kernel that leaked tensor memory",
    810: "the MPS server ended",
    911: "an error of a device outside CUDA",
    999: "an unknown error, as when a GPU falls off the bus",
}
"""CUDA's error codes that only a new process survives, in words."""

_CODE = re.compile(r"(?i)\bCUDA (?:failure|error|runtime error|initialization failure with error)[: ]+\(?(\d+)")
_MEMORY = re.compile(r"(?i)out ?of ?memory|failed to allocate memory|bad[ _]alloc|alloc_failed")
_LOST = re.compile(r"(?i)illegal (?:memory access|address|instruction)|unspecified launch failure|misaligned address")


def fault(code: int, text: str) -> Exception:
    """The exception for a CUDA error code; `text` says where it came up, without paths."""
    if code == OUT_OF_MEMORY:
        return DeviceOutOfMemory(f"the GPU is out of memory: {text}")
    if code in STICKY:
        return _lost(f"the GPU reported {STICKY[code]} (CUDA error {code}): {text}")
    return errors.Internal(f"{text} (CUDA error {code})")


def from_text(text: str) -> Exception | None:
    """The exception for an error that a library only tells in words; None when they name no fault of the device."""
    found = _CODE.search(text)
    if found is not None and int(found[1]) in STICKY:
        return fault(int(found[1]), text)
    if _MEMORY.search(text):
        return DeviceOutOfMemory(f"the device is out of memory: {text}")
    return _lost(f"the GPU failed: {text}") if _LOST.search(text) else None


def _lost(text: str) -> EngineCrashed:
    """Where this is said in a child, the child ends, and what it ran is known; elsewhere a run before this one may be to blame."""
    return EngineCrashed(text, sure=False)
