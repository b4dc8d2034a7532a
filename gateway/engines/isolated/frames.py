"""What a gateway and its children say to each other, and how it is cut out of a stream of bytes.

A frame is the sizes of its header and payload, a header of msgpack and a payload, which is empty where the arrays are
in shared memory. The messages of the sockets that carry descriptors are packets of the same msgpack.
"""

from __future__ import annotations

import builtins
import struct
from contextlib import suppress
from typing import Annotated, NamedTuple, Self, TypeAlias

import msgspec

from gateway.engines.isolated.layout import MOST
from gateway.engines.measures import Measure
from gateway.message import BadMessage, unpack_error
from gateway.types import Buffer, InferRequest, Parameter

CHUNK = 1 << 18
"""Bytes read at once."""

Start: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2 * MOST)]
"""Where in shared memory arrays begin."""

_SIZES = struct.Struct("<IQ")
_MOST_HEADER = 64 << 20


class Message(msgspec.Struct, array_like=True, gc=False):
    """Anything said."""


class About(Message):
    """A request of a batch, for a model that tells them apart: everything but its tensors."""

    model: str
    version: str
    id: str
    outputs: tuple[tuple[str, int], ...]
    parameters: dict[str, Parameter]
    deadline: float | None
    priority: int
    tenant: str
    rows: Annotated[int, msgspec.Meta(ge=1)]

    @classmethod
    def of(cls, request: InferRequest) -> Self:
        """What there is to say of a request."""
        outputs = tuple((output.name, output.classification) for output in request.outputs)
        return cls(
            request.model_name,
            request.model_version,
            request.id,
            outputs,
            dict(request.parameters),
            request.deadline,
            request.priority,
            request.tenant,
            request.rows,
        )


# --- to a child, on an instance's own line


class Load(Message, tag="load"):
    """Load what the payload, a pickled `EngineSpec`, says with the backend in `module`."""

    module: str
    install: str  # what to do when a package the module imports is missing
    proto: bytes  # of the configuration, which the payload goes without


class Run(Message, tag="run"):
    """Run a batch, its arrays in the payload if there is one and else in shared memory, from `start` on.

    It may be sent while another runs. `desk` is one of two numbers that runs take turns at: when one comes again, what the
    last run with it gave has been taken in.
    """

    rows: int
    cores: int
    outputs: tuple[str, ...]
    form: bytes
    start: Start
    desk: Annotated[int, msgspec.Meta(ge=0, le=1)]
    requests: tuple[About, ...] = ()


class Next(Message, tag="next"):
    """The last answer has been taken in."""


# --- from a child


class Ready(Message, tag="ready"):
    """The model is loaded. With `answers` it is told about each request and answers them one by one."""

    provider: str
    warnings: tuple[str, ...]
    widest: Annotated[int, msgspec.Meta(ge=1)]
    answers: bool


class Done(Message, tag="done"):
    """What the batch came to, and when that was, in nanoseconds of the monotonic clock; in shared memory from `start` on."""

    finished_ns: int
    form: bytes
    start: Start


class Answered(Message, tag="answered"):
    """What some requests are answered: arrays are named by their place in `answers` and their own name."""

    finished_ns: int
    form: bytes
    start: Start
    answers: tuple[tuple[int, tuple[str, ...] | None, bytes, bool, dict[str, Parameter] | None], ...]


class Finished(Message, tag="finished"):
    """There are no more answers to this run."""

    finished_ns: int


class Failed(Message, tag="failed"):
    """The run, or the load, raised: `error` is packed if it is one of ours, else `kind` and `text` tell of it."""

    error: bytes
    kind: str = ""
    text: str = ""
    trace: str = ""

    def raised(self) -> BaseException:
        """What the child raised, as near to it as can be; its trace is noted."""
        if self.error:
            return unpack_error(self.error)
        kind = getattr(builtins, self.kind, None)
        problem: Exception = RuntimeError(f"{self.kind}: {self.text}")
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not StopIteration:
            with suppress(TypeError):  # some are made of more than a text
                problem = kind(self.text)
        problem.add_note(f"In the engine's process:\n{self.trace}")
        return problem


ToChild: TypeAlias = Load | Run | Next
FromChild: TypeAlias = Ready | Done | Answered | Finished | Failed


# --- a model's calls of other models, on a line of their own


class Ask(Message, tag="ask"):
    """Run the request that `header` and the payload pack, which is in shared memory where `shared` says how long it is.

    It is a part of the trace of the request at the place `of` in the batch that runs; -1 for none.
    """

    call: int
    header: bytes
    deadline: float | None
    shared: Annotated[int, msgspec.Meta(ge=0, le=MOST)] = 0
    of: int = -1


class GiveUp(Message, tag="give_up"):
    """Nobody waits for a call's responses any more."""

    call: int


class Counted(Message, tag="counted"):
    """Something is done to a metric. The reply, where `call` is not -1, has what was read, or why it may not be done."""

    call: int
    measure: Measure


class Wanted(Message, tag="wanted"):
    """Does anybody wait for the request at this place of the batch that runs? The reply is an error if nobody does."""

    call: int
    place: Annotated[int, msgspec.Meta(ge=0)]


class Reply(Message, tag="reply"):
    """A response to a call, packed, or an error; `last` when no more will come."""

    call: int
    response: bytes
    error: bytes
    last: bool


# --- packets, to and from the nursery, and on a child's own line


class Spawn(Message, tag="spawn"):
    """Fork a child called `name`; the socket that comes with it is the child's own line."""

    child: int
    name: str
    preload: tuple[str, ...]


class Kill(Message, tag="kill"):
    """End a child now."""

    child: int


class Spawned(Message, tag="spawned"):
    """A child runs."""

    child: int
    pid: int


class Exited(Message, tag="exited"):
    """A child is gone: its exit status, or minus a signal's number."""

    child: int
    status: int


class Host(Message, tag="host"):
    """Take in an instance: its line, its two areas where there are any and, with `calls`, a line for its calls and, where
    there are areas, one for them.
    """

    name: str
    areas: bool
    calls: bool


class Beat(Message, tag="beat"):
    """Are you there, and the answer to it."""

    number: int


encode = msgspec.msgpack.Encoder().encode


class Frame(NamedTuple):
    """A header and a payload."""

    header: bytes
    payload: bytearray


def pack(message: Message, size: int = 0) -> bytes:
    """The beginning of a frame whose payload has so many bytes."""
    header = encode(message)
    return _SIZES.pack(len(header), size) + header


class Frames:
    """Cuts what is received into frames. Raises `BadMessage` for sizes that cannot be."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = _SIZES.size

    def feed(self, data: Buffer) -> None:
        """Take in what was received."""
        self._buffer += data

    def next(self) -> Frame | None:
        """The next whole frame, if it is here."""
        buffer = self._buffer
        if len(buffer) < self._needed:
            return None
        header, payload = _SIZES.unpack_from(buffer)
        if header > _MOST_HEADER or payload > MOST:
            raise BadMessage(f"a frame claims {header} and {payload} bytes")
        start = _SIZES.size + header
        self._needed = start + payload
        if len(buffer) < self._needed:
            return None
        frame = Frame(bytes(buffer[_SIZES.size : start]), buffer[start : self._needed])
        del buffer[: self._needed]
        self._needed = _SIZES.size
        return frame
