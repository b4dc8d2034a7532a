"""A plan in a device's memory: what it takes and gives, its profiles, and how much memory a run needs.

Shared by all engines of a version on a device. Refuses, in words, what this backend cannot run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from gateway import errors
from gateway.engines.tensorrt.log import ErrorLog
from gateway.engines.tensorrt.packages import Package
from gateway.engines.tensorrt.profiles import Profile, Range, Shape
from gateway.types import DataType, ModelIO, TensorSpec

_DATATYPES = {
    "FLOAT": DataType.FP32,
    "HALF": DataType.FP16,
    "BF16": DataType.BF16,
    "INT8": DataType.INT8,
    "INT32": DataType.INT32,
    "INT64": DataType.INT64,
    "UINT8": DataType.UINT8,
    "BOOL": DataType.BOOL,
}


class LoadedPlan:
    """A deserialized plan. `label` is what errors call its file."""

    def __init__(self, package: Package, plan: bytes, label: str) -> None:
        """Raises `Unavailable` for a plan that TensorRT does not take, `Unsupported` for one that we cannot run."""
        self._trt = trt = package.api()
        self._log = ErrorLog(trt)
        self._runtime = trt.Runtime(self._log.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise errors.Unavailable(
                f"{label} does not load in {package.name} {trt.__version__}: "
                f"{self.last_errors() or 'it gave no reason'}. Build it on this machine: gateway build --plan"
            )
        self._label = label
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        mode = trt.TensorIOMode.INPUT
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == mode]
        self.io = ModelIO(
            tuple(self._spec(name) for name in inputs),
            tuple(self._spec(name) for name in names if name not in inputs),
        )
        self.profiles: tuple[Profile, ...] = tuple(
            {name: self._range(name, index) for name in inputs}
            for index in range(self._engine.num_optimization_profiles)
        )
        self.activation_bytes: int = self._engine.device_memory_size_v2

    def context(self) -> Any:
        """A new execution context, which must be given its memory. Raises `Internal` when TensorRT makes none."""
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise errors.Internal(f"{self._label}: TensorRT made no execution context: {self.last_errors()}")
        return context

    def profile_for(self, shapes: Sequence[tuple[str, Shape]], current: int) -> int:
        """The number of a profile that holds these inputs, the current one if it does.

        Raises `InvalidArgument` when none does.
        """
        candidates: list[int] = [current, *range(len(self.profiles))]
        for index in candidates:
            if all(self.profiles[index][name].holds(shape) for name, shape in shapes):
                return index
        name, shape = next(
            ((name, shape) for name, shape in shapes if not any(each[name].holds(shape) for each in self.profiles)),
            shapes[0],
        )
        ranges = " or ".join(dict.fromkeys(str(profile[name]) for profile in self.profiles))
        raise errors.InvalidArgument(
            f"input '{name}' has shape {list(shape)}, and the plan was built for {ranges}; send such shapes, or build it "
            "for more with the parameters trt_profile_min_shapes and trt_profile_max_shapes"
        )

    def forget_errors(self) -> None:
        """Begin anew with what TensorRT says went wrong."""
        self._log.clear()

    def last_errors(self) -> str:
        """What TensorRT said went wrong, without paths; empty for nothing."""
        return str(self._log)

    def _spec(self, name: str) -> TensorSpec:
        if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
            raise errors.Unsupported(
                f"{self._label}: '{name}' is a shape tensor, whose values TensorRT reads on the CPU; export the model "
                "without it, or serve the ONNX file"
            )
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DATATYPES:
            raise errors.Unsupported(
                f"{self._label}: '{name}' is of type {kind}, which the protocol cannot carry; cast it at the model's edge"
            )
        return TensorSpec(name, _DATATYPES[kind], tuple(self._engine.get_tensor_shape(name)))

    def _range(self, name: str, profile: int) -> Range:
        fixed = tuple(self._engine.get_tensor_shape(name))
        if -1 not in fixed:
            return Range(fixed, fixed, fixed)
        shapes = self._engine.get_tensor_profile_shape(name, profile)
        return Range(*(tuple(shape) for shape in shapes))

    @cached_property
    def buffer_bytes(self) -> dict[str, int]:
        """The most bytes that each tensor can have, over all profiles.

        Raises `Unsupported` for an output of which that is not known.
        """
        sizes = {
            spec.name: max(math.prod(profile[spec.name].greatest) for profile in self.profiles) * spec.datatype.itemsize
            for spec in self.io.inputs
        }
        for index in range(len(self.profiles)):
            for name, size in self._output_sizes(self.context(), index).items():
                sizes[name] = max(sizes.get(name, 0), size)
        return sizes

    def _output_sizes(self, context: Any, profile: int) -> dict[str, int]:
        if profile and not context.set_optimization_profile_async(profile, 0):
            raise errors.Internal(f"{self._label}: TensorRT refused optimization profile {profile}")
        for name, shapes in self.profiles[profile].items():
            context.set_input_shape(name, shapes.greatest)
        sizes = {}
        for spec in self.io.outputs:
            size = context.get_max_output_size(spec.name)
            if size < 0 or -1 in tuple(context.get_tensor_shape(spec.name)):
                raise errors.Unsupported(
                    f"{self._label}: the shape of output '{spec.name}' depends on what is computed, which this backend "
                    "cannot run; serve the ONNX file"
                )
            sizes[spec.name] = size
        return sizes
