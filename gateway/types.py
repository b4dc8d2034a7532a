"""What travels through the gateway: tensors, requests, responses and the one endpoint type.

A `Tensor` is wire bytes and a numpy array at once, each made from the other only when asked for, so a
binary request reaches an engine without a copy. What is made for each request is a `msgspec.Struct`, which is made
in less than half a dataclass's time. Nothing here validates against a model: that is
`service.py`. Nothing here imports the rest of the package but `errors`.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.errors import GatewayError

Array: TypeAlias = npt.NDArray[Any]
Buffer: TypeAlias = bytes | bytearray | memoryview
Parameter: TypeAlias = str | int | float | bool


NO_PARAMETERS: Mapping[str, Parameter] = MappingProxyType({})
NO_CONTEXT: Mapping[str, str] = MappingProxyType({})

EMPTY_FINAL = "triton_enable_empty_final_response"
"""The parameter by which a caller asks for a last response that says nothing but that it is the last."""

RESERVED = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout")
"""The parameters that the protocol gives a meaning; the others are the model's."""

_NUMPY = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    "BF16": "<u2",
    "BYTES": "O",
}


class DataType(enum.Enum):
    """A tensor element type by its name on the wire (KServe V2, "Tensor Data Types").

    `dtype` is the numpy type an engine sees: BYTES is an object array of `bytes`, BF16 is carried as its
    raw 16 bits in uint16 because numpy has no bfloat16.
    """

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    FP64 = "FP64"
    BF16 = "BF16"
    BYTES = "BYTES"

    __hash__ = object.__hash__  # members are single; enum's own hash is written in Python, and costs more

    dtype: np.dtype[Any]
    itemsize: int  # bytes per element on the wire; 0 for BYTES, whose elements vary

    def __init__(self, wire: str) -> None:
        self.dtype = np.dtype(_NUMPY[wire])
        self.itemsize = 0 if wire == "BYTES" else self.dtype.itemsize


_SMALL = 4096


class Tensor(msgspec.Struct, eq=False, gc=False):
    """One named value: element type, shape, and data as wire bytes (`Tensor(datatype, shape, wire)`) or as an array
    (`Tensor.from_array`).

    `wire` is little-endian and row-major; BYTES elements carry a 4-byte little-endian length each.
    `array` has exactly `shape`. Whichever was not given is made on first use and kept.
    """

    datatype: DataType
    shape: tuple[int, ...]
    _wire: Buffer | None = None
    _array: Array | None = None

    @classmethod
    def from_array(cls, datatype: DataType, array: Array) -> Tensor:
        """Wrap an array whose dtype is already `datatype.dtype`."""
        return cls(datatype, array.shape, None, array)

    @property
    def array(self) -> Array:
        """The data as an array of `shape`; a view of the wire bytes where the type allows.

        Raises ValueError when the wire bytes do not fit the shape.
        """
        if self._array is None:
            assert self._wire is not None
            if self.datatype is DataType.BYTES:
                self._array = decode_bytes(self._wire, element_count(self.shape)).reshape(self.shape)
            else:
                self._array = np.frombuffer(self._wire, self.datatype.dtype).reshape(self.shape)
        return self._array

    @property
    def wire(self) -> Buffer:
        """The data as wire bytes; a view of the array's memory where it is contiguous."""
        if self._wire is None:
            assert self._array is not None
            if self.datatype is DataType.BYTES:
                self._wire = encode_bytes(self._array)
            elif self._array.nbytes <= _SMALL or not self._array.flags.c_contiguous:
                self._wire = self._array.tobytes()  # for few bytes a copy is quicker than a view
            else:
                self._wire = self._array.reshape(-1).view(np.uint8).data
        return self._wire

    @property
    def nbytes(self) -> int:
        """The size of the wire bytes."""
        if self._wire is not None:
            return len(self._wire)
        if self.datatype is DataType.BYTES:
            return len(self.wire)
        assert self._array is not None
        return self._array.nbytes

    def __repr__(self) -> str:
        return f"Tensor({self.datatype.name}, {list(self.shape)})"


