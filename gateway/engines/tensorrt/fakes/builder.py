"""The fake TensorRT's builder: parses ONNX files with the package `onnx`, and makes fake plans.

Refuses what TensorRT refuses of quantized files only as far as a test needs: a DequantizeLinear of INT32.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gateway.engines.tensorrt.fakes.logger import ILogger
from gateway.engines.tensorrt.fakes.network import serialize, tensors


class DataType(enum.Enum):
    """The types of elements."""

    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8


class NetworkDefinitionCreationFlag(enum.IntEnum):
    """How a network is made."""

    STRONGLY_TYPED = 1


class INetworkDefinition:
    """A network; `flags` as it was made, `model` once it was parsed."""

    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.model = b""

    @property
    def num_inputs(self) -> int:
        """How many inputs it has."""
        return sum(tensor.is_input for tensor in tensors(self.model))

    def get_input(self, index: int) -> Any:
        """An input: its name and shape."""
        return [tensor for tensor in tensors(self.model) if tensor.is_input][index]


class IOptimizationProfile:
    """A profile; `shapes` as they were set."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[Sequence[int]]] = {}

    def set_shape(self, name: str, least: Sequence[int], best: Sequence[int], greatest: Sequence[int]) -> None:
        """The range of an input."""
        self.shapes[name] = [least, best, greatest]


class ITimingCache:
    """How long kernels took."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        """Its content, to keep."""
        return self.content


class IBuilderConfig:
    """How to build."""

    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self.progress_monitor: Any = None
        self.pools: dict[Any, int] = {}
        self.cache = ITimingCache(b"")

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        """Add a profile; its number."""
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> ITimingCache:
        """A cache with what was kept."""
        return ITimingCache(bytes(content))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        """Use a cache; False for one of another GPU."""
        if cache.content.startswith(b"other") and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        """The cache, with what this build adds."""
        return ITimingCache(self.cache.content + b"timed;")

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        """The most memory that a kernel may use."""
        self.pools[pool] = size


class IProgressMonitor:
    """What is told of a build."""


class MemoryPoolType(enum.Enum):
    """Kinds of memory."""

    WORKSPACE = 0


class Builder:
    """Builds plans."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        """An empty network."""
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        """The defaults."""
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        """An empty profile."""
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        """The plan; None when an open dimension has no profile."""
        asked = {tensor.name for tensor in tensors(network.model) if tensor.is_input}
        if any(set(profile.shapes) != asked for profile in config.profiles):
            self._logger.log(ILogger.ERROR, "Network has dynamic or shape inputs, but no optimization profile")
            return None
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("Building", None, 2)
            for step in range(2):
                if not config.progress_monitor.step_complete("Building", step):
                    return None
            config.progress_monitor.phase_finish("Building")
        return serialize(network.model, [profile.shapes for profile in config.profiles])


class ParserError:
    """What is wrong with a model."""

    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        """In words."""
        return self._text

    def node_name(self) -> str:
        """Where."""
        return "node"

    def node_operator(self) -> str:
        """What."""
        return "DequantizeLinear"


class OnnxParser:
    """Reads ONNX files."""

    def __init__(self, network: INetworkDefinition, _logger: ILogger) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    def parse_from_file(self, path: str) -> bool:
        """Read a file; False when there are errors."""
        import onnx

        model = onnx.load(path)
        kinds = {each.name: each.data_type for each in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear" and kinds.get(node.input[0]) == onnx.TensorProto.INT32:
                self._errors.append(ParserError("input has type Int32 but must have type Int8"))
        self._network.model = Path(path).read_bytes()
        return not self._errors

    @property
    def num_errors(self) -> int:
        """How many there are."""
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        """One of them."""
        return self._errors[index]
