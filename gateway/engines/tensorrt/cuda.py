"""CUDA's runtime on one device, by `cuda.bindings.runtime` or something like it: every call's error is checked.

What is made here is freed by whoever asked for it. An error becomes what it means for an engine (`cuda_faults`): no
memory, a lost process, or a failed run. Current devices belong to threads, so a thread calls `select` before
anything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from gateway.engines import cuda_faults
from gateway.types import Array

Handle: TypeAlias = Any  # a stream or a graph; only CUDA knows what is in it
Address: TypeAlias = int


@dataclass(frozen=True, slots=True)
class Pinned:
    """Page-locked memory of the host, from which and to which copies run beside everything else."""

    address: Address
    bytes: Array  # its memory, as uint8


class Cuda:
    """The calls an engine needs, on one device. Raises what `cuda_faults.fault` makes of an error."""

    def __init__(self, runtime: Any, device: int) -> None:
        self._rt = runtime
        self._device = device

    def select(self) -> None:
        """Make the device the current one of the calling thread."""
        self._call("cudaSetDevice", self._device)

    def stream(self) -> Handle:
        """A stream that does not wait for the default one."""
        return self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking)

    def allocate(self, size: int) -> Address:
        """So many bytes of the device's memory."""
        return int(self._call("cudaMalloc", size))

    def pin(self, size: int) -> Pinned:
        """So many bytes of page-locked memory."""
        address = int(self._call("cudaHostAlloc", size, self._rt.cudaHostAllocDefault))
        return Pinned(address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))

    def upload(self, target: Address, source: Pinned, size: int, stream: Handle) -> None:
        """Copy to the device, in the stream's order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.address, size, kind, stream)

    def download(self, target: Pinned, source: Address, size: int, stream: Handle) -> None:
        """Copy from the device, in the stream's order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.address, source, size, kind, stream)

    def synchronize(self, stream: Handle) -> None:
        """Wait for all that the stream was given; raises what went wrong in it."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: Handle, enqueue: Callable[[], bool]) -> Handle | None:
        """What `enqueue` puts on the stream, as a graph to launch; None if it cannot be captured. Runs nothing."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # others may allocate meanwhile
        self._call("cudaStreamBeginCapture", stream, mode)
        enqueued = enqueue()
        code, graph = self._rt.cudaStreamEndCapture(stream)
        if int(code) or not enqueued:
            self.last_error()
            if int(code) in cuda_faults.STICKY:
                raise self._fault("cudaStreamEndCapture", code)
            return None
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Run a captured graph, in the stream's order."""
        self._call("cudaGraphLaunch", graph, stream)

    def free(self, address: Address) -> None:
        """Give the device's memory back."""
        self._call("cudaFree", address)

    def unpin(self, memory: Pinned) -> None:
        """Give page-locked memory back; nothing may look at it any more."""
        self._call("cudaFreeHost", memory.address)

    def end_stream(self, stream: Handle) -> None:
        """End a stream."""
        self._call("cudaStreamDestroy", stream)

    def end_graph(self, graph: Handle) -> None:
        """Drop a captured graph."""
        self._call("cudaGraphExecDestroy", graph)

    def last_error(self) -> Exception | None:
        """What CUDA says went wrong in a library that called it; None for nothing. Asking forgets it."""
        (code,) = self._rt.cudaGetLastError()
        return self._fault("a call of the library", code) if int(code) else None

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._rt, name)(*arguments)
        if int(code):
            self._rt.cudaGetLastError()  # CUDA would report it again for a later call that is not to blame
            raise self._fault(name, code)
        return values[0] if values else None

    def _fault(self, name: str, code: Any) -> Exception:
        _, text = self._rt.cudaGetErrorString(code)
        words = text.decode() if isinstance(text, bytes) else str(text)
        return cuda_faults.fault(int(code), f"{name}: {words}")