def wires(tensors: Iterable[Tensor]) -> list[Buffer]:
    """The wire bytes of each, without the 600 instructions that reading a property costs where they are at hand."""
    return [tensor.wire if tensor._wire is None else tensor._wire for tensor in tensors]  # noqa: SLF001 - this module's


class Pieces(NamedTuple):
    """One array of this shape before it is copied together: what tensors of one type hold, end to end."""

    shape: tuple[int, ...]
    tensors: Sequence[Tensor]


def element_count(shape: tuple[int, ...]) -> int:
    """How many elements a shape holds; 1 for a scalar, 0 when any dimension is 0."""
    return math.prod(shape)


def decode_bytes(wire: Buffer, count: int) -> Array:
    """Read `count` length-prefixed elements into a flat object array of `bytes`.

    Raises ValueError when the buffer holds fewer or more than `count` elements.
    """
    if count * 4 > len(wire):
        raise ValueError(f"expected {count} string elements, got at most {len(wire) // 4}")
    view = memoryview(wire)
    elements = np.empty(count, dtype=object)
    offset = 0
    for index in range(count):
        if offset + 4 > len(view):
            raise ValueError(f"expected {count} string elements, got {index}")
        (length,) = struct.unpack_from("<I", view, offset)
        offset += 4
        if offset + length > len(view):
            raise ValueError(f"string element {index} claims {length} bytes, {len(view) - offset} are left")
        elements[index] = bytes(view[offset : offset + length])
        offset += length
    if offset != len(view):
        raise ValueError(f"{len(view) - offset} bytes are left after {count} string elements")
    return elements


def encode_bytes(array: Array) -> bytes:
    """Write an array of `bytes` or `str` elements with a 4-byte little-endian length before each."""
    parts: list[bytes] = []
    for element in array.reshape(-1):
        raw = element.encode() if isinstance(element, str) else bytes(element)
        parts.append(struct.pack("<I", len(raw)))
        parts.append(raw)
    return b"".join(parts)


class RequestedOutput(msgspec.Struct, gc=False):
    """An output the client asked for; `classification` > 0 asks for the top classes instead of the tensor."""

    name: str
    classification: int = 0


class Place(NamedTuple):
    """Where in a client's shared memory a tensor lies: bytes of a registered region."""

    region: str
    offset: int
    size: int


class Places(NamedTuple):
    """The inputs to be read from shared memory, and the outputs to be written to it, by their names."""

    inputs: Mapping[str, Place]
    outputs: Mapping[str, Place]


class InferRequest(msgspec.Struct, eq=False, gc=False):
    """One inference as the client sent it. Times are `time.monotonic` seconds.

    `rows`, `size` and `signature` are filled in by the service when it checks the request against the model:
    the request's batch size, its bytes, and what must be equal for two requests to share a batch; `admitted` when
    the worker was asked whether to accept it. Requests
    given the same `form` by a transport are equal in everything but id, parameters and the values of their tensors,
    whose sizes in bytes are equal too, so that what was found out about one need not be found out about the next.
    Requests of a tenant with the same `idempotency_key` are one request that is repeated; without one it is empty.
    `callers` are the models that wait for the answer, where it is no client that does. With `places` some tensors are in
    shared memory, and the inputs among them have no data until they were read (`middleware/shared_memory.py`).
    `one_answer` says that whoever asks can take one only. `trace_context` are the W3C trace context's headers, where spans are
    made of requests: by the gateway, so that no worker gets them. Nor does it get the `trace`, which is `middleware/tracing.py`'s:
    of the request or, where models wait for it, of theirs. A model's code has in its place the request that it works on.
    """

    model_name: str
    inputs: dict[str, Tensor]
    model_version: str = ""
    id: str = ""
    outputs: tuple[RequestedOutput, ...] = ()
    parameters: Mapping[str, Parameter] = NO_PARAMETERS
    deadline: float | None = None
    priority: int = 0
    tenant: str = ""
    form: object = None
    rows: int = 1
    size: int = 0
    signature: Hashable = None
    admitted: bool = False
    idempotency_key: str = ""
    callers: tuple[str, ...] = ()
    places: Places | None = None
    one_answer: bool = False
    trace_context: Mapping[str, str] = NO_CONTEXT
    trace: object = None


