"""One model's configuration, read once from Triton's `ModelConfig` protobuf into plain frozen values.

`ModelConfig.proto` keeps the whole normalised message for the model configuration extension; the rest of
the gateway reads the fields here and never touches protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gateway.types import DataType

ModelConfigProto: TypeAlias = Any  # tritonclient.grpc.model_config_pb2.ModelConfig, which has no stubs


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """One input or output. `dims` exclude the batch dimension when `max_batch_size` > 0; -1 is open.

    `reshape` is the shape the model itself wants where that differs from `dims`, the shape clients use. A `ragged`
    input's elements are joined end to end, whatever the shapes of the requests. What is `whole` (Triton's shape tensor) has
    no batch dimension and is one for the batch. An output that is `like` an input has one element after the other, which
    are cut by that input's shapes (Triton's user_guide/ragged_batching.md, BATCH_SCATTER_WITH_INPUT_SHAPE).
    """

    name: str
    datatype: DataType
    dims: tuple[int, ...]
    reshape: tuple[int, ...] | None = None
    optional: bool = False
    label_filename: str = ""
    labels: tuple[str, ...] = ()
    ragged: bool = False
    whole: bool = False
    like: str = ""


@dataclass(frozen=True, slots=True)
class BatchInput:
    """An input that no request has: the gateway makes it from the shapes of `source` in a batch's requests.

    `kind` is Triton's name without BATCH_, in lower case, or `shapes`: those of each request, for a model that is code.
    """

    kind: str
    targets: tuple[str, ...]
    datatype: DataType
    source: str


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Triton's `ModelQueuePolicy`: how many requests may wait, how long, and what becomes of those that did.

    `delays` is `timeout_action` DELAY: a request that waited too long goes behind the others, not out.
    """

    max_queue_size: int = 0  # 0: any number
    default_timeout_us: int = 0  # 0: for ever
    delays: bool = False
    allow_timeout_override: bool = False


@dataclass(frozen=True, slots=True)
class Batching:
    """Triton's `dynamic_batching`: when a batch is sent though it could still grow, and who may wait for it.

    The queue policies count for a model without batches (`max_batch_size` below 2) too. Priority 1 is the highest of `priority_levels`; a level without its own policy has `queue_policy`.
    """

    max_queue_delay_us: int = 0
    preferred_batch_sizes: tuple[int, ...] = ()
    queue_policy: QueuePolicy = QueuePolicy()
    priority_levels: int = 0  # 0: priorities are not the model's business
    default_priority_level: int = 0
    priority_queue_policies: Mapping[int, QueuePolicy] = field(default_factory=dict)
    preserve_ordering: bool = False


@dataclass(frozen=True, slots=True)
class Resource:
    """So many of what Triton's rate limiter calls a resource: one of each device, or one for all of them."""

    name: str
    count: int
    everywhere: bool = False


@dataclass(frozen=True, slots=True)
class RateLimiter:
    """What an instance must have while it runs; one of `priority` 2 has its turn half as often as one of 1."""

    resources: tuple[Resource, ...]
    priority: int = 1


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """Where instances live: `kind` is `cpu`, `gpu` or `auto`; `count` 0 leaves the number to the gateway."""

    kind: str = "auto"
    count: int = 0
    gpus: tuple[int, ...] = ()
    limiter: RateLimiter | None = None


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """One input of a warm-up sample; exactly one of zero, random or file data."""

    datatype: DataType
    dims: tuple[int, ...]
    source: str  # "zero", "random", or the name of a file in <model>/warmup/


@dataclass(frozen=True, slots=True)
class Warmup:
    """One warm-up sample, run `count` times at `batch_size` before an instance is ready."""

    name: str
    batch_size: int
    count: int
    inputs: Mapping[str, WarmupInput]


@dataclass(frozen=True, slots=True)
class ResponseCache:
    """The responses may be kept and given again to equal requests: of the same tenant or, if `public`, of any."""

    public: bool = False


@dataclass(frozen=True, slots=True)
class SequenceControl:
    """An input that the gateway fills in for a model of sequences: `kind` is `start`, `end`, `ready` or `corrid`.

    Its element is `on` where the kind is true of a request and `off` where not; for `corrid` it is the sequence's id.
    """

    name: str
    kind: str
    datatype: DataType
    off: float = 0
    on: float = 0


@dataclass(frozen=True, slots=True)
class SequenceState:
    """An output that is an input of the sequence's next run. `initial` is what the first has: the name of a file in the
    model's folder `initial_state`, or empty for zeros of `initial_dims`.
    """

    input: str
    output: str
    datatype: DataType
    dims: tuple[int, ...]
    initial: str
    initial_dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceBatching:
    """Triton's `sequence_batching`. Without `candidates` it is the direct strategy, where a sequence keeps its row in
    every batch; with them the oldest, where so many sequences of an instance share batches of any rows.
    """

    idle_us: int
    candidates: int = 0
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    minimum_slot_utilization: float = 0.0
    controls: tuple[SequenceControl, ...] = ()
    states: tuple[SequenceState, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a model in an ensemble: its inputs and outputs by name, and the ensemble's tensors that they are.

    `batched`, `dims`, of its inputs, and `decoupled` are what the model itself says, known once it is loaded.
    """

    model: str
    version: str  # empty: the newest that is loaded
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    batched: bool = False
    dims: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    decoupled: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's configuration, complete and checked: every field filled, inputs and outputs known."""

    name: str
    backend: str
    platform: str
    max_batch_size: int  # 0: the model takes requests as they are, one at a time
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    instance_groups: tuple[InstanceGroup, ...]
    batching: Batching | None  # None: requests are not joined, though max_batch_size > 1 lets a client send batches
    warmup: tuple[Warmup, ...]
    default_model_filename: str
    parameters: Mapping[str, str]
    execution_providers: tuple[str, ...]  # from optimization.execution_accelerators and instance kinds, in order
    decoupled: bool
    proto: ModelConfigProto
    default_deadline_ms: float | None = None  # of requests that bring none; 0: none, None: the gateway's default
    response_cache: ResponseCache | None = None
    accelerators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # parameters by execution provider
    sequences: SequenceBatching | None = None  # None: no request has anything to do with another
    steps: tuple[Step, ...] = ()  # of an ensemble, which has them instead of a backend
    batch_inputs: tuple[BatchInput, ...] = ()

    @property
    def is_code(self) -> bool:
        """Whether running it is to run its author's code: it may keep state, call other models, and do more than compute.

        So nobody runs it but for clients and for its own warm-up samples, and one instance is not two.
        """
        return self.backend == "python"

    @property
    def by_rows(self) -> bool:
        """Whether row i of everything the model takes and gives is row i of the batch, if there are batches at all."""
        tensors = (*self.inputs, *self.outputs)
        return not self.batch_inputs and not any(each.ragged or each.whole or each.like for each in tensors)


def translate(shape: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...]:
    """`target` with its open dimensions filled in order from `shape`, which is `source` after any batch dimension."""
    batch = shape[: len(shape) - len(source)]
    sizes = iter([size for size, dim in zip(shape[len(batch) :], source, strict=True) if dim == -1])
    return (*batch, *(next(sizes) if dim == -1 else dim for dim in target))


def may_leave_gpu(backend: str, fallback: str) -> bool:
    """Whether a model that asks for a GPU may run without; `fallback` is the parameter of that name.

    The file of an ONNX model runs on the CPU, too. Of other models their configuration has to say what else they run on.
    """
    return backend == "onnxruntime" if not fallback else fallback != "none"
