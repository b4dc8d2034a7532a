"""A message read by a remembered layout is read as it would be without."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.transport.grpc import codec
from gateway.transport.grpc.layout import Layouts
from gateway.transport.grpc.wire import split
from gateway.types import DataType


def message(*sizes: int, fill: int = 0, more: bytes = b"", **fields: object) -> bytes:
    built = pb.ModelInferRequest(model_name="m", **fields)
    for number, size in enumerate(sizes):
        built.inputs.add(name=f"IN{number}", datatype="UINT8", shape=[size])
        built.raw_input_contents.append(bytes([fill + number]) * size)
    return built.SerializeToString() + more


def values(request) -> dict[str, list[int]]:
    return {name: tensor.array.tolist() for name, tensor in request.inputs.items()}


def remembered(payload: bytes) -> Layouts:
    layouts = Layouts()
    parts = split(payload)
    assert parts.ordered
    layouts.remember(payload, parts.raw, codec.decode(payload))
    return layouts


@pytest.mark.parametrize("sizes", [(4,), (4, 4), (0, 3), (3, 0), (200, 1), (5000, 5000)])
def test_another_message_of_the_layout_is_read_the_same(sizes):
    again = message(*sizes, fill=7)
    got = remembered(message(*sizes)).request(again)
    assert values(got) == {f"IN{n}": [7 + n] * size for n, size in enumerate(sizes)}
    assert got.model_name == "m"
    assert got.inputs["IN0"].datatype is DataType.UINT8
    assert got.form is not None


def test_data_that_looks_like_a_field_is_data():
    layouts = remembered(message(6, 6))
    built = pb.ModelInferRequest.FromString(message(6, 6))
    built.raw_input_contents[0] = b"\x3a\x06\x3a\x06\x3a\x06"
    assert values(layouts.request(built.SerializeToString()))["IN0"] == list(b"\x3a\x06\x3a\x06\x3a\x06")


@pytest.mark.parametrize(
    "other",
    [
        message(5, 3),
        message(3, 5),
        message(4, 4, fill=1).replace(b"IN0", b"INX"),
        message(4, 4).replace(b"\x04\0\0\0\0", b"\x03\0\0\0:", 1),
    ],
)
def test_a_message_of_equal_length_and_another_layout_is_not_read(other):
    layouts = remembered(message(4, 4))
    assert len(other) == len(message(4, 4))
    assert layouts.request(other) is None


def test_a_size_in_more_bytes_than_it_needs_is_not_remembered():
    usual = message(4, 4)
    head = usual[: -(2 + 4) * 2]
    odd = head + b"\x3a\x84\x00" + b"aaaa" + b"\x3a\x84\x00" + b"bbbb"
    first = codec.decode(odd)
    assert values(first) == {"IN0": [97] * 4, "IN1": [98] * 4}
    assert values(codec.decode(odd)) == values(first)
    layouts = Layouts()
    layouts.remember(odd, split(odd).raw, first)
    assert layouts.request(odd) is None


def with_an_empty_id(between: int) -> bytes:
    """A message of two tensors, with an empty id behind so many of them."""
    usual = message(4, 4)
    place = len(usual) - (2 + 4) * (2 - between)
    return usual[:place] + b"\x1a\x00" + usual[place:]


@pytest.mark.parametrize(
    "payload",
    [
        message(4, id="a"),
        message(4, more=b"\x12\x011"),
        message(),
        with_an_empty_id(0),
        with_an_empty_id(1),
        with_an_empty_id(2),
    ],
)
def test_what_is_not_a_head_with_its_tensors_behind_is_not_remembered(payload):
    assert not split(payload).ordered


def test_a_field_that_holds_what_looks_like_a_tensor_is_read_the_same_twice():
    usual = message(4, 4)
    head, first, second = usual[:-12], usual[-12:-6], usual[-6:]
    payload = head + b"\x1a\x00" + first + b"\x0a\x08xx\x3a\x04evil" + second
    for _ in range(2):
        assert values(codec.decode(payload)) == {"IN0": [0] * 4, "IN1": [1] * 4}


def test_parameters_are_read_each_time():
    built = pb.ModelInferRequest.FromString(message(4))
    built.parameters["timeout"].int64_param = 5
    payload = built.SerializeToString()
    first, second = codec.decode(payload), codec.decode(payload)
    assert first.parameters == second.parameters == {"timeout": 5}
    assert first.parameters is not second.parameters


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.data()
)
def test_reading_never_depends_on_what_was_read_before(sizes, others, data):
    layouts = remembered(message(*sizes))
    payload = bytearray(message(*others, fill=3))
    place = data.draw(st.integers(0, len(payload) - 1))
    payload[place] = data.draw(st.integers(0, 255))
    known = layouts.request(bytes(payload))
    if known is not None:
        fresh = split(bytes(payload))
        assert [bytes(raw) for raw in fresh.raw] == [bytes(tensor.wire) for tensor in known.inputs.values()]
        assert fresh.head == split(message(*sizes)).head


def test_only_so_many_layouts_are_kept():
    layouts = Layouts()
    for size in range(1, 600):
        payload = message(size)
        layouts.remember(payload, split(payload).raw, codec.decode(payload))
    assert len(layouts._layouts) <= 256
    assert np.array_equal(layouts.request(message(599, fill=9)).inputs["IN0"].array, np.full(599, 9, np.uint8))
