"""Runs of one plan on one stream: buffers, execution contexts, and CUDA graphs for the shapes that come again.

One `Execution` belongs to one engine and is used by one thread at a time; several may share a deserialized plan. All
buffers are as large as the plan's profiles allow and never move, so that graphs may hold their addresses. A graph
must not outlive changes to the context it was captured from (TensorRT's guide, "CUDA Graphs"), so each has a context
of its own; as they run one after the other, all share one block of memory for activations.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from gateway import errors
from gateway.engines import cuda_faults
from gateway.engines.base import DeviceOutOfMemory, EngineCrashed
from gateway.engines.tensorrt.cuda import Address, Cuda, Handle, Pinned
from gateway.engines.tensorrt.loaded import LoadedPlan
from gateway.engines.tensorrt.profiles import Shape
from gateway.types import Array, TensorSpec

MOST_GRAPHS = 16
"""How many shapes have a graph; the others run without one."""

_MOST_SEEN = 1024

Shapes: TypeAlias = tuple[tuple[str, Shape], ...]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """The memory of one tensor here and on the device, for the largest of its shapes."""

    host: Pinned
    device: Address


@dataclass(slots=True)
class _Context:
    """An execution context, and the profile and shapes it was last given."""

    trt: Any
    profile: int = 0
    shapes: Shapes = ()


@dataclass(frozen=True, slots=True)
class _Graph:
    context: _Context
    handle: Handle


class Execution:
    """One stream's way to run a plan. Made, used and dropped on threads that have selected its device."""

    def __init__(self, cuda: Cuda, plan: LoadedPlan, *, graphs: bool) -> None:
        """Takes the memory. Raises `DeviceOutOfMemory` when there is not enough, with nothing left behind."""
        self._cuda = cuda
        self._plan = plan
        self._most_graphs = MOST_GRAPHS if graphs else 0
        self._seen: set[Shapes] = set()  # once, and without a graph
        self._graphs: dict[Shapes, _Graph | None] = {}  # None: it cannot be captured
        self._specs = {spec.name: spec for spec in (*plan.io.inputs, *plan.io.outputs)}
        with ExitStack() as resources:
            self._stream = cuda.stream()
            self._number = int(self._stream)  # as TensorRT takes it
            resources.callback(cuda.end_stream, self._stream)
            self._contexts: list[_Context] = []
            self._activations = cuda.allocate(max(plan.activation_bytes, 1))
            resources.callback(cuda.free, self._activations)
            self._buffers = {name: self._buffer(size, resources) for name, size in plan.buffer_bytes.items()}
            resources.callback(self._contexts.clear)
            self._main = self._context()
            self._resources = resources.pop_all()
        # What is left when the process ends goes with it: CUDA may be gone before Python's last objects are.
        weakref.finalize(self, _release, self._resources).atexit = False

    def run(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs. Inputs have the plan's types and shapes.

        Raises `InvalidArgument` for shapes that no profile of the plan holds, `DeviceOutOfMemory`, `EngineCrashed` when
        the process is lost, and `Internal` for a run that failed.
        """
        self._cuda.select()
        self._plan.forget_errors()
        context = self._start(inputs)
        results = {name: self._fetch(name, tuple(context.trt.get_tensor_shape(name))) for name in names}
        self._cuda.synchronize(self._stream)
        # Copied, because the next run writes over the buffers while these answers are still on their way.
        return {name: view.copy() for name, view in results.items()}

    def _start(self, inputs: Mapping[str, Array]) -> _Context:
        """Put a run on the stream; returns the context that knows the shapes of its outputs."""
        shapes = tuple((name, array.shape) for name, array in inputs.items())
        profile = self._plan.profile_for(shapes, self._main.profile)  # and so they fit the buffers
        for name, array in inputs.items():
            self._upload(name, array)
        if self._captures(shapes):
            self._graphs[shapes] = graph = self._capture(profile, shapes)
            if graph is not None:
                return graph.context
        elif (graph := self._graphs.get(shapes)) is not None:
            self._cuda.launch(graph.handle, self._stream)
            return graph.context
        self._give(self._main, profile, shapes)
        self._execute(self._main)
        return self._main

    def _captures(self, shapes: Shapes) -> bool:
        """Whether to make a graph of these shapes now: the second time that they come, as many never do again."""
        if shapes in self._graphs or len(self._graphs) >= self._most_graphs:
            return False
        if shapes in self._seen:
            self._seen.remove(shapes)
            return True
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen.add(shapes)
        return False

    def _capture(self, profile: int, shapes: Shapes) -> _Graph | None:
        """Run the batch on a context of its own and capture that; None, with nothing run, if it cannot be."""
        try:
            context = self._context()
        except (DeviceOutOfMemory, errors.Internal):
            return None
        self._give(context, profile, shapes)
        # TensorRT settles in the first run what a change of shapes puts off; only what follows can be captured.
        self._execute(context)
        self._cuda.synchronize(self._stream)
        handle = self._cuda.capture(self._stream, lambda: bool(context.trt.execute_async_v3(self._number)))
        if handle is None:
            return None
        self._resources.callback(self._cuda.end_graph, handle)
        return _Graph(context, handle)

    def _context(self) -> _Context:
        made = self._plan.context()
        made.set_device_memory(self._activations, self._plan.activation_bytes)
        for name, buffer in self._buffers.items():
            if not made.set_tensor_address(name, buffer.device):
                raise self._failure(f"TensorRT refused the address of '{name}'")
        context = _Context(made)
        self._contexts.append(context)
        return context

    def _give(self, context: _Context, profile: int, shapes: Shapes) -> None:
        if profile != context.profile:
            if not context.trt.set_optimization_profile_async(profile, self._number):
                raise self._failure(f"TensorRT refused optimization profile {profile}")
            self._cuda.synchronize(self._stream)
            context.profile, context.shapes = profile, ()
        if shapes == context.shapes:
            return
        context.shapes = ()
        for name, shape in shapes:
            if not context.trt.set_input_shape(name, shape):
                raise self._failure(f"TensorRT refused shape {list(shape)} of input '{name}'")
        context.shapes = shapes

    def _upload(self, name: str, array: Array) -> None:
        buffer = self._buffers[name]
        if array.nbytes:
            _view(buffer.host, self._specs[name], array.shape)[...] = array
            self._cuda.upload(buffer.device, buffer.host, array.nbytes, self._stream)

    def _fetch(self, name: str, shape: Shape) -> Array:
        buffer = self._buffers[name]
        view = _view(buffer.host, self._specs[name], shape)
        if view.nbytes:
            self._cuda.download(buffer.host, buffer.device, view.nbytes, self._stream)
        return view

    def _execute(self, context: _Context) -> None:
        if not context.trt.execute_async_v3(self._number):
            raise self._failure("the run failed")

    def _buffer(self, size: int, resources: ExitStack) -> _Buffer:
        device = self._cuda.allocate(max(size, 1))
        resources.callback(self._cuda.free, device)
        host = self._cuda.pin(max(size, 1))
        resources.callback(self._cuda.unpin, host)
        return _Buffer(host, device)

    def _failure(self, what: str) -> Exception:
        """What a refusal of TensorRT means: CUDA knows it, or what TensorRT logged does."""
        told = self._plan.last_errors()
        text = f"{what}: {told}" if told else what
        return self._cuda.last_error() or cuda_faults.from_text(text) or errors.Internal(text)


def _view(memory: Pinned, spec: TensorSpec, shape: Shape) -> Array:
    dtype = spec.datatype.dtype
    size = int(np.prod(shape)) * dtype.itemsize
    return memory.bytes[:size].view(dtype).reshape(shape)


def _release(resources: ExitStack) -> None:
    # After a sticky error nothing can be freed, and the process, which must end, frees it all.
    with suppress(EngineCrashed):
        resources.close()
