"""Requests of different shapes in one batch: the model is told of each, and each gets its own back."""

from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import errors
from gateway.config.model import BatchInput, ModelConfig, TensorConfig
from gateway.scheduling import batch, ragged
from gateway.types import Array, DataType, InferRequest, RequestedOutput, Tensor
from tests.support import model_config, tensor, tensor_config


def test_items_of_which_a_client_sends_nothing_are_bounded() -> None:
    config = model_config(inputs=(tensor_config("IN", dims=(-1, -1)),), max_batch_size=0)
    made = BatchInput("item_shape", ("SHAPES",), DataType.FP32, "IN")

    def shapes(*shape: int) -> tuple[int, ...]:
        empty = Tensor(DataType.FP32, shape, b"")
        asked = InferRequest("m", inputs={"IN": empty})
        return ragged.described([asked], made, config)["SHAPES"].shape

    assert shapes(3, 0) == (3, 1)
    assert shapes(0, 3) == (0, 1)
    with pytest.raises(errors.InvalidArgument, match="an input without elements may have 65536 items"):
        shapes(1 << 60, 0)


KINDS = (
    "element_count",
    "accumulated_element_count",
    "accumulated_element_count_with_zero",
    "max_element_count_as_shape",
    "item_shape",
    "item_shape_flatten",
)
SIZES = st.integers(0, 3)


@dataclass
class Sample:
    """Requests to a model that gives its inputs back, and what was put into each."""

    config: ModelConfig
    requests: list[InferRequest]
    given: list[dict[str, Array]]


def values(datatype: DataType, shape: tuple[int, ...], start: int) -> Array:
    numbers = np.arange(start, start + prod(shape))
    if datatype is DataType.BYTES:
        return np.array([str(number).encode() for number in numbers] + [b""], dtype=object)[:-1].reshape(shape)
    return numbers.astype(datatype.dtype).reshape(shape)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """1-2 ragged inputs that come back as outputs like them, one plain input, 1-4 requests of 1-3 rows."""
    batched = draw(st.booleans())
    inputs, outputs = [tensor_config("ROW", DataType.INT32, (2,))], [tensor_config("ROW", DataType.INT32, (2,))]
    ranks = {}
    for index in range(draw(st.integers(1, 2))):
        name, rank = f"R{index}", draw(st.integers(1, 3))
        datatype = draw(st.sampled_from([DataType.FP32, DataType.INT64, DataType.BYTES, DataType.UINT8]))
        dims = (-1,) * rank
        reshape = draw(st.sampled_from([None, (1, *dims)]))
        inputs.append(TensorConfig(name, datatype, dims, reshape, ragged=True))
        outputs.append(TensorConfig(name, datatype, dims, reshape, like=name))
        ranks[name] = rank
    config = model_config(inputs=tuple(inputs), outputs=tuple(outputs), max_batch_size=64 if batched else 0)
    types = {each.name: each.datatype for each in inputs}
    requests, given_values = [], []
    for number in range(draw(st.integers(1, 4)) if batched else 1):
        lead = (draw(st.integers(1, 3)),) if batched else ()
        shapes = {name: (*lead, *draw(st.tuples(*[SIZES] * rank))) for name, rank in ranks.items()}
        shapes["ROW"] = (*lead, 2)
        arrays = {name: values(types[name], shape, 50 * number) for name, shape in shapes.items()}
        tensors = {
            name: Tensor(types[name], array.shape, bytes(Tensor.from_array(types[name], array).wire))
            for name, array in arrays.items()
        }
        wanted = tuple(map(RequestedOutput, draw(st.lists(st.sampled_from(sorted(shapes)), unique=True))))
        requests.append(InferRequest("m", tensors, rows=lead[0] if lead else 1, outputs=wanted))
        given_values.append(arrays)
    return Sample(config, requests, given_values)


@given(samples())
def test_each_request_gets_its_own_elements_back_in_its_own_shape(sample: Sample) -> None:
    stacked = batch.stack(sample.requests, sample.config)
    answers = batch.split(stacked, sample.requests, sample.config)
    for asked, arrays, got in zip(sample.requests, sample.given, answers, strict=True):
        assert set(got) == ({output.name for output in asked.outputs} or set(arrays))
        for name, part in got.items():
            assert part.shape == arrays[name].shape
            assert np.array_equal(part.array, arrays[name])
            assert np.array_equal(Tensor(part.datatype, part.shape, part.wire).array, arrays[name])


