"""A fake of `cuda.bindings.runtime`: device memory, streams and graphs, on the CPU.

As strict as the real one where that lets errors of ours slip: work on a stream is done when it is waited for and not
before, so that a forgotten wait yields old memory; copies are checked against what is allocated; an allocation during
a capture invalidates it; after a sticky error every call fails. One fake GPU for each process: `GPU`.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from typing import TypeAlias

cudaStreamNonBlocking = 1
cudaHostAllocDefault = 0

Work: TypeAlias = Callable[[], "cudaError_t"]


class cudaError_t(enum.IntEnum):
    """The codes that are used here."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


OK = cudaError_t.cudaSuccess
_STICKY = (cudaError_t.cudaErrorIllegalAddress, cudaError_t.cudaErrorLaunchFailure)


class cudaMemcpyKind(enum.IntEnum):
    """Where a copy goes."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    """Whose calls may disturb a capture."""

    cudaStreamCaptureModeThreadLocal = 1


class Gpu:
    """The state of the fake GPU. `calls` are the names of all calls; `fail` makes the next call of a name fail."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, memory: int = 1 << 30) -> None:
        """As a GPU of so many bytes that nobody uses."""
        self.calls: list[str] = []
        self.fail: dict[str, cudaError_t] = {}
        self.device: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.host: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.streams: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.captured: dict[int, list[Work]] = {}
        self.capturing: int = 0
        self.invalid = False
        self.lost: cudaError_t | None = None
        self.last = OK
        self.free = memory
        self._handles = 0

    def handle(self) -> int:
        """A number that was not given before."""
        self._handles += 1
        return self._handles

    def put(self, stream: int, work: Work) -> cudaError_t:
        """Add to a stream, or to what is being captured from it."""
        if stream not in self.streams:
            return cudaError_t.cudaErrorInvalidResourceHandle
        (self.captured[stream] if self.capturing == stream else self.streams[stream]).append(work)
        return OK

    def owned(self, memory: dict[int, ctypes.Array[ctypes.c_char]], address: int, size: int) -> bool:
        """Whether so many bytes at an address are within one allocation."""
        return any(start <= address and address + size <= start + len(block) for start, block in memory.items())


GPU = Gpu()


def _enter(name: str, *, allocates: bool = False) -> cudaError_t:
    GPU.calls.append(name)
    if GPU.lost is not None:
        return GPU.lost
    if allocates and GPU.capturing:
        GPU.invalid = True
        return _fail(cudaError_t.cudaErrorStreamCaptureUnsupported)
    return _fail(GPU.fail.pop(name)) if name in GPU.fail else OK


def _fail(code: cudaError_t) -> cudaError_t:
    GPU.last = code
    if code in _STICKY:
        GPU.lost = code
    return code


def cudaSetDevice(device: int) -> tuple[cudaError_t]:
    """There is one."""
    code = _enter("cudaSetDevice")
    return (code or (OK if device == 0 else _fail(cudaError_t.cudaErrorInvalidDevice)),)


def cudaGetLastError() -> tuple[cudaError_t]:
    """The last error, which it forgets unless it is sticky."""
    last, GPU.last = GPU.last, GPU.lost or OK
    return (last,)


