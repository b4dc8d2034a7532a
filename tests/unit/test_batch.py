"""Requests become a batch and a batch becomes answers: row i always belongs to request i."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import errors
from gateway.config.model import ModelConfig, TensorConfig
from gateway.engines.isolated.layout import lay_out, read, read_form, write
from gateway.scheduling import batch
from gateway.types import Array, DataType, InferRequest, RequestedOutput, Tensor
from tests.support import model_config, request, tensor, tensor_config

DATATYPES = st.sampled_from(DataType)
DIMS = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def values(datatype: DataType, shape: tuple[int, ...], start: int) -> Array:
    """Distinct values where the type has enough of them, so that a misplaced row shows."""
    count = int(np.prod(shape))
    numbers = np.arange(start, start + count)
    if datatype is DataType.BYTES:
        flat = np.array([b"x" * (n % 5) + str(n).encode() for n in numbers] + [b""], dtype=object)[:count]
    elif datatype is DataType.BOOL:
        flat = numbers % 2 == 0
    else:
        flat = (numbers % 200 if datatype.itemsize == 1 else numbers).astype(datatype.dtype)
    return flat.reshape(shape)


@dataclass
class Sample:
    """Requests to an identity model, and what was put into each."""

    config: ModelConfig
    requests: list[InferRequest]
    given: list[dict[str, Array]]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """An identity model of 1-3 tensors: some optional, some reshaped, some with open dimensions; 1-4 requests."""
    inputs, outputs, shapes = [], [], {}
    for index in range(draw(st.integers(1, 3))):
        actual = draw(DIMS)
        dims = tuple(-1 if draw(st.booleans()) else size for size in actual)
        reshape = draw(st.sampled_from([None, (1, *dims), (*dims, 1)]))
        if dims == (1,):
            reshape = draw(st.sampled_from([None, ()]))  # a scalar per row
        optional = index > 0 and draw(st.booleans())
        datatype = draw(DATATYPES)
        inputs.append(TensorConfig(f"T{index}", datatype, dims, reshape, optional))
        outputs.append(TensorConfig(f"T{index}", datatype, dims, reshape))
        if not (optional and draw(st.booleans())):
            shapes[f"T{index}"] = actual
    outputs = [output for output in outputs if output.name in shapes]
    config = model_config(inputs=tuple(inputs), outputs=tuple(outputs), max_batch_size=64)
    types = {each.name: each.datatype for each in inputs}
    requests, given_values = [], []
    start = 0
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.integers(1, 4))
        arrays = {name: values(types[name], (rows, *shape), start) for name, shape in shapes.items()}
        start += 37
        tensors = {
            name: Tensor(types[name], array.shape, bytes(Tensor.from_array(types[name], array).wire))
            if draw(st.booleans())
            else Tensor.from_array(types[name], array)
            for name, array in arrays.items()
        }
        wanted = draw(st.lists(st.sampled_from(sorted(shapes)), unique=True))
        requests.append(InferRequest("m", tensors, rows=rows, outputs=tuple(map(RequestedOutput, wanted))))
        given_values.append(arrays)
    return Sample(config, requests, given_values)


@given(samples())
def test_each_request_gets_its_own_rows_back_from_an_identity_model(sample):
    stacked = batch.stack(sample.requests, sample.config)
    wanted = batch.wanted_outputs(sample.requests)
    outputs = {name: array for name, array in stacked.items() if not wanted or name in wanted}
    answers = batch.split(outputs, sample.requests, sample.config)
    assert len(answers) == len(sample.requests)
    for asked, arrays, got in zip(sample.requests, sample.given, answers, strict=True):
        names = {output.name for output in asked.outputs} or set(arrays)
        assert set(got) == names
        for name in names:
            assert got[name].shape == arrays[name].shape
            assert np.array_equal(got[name].array, arrays[name])
            again = Tensor(got[name].datatype, got[name].shape, got[name].wire)
            assert np.array_equal(again.array, arrays[name]), "the wire bytes are the same rows"


@given(samples())
def test_the_engine_sees_the_models_own_shapes(sample):
    stacked = batch.stack(sample.requests, sample.config)
    rows = sum(asked.rows for asked in sample.requests)
    for config in sample.config.inputs:
        if config.name not in stacked:
            assert config.name not in sample.requests[0].inputs
            continue
        array = stacked[config.name]
        wanted = config.dims if config.reshape is None else config.reshape
        assert array.dtype == config.datatype.dtype
        assert array.shape[0] == rows
        assert len(array.shape) == len(wanted) + 1
        assert all(dim in (-1, size) for size, dim in zip(array.shape[1:], wanted, strict=True))


@pytest.mark.parametrize("small", [0, 1 << 14])
@given(samples())
def test_what_is_gathered_lies_in_shared_memory_as_what_is_stacked(small, sample):
    layout, values = lay_out(batch.gather(sample.requests, sample.config))
    block = bytearray(max(layout.size, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.engines.isolated.layout._SMALL", small)
        write(block, layout, values)
    found = read(block, read_form(layout.form), copy=True)
    stacked = batch.stack(sample.requests, sample.config)
    assert list(found) == list(stacked)
    for name, array in stacked.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)


def test_a_large_batch_is_stacked_like_a_small_one():
    row = np.arange(40_000, dtype=np.float32)
    config = model_config(inputs=(tensor_config("IN", dims=(40_000,)),))
    requests = [request(inputs={"IN": tensor([row + n])}) for n in range(3)]
    stacked = batch.stack(requests, config)["IN"]
    assert np.array_equal(stacked, [row, row + 1, row + 2])


@pytest.mark.parametrize(
    ("dims", "reshape", "shape", "engine"),
    [
        ((1,), (), (2, 1), (2,)),
        ((-1, 4), (4, -1), (2, 3, 4), (2, 4, 3)),
        ((-1, 2, -1), (-1, -1, 1, 2), (2, 3, 2, 5), (2, 3, 5, 1, 2)),
        ((6,), (2, 3), (2, 6), (2, 2, 3)),
    ],
)
def test_reshape_fills_open_dimensions_in_order_both_ways(dims, reshape, shape, engine):
    config = model_config(
        inputs=(tensor_config("IN", dims=dims, reshape=reshape),),
        outputs=(tensor_config("OUT", dims=dims, reshape=reshape),),
    )
    given_values = values(DataType.FP32, shape, 0)
    asked = [request(inputs={"IN": tensor(given_values)}, rows=2)]
    stacked = batch.stack(asked, config)["IN"]
    assert stacked.shape == engine
    assert np.array_equal(batch.split({"OUT": stacked}, asked, config)[0]["OUT"].array, given_values)


def test_a_model_without_a_batch_dimension_takes_and_gives_whole_tensors():
    config = model_config(
        max_batch_size=0,
        batching=None,
        inputs=(tensor_config("IN", dims=(-1, 2), reshape=(2, -1)),),
        outputs=(tensor_config("OUT", dims=()),),
    )
    asked = [request(inputs={"IN": tensor(np.zeros((3, 2)))})]
    assert batch.stack(asked, config)["IN"].shape == (2, 3)
    (got,) = batch.split({"OUT": np.array(5, np.float32)}, asked, config)
    assert (got["OUT"].shape, got["OUT"].array.item()) == ((), 5.0)


def test_what_is_computed_is_what_anyone_asked_for():
    assert batch.wanted_outputs([request(outputs=("B",)), request(outputs=("A", "B"))]) == ("B", "A")
    assert batch.wanted_outputs([request(outputs=("B",)), request()]) == ()


# --- results that must not be handed out

TWO = [request(rows=2), request(rows=1)]


@pytest.mark.parametrize("shape", [(2, 2), (4, 2), (1, 2), (0, 2), (6,)])
def test_other_rows_than_the_batch_has_are_refused(shape):
    with pytest.raises(errors.Internal) as caught:
        batch.split({"OUT": np.zeros(shape, np.float32)}, TWO, model_config())
    assert caught.value.message == (
        f"model 'm' gave {shape[0]} rows in output 'OUT' for a batch of 3; "
        "a model must give one row for each row it is given"
    )


def test_an_output_without_rows_is_refused():
    with pytest.raises(errors.Internal, match="gave no rows in output 'OUT' for a batch of 3"):
        batch.split({"OUT": np.array(1, np.float32)}, TWO, model_config())


def test_wrong_rows_are_refused_for_a_lone_request_too():
    with pytest.raises(errors.Internal, match="gave 2 rows"):
        batch.split({"OUT": np.zeros((2, 2), np.float32)}, [request()], model_config())


def test_a_missing_output_is_refused():
    with pytest.raises(errors.Internal) as caught:
        batch.split({"OTHER": np.zeros((3, 2), np.float32)}, TWO, model_config())
    assert caught.value.message == "model 'm' gave no output 'OUT', which its configuration lists"


def test_an_output_of_another_type_is_refused():
    with pytest.raises(errors.Internal) as caught:
        batch.split({"OUT": np.zeros((3, 2), np.float64)}, TWO, model_config())
    assert caught.value.message == "model 'm' gave output 'OUT' as float64, its configuration says FP32"


def test_an_output_nobody_asked_for_may_be_missing():
    config = model_config(outputs=(tensor_config("OUT"), tensor_config("MORE")))
    asked = [request(1.0, outputs=("OUT",)), request(2.0, outputs=("OUT",))]
    first, second = batch.split({"OUT": np.array([[1, 1], [2, 2]], np.float32)}, asked, config)
    assert (first["OUT"].array.tolist(), second["OUT"].array.tolist()) == ([[1, 1]], [[2, 2]])
