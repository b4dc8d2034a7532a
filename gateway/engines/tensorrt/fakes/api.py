"""A fake of the package `tensorrt`: its runtime. The builder is in `builder.py`.

A fake plan holds an ONNX file, which ONNX Runtime computes on the CPU when the fake GPU's stream gets there. It has
profiles and keeps to them, takes no shape that was not set and no address that was not given, and writes its outputs
over whatever is in their memory. `faults` of a plan make runs fail: a value anywhere in the first input is a sticky
error (`sticky`), or lets the GPU run out of memory (`memory`), as do more rows than `memory_rows`.
"""

from __future__ import annotations

import base64
import ctypes
import enum
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from gateway.engines.tensorrt.fakes.builder import (
    Builder,
    DataType,
    IBuilderConfig,
    IOptimizationProfile,
    IProgressMonitor,
    ITimingCache,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    OnnxParser,
    ParserError,
)
from gateway.engines.tensorrt.fakes.cuda import GPU, OK, cudaError_t
from gateway.engines.tensorrt.fakes.logger import ILogger, Logger
from gateway.engines.tensorrt.fakes.network import MAGIC, VERSION, Tensor
from gateway.types import Array, element_count

__version__ = VERSION

__all__ = [
    "Builder", "DataType", "ExecutionContextAllocationStrategy", "IBuilderConfig", "ILogger", "IOptimizationProfile",
    "IProgressMonitor", "ITimingCache", "Logger", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser",
    "ParserError", "Runtime", "TensorIOMode", "TensorLocation",
]  # fmt: skip


class TensorIOMode(enum.Enum):
    """What a tensor is."""

    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    """Where TensorRT reads a tensor."""

    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    """Who allocates the memory of a context."""

    STATIC = 0
    USER_MANAGED = 2


