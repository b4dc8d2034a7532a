"""The parts of isolation that need no process: what shares memory, what is said, when to try again, what is a right answer."""

import os
import socket
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gateway.engines.isolated.area import Area
from gateway.engines.isolated.breaker import Breaker
from gateway.engines.isolated.child import live
from gateway.engines.isolated.frames import Beat, Done, Frames, Run, encode, pack
from gateway.engines.isolated.golden import Golden
from gateway.engines.isolated.layout import lay_out, read, read_form, write
from gateway.engines.isolated.patience import Patience
from gateway.message import BadMessage
from gateway.types import DataType
from tests.support import model_config, tensor_config

DTYPES = [datatype.dtype for datatype in DataType if datatype is not DataType.BYTES]


@st.composite
def named_arrays(draw):
    names = draw(st.lists(st.text(max_size=5), max_size=4, unique=True))
    shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
    return {name: draw(arrays.arrays(draw(st.sampled_from(DTYPES)), shapes)) for name in names}


@given(named_arrays(), st.lists(st.binary(max_size=9), max_size=5))
def test_arrays_come_out_of_a_block_as_they_went_in(given_arrays, texts):
    given_arrays["texts"] = np.array([*texts, None], dtype=object)[:-1]
    layout, values = lay_out(given_arrays)
    block = bytearray(max(layout.size, 1))
    write(block, layout, values)
    found = read(block, read_form(layout.form), copy=True)
    assert list(found) == list(given_arrays)
    for name, array in given_arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes() if array.dtype != object else found[name].tolist() == texts


@pytest.mark.parametrize("dtype", ["M8[s]", "c16", "S3", ">f4", "U2"])
def test_a_type_that_no_tensor_has_is_refused(dtype):
    with pytest.raises(TypeError, match="'x' is of the type"):
        lay_out({"x": np.zeros(2, dtype)})


@pytest.mark.parametrize(
    "described",
    [
        [("x", "<f4", (2, 3), 23)],
        [("x", "<f4", (2, 3), 28)],
        [("x", "<f4", (1 << 40, 1 << 40, 0), 0)],
        [("x", "|O", (3,), 11)],
        [("x", "<c16", (1,), 16)],
        [("x", "<f4", (-1,), 4)],
        [("x", "<f4", (1,), 4), ("x", "<f4", (1,), 4)],
        [(str(number), "|u1", (1 << 31,), 1 << 31) for number in range(3)],
        [("x", "<f4", (1 << 31,), 1 << 33)],
        "nonsense",
    ],
    ids=str,
)
def test_a_form_that_cannot_be_is_refused(described):
    with pytest.raises(BadMessage):
        read_form(encode(described))


@given(st.binary(max_size=40))
def test_no_bytes_are_taken_for_a_form_but_forms(form):
    with suppress(BadMessage):
        layout = read_form(form)
        assert all(cut.start + cut.size <= layout.size for cut in layout.cuts)


@pytest.mark.parametrize(
    "wire", [b"\xff\xff\xff\xff", struct.pack("<I", 5) + b"abc", struct.pack("<II", 0, 0)], ids=repr
)
def test_strings_that_reach_beyond_their_place_are_refused(wire):
    form = encode([("x", "|O", (1,), len(wire))])
    with pytest.raises(BadMessage, match="array 'x'"):
        read(bytearray(wire.ljust(64, b"\0")), read_form(form), copy=True)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.lists(st.binary(max_size=60), max_size=4))
def test_frames_are_cut_wherever_the_stream_is(cuts, payloads):
    stream = b"".join(pack(Done(number, b"f", 0), len(payload)) + payload for number, payload in enumerate(payloads))
    frames, found = Frames(), []
    for start, size in zip(np.cumsum([0, *cuts]), [*cuts, len(stream)], strict=True):
        frames.feed(stream[start : start + size])
        while (frame := frames.next()) is not None:
            found.append(frame)
    assert [bytes(frame.payload) for frame in found] == payloads
    assert [frame.header for frame in found] == [encode(Done(number, b"f", 0)) for number in range(len(payloads))]


@pytest.mark.parametrize("sizes", [(1 << 31, 0), (1, 1 << 40)])
def test_a_frame_of_impossible_size_is_refused(sizes):
    frames = Frames()
    frames.feed(struct.pack("<IQ", *sizes))
    with pytest.raises(BadMessage, match="claims"):
        frames.next()


def test_a_message_says_what_it_is():
    assert encode(Run(3, 1, (), b"", 64, 1)) == encode(["run", 3, 1, [], b"", 64, 1, []])


@pytest.fixture
def area():
    there = Area.create()
    yield there
    there.close()