@given(samples())
def test_a_ragged_input_is_the_elements_of_all_requests_end_to_end(sample: Sample) -> None:
    stacked = batch.stack(sample.requests, sample.config)
    rows = [arrays["ROW"] for arrays in sample.given]
    assert np.array_equal(stacked["ROW"], np.concatenate(rows))
    for name in stacked.keys() - {"ROW"}:
        assert stacked[name].ndim == 1
        assert stacked[name].tolist() == [each for arrays in sample.given for each in arrays[name].reshape(-1).tolist()]


@given(samples(), st.integers(-3, 3).filter(bool))
def test_elements_that_are_left_over_or_missing_fail_the_batch(sample: Sample, more: int) -> None:
    outputs = batch.stack(sample.requests, sample.config)
    name = sample.config.outputs[-1].name
    outputs[name] = np.resize(outputs[name], max(outputs[name].size + more, 0))
    had = sum(arrays[name].size for arrays in sample.given)
    for request in sample.requests:
        request.outputs = ()
    if outputs[name].size == had:  # there was none to take
        return
    with pytest.raises(errors.Internal) as caught:
        batch.split(outputs, sample.requests, sample.config)
    assert caught.value.message == (
        f"model 'm' gave {outputs[name].size} elements in output '{name}' for a batch whose inputs '{name}' have shapes of "
        f"{had}; a model must give one element for each"
    )


# --- what the model is told

SHAPES = st.lists(st.tuples(st.integers(1, 3), SIZES, SIZES), min_size=1, max_size=5)


def expected(kind: str, shapes: list[tuple[int, ...]]) -> list[object]:
    counts = [prod(shape) for shape in shapes]
    items = [list(shape[1:]) for shape in shapes for _ in range(shape[0])]
    return {
        "element_count": counts,
        "accumulated_element_count": list(accumulate(counts)),
        "accumulated_element_count_with_zero": [0, *accumulate(counts)],
        "max_element_count_as_shape": [0] * max(counts),
        "item_shape": items,
        "item_shape_flatten": [each for item in items for each in item],
    }[kind]


@given(SHAPES, st.sampled_from(KINDS), st.sampled_from([DataType.INT32, DataType.FP32]))
def test_every_kind_of_batch_input_under_each_of_its_names(shapes, kind: str, datatype: DataType) -> None:
    made = BatchInput(kind, ("A", "B"), datatype, "IN")
    config = model_config(inputs=(tensor_config("IN", dims=(-1, -1), ragged=True),))
    config = replace(config, batch_inputs=(made,))
    requests = [InferRequest("m", {"IN": tensor(np.zeros(shape))}, rows=shape[0]) for shape in shapes]
    stacked = batch.stack(requests, config)
    for name in ("A", "B"):
        assert stacked[name].dtype == datatype.dtype
        assert stacked[name].tolist() == expected(kind, shapes)
    if kind == "item_shape":
        assert stacked["A"].shape == (sum(shape[0] for shape in shapes), 2)


def test_a_batch_input_tells_the_shape_that_the_model_would_see():
    made = BatchInput("item_shape", ("A",), DataType.INT32, "IN")
    config = model_config(inputs=(tensor_config("IN", dims=(-1, 2), reshape=(2, -1), ragged=True),))
    config = replace(config, batch_inputs=(made,))
    stacked = batch.stack([InferRequest("m", {"IN": tensor(np.zeros((1, 3, 2)))})], config)
    assert stacked["A"].tolist() == [[2, 3]]


# --- what is one for the whole batch


def test_a_whole_tensor_is_given_once_and_its_output_to_each():
    config = model_config(
        inputs=(tensor_config("IN"), tensor_config("SHAPE", DataType.INT64, (-1,), whole=True)),
        outputs=(tensor_config("OUT"), tensor_config("OF", DataType.INT64, (-1,), whole=True)),
    )
    shape = np.array([3, 4, 5])
    requests = [
        InferRequest("m", {"IN": tensor(np.full((rows, 2), rows)), "SHAPE": tensor(shape, DataType.INT64)}, rows=rows)
        for rows in (1, 2)
    ]
    stacked = batch.stack(requests, config)
    assert stacked["IN"].shape == (3, 2)
    assert stacked["SHAPE"].tolist() == [3, 4, 5]
    one, two = batch.split({"OUT": stacked["IN"], "OF": stacked["SHAPE"]}, requests, config)
    assert (one["OUT"].shape, two["OUT"].shape) == ((1, 2), (2, 2))
    assert one["OF"].array.tolist() == two["OF"].array.tolist() == [3, 4, 5]
