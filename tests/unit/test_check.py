"""The request check says what Triton says, word for word (PROTOCOL.md section 1)."""

import numpy as np
import pytest

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.service.check import Checker
from gateway.types import DataType, InferRequest, RequestedOutput, Tensor
from tests.support import model_config, tensor_config

FP32, INT32, BYTES = DataType.FP32, DataType.INT32, DataType.BYTES
NOTE = (
    " NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended "
    "to each input shape. If you want to specify the full shape including the batch dim in your input dims "
    "config, try setting max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)

ONE = model_config(inputs=(tensor_config("IN", FP32, (16,)),), outputs=(tensor_config("OUT"),))
TWO = model_config(inputs=(tensor_config("A", FP32, (2,)), tensor_config("B", FP32, (2,))))
OPTIONAL = model_config(inputs=(tensor_config("A", FP32, (2,)), tensor_config("B", FP32, (2,), optional=True)))
OPTIONAL_PAIR = model_config(
    inputs=(tensor_config("A", FP32, (2,)), tensor_config("B", optional=True), tensor_config("C", optional=True))
)
UNBATCHED = model_config(max_batch_size=0, batching=None, inputs=(tensor_config("IN", FP32, (2, -1)),))
TEXT = model_config(inputs=(tensor_config("IN", BYTES, (1,)),))
OPEN = model_config(inputs=(tensor_config("IN", FP32, (-1,)), tensor_config("MASK", INT32, (-1,), optional=True)))


def wire(shape: tuple[int, ...], datatype: DataType = FP32, *, size: int | None = None) -> Tensor:
    """A tensor of zeros, or of `size` bytes whatever its shape."""
    full = max(int(np.prod(shape)), 0) * max(datatype.itemsize, 4)
    return Tensor(datatype, shape, bytes(full if size is None else size))


def asked(inputs: dict[str, Tensor], *outputs: str, request_id: str = "") -> InferRequest:
    return InferRequest("m", inputs, id=request_id, outputs=tuple(map(RequestedOutput, outputs)))


REFUSED = {
    "wrong shape": (
        ONE,
        asked({"IN": wire((1, 15))}),
        "unexpected shape for input 'IN' for model 'm'. Expected [-1,16], got [1,15]." + NOTE,
    ),
    "wrong rank": (
        ONE,
        asked({"IN": wire((16,))}),
        "inference request batch-size must be <= 8 for 'm'",  # as Triton: the first dimension is the batch
    ),
    "a scalar to a model that batches": (
        ONE,
        asked({"IN": wire(())}),
        "unexpected shape for input 'IN' for model 'm'. Expected [-1,16], got []." + NOTE,
    ),
    "wrong shape without batch": (
        UNBATCHED,
        asked({"IN": wire((3, 5))}),
        "unexpected shape for input 'IN' for model 'm'. Expected [2,-1], got [3,5].",
    ),
    "negative dimension": (
        UNBATCHED,
        asked({"IN": wire((2, -1))}),
        "unexpected shape for input 'IN' for model 'm'. Expected [2,-1], got [2,-1].",
    ),
    "negative batch and dimension": (
        OPEN,
        asked({"IN": wire((-1, -4), size=16)}),
        "inference request batch-size must be >= 1 for 'm'",
    ),
    "batch too big": (ONE, asked({"IN": wire((9, 16))}), "inference request batch-size must be <= 8 for 'm'"),
    "batch of none": (ONE, asked({"IN": wire((0, 16))}), "inference request batch-size must be >= 1 for 'm'"),
    "inputs with different batch": (
        TWO,
        asked({"A": wire((1, 2)), "B": wire((2, 2))}),
        "input 'B' batch size does not match other inputs for 'm'",
    ),
    "wrong type": (
        ONE,
        asked({"IN": wire((1, 16), INT32)}),
        "inference input 'IN' data-type is 'INT32', but model 'm' expects 'FP32'",
    ),
    "missing input": (
        TWO,
        asked({"A": wire((1, 2))}),
        (
            "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['A'], "
            "but missing required input(s) ['B']. Please provide all required input(s)."
        ),
    ),
    "no input": (
        TWO,
        asked({}),
        (
            "expected 2 inputs but got 0 inputs for model 'm'. Got input(s) [], "
            "but missing required input(s) ['A','B']. Please provide all required input(s)."
        ),
    ),
    "missing input, others optional": (
        OPTIONAL,
        asked({}),
        (
            "expected number of inputs between 1 and 2 but got 0 inputs for model 'm'. Got input(s) [], "
            "but missing required input(s) ['A']. Please provide all required input(s)."
        ),
    ),
    "optional in place of required": (
        OPTIONAL_PAIR,
        asked({"B": wire((1, 2)), "C": wire((1, 2))}),
        (
            "expected number of inputs between 1 and 3 but got 2 inputs for model 'm'. Got input(s) ['B','C'], "
            "but missing required input(s) ['A']. Please provide all required input(s)."
        ),
    ),
    "extra input": (
        ONE,
        asked({"IN": wire((1, 16)), "Z": wire((1, 16))}),
        "expected 1 inputs but got 2 inputs for model 'm'.",
    ),
    "unknown input, count fits": (
        TWO,
        asked({"A": wire((1, 2)), "Z": wire((1, 2))}),
        "unexpected inference input 'Z' for model 'm'",
    ),
    "unknown input, count fits by an optional": (
        OPTIONAL,
        asked({"A": wire((1, 2)), "Z": wire((1, 2))}),
        "unexpected inference input 'Z' for model 'm'",
    ),
    "unknown output": (ONE, asked({"IN": wire((1, 16))}, "Z"), "unexpected inference output 'Z' for model 'm'"),
    "duplicate output": (ONE, asked({"IN": wire((1, 16))}, "OUT", "OUT"), "output 'OUT' already exists in request"),
    "too few bytes": (
        ONE,
        asked({"IN": wire((1, 16), size=60)}),
        "input byte size mismatch for input 'IN' for model 'm'. Expected 64, got 60",
    ),
    "too many bytes": (
        ONE,
        asked({"IN": wire((2, 16), size=129)}),
        "input byte size mismatch for input 'IN' for model 'm'. Expected 128, got 129",
    ),
    "string elements that do not fit": (
        TEXT,
        asked({"IN": Tensor(BYTES, (1, 1), b"\7\0\0\0abc")}),
        "string element 0 claims 7 bytes, 3 are left for inference input 'IN' for model 'm'",
    ),
}


@pytest.mark.parametrize(("config", "request_", "text"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("request_id", ["", "r-7"])
def test_a_request_the_model_cannot_take_is_refused_in_tritons_words(config, request_, text, request_id):
    request_.id = request_id
    with pytest.raises(errors.InvalidArgument) as caught:
        Checker(config).check(request_)
    assert caught.value.message == f"[request id: {request_id or '<id_unknown>'}] {text}"


@pytest.mark.parametrize(
    ("config", "request_", "rows"),
    [
        (ONE, asked({"IN": wire((1, 16))}), 1),
        (ONE, asked({"IN": wire((8, 16))}, "OUT"), 8),
        (TWO, asked({"B": wire((3, 2)), "A": wire((3, 2))}), 3),
        (OPTIONAL, asked({"A": wire((2, 2))}), 2),
        (OPTIONAL, asked({"A": wire((2, 2)), "B": wire((2, 2))}), 2),
        (UNBATCHED, asked({"IN": wire((2, 0))}), 1),
        (TEXT, asked({"IN": Tensor(BYTES, (2, 1), b"\0\0\0\0\1\0\0\0a")}), 2),
        (OPEN, asked({"IN": wire((2, 0))}), 2),
    ],
)
def test_a_request_the_model_can_take_learns_its_rows(config, request_, rows):
    Checker(config).check(request_)
    assert request_.rows == rows


def test_only_requests_that_can_share_a_batch_have_the_same_signature():
    def signature(config, **inputs):
        request = asked(inputs)
        Checker(config).check(request)
        hash(request.signature)
        return request.signature

    assert signature(ONE, IN=wire((1, 16))) == signature(ONE, IN=wire((5, 16)))
    assert signature(OPEN, IN=wire((1, 4))) == signature(OPEN, IN=wire((3, 4)))
    different = [
        signature(OPEN, IN=wire((1, 4))),
        signature(OPEN, IN=wire((1, 5))),
        signature(OPEN, IN=wire((1, 4)), MASK=wire((1, 4), INT32)),
        signature(OPEN, IN=wire((1, 4)), MASK=wire((1, 3), INT32)),
    ]
    assert len(set(different)) == 4
    swapped = asked({"MASK": wire((1, 4), INT32), "IN": wire((1, 4))})
    Checker(OPEN).check(swapped)
    assert swapped.signature == different[2]
    assert signature(OPTIONAL, A=wire((1, 2))) != signature(OPTIONAL, A=wire((1, 2)), B=wire((1, 2)))


# --- who may share a batch

RAGGED = model_config(inputs=(tensor_config("IN", FP32, (-1,), ragged=True), tensor_config("ROW", INT32, (2,))))
RAGGED_OPTIONAL = model_config(
    inputs=(tensor_config("IN", FP32, (-1,), ragged=True), tensor_config("B", FP32, (-1,), ragged=True, optional=True))
)
WHOLE = model_config(
    inputs=(tensor_config("IN", FP32, (2,)), tensor_config("SHAPE", DataType.INT64, (-1,), whole=True))
)


def signature(config: ModelConfig, **inputs: Tensor) -> object:
    request = asked(inputs)
    Checker(config).check(request)
    return request.signature


def test_ragged_inputs_of_any_shape_share_a_batch() -> None:
    short, long = (signature(RAGGED, IN=wire((1, size)), ROW=wire((1, 2), INT32)) for size in (3, 5))
    assert short == long
    one, other = (signature(RAGGED_OPTIONAL, IN=wire((1, size)), B=wire((1, size))) for size in (3, 5))
    assert one == other
    assert one != signature(RAGGED_OPTIONAL, IN=wire((1, 3)))


def test_shape_tensors_have_no_batch_dimension_and_must_be_equal() -> None:
    def sized(*sizes: int) -> Tensor:
        return Tensor.from_array(DataType.INT64, np.array(sizes))

    one = signature(WHOLE, IN=wire((1, 2)), SHAPE=sized(3, 4))
    assert one == signature(WHOLE, SHAPE=sized(3, 4), IN=wire((5, 2)))
    assert one != signature(WHOLE, IN=wire((1, 2)), SHAPE=sized(4, 3))
    assert one != signature(WHOLE, IN=wire((1, 2)), SHAPE=sized(3, 4, 0))


def test_what_a_shape_tensor_says_is_not_remembered_by_its_form() -> None:
    checker = Checker(WHOLE)
    signatures = []
    for size in (3, 4):
        request = asked({"IN": wire((2, 2)), "SHAPE": Tensor.from_array(DataType.INT64, np.array([size]))})
        request.form = "the same"
        checker.check(request)
        assert request.rows == 2
        signatures.append(request.signature)
    assert signatures[0] != signatures[1]