def test_an_area_grows_and_what_was_read_of_it_stays(area: Area):
    other = Area(os.dup(area.descriptor))
    area.room(10)[:3] = b"abc"
    before = memoryview(other.seen(10))[:3]
    assert bytes(before) == b"abc"
    area.room(5_000_000)[4_999_999:5_000_000] = b"z"
    assert other.seen(5_000_000)[4_999_999:5_000_000] == b"z"
    assert bytes(before) == b"abc"
    other.close()


def test_an_area_cannot_be_made_smaller(area: Area):
    area.room(100_000)
    with pytest.raises(PermissionError):
        os.ftruncate(area.descriptor, 10)


def test_no_more_is_read_than_there_is(area: Area):
    area.room(100)
    with pytest.raises(BadMessage, match="shared memory"):
        area.seen(10_000_000)


def test_crashes_among_good_batches_never_trip_the_breaker():
    breaker = Breaker()
    for number in range(1000):
        breaker.started()
        assert breaker.crashed(float(number)) == 0.0
        breaker.succeeded()
    assert breaker.retry_after(0.0) is None


def test_a_row_of_crashes_is_slowed_down_and_then_trips_it():
    breaker = Breaker()
    delays = [breaker.crashed(0.0) for _ in range(24)]
    assert delays[:8] == [0.0] * 8
    assert delays == sorted(delays)
    assert max(delays[:-1]) <= 1.0
    assert breaker.retry_after(0.4) == pytest.approx(0.6)
    assert breaker.retry_after(1.1) is None


def test_starts_that_fail_trip_it_for_longer_each_time_until_a_batch_runs():
    breaker = Breaker()
    for _ in range(3):
        assert breaker.not_started(0.0) < 1.0
    assert [breaker.not_started(0.0) for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    breaker.succeeded()
    for _ in range(3):
        breaker.not_started(0.0)
    assert breaker.not_started(0.0) == 1.0


def test_a_run_has_hung_when_it_takes_ten_times_what_was_expected_and_more_than_the_least():
    patience = Patience(5.0)
    assert patience.limit() == patience.limit(32, 0.1) == 60.0
    assert patience.limit(32, 30.0) == 300.0
    patience.learn(1, 0.01)
    assert patience.limit(1, 0.01) == patience.limit(32) == 5.0
    assert patience.limit(1, 2.0) == 20.0
    patience.learn(2, 4.0)
    assert patience.limit(1) == 40.0
    assert patience.limit(8) == 160.0


def judged(first, other) -> bool:
    golden = Golden.of(model_config())
    assert golden.judge({"OUT": np.array(first)})
    return golden.judge({"OUT": np.array(other)})


@pytest.mark.parametrize(
    ("first", "other", "alike"),
    [
        ([1.0, 1000.0], [1.5, 1000.0], True),  # a thousandth of the largest
        ([1.0, 1000.0], [4.0, 1000.0], False),
        ([1.0, np.nan], [1.0, np.nan], True),
        ([1.0, np.nan], [1.0, 1.0], False),
        ([1.0, np.inf], [1.0, np.inf], True),
        ([1, 2], [1, 3], False),
        ([1.0], [1.0, 1.0], False),
        ([1.0], [1], False),
    ],
)
def test_an_answer_is_alike_within_what_orders_of_addition_explain(first, other, alike):
    assert judged(first, other) == alike


def test_the_test_is_a_row_of_zeros_where_shapes_are_fixed():
    config = model_config(inputs=(tensor_config("A", dims=(2, 3)), tensor_config("B", DataType.BYTES, (1,))))
    batch = Golden.of(config).batch()
    assert batch.rows == 1
    inputs = batch.stack()
    assert inputs["A"].tolist() == [[[0.0] * 3] * 2]
    assert inputs["B"].tolist() == [[b""]]


@pytest.mark.parametrize("more", [{"dims": (-1,)}, {"ragged": True}, {"whole": True}])
def test_else_it_is_the_first_small_batch_that_went_well(more):
    golden = Golden.of(model_config(inputs=(tensor_config(**more),)))
    assert golden.batch() is None
    large = {"IN": np.zeros((1, 1 << 20), "<f4")}
    assert not golden.offer(large, large)
    small = {"IN": np.ones((2, 3), "<f4")}
    assert golden.offer(small, small)
    small["IN"][:] = 7
    assert golden.batch().rows == 2
    assert golden.batch().stack()["IN"].tolist() == [[1.0] * 3] * 2
    assert not golden.offer(small, small)


def test_a_line_that_closes_while_a_beat_is_answered_ends_the_child_in_peace() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.send(encode(Beat(1)))
        ours.close()
        assert live(theirs) == 0
