"""Requests that are wrong in one way, on both wires, and the error that Triton's words have for it (PROTOCOL.md section 1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from numpy.random import Generator

from loadtest.fuzz import messages, requests
from loadtest.fuzz.messages import NOT_JSON, Message, Part, to_wire
from loadtest.fuzz.models import Model
from loadtest.fuzz.requests import DTYPES, Request
from loadtest.fuzz.wires import REGION, ROOM, Wires

NOT_UTF8 = "a string that is not UTF-8"
GARBLED = "bytes changed at random"
_TRIES = 50
PREFIX = r"\[request id: <id_unknown>\] "


class Due(NamedTuple):
    """The error that is due: HTTP status, gRPC code, and a pattern that its whole text matches."""

    http: int
    grpc: str
    text: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """A request to be sent by one of the two, and the error."""

    kind: str
    due: Due
    wire: str
    send: Callable[[Wires], Any]

    @property
    def runs(self) -> bool:
        """Whether only the model may find out, and the batch fail."""
        return self.kind in (NOT_UTF8, GARBLED)

    def fits(self, status: int | str, text: str) -> bool:
        """Whether this is the error that is due; what was garbled at random may have any that is documented."""
        if self.kind == GARBLED:
            told = text.startswith(("failed to parse the request JSON buffer: ", "Unable to parse '", "model '"))
            return status in (400, 404, "INVALID_ARGUMENT", "NOT_FOUND") or (status in (500, "INTERNAL") and told)
        due = self.due.http if self.wire == "http" else self.due.grpc
        return status == due and re.fullmatch(self.due.text, text, re.DOTALL) is not None


class Case(NamedTuple):
    """A good request, about to be spoilt. `message` has it as it is sent, `parts` by input name."""

    model: Model
    request: Request
    message: Message
    rng: Generator

    @property
    def part(self) -> Part:
        """One of its inputs."""
        return self.message.inputs[self.rng.integers(len(self.message.inputs))]


Spoil = Callable[[Case], "tuple[Message, Due] | None"]
Garble = Callable[[Case, bytes, bytes], "tuple[bytes, bytes, str, Due] | None"]


def make(model: Model, rng: Generator, answers: Callable[[Request], object]) -> list[Wrong]:
    """A request that is wrong in a random way, for each wire that has this way; to be spoilt is what the model `answers`.

    Empty for a model that refuses everything.
    """
    kinds: Sequence[str] = (*BOTH, *ONLY_HTTP, *ONLY_GRPC, *[GARBLED] * 4)
    for _ in range(_TRIES):
        case = _case(model, rng)
        if answers(case.request) is None:
            continue
        kind = kinds[rng.integers(len(kinds))]
        if kind == GARBLED:
            found = _garbled(case)
        elif kind in BOTH:
            found = _both(kind, case)
        elif kind in ONLY_HTTP:
            found = _http(kind, case)
        else:
            found = _grpc(kind, case)
        if found:
            return found
    return []


def _case(model: Model, rng: Generator) -> Case:
    request = requests.make(model, rng, requests.sizes_of(model, rng))
    kinds = {each.name: each.datatype for each in model.inputs}
    parts = [Part(name, kinds[name], list(array.shape), to_wire(array)) for name, array in request.inputs.items()]
    return Case(model, request, Message(model.name, parts, [(name, {}) for name in request.outputs]), rng)


def _both(kind: str, case: Case) -> list[Wrong]:
    spoilt = BOTH[kind](case)
    if spoilt is None:
        return []
    message, due = spoilt
    body, proto = messages.http(message), messages.grpc(message)
    return [
        Wrong(kind, due, "http", lambda wires: wires.post(message.path, *body, header_length=str(len(body[0])))),
        Wrong(kind, due, "grpc", lambda wires: wires.call(proto)),
    ]


def _http(kind: str, case: Case) -> list[Wrong]:
    garbled = ONLY_HTTP[kind](case, *messages.http(case.message))
    if garbled is None:
        return []
    head, blobs, length, due = garbled
    return [Wrong(kind, due, "http", lambda wires: wires.post(case.model.name, head, blobs, length))]


def _grpc(kind: str, case: Case) -> list[Wrong]:
    garbled = ONLY_GRPC[kind](case, messages.grpc(case.message))
    if garbled is None:
        return []
    message, text = garbled
    return [Wrong(kind, Due(0, "INVALID_ARGUMENT", text), "grpc", lambda wires: wires.call(message))]


def _garbled(case: Case) -> list[Wrong]:
    head, blobs = messages.http(case.message)
    length = str(len(head))
    body = _changed(head if case.rng.random() < 0.7 else head + blobs, case.rng)
    body += (head + blobs)[len(body) :]
    message = _changed(messages.grpc(case.message).SerializeToString(), case.rng)
    due = Due(0, "", "any")
    return [
        Wrong(GARBLED, due, "http", lambda wires: wires.post(case.model.name, body, b"", length)),
        Wrong(GARBLED, due, "grpc", lambda wires: wires.call(message)),
    ]


def _changed(data: bytes, rng: Generator) -> bytes:
    """A few bytes are others, or some are there twice, or are gone."""
    found = bytearray(data)
    way = rng.integers(3)
    start = int(rng.integers(len(found)))
    end = start + int(rng.integers(1, 9))
    if way == 0:
        for place in rng.integers(len(found), size=rng.integers(1, 4)):
            found[place] = int(rng.choice([0, 0x22, 0x30, 0x2C, 0x7D, 0xFF, rng.integers(256)]))
    elif way == 1:
        found[start:start] = found[start:end]
    else:
        del found[start:end]
    return bytes(found)


def _invalid(text: str) -> Due:
    return Due(400, "INVALID_ARGUMENT", text)


def _with(message: Message, old: Part, **changes: Any) -> Message:
    return replace(message, inputs=[replace(each, **changes) if each is old else each for each in message.inputs])


def _zeros(datatype: str, shape: Sequence[int]) -> bytes:
    count = 1
    for size in shape:
        count *= size
    return bytes(count * (DTYPES[datatype].itemsize if datatype != "BYTES" else 4))


def _shape_text(case: Case, part: Part, shape: Sequence[int]) -> Due:
    dims = next(each.dims for each in case.model.inputs if each.name == part.name)
    expected = [-1] * case.model.batch + list(dims)
    lists = [re.escape("[" + ",".join(map(str, each)) + "]") for each in (expected, shape)]
    name, model = re.escape(part.name), re.escape(case.model.name)
    note = r" NOTE: Setting a non-zero max_batch_size .*" if case.model.batch else ""
    return _invalid(
        rf"{PREFIX}unexpected shape for input '{name}' for model '{model}'\. Expected {lists[0]}, got {lists[1]}\.{note}"
    )


def _rank(case: Case) -> tuple[Message, Due]:
    part = case.part
    shape = [*part.shape, 1]
    return _with(case.message, part, shape=shape), _shape_text(case, part, shape)


def _dimension(case: Case) -> tuple[Message, Due] | None:
    part, batch = case.part, case.model.batch
    dims = next(each.dims for each in case.model.inputs if each.name == part.name)
    fixed = [place for place, dim in enumerate(dims) if dim != -1]
    if not fixed:
        return None
    place = fixed[case.rng.integers(len(fixed))] + batch
    shape = [size + (at == place) for at, size in enumerate(part.shape)]
    return _with(case.message, part, shape=shape, data=_zeros(part.datatype, shape)), _shape_text(case, part, shape)


def _rows(case: Case, rows: int) -> Message:
    shapes = [[rows, *part.shape[1:]] for part in case.message.inputs]
    inputs = [
        replace(part, shape=shape, data=_zeros(part.datatype, shape))
        for part, shape in zip(case.message.inputs, shapes, strict=True)
    ]
    return replace(case.message, inputs=inputs)


def _too_many_rows(case: Case) -> tuple[Message, Due] | None:
    most = case.model.max_batch_size
    text = rf"{PREFIX}inference request batch-size must be <= {most} for '{case.model.name}'"
    return (_rows(case, most + 1), _invalid(text)) if most else None


def _no_rows(case: Case) -> tuple[Message, Due] | None:
    text = rf"{PREFIX}inference request batch-size must be >= 1 for '{case.model.name}'"
    return (_rows(case, 0), _invalid(text)) if case.model.batch else None


def _unequal_rows(case: Case) -> tuple[Message, Due] | None:
    if not case.model.batch or len(case.message.inputs) < 2:
        return None
    part = case.message.inputs[1]
    shape = [part.shape[0] + 1, *part.shape[1:]]
    text = rf"{PREFIX}input '{re.escape(part.name)}' batch size does not match other inputs for '{case.model.name}'"
    return _with(case.message, part, shape=shape, data=_zeros(part.datatype, shape)), _invalid(text)


def _datatype(case: Case) -> tuple[Message, Due]:
    part = case.part
    others = [each for each in DTYPES if each != part.datatype]
    other = others[case.rng.integers(len(others))]
    text = (
        rf"{PREFIX}inference input '{re.escape(part.name)}' data-type is '{other}', "
        rf"but model '{case.model.name}' expects '{part.datatype}'"
    )
    return _with(case.message, part, datatype=other, data=_zeros(other, part.shape)), _invalid(text)


def _size(case: Case, change: Callable[[bytes], bytes]) -> tuple[Message, Due] | None:
    part = case.part
    data = change(part.data)
    if data == part.data:
        return None
    name = re.escape(part.name)
    if part.datatype == "BYTES":
        text = rf"{PREFIX}.+ for inference input '{name}' for model '{case.model.name}'"
    else:
        text = (
            rf"{PREFIX}input byte size mismatch for input '{name}' for model '{case.model.name}'\. "
            rf"Expected {len(part.data)}, got {len(data)}"
        )
    return _with(case.message, part, data=data), _invalid(text)


def _truncated(case: Case) -> tuple[Message, Due] | None:
    return _size(case, lambda data: data[: -int(case.rng.integers(1, 9))])


def _lengthened(case: Case) -> tuple[Message, Due] | None:
    return _size(case, lambda data: data + bytes(int(case.rng.integers(1, 9))))


def _count_text(case: Case, got: int) -> str:
    least, most = sum(not each.optional for each in case.model.inputs), len(case.model.inputs)
    counts = f"{most} inputs" if least == most else f"number of inputs between {least} and {most}"
    return rf"{PREFIX}expected {counts} but got {got} inputs for model '{case.model.name}'\."


def _missing(case: Case) -> tuple[Message, Due]:
    required = [each.name for each in case.model.inputs if not each.optional]
    gone = required[case.rng.integers(len(required))]
    left = [each for each in case.message.inputs if each.name != gone]
    names = re.escape("[" + ",".join(f"'{each.name}'" for each in left) + "]")
    tail = (
        rf" Got input\(s\) {names}, but missing required input\(s\) \['{re.escape(gone)}'\]\. "
        r"Please provide all required input\(s\)\."
    )
    return replace(case.message, inputs=left), _invalid(_count_text(case, len(left)) + tail)


def _renamed(case: Case) -> tuple[Message, Due]:
    text = rf"{PREFIX}unexpected inference input 'not there' for model '{case.model.name}'"
    return _with(case.message, case.part, name="not there"), _invalid(text)


def _extra(case: Case) -> tuple[Message, Due] | None:
    if len(case.message.inputs) < len(case.model.inputs):
        return None
    inputs = [*case.message.inputs, replace(case.part, name="not there")]
    return replace(case.message, inputs=inputs), _invalid(_count_text(case, len(inputs)))


def _unknown_output(case: Case) -> tuple[Message, Due]:
    text = rf"{PREFIX}unexpected inference output 'not there' for model '{case.model.name}'"
    return replace(case.message, outputs=[*case.message.outputs, ("not there", {})]), _invalid(text)


def _output_twice(case: Case) -> tuple[Message, Due]:
    name = case.model.outputs[case.rng.integers(len(case.model.outputs))].name
    return replace(case.message, outputs=[(name, {}), (name, {})]), _invalid(
        rf"{PREFIX}output '{name}' already exists in request"
    )


def _unknown_model(case: Case) -> tuple[Message, Due]:
    return replace(case.message, model="nobody"), Due(
        404, "NOT_FOUND", "Request for unknown model: 'nobody' is not found"
    )


def _region(case: Case) -> tuple[Message, Due]:
    place = {"shared_memory_region": "nowhere", "shared_memory_offset": 0, "shared_memory_byte_size": 4}
    text = "Unable to find shared memory region: 'nowhere'"
    return _with(case.message, case.part, place=place), Due(404, "NOT_FOUND", text)


def _beyond(case: Case) -> tuple[Message, Due]:
    part = case.part
    size = len(part.data) + 8
    place = {"shared_memory_region": REGION, "shared_memory_offset": ROOM - 4, "shared_memory_byte_size": size}
    text = f"Invalid offset \\+ byte size for shared memory region: '{REGION}'"
    return _with(case.message, part, place=place), _invalid(text)


def _no_room(case: Case) -> tuple[Message, Due] | None:
    output = case.model.outputs[0]
    if output.datatype == "BYTES" or any(0 in array.shape for array in case.request.inputs.values()):
        return None  # nothing may be all that there is
    place = {"shared_memory_region": REGION, "shared_memory_offset": 0, "shared_memory_byte_size": 0}
    text = (
        rf"shared memory size specified with the request for output '{output.name}' \(0 bytes\) "
        r"should be at least [0-9]+ bytes to hold the results"
    )
    return replace(case.message, outputs=[(output.name, place)]), Due(500, "INTERNAL", text)


def _unknown_version(case: Case) -> tuple[Message, Due]:
    text = f"Request for unknown model: '{case.model.name}' version 99 is not found"
    return replace(case.message, version="99"), Due(404, "NOT_FOUND", text)


def _not_utf8(case: Case) -> tuple[Message, Due] | None:
    part = case.part
    if part.datatype != "BYTES" or not part.data:
        return None
    array = case.request.inputs[part.name].copy()
    array.reshape(-1)[0] = b"\xff\xfe"
    text = rf"input '{re.escape(part.name)}' of model '{case.model.name}' holds a string that is not UTF-8.*"
    return _with(case.message, part, data=to_wire(array)), _invalid(text)


BOTH: dict[str, Spoil] = {
    "one dimension more": _rank,
    "another size": _dimension,
    "too many rows": _too_many_rows,
    "no rows": _no_rows,
    "rows that differ": _unequal_rows,
    "another datatype": _datatype,
    "too few bytes": _truncated,
    "too many bytes": _lengthened,
    "an input is missing": _missing,
    "an input of another name": _renamed,
    "one input more": _extra,
    "an output that is not there": _unknown_output,
    "an output twice": _output_twice,
    "an unknown model": _unknown_model,
    "an unknown region": _region,
    "beyond the region": _beyond,
    "too little room for an output": _no_room,
    "an unknown version": _unknown_version,
    NOT_UTF8: _not_utf8,
}


def _cut_body(case: Case, head: bytes, blobs: bytes) -> tuple[bytes, bytes, str, Due] | None:
    if not blobs:
        return None
    fewer = int(case.rng.integers(1, min(len(blobs), 9) + 1))
    text = rf"unexpected size for input '.+', expecting [0-9]+ additional bytes for model '{case.model.name}'"
    return head, blobs[:-fewer], str(len(head)), _invalid(text)


def _left_over(case: Case, head: bytes, blobs: bytes) -> tuple[bytes, bytes, str, Due]:
    text = rf"unexpected additional input data for model '{case.model.name}'"
    return head, blobs + bytes(int(case.rng.integers(1, 9))), str(len(head)), _invalid(text)


def _header_length(case: Case, head: bytes, blobs: bytes) -> tuple[bytes, bytes, str, Due]:
    size = len(head) + len(blobs)
    length = (str(size + 1), "-1", "99999999999999999999")[case.rng.integers(3)]
    text = rf"inference header size should be in range \(0, {size}\), got: {length}"
    return head, blobs, length, _invalid(text)


def _cut_json(case: Case, head: bytes, blobs: bytes) -> tuple[bytes, bytes, str, Due]:
    cut = int(case.rng.integers(len(head)))
    return head[:cut], blobs, str(cut) if cut else "", Due(500, "", r"failed to parse the request JSON buffer: .+")


def _json_part(case: Case) -> Part | None:
    part = case.part
    if part.datatype in NOT_JSON:
        return None
    return replace(part, typed=messages.typed(case.request.inputs[part.name]))


def _json_count(case: Case, _: bytes, __: bytes) -> tuple[bytes, bytes, str, Due] | None:
    part = _json_part(case)
    if part is None:
        return None
    part.typed = [*(part.typed or []), {"BYTES": "x", "BOOL": True}.get(part.datatype, 1)]
    inputs = [part if each.name == part.name else each for each in case.message.inputs]
    head, blobs = messages.http(replace(case.message, inputs=inputs))
    return (
        head,
        blobs,
        str(len(head)),
        Due(500, "", "Unable to parse 'data': Shape does not match true shape of 'data' field"),
    )


def _json_type(case: Case, _: bytes, __: bytes) -> tuple[bytes, bytes, str, Due] | None:
    part = _json_part(case)
    if part is None or not part.typed:
        return None
    part.typed[case.rng.integers(len(part.typed))] = 1 if part.datatype in ("BYTES", "BOOL") else "1"
    inputs = [part if each.name == part.name else each for each in case.message.inputs]
    head, blobs = messages.http(replace(case.message, inputs=inputs))
    text = r"Unable to parse 'data': attempt to access JSON non-.+ as .+"
    return head, blobs, str(len(head)), Due(500, "", text)


def _negative(case: Case, _: bytes, __: bytes) -> tuple[bytes, bytes, str, Due]:
    part = case.part
    head, blobs = messages.http(_with(case.message, part, shape=[*part.shape[:-1], -1]))
    text = "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer"
    return head, blobs, str(len(head)), Due(500, "", text)


def _huge(case: Case, _: bytes, __: bytes) -> tuple[bytes, bytes, str, Due]:
    part = case.part
    head, blobs = messages.http(_with(case.message, part, shape=[*part.shape[:-1], 1 << 40]))
    text = rf"shape of input '{re.escape(part.name)}' causes total element count to exceed maximum size of [0-9]+"
    return head, blobs, str(len(head)), _invalid(text)


def _half_as_json(case: Case, _: bytes, __: bytes) -> tuple[bytes, bytes, str, Due] | None:
    part = case.part
    if part.datatype not in NOT_JSON:
        return None
    head, blobs = messages.http(_with(case.message, part, typed=messages.typed(case.request.inputs[part.name])))
    text = (
        rf"receiving {part.datatype} data via JSON is not supported\. "
        rf"Please use the binary data format for input {re.escape(part.name)}"
    )
    return head, blobs, str(len(head)), _invalid(text)


def _half_to_json(case: Case, head: bytes, blobs: bytes) -> tuple[bytes, bytes, str, Due] | None:
    halves = [each for each in case.model.outputs if each.datatype in NOT_JSON]
    if not halves:
        return None
    half = halves[0]
    head, blobs = messages.http(replace(case.message, outputs=[(half.name, {"binary_data": False})]))
    text = (
        rf"sending {half.datatype} data via JSON is not supported\. "
        rf"Please use the binary data format for output {half.name}"
    )
    return head, blobs, str(len(head)), _invalid(text)


ONLY_HTTP: dict[str, Garble] = {
    "a body that is cut": _cut_body,
    "bytes after the body": _left_over,
    "a wrong header length": _header_length,
    "JSON that is cut": _cut_json,
    "JSON data that do not fill the shape": _json_count,
    "JSON data of another type": _json_type,
    "a negative dimension as JSON": _negative,
    "too many elements": _huge,
    "half floats as JSON": _half_as_json,
    "half floats wanted as JSON": _half_to_json,
}


def _no_raw(case: Case, message: Any) -> tuple[Any, str]:
    del message.raw_input_contents[-1]
    name = re.escape(message.inputs[-1].name)
    return message, rf"unable to find data for input tensor '{name}' for model '{case.model.name}' in request\."


def _one_raw_more(case: Case, message: Any) -> tuple[Any, str]:
    message.raw_input_contents.append(b"")
    count = len(message.inputs)
    text = (
        rf"expected {count} raw_input_contents, one for each input, but got {count + 1} for model '{case.model.name}'"
    )
    return message, text


def _contents_too(case: Case, message: Any) -> tuple[Any, str]:
    place = int(case.rng.integers(len(message.inputs)))
    message.inputs[place].contents.fp32_contents.append(1.0)
    name = re.escape(message.inputs[place].name)
    if message.inputs[place].datatype != "FP32":
        return (
            message,
            rf"unexpected explicit tensor data for input tensor '{name}' for model '{case.model.name}' of type 'FP32', expected datatype '.+'",
        )
    return message, (
        rf"contents field must not be specified when using raw_input_contents for '{name}' for model '{case.model.name}'"
    )


def _negative_size(case: Case, message: Any) -> tuple[Any, str]:
    place = int(case.rng.integers(len(message.inputs)))
    message.inputs[place].shape[-1] = -1
    name = re.escape(message.inputs[place].name)
    return message, rf"input '{name}' for model '{case.model.name}' has a negative dimension in its shape .+"


def _cut_message(case: Case, message: Any) -> tuple[Any, str] | None:
    if not message.raw_input_contents or not message.raw_input_contents[-1]:
        return None
    fewer = int(case.rng.integers(1, len(message.raw_input_contents[-1]) + 1))
    return message.SerializeToString()[:-fewer], r".+"


ONLY_GRPC: dict[str, Callable[[Case, Any], tuple[Any, str] | None]] = {
    "a raw tensor is missing": _no_raw,
    "one raw tensor more": _one_raw_more,
    "contents beside raw tensors": _contents_too,
    "a negative dimension": _negative_size,
    "a message that is cut": _cut_message,
}