class Timings(msgspec.Struct, gc=False):
    """Where one request's time went, in nanoseconds, and the batch it ran in."""

    queue_ns: int = 0
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0
    batch_rows: int = 0


class InferResponse(msgspec.Struct, eq=False, gc=False):
    """One answer to a request; a unary model gives exactly one, with `final` true.

    `digest` tells what the version that answered computes, where its responses may be cached. The outputs named in
    `placed` went to shared memory, and are described without their data.
    """

    model_name: str
    model_version: str
    outputs: dict[str, Tensor]
    id: str = ""
    parameters: Mapping[str, Parameter] = NO_PARAMETERS
    timings: Timings | None = None
    final: bool = True
    digest: str = ""
    placed: Collection[str] = ()


class Responses(Protocol):
    """The answers to one request; closing it gives up those that are still to come. Always close it.

    Any async generator of responses will do. What every request passes is a class of its own, because a generator
    costs it 9,000 instructions, a third of them asyncio's bookkeeping.
    """

    def __aiter__(self) -> AsyncIterator[InferResponse]: ...

    def __anext__(self) -> Awaitable[InferResponse]: ...

    def aclose(self) -> Awaitable[None]:
        """Give the request up if it is not answered."""


Infer: TypeAlias = Callable[[InferRequest], Responses]
"""The one endpoint type: a unary call is a stream of one. Closing the iterator cancels the request."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model file says of one input or output; -1 is a dimension it leaves open.

    An `optional` input has a value in the file, which a request may replace.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ModelIO:
    """What a model file takes and gives, batch dimension included."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(slots=True)
class Batch:
    """What an engine is asked to run.

    `stack` builds the model's inputs (batch dimension included, `reshape` applied) and is called on the
    engine's own thread, off the event loop. `outputs` names what to compute; empty means everything.
    `cores` is how many cores this run may use. With `hurry` the event loop has much to do, and the engine should begin
    before it does that. `requests` are what the batch is made of, in row order, for an engine that must tell them
    apart; a measurement has none. `waits` is told when the run has to wait for other models, which may
    need its cores: from then on it has none. It may be told again. `wanted` says whether somebody still waits for the
    request at this place. `predicted` is how many seconds the run is expected
    to take, None when nothing is known: from it follows when it has hung. `gather` gives what `stack` does, uncopied; None
    where the inputs are not just what the requests hold.
    """

    rows: int
    stack: Callable[[], dict[str, Array]]
    outputs: tuple[str, ...] = ()
    cores: int = 1
    hurry: bool = False
    requests: Sequence[InferRequest] = ()
    waits: Callable[[], None] = lambda: None
    predicted: float | None = None
    wanted: Callable[[int], bool] = lambda _: True
    gather: Callable[[], Mapping[str, Pieces]] | None = None


@dataclass(slots=True)
class Answer:
    """What an engine says to one request of a batch: outputs of that request alone, or an error; `final` ends it.

    `outputs` may be None only with an error, or in a final answer that carries nothing more.
    """

    request: int  # its place in `Batch.requests`
    outputs: dict[str, Array] | None = None
    error: GatewayError | None = None
    final: bool = True
    parameters: Mapping[str, Parameter] | None = None  # told to the client of this request


@dataclass(slots=True)
class BatchResult:
    """One answer of an engine to a batch, with `time.monotonic_ns` marks of its steps.

    `outputs` hold the rows of the whole batch, unless the engine answers request by request: then they are empty and
    `answers` is given. `parameters` are told to every client of the batch, e.g. which engine it was.
    """

    outputs: dict[str, Array]
    started_ns: int  # before stack()
    stacked_ns: int  # after stack(), before the model ran
    finished_ns: int  # after the model ran
    answers: Sequence[Answer] | None = None
    parameters: Mapping[str, Parameter] | None = None