def cudaGetErrorString(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    """Its name, for a text."""
    return OK, cudaError_t(error).name.encode()


def cudaMalloc(size: int) -> tuple[cudaError_t, int | None]:
    """Memory that the host must not read; here it could."""
    code = _enter("cudaMalloc", allocates=True)
    if not code and size > GPU.free:
        code = _fail(cudaError_t.cudaErrorMemoryAllocation)
    if code:
        return code, None
    block = ctypes.create_string_buffer(b"\xa5" * size, size)  # fresh memory holds what it held
    GPU.free -= size
    GPU.device[ctypes.addressof(block)] = block
    return OK, ctypes.addressof(block)


def cudaFree(address: int) -> tuple[cudaError_t]:
    """Give it back."""
    code = _enter("cudaFree")
    block = GPU.device.pop(address, None)
    if block is None:
        return (code or _fail(cudaError_t.cudaErrorInvalidValue),)
    GPU.free += len(block)
    return (code,)


def cudaHostAlloc(size: int, _flags: int) -> tuple[cudaError_t, int | None]:
    """Page-locked memory."""
    code = _enter("cudaHostAlloc", allocates=True)
    if code:
        return code, None
    block = ctypes.create_string_buffer(b"\x5a" * size, size)
    GPU.host[ctypes.addressof(block)] = block
    return OK, ctypes.addressof(block)


def cudaFreeHost(address: int) -> tuple[cudaError_t]:
    """Give it back."""
    code = _enter("cudaFreeHost")
    found = GPU.host.pop(address, None) is not None
    return (code or (OK if found else _fail(cudaError_t.cudaErrorInvalidValue)),)


def cudaMemcpyAsync(target: int, source: int, size: int, kind: cudaMemcpyKind, stream: int) -> tuple[cudaError_t]:
    """Copied when the stream is waited for."""
    code = _enter("cudaMemcpyAsync")
    up = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
    to, of = (GPU.device, GPU.host) if up else (GPU.host, GPU.device)
    if not code and not (GPU.owned(to, target, size) and GPU.owned(of, source, size)):
        code = _fail(cudaError_t.cudaErrorInvalidValue)

    def copy() -> cudaError_t:
        ctypes.memmove(target, source, size)
        return OK

    return (code or GPU.put(stream, copy),)


def cudaStreamCreateWithFlags(_flags: int) -> tuple[cudaError_t, int | None]:
    """A stream with nothing to do."""
    code = _enter("cudaStreamCreateWithFlags")
    if code:
        return code, None
    stream = GPU.handle()
    GPU.streams[stream] = []
    return OK, stream


def cudaStreamSynchronize(stream: int) -> tuple[cudaError_t]:
    """Do what the stream was given, in order, and give the first error."""
    code = _enter("cudaStreamSynchronize", allocates=True)
    if code or stream not in GPU.streams:
        return (code or _fail(cudaError_t.cudaErrorInvalidResourceHandle),)
    works = GPU.streams[stream]
    while works:
        code = works.pop(0)()
        if code:
            works.clear()
            return (_fail(code),)
    return (OK,)


def cudaStreamDestroy(stream: int) -> tuple[cudaError_t]:
    """End it."""
    code = _enter("cudaStreamDestroy")
    found = GPU.streams.pop(stream, None) is not None
    return (code or (OK if found else _fail(cudaError_t.cudaErrorInvalidResourceHandle)),)


def cudaStreamBeginCapture(stream: int, _mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:
    """From here on the stream's work is kept and not done."""
    code = _enter("cudaStreamBeginCapture")
    if not code:
        GPU.capturing, GPU.invalid, GPU.captured[stream] = stream, False, []
    return (code,)


def cudaStreamEndCapture(stream: int) -> tuple[cudaError_t, int | None]:
    """What was kept, as a graph."""
    code = _enter("cudaStreamEndCapture")
    works, GPU.capturing = GPU.captured.pop(stream, []), 0
    if code or GPU.invalid:
        return code or _fail(cudaError_t.cudaErrorStreamCaptureInvalidated), None
    graph = GPU.handle()
    GPU.graphs[graph] = works
    return OK, graph


def cudaGraphInstantiate(graph: int, _flags: int) -> tuple[cudaError_t, int | None]:
    """A graph that can be launched."""
    code = _enter("cudaGraphInstantiate")
    if code:
        return code, None
    made = GPU.handle()
    GPU.graphs[made] = GPU.graphs[graph]
    return OK, made


def cudaGraphDestroy(graph: int) -> tuple[cudaError_t]:
    """Drop it; what was made of it stays."""
    code = _enter("cudaGraphDestroy")
    del GPU.graphs[graph]
    return (code,)


def cudaGraphExecDestroy(graph: int) -> tuple[cudaError_t]:
    """Drop it."""
    code = _enter("cudaGraphExecDestroy")
    del GPU.graphs[graph]
    return (code,)


def cudaGraphLaunch(graph: int, stream: int) -> tuple[cudaError_t]:
    """Add what was captured to a stream."""
    code = _enter("cudaGraphLaunch")
    for work in () if code else GPU.graphs[graph]:
        code = code or GPU.put(stream, work)
    return (code,)