class Runtime:
    """Reads plans."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        """The engine of a plan; None, and a line in the log, for one that is damaged or of another version."""
        if not plan.startswith(MAGIC):
            self._logger.log(ILogger.ERROR, "Serialization assertion magicTag failed. Trying to load an engine in /a/b")
            return None
        body = json.loads(plan[len(MAGIC) :])
        if body["version"] != __version__:
            self._logger.log(
                ILogger.ERROR,
                f"The engine plan file is not compatible with this version of TensorRT, expecting library version "
                f"{__version__} got {body['version']}",
            )
            return None
        return ICudaEngine(body, self._logger)


class ICudaEngine:
    """A plan in memory."""

    def __init__(self, body: Mapping[str, Any], logger: ILogger) -> None:
        self.logger = logger
        self.tensors: dict[str, Tensor] = {each["name"]: Tensor(**each) for each in body["tensors"]}
        self.profiles: list[Mapping[str, Sequence[Sequence[int]]]] = body["profiles"]
        self.faults: Mapping[str, float] = body["faults"]
        self.model = base64.b64decode(body["onnx"])
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(self.profiles)
        self.device_memory_size_v2 = 4096
        self._session: Any = None

    def get_tensor_name(self, index: int) -> str:
        """The name of a tensor, inputs first."""
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        """What a tensor is."""
        return TensorIOMode.INPUT if self.tensors[name].is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        """The type of its elements."""
        return DataType[self.tensors[name].kind]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Its shape; -1 for what is open."""
        return tuple(self.tensors[name].shape)

    def get_tensor_location(self, name: str) -> TensorLocation:
        """Where it is read."""
        return TensorLocation[self.tensors[name].location]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        """The least, best and greatest shape of an input."""
        return [tuple(shape) for shape in self.profiles[profile][name]]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext | None:
        """A context without memory. None while memory is short."""
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if GPU.lost is not None:
            self.logger.log(ILogger.ERROR, f"CUDA error {int(GPU.lost)}")
            return None
        return IExecutionContext(self)

    def compute(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What ONNX Runtime makes of arrays."""
        import onnxruntime as ort

        from gateway.engines import tensors

        if self._session is None:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            # Quantized files are computed in floating point: a CPU's integer kernels saturate where a GPU's do not.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._session = ort.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        names = [tensor.name for tensor in self.tensors.values() if not tensor.is_input]
        bf16 = {tensor.name for tensor in self.tensors.values() if tensor.kind == "BF16"}
        values = self._session.run_with_ort_values(names, tensors.to_values(inputs, bf16))
        return {name: tensors.from_value(value) for name, value in zip(names, values, strict=True)}


class IExecutionContext:
    """The state of runs of an engine."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = 0
        self._memory = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._settled = False
        for tensor in engine.tensors.values():
            if tensor.is_input and -1 not in tensor.shape:
                self._shapes[tensor.name] = tuple(tensor.shape)

    def set_device_memory(self, memory: int, size: int) -> None:
        """Where activations are put."""
        assert GPU.owned(GPU.device, memory, size)
        self._memory = size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Where a tensor is."""
        self._addresses[name] = memory
        return name in self._engine.tensors

    def set_optimization_profile_async(self, profile: int, _stream: int) -> bool:
        """Change the profile, which forgets all shapes."""
        if not 0 <= profile < self._engine.num_optimization_profiles:
            return self._refuse(f"profile {profile} is out of range")
        self._profile, self._settled = profile, False
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """The shape of the next run's input, which must be in the profile."""
        least, _, greatest = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(least) or not all(
            low <= size <= high for low, size, high in zip(least, shape, greatest, strict=True)
        ):
            return self._refuse(f"Set dimension {list(shape)} for tensor {name} does not satisfy any profile")
        self._settled = self._settled and self._shapes.get(name) == tuple(shape)
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor with the inputs' shapes as they are set; -1 where it depends on what is computed."""
        tensor = self._engine.tensors[name]
        if tensor.is_input:
            return self._shapes[name]
        if tensor.depends_on_data:
            return tuple(tensor.shape)
        zeros = {
            each.name: np.zeros(self._shapes[each.name], each.dtype)
            for each in self._engine.tensors.values()
            if each.is_input
        }
        return self._engine.compute(zeros)[name].shape

    def get_max_output_size(self, name: str) -> int:
        """The most bytes that an output can have, as the shapes are set."""
        tensor = self._engine.tensors[name]
        return -1 if tensor.depends_on_data else element_count(self.get_tensor_shape(name)) * tensor.dtype.itemsize

    def execute_async_v3(self, stream: int) -> bool:
        """Put a run on a stream. A capture needs a run with these shapes before it."""
        if GPU.lost is not None:
            return self._refuse(f"Cuda Runtime (error {int(GPU.lost)})")
        tensors = self._engine.tensors
        if self._memory < self._engine.device_memory_size_v2 or set(self._addresses) != set(tensors):
            return self._refuse("no memory or no address was set")
        names = [tensor.name for tensor in tensors.values() if tensor.is_input]
        if not set(names) <= set(self._shapes):
            return self._refuse("not all shapes are set")
        shapes = {name: self._shapes[name] for name in names}
        if GPU.capturing == stream and not self._settled:
            GPU.invalid = True
            return self._refuse("operation not permitted when stream is capturing")
        if GPU.capturing != stream:
            rows = max((shape[0] for shape in shapes.values() if shape), default=1)
            if rows > self._engine.faults.get("memory_rows", rows):
                return self._refuse("OutOfMemory (Requested size was 1 bytes)")
        self._settled = True
        return GPU.put(stream, partial(self._run, shapes, dict(self._addresses))) == OK

    def _run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> cudaError_t:
        inputs = {name: self._view(name, shape, addresses) for name, shape in shapes.items()}
        first = next(iter(inputs.values()))
        if "sticky" in self._engine.faults and np.any(first == self._engine.faults["sticky"]):
            return cudaError_t.cudaErrorIllegalAddress
        if "memory" in self._engine.faults and np.any(first == self._engine.faults["memory"]):
            return cudaError_t.cudaErrorMemoryAllocation
        for name, array in self._engine.compute({name: array.copy() for name, array in inputs.items()}).items():
            self._view(name, array.shape, addresses)[...] = array
        return OK

    def _view(self, name: str, shape: Sequence[int], addresses: Mapping[str, int]) -> Array:
        dtype = self._engine.tensors[name].dtype
        size = element_count(tuple(shape)) * dtype.itemsize
        assert GPU.owned(GPU.device, addresses[name], size)
        memory = (ctypes.c_uint8 * size).from_address(addresses[name])
        return (
            np.ctypeslib.as_array(memory).view(dtype).reshape(tuple(shape)) if size else np.zeros(tuple(shape), dtype)
        )

    def _refuse(self, text: str) -> bool:
        self._engine.logger.log(ILogger.ERROR, f"IExecutionContext: Error Code 3: API Usage Error ({text})")
        return False
