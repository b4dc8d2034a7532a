"""The NVIDIA driver and its GPUs, asked in a child process: what hangs or crashes there does no harm here.

TensorRT ends the process with a segmentation fault when it is used without a driver, and a broken driver may hang
its caller for ever, so nothing of NVIDIA is loaded before this has said that all is well. Uses the driver's own
library alone; nothing has to be installed. An answer is kept for the life of the process, a failure is not.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import msgspec

from gateway import child, errors

_SECONDS = 20.0  # a cold driver of eight GPUs without its persistence daemon takes several

_TRACES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")

# Prints one JSON object: what is there, or what failed. cuDeviceGetAttribute 75 and 76: compute capability.
_SCRIPT = """
import ctypes, json
def ask():
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as problem:
        return {"missing": str(problem)}
    number, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    def call(function, *arguments):
        code = getattr(cuda, function)(*arguments)
        if code:
            raise RuntimeError(function, code)
    try:
        call("cuInit", 0)
        call("cuDriverGetVersion", ctypes.byref(number))
        version = number.value
        call("cuDeviceGetCount", ctypes.byref(number))
        gpus = []
        for index in range(number.value):
            device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            call("cuDeviceGet", ctypes.byref(device), index)
            call("cuDeviceGetAttribute", ctypes.byref(major), 75, device)
            call("cuDeviceGetAttribute", ctypes.byref(minor), 76, device)
            call("cuDeviceGetName", name, 256, device)
            call("cuDeviceTotalMem_v2", ctypes.byref(size), device)
            sm = f"{major.value}{minor.value}"
            gpus.append({"index": index, "name": name.value.decode(), "sm": sm, "memory": size.value})
    except RuntimeError as problem:
        return {"function": problem.args[0], "code": problem.args[1]}
    return {"cuda": f"{version // 1000}.{version % 1000 // 10}", "gpus": gpus}
print(json.dumps(ask()))
"""

_CODES = {  # CUresult
    3: "the driver is not initialized",
    34: "the library is the stub of the CUDA toolkit; put the driver's own in front of it on the library path",
    100: "it sees no GPU; check that one is plugged in and, in a container, that it was started with --gpus",
    101: "a GPU is in a bad state",
    803: "library and kernel module are of different versions; restart the machine after an update",
    804: "this driver is too new for the GPU",
    999: "the driver failed; `nvidia-smi` and the kernel's log say more",
}


class Gpu(msgspec.Struct, frozen=True):
    """One GPU: `sm` is its compute capability without the point, e.g. "90"; `memory` is in bytes."""

    index: int
    name: str
    sm: str
    memory: int


class Driver(msgspec.Struct, frozen=True):
    """A driver that works: the CUDA version it supports, e.g. "13.0", and its GPUs."""

    cuda: str
    gpus: tuple[Gpu, ...]

    def gpu(self, index: int) -> Gpu:
        """The GPU of this number. Raises `Unavailable` when there is none."""
        if index >= len(self.gpus):
            raise errors.Unavailable(f"there is no GPU {index}; the driver sees {len(self.gpus)}, counted from 0")
        return self.gpus[index]


@functools.cache
def probe() -> Driver:
    """The driver of this machine. Blocking: about 0.1 s without a driver, and up to 20 s with one that does not answer.

    Raises `Unavailable` in words for the operator when there is none, or it does not work.
    """
    return ask(_SECONDS)


def present(root: Path = Path("/")) -> bool:
    """Whether there are traces of a driver, so that it is worth asking: a look at a few files."""
    return any((root / trace.lstrip("/")).exists() for trace in _TRACES)


def ask(seconds: float) -> Driver:
    """`probe`, every time anew, and for at most so long."""
    command = child.mortal([sys.executable, "-I", "-S", "-c", _SCRIPT])
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)  # noqa: S603 - our own script
    except subprocess.TimeoutExpired:
        raise errors.Unavailable(
            f"the NVIDIA driver did not answer within {seconds:g} s; `nvidia-smi` will hang too. Restart the machine, "
            "or take the GPU out of service"
        ) from None
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        raise errors.Unavailable(
            f"the process that asked the NVIDIA driver ended with {how}: the driver is broken; install it again"
        )
    return _read(json.loads(done.stdout))


def _read(told: dict[str, object]) -> Driver:
    if "missing" in told:
        missing = str(told["missing"]).partition(":")[0]
        raise errors.Unavailable(
            f"no NVIDIA driver: {missing} is missing; install the driver or, in a container, start it with --gpus all"
        )
    if "function" in told:
        code = int(str(told["code"]))
        text = _CODES.get(code, "`nvidia-smi` and the kernel's log say more")
        raise errors.Unavailable(f"the NVIDIA driver does not work: {told['function']} gave error {code}: {text}")
    driver = msgspec.convert(told, Driver)
    if not driver.gpus:
        raise errors.Unavailable(f"the NVIDIA driver does not work: {_CODES[100]}")
    return driver
