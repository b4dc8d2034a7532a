"""Tensors: wire bytes and arrays are two views of the same values."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from gateway.types import DataType, Tensor, decode_bytes, element_count, encode_bytes

FIXED = [datatype for datatype in DataType if datatype is not DataType.BYTES]
ARRAYS = st.sampled_from(FIXED).flatmap(
    lambda datatype: st.tuples(
        st.just(datatype),
        st_numpy.arrays(
            datatype.dtype, st_numpy.array_shapes(min_dims=0, min_side=0), elements=st_numpy.from_dtype(datatype.dtype)
        ),
    )
)


def test_the_types_of_the_protocol_have_the_sizes_of_the_protocol():
    assert {datatype.name: datatype.itemsize for datatype in DataType} == {
        "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
        "FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2, "BYTES": 0,
    }  # fmt: skip
    assert all(DataType(datatype.name) is datatype for datatype in DataType)


@given(ARRAYS)
def test_an_array_survives_the_wire(typed):
    datatype, array = typed
    sent = Tensor.from_array(datatype, array)
    wire = bytes(sent.wire)
    assert len(wire) == sent.nbytes == element_count(array.shape) * datatype.itemsize
    got = Tensor(datatype, array.shape, wire)
    assert got.nbytes == len(wire)
    assert got.array.shape == array.shape
    assert got.array.dtype == array.dtype
    assert got.array.tobytes() == array.tobytes()


@given(st_numpy.arrays(object, st_numpy.array_shapes(min_dims=0, min_side=0), elements=st.binary(max_size=9)))
def test_bytes_elements_survive_the_wire(array):
    sent = Tensor.from_array(DataType.BYTES, array)
    got = Tensor(DataType.BYTES, array.shape, sent.wire)
    assert got.nbytes == sent.nbytes == sum(4 + len(element) for element in array.reshape(-1))
    assert got.array.tolist() == array.tolist()


def test_the_wire_is_little_endian_and_row_major():
    array = np.array([[1, 2], [3, 4]], "<u2")
    assert bytes(Tensor.from_array(DataType.UINT16, array.T).wire) == struct.pack("<4H", 1, 3, 2, 4)
    assert encode_bytes(np.array([b"ab", b""], dtype=object)) == b"\x02\0\0\0ab\0\0\0\0"
    assert encode_bytes(np.array(["é"], dtype=object)) == b"\x02\0\0\0\xc3\xa9"


def test_neither_direction_copies_what_is_large_and_contiguous():
    array = np.arange(4096, dtype=np.float32)
    sent = Tensor.from_array(DataType.FP32, array)
    assert np.shares_memory(np.frombuffer(sent.wire, np.float32), array)
    wire = bytearray(24)
    got = Tensor(DataType.FP32, (2, 3), wire)
    wire[0:4] = struct.pack("<f", 5.0)
    assert got.array[0, 0] == 5.0
    assert got.array is got.array


@pytest.mark.parametrize(("shape", "size"), [((2,), 7), ((2,), 9), ((2,), 12), ((2,), 0), ((), 8), ((0,), 4)])
def test_wire_bytes_that_do_not_fit_the_shape_raise(shape, size):
    with pytest.raises(ValueError, match=r".+"):
        _ = Tensor(DataType.FP32, shape, bytes(size)).array


@pytest.mark.parametrize(
    ("wire", "count", "text"),
    [
        (b"", 1, "expected 1 string elements, got at most 0"),
        (b"\0\0\0\0", 2, "expected 2 string elements, got at most 1"),
        (b"\5\0\0\0abc", 1, "string element 0 claims 5 bytes, 3 are left"),
        (b"\xff\xff\xff\xff", 1, "string element 0 claims 4294967295 bytes, 0 are left"),
        (b"\1\0\0\0a\0\0\0", 2, "expected 2 string elements, got 1"),
        (b"\0\0\0\0x", 1, "1 bytes are left after 1 string elements"),
        (b"\0\0\0\0", 0, "4 bytes are left after 0 string elements"),
        (b"", 1 << 40, "expected 1099511627776 string elements, got at most 0"),
    ],
)
def test_string_elements_that_do_not_fit_are_explained(wire, count, text):
    with pytest.raises(ValueError, match=r".+") as caught:
        decode_bytes(wire, count)
    assert str(caught.value) == text


@given(st.binary(max_size=40), st.integers(0, 10))
def test_any_bytes_decode_to_what_encodes_back_or_raise(wire, count):
    try:
        elements = decode_bytes(wire, count)
    except ValueError:
        return
    assert len(elements) == count
    assert encode_bytes(elements) == wire


def test_element_count():
    assert [element_count(shape) for shape in [(), (3,), (2, 3), (2, 0, 3)]] == [1, 3, 6, 0]


def test_a_tensor_does_not_print_its_data():
    assert repr(Tensor(DataType.FP32, (1, 2), bytes(8))) == "Tensor(FP32, [1, 2])"
