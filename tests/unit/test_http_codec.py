"""The HTTP codec: round trips of every datatype, Triton's words for every mistake, and nothing else ever raised."""

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.transport.http.codec import Codec, encode
from gateway.transport.http.header import ResponsePlan
from gateway.transport.http.limits import HttpLimits
from gateway.types import DataType, InferResponse, Place, Places, Tensor
from tests.support import model_config, tensor, tensor_config

LIMITS = HttpLimits(max_input_size=1 << 20, max_request_tensors=8, max_tensor_elements=1 << 20)
BINARY, JSON = ResponsePlan(binary=True, listed={}), ResponsePlan(binary=False, listed={})
RAW = model_config(inputs=(tensor_config("IN", DataType.FP32, (-1, 2)),))
IN = {"name": "IN", "datatype": "FP32", "shape": [1, 2]}
SHARED = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
MANY = list(range(2000))  # enough JSON text to take simdjson's path


def decode(body: bytes | dict[str, Any], header_length: str | None = None, config=RAW):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Codec(LIMITS).decode(body, header_length, "m", "", config)


def binary(document: dict[str, Any], *blobs: bytes) -> tuple[bytes, str]:
    text = json.dumps(document).encode()
    return b"".join((text, *blobs)), str(len(text))


def json_input(data: Any, datatype: str = "FP32", shape: list[int] | None = None) -> dict[str, Any]:
    shape = [len(data)] if shape is None else shape
    return {"inputs": [{"name": "IN", "datatype": datatype, "shape": shape, "data": data}]}


def array(body: bytes | dict[str, Any]) -> np.ndarray:
    return decode(body)[0].inputs["IN"].array


def error(*arguments: Any, **more: Any) -> tuple[int, str]:
    with pytest.raises(GatewayError) as caught:
        decode(*arguments, **more)
    return caught.value.http, caught.value.message


def answer(*outputs: Tensor, **more: Any) -> InferResponse:
    return InferResponse("m", "1", {f"OUT{index}": each for index, each in enumerate(outputs)}, **more)


# --- round trips


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NUMERIC = [each for each in DataType if each is not DataType.BYTES]
NO_JSON = (DataType.FP16, DataType.BF16)


@st.composite
def tensors(draw: st.DrawFn, datatypes: list[DataType]) -> Tensor:
    datatype, shape = draw(st.sampled_from(datatypes)), draw(SHAPES)
    count = int(np.prod(shape))
    if datatype is DataType.BYTES:
        elements = draw(st.lists(st.text(max_size=5).map(str.encode), min_size=count, max_size=count))
        flat = np.empty(count, dtype=object)
        flat[:] = elements
    elif datatype is DataType.BOOL:
        flat = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=bool)
    else:
        size = count * datatype.itemsize
        flat = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), datatype.dtype)
    return Tensor.from_array(datatype, flat.reshape(shape))


def as_request(headers: list[tuple[str, str]], body: bytes) -> tuple[bytes, str | None]:
    """A response's body as the request that sends the same tensors back."""
    length = dict(headers).get("inference-header-content-length")
    text, blobs = (body, b"") if length is None else (body[: int(length)], body[int(length) :])
    document = json.loads(text)
    document["inputs"] = document.pop("outputs")
    text = json.dumps(document).encode()
    return text + blobs, None if length is None else str(len(text))


def same(left: Tensor, right: Tensor) -> bool:
    return (
        left.datatype is right.datatype
        and left.shape == right.shape
        and left.array.dtype == right.array.dtype
        and np.array_equal(left.array, right.array, equal_nan=left.array.dtype.kind == "f")
    )


@settings(deadline=None)
@given(st.lists(tensors(list(DataType)), min_size=1, max_size=3), st.booleans())
def test_binary_round_trip(sent: list[Tensor], first_as_json: bool) -> None:
    json_first = first_as_json and sent[0].datatype not in NO_JSON
    plan = ResponsePlan(binary=True, listed={"OUT0": not json_first})
    body, length = as_request(*encode(answer(*sent), plan))
    request, _ = decode(body, length)
    assert len(request.inputs) == len(sent)
    assert all(same(got, want) for got, want in zip(request.inputs.values(), sent, strict=True))


@settings(deadline=None)
@given(st.lists(tensors([each for each in DataType if each not in NO_JSON]), min_size=1, max_size=3))
def test_json_round_trip(sent: list[Tensor]) -> None:
    body, length = as_request(*encode(answer(*sent), JSON))
    assert length is None
    request, _ = decode(body)
    assert all(same(got, want) for got, want in zip(request.inputs.values(), sent, strict=True))


def test_binary_inputs_are_views_of_the_body() -> None:
    body, length = binary({"inputs": [{**IN, "parameters": {"binary_data_size": 8}}]}, np.ones(2, "<f4").tobytes())
    request, _ = decode(body, length)
    assert isinstance(request.inputs["IN"].wire, memoryview)
    assert np.shares_memory(request.inputs["IN"].array, np.frombuffer(body, np.uint8))


def test_a_repeated_header_is_read_again_from_each_body() -> None:
    codec = Codec(LIMITS)
    for value in (1.0, 2.0):
        body, length = binary(
            {"inputs": [{**IN, "parameters": {"binary_data_size": 8}}]}, np.full(2, value, "<f4").tobytes()
        )
        request, _ = codec.decode(body, length, "m", "", RAW)
        assert request.inputs["IN"].array.tolist() == [[value, value]]


def test_a_member_named_with_nul_in_a_large_document_is_passed_over() -> None:
    assert array({"inputs": [{**IN, "data": [1, 2], "\0": None}], "pad\0": "x" * 2000}).tolist() == [[1, 2]]


def test_headers_with_ids_do_not_answer_for_each_other() -> None:
    codec = Codec(LIMITS)
    for request_id in ("a", "b", "a"):
        body, length = binary({"id": request_id, "inputs": [{**IN, "parameters": {"binary_data_size": 0}}]})
        assert codec.decode(body, length, "m", "", RAW)[0].id == request_id


# --- JSON numbers


@pytest.mark.parametrize("pad", [[], MANY], ids=["small", "large"])
@pytest.mark.parametrize(
    ("datatype", "numbers", "expected"),
    [
        ("FP32", [1, 2.5, -0.1], [1.0, 2.5, np.float32(-0.1)]),
        ("FP64", [1e308, 123456789012345678901234567890], [1e308, 123456789012345678901234567890.0]),
        ("INT8", [300, -129], [44, 127]),
        ("UINT8", [256, 255], [0, 255]),
        ("INT64", [-(2**63), 2**63 - 1], [-(2**63), 2**63 - 1]),
        ("UINT64", [2**64 - 1], [2**64 - 1]),
    ],
)
def test_numbers(datatype: str, numbers: list[float], expected: list[float], pad: list[int]) -> None:
    got = array(json_input([*numbers, *pad], datatype))
    assert got.dtype == DataType(datatype).dtype
    assert got[: len(expected)].tolist() == expected
    assert got.size == len(numbers) + len(pad)


@pytest.mark.parametrize("pad", [b"", b",7" * 2000], ids=["small", "large"])
def test_nan_and_infinity_are_read(pad: bytes) -> None:
    text = b'{"inputs":[{"name":"IN","datatype":"FP32","shape":[%d],"data":[NaN,Infinity,-Infinity%b]}]}'
    got = array(text % (3 + pad.count(b"7"), pad))
    assert np.isnan(got[0])
    assert got[1:3].tolist() == [np.inf, -np.inf]


def test_nan_and_infinity_are_written_bare() -> None:
    values = [0.5, np.nan, np.inf, 3.0, -np.inf]
    _, body = encode(answer(tensor(values)), JSON)
    assert b'"data":[0.5,NaN,Infinity,3.0,-Infinity]' in body


@pytest.mark.parametrize("pad", [0, 2000])
def test_nested_data_is_read_in_row_major_order(pad: int) -> None:
    rows = [[1, 2], [3, 4]] + [[0, 0]] * pad
    assert array(json_input(rows, shape=[len(rows), 2]))[:2].tolist() == [[1, 2], [3, 4]]
    words = [[["a"], ["b"]], [["c"], ["d"]]]
    assert array(json_input(words, "BYTES", [2, 2])).tolist() == [[b"a", b"b"], [b"c", b"d"]]


@pytest.mark.parametrize("pad", [0, 2000])
@pytest.mark.parametrize(
    ("datatype", "element"),
    [
        ("FP32", "1"),
        ("FP32", None),
        ("FP32", True),
        ("FP32", {}),
        ("INT32", 1.5),
        ("INT32", True),
        ("INT64", 2**63),
        ("UINT32", -1),
        ("UINT64", 2**64),
        ("BOOL", 1),
        ("BYTES", 1),
    ],
)
def test_an_element_of_another_type(datatype: str, element: Any, pad: int) -> None:
    filler = {"BOOL": True, "BYTES": "x"}.get(datatype, 1)
    status, text = error(json_input([element] + [filler] * pad, datatype))
    assert status == 500
    assert text.startswith("Unable to parse 'data': attempt to access JSON non-")


# --- what the response looks like


def test_response_members_are_in_tritons_order() -> None:
    headers, body = encode(answer(tensor([[1, 2]]), id="7", parameters={"k": 1}), JSON)
    assert headers == [("content-type", "application/json")]
    assert body == (
        b'{"id":"7","model_name":"m","model_version":"1","parameters":{"k":1},'
        b'"outputs":[{"name":"OUT0","datatype":"FP32","shape":[1,2],"data":[1.0,2.0]}]}'
    )


def test_an_empty_id_is_left_out_and_accepted() -> None:
    request, plan = decode({"id": "", **json_input([1.0])})
    assert request.id == ""
    assert b'"id"' not in encode(answer(tensor([1])), plan)[1]


def test_binary_response_headers() -> None:
    headers, body = encode(answer(tensor([1, 2])), BINARY)
    length = int(dict(headers)["inference-header-content-length"])
    assert dict(headers)["content-type"] == "application/octet-stream"
    assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert body[length:] == np.array([1, 2], "<f4").tobytes()


def test_binary_output_without_bytes_is_announced_in_json() -> None:
    headers, body = encode(answer(tensor(np.zeros((0, 2)))), BINARY)
    assert headers == [("content-type", "application/json")]
    assert json.loads(body)["outputs"][0]["parameters"] == {"binary_data_size": 0}


@pytest.mark.parametrize(
    ("members", "binary_names"),
    [
        ({}, []),
        ({"parameters": {"binary_data_output": True}}, ["OUT0", "OUT1"]),
        ({"outputs": [{"name": "OUT0", "parameters": {"binary_data": True}}]}, ["OUT0"]),
        # A listed output is JSON unless it says otherwise, whatever binary_data_output says.
        ({"parameters": {"binary_data_output": True}, "outputs": [{"name": "OUT0"}]}, ["OUT1"]),
    ],
)
def test_which_outputs_are_binary(members: dict[str, Any], binary_names: list[str]) -> None:
    _, plan = decode({**json_input([1.0]), **members})
    headers, body = encode(answer(tensor([1]), tensor([2])), plan)
    length = int(dict(headers).get("inference-header-content-length", len(body)))
    outputs = json.loads(body[:length])["outputs"]
    assert [each["name"] for each in outputs if "parameters" in each] == binary_names


def test_requested_outputs_and_parameters() -> None:
    request, _ = decode(
        {
            **json_input([1.0]),
            "id": "x",
            "outputs": [{"name": "A", "parameters": {"classification": 3}}, {"name": "B"}],
            "parameters": {"priority": 1, "ratio": 0.5, "word": "w", "flag": True, "binary_data_output": False},
        }
    )
    assert [(each.name, each.classification) for each in request.outputs] == [("A", 3), ("B", 0)]
    assert request.parameters == {"priority": 1, "ratio": 0.5, "word": "w", "flag": True}


def test_bytes_that_are_no_text_cannot_go_as_json() -> None:
    output = Tensor.from_array(DataType.BYTES, np.array([b"\xff"], dtype=object))
    with pytest.raises(GatewayError, match="not UTF-8 text") as caught:
        encode(answer(output), JSON)
    assert caught.value.http == 400


@pytest.mark.parametrize("datatype", NO_JSON)
def test_half_floats_cannot_go_as_json(datatype: DataType) -> None:
    with pytest.raises(GatewayError) as caught:
        encode(answer(tensor([1], datatype)), JSON)
    assert (caught.value.http, caught.value.message) == (
        400,
        f"sending {datatype.name} data via JSON is not supported. Please use the binary data format for output OUT0",
    )
    assert error(json_input([1.0], datatype.name)) == (
        400,
        f"receiving {datatype.name} data via JSON is not supported. Please use the binary data format for input IN",
    )


# --- raw binary requests


def test_raw_request_takes_its_shape_from_the_model() -> None:
    data = np.arange(6, dtype="<f4")
    request, plan = decode(data.tobytes(), "0")
    assert request.inputs["IN"].array.tolist() == data.reshape(1, 3, 2).tolist()
    assert "inference-header-content-length" in dict(encode(answer(tensor([1])), plan)[0])


def test_raw_bytes_request() -> None:
    config = model_config(inputs=(tensor_config("IN", DataType.BYTES, (1,)),))
    request, _ = decode(b"some text", "0", config)
    assert request.inputs["IN"].array.tolist() == [[b"some text"]]


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            (("A", "FP32", (2,)), ("B", "FP32", (2,))),
            "[request id: <id_unknown>] Raw request must only have 1 input (found 1) to be deduced but got 2 inputs",
        ),
        (
            (("A", "FP32", (-1, -1)),),
            "the raw input 'A' can not be deduced because there are more than one variable-sized dimension",
        ),
        ((("A", "BYTES", (2,)),), "For BYTE datatype raw input 'A', the model must have input shape [1]"),
    ],
)
def test_models_that_take_no_raw_request(inputs: tuple, text: str) -> None:
    config = model_config(inputs=tuple(tensor_config(name, DataType(kind), dims) for name, kind, dims in inputs))
    status, message = error(b"12345678", "0", config=config)
    assert status == 400
    assert text in message


# --- mistakes, in Triton's words


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 500, "failed to parse the request JSON buffer: The document is empty. at 0"),
        (b"  ", 500, "failed to parse the request JSON buffer: The document is empty. at 0"),
        (b"{", 500, "failed to parse the request JSON buffer: "),
        (b"[]", 500, "failed to parse the request JSON buffer: "),
        (b'"\xff"', 500, "failed to parse the request JSON buffer: Invalid encoding in string. at 0"),
        (b'{"id":"\\ud800","inputs":[]}', 500, "failed to parse the request JSON buffer: Invalid encoding in string."),
        (b"[" * 101 + b"]" * 101, 400, "JSON nesting depth exceeds maximum allowed limit (100)"),
        (b"[" * 70_000, 400, "JSON nesting depth exceeds maximum allowed limit (100)"),
        (b"1" * ((1 << 20) + 1), 400, "request JSON size of 1048577 bytes exceeds the maximum allowed input size of"),
        ({}, 500, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
        ({"inputs": {}}, 500, "Unable to parse 'inputs': attempt to access JSON non-array as array"),
        ({"inputs": [1]}, 500, "Unable to parse 'inputs': attempt to access JSON non-object as object"),
        ({"id": 1, "inputs": []}, 500, "Unable to parse 'id': attempt to access JSON non-string as string"),
        ({"inputs": [{}]}, 500, "Unable to parse 'name': attempt to access non-existing object member 'name'"),
        ({"inputs": [{**IN, "data": 1}]}, 500, "Unable to parse 'data': attempt to access JSON non-"),
        (json_input([1.0], shape=[2]), 500, "Unable to parse 'data': Shape does not match true shape of 'data' field"),
        (
            json_input([1.0], shape=[-1]),
            500,
            "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        (json_input([1.0], shape=[1 << 40]), 400, "causes total element count to exceed maximum size of 1048576"),
        (json_input([], shape=[0, 1 << 40]), 400, "causes total element count to exceed maximum size of 1048576"),
        (json_input([1.0], shape=[1 << 62]), 400, "byte size overflow for input 'IN'"),
        (json_input([1.0], shape=[1 << 63]), 400, "causes total element count to exceed maximum size of 1048576"),
        (json_input([1.0], "FLOAT"), 400, "input 'IN' has unknown datatype 'FLOAT'; expected one of BOOL, UINT8"),
        ({"inputs": [IN]}, 400, "Input must set only one of the following fields: 'data', "),
        (
            {"inputs": [{**IN, "data": [1, 2], "parameters": {"binary_data_size": 8}}]},
            400,
            "Input must set only one of the following fields: 'data', ",
        ),
        ({"inputs": [{**IN, "data": [1, 2]}] * 2}, 400, "input 'IN' already exists in request"),
        ({"inputs": [{**IN, "data": [1, 2]}] * 9}, 400, "the request has 9 inputs, more than the limit of 8"),
        ({"inputs": [], "parameters": {"p": None}}, 400, "parameter 'p' has invalid type"),
        (
            {"inputs": [{**IN, "parameters": {"shared_memory_region": "r"}}]},
            400,
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor 'IN'",
        ),
        (
            {"inputs": [{**IN, "parameters": {"shared_memory_region": 1, "shared_memory_byte_size": 8}}]},
            500,
            "Unable to parse 'shared_memory_region': attempt to access JSON non-string as string",
        ),
        (
            {"inputs": [{**IN, "parameters": {**SHARED, "shared_memory_offset": -1}}]},
            500,
            "Unable to parse 'shared_memory_offset': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        (
            {"inputs": [{**IN, "data": [1.0], "parameters": SHARED}]},
            400,
            "Input must set only one of the following fields",
        ),
        (
            {
                "inputs": [{**IN, "parameters": SHARED}],
                "outputs": [{"name": "O", "parameters": {**SHARED, "classification": 1}}],
            },
            400,
            "Output can't set both 'shared_memory_region' and 'classification'",
        ),
        (
            {
                "inputs": [{**IN, "parameters": SHARED}],
                "outputs": [{"name": "O", "parameters": {**SHARED, "binary_data": True}}],
            },
            400,
            "Output can't set both 'shared_memory_region' and 'binary_data'",
        ),
    ],
)
def test_mistakes(body: bytes | dict[str, Any], status: int, text: str) -> None:
    got_status, got_text = error(body)
    assert (got_status, text in got_text) == (status, True), got_text


def test_brackets_in_strings_are_no_nesting() -> None:
    words = ["[{" * 60, 'say "[' * 60]
    assert array(json_input(words, "BYTES")).tolist() == [word.encode() for word in words]


@pytest.mark.parametrize("value", ["-1", "101", "x", "", "99999999999999", "1.0", "٣"])
def test_header_length_out_of_range(value: str) -> None:
    status, text = error(b"x" * 100, value)
    assert (status, text) == (400, f"inference header size should be in range (0, 100), got: {value}")


def test_blobs_that_do_not_fit() -> None:
    document = {"inputs": [{**IN, "parameters": {"binary_data_size": 8}}]}
    assert error(*binary(document, b"12345")) == (
        400,
        "unexpected size for input 'IN', expecting 3 additional bytes for model 'm'",
    )
    assert error(*binary(document, b"123456789")) == (400, "unexpected additional input data for model 'm'")


# --- whatever comes


def survives(body: bytes, length: str | None) -> None:
    try:
        request, _ = decode(body, length)
    except GatewayError as problem:
        orjson.dumps(problem.message.encode(errors="replace").decode())
        return
    for each in request.inputs.values():
        assert each.nbytes >= 0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["id", "inputs", "outputs", "parameters", "name", "datatype", "shape", "data", "x"])
INPUTS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=3) | VALUES,
        "datatype": st.sampled_from([each.value for each in DataType]) | VALUES,
        "shape": st.lists(st.integers(-1, 3) | st.integers(), max_size=3) | VALUES,
        "data": st.lists(st.integers() | st.floats() | st.text(max_size=3) | st.booleans(), max_size=6) | VALUES,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "x"]), st.integers() | VALUES, max_size=2)
        | VALUES,
    },
)
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=5) | st.fixed_dictionaries(
    {"inputs": st.lists(INPUTS, max_size=3)},
    optional={"id": VALUES, "outputs": st.lists(st.dictionaries(NAMES, VALUES), max_size=2), "parameters": VALUES},
)


@settings(deadline=None)
@given(st.binary(max_size=64), st.none() | st.text(max_size=6) | st.integers(0, 64).map(str))
def test_arbitrary_bytes_raise_only_gateway_errors(body: bytes, length: str | None) -> None:
    survives(body, length)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(DOCUMENTS, st.binary(max_size=16), st.booleans(), st.booleans())
def test_arbitrary_documents_raise_only_gateway_errors(
    document: dict[str, Any], blobs: bytes, with_header: bool, large: bool
) -> None:
    # The padding sends the same document to the other parser.
    text = json.dumps({**document, "padding": "p" * 1100 * large}).encode(errors="surrogatepass")
    survives(text + blobs * with_header, str(len(text)) if with_header else None)


@settings(deadline=None)
@given(st.data())
def test_truncated_bodies_raise_only_gateway_errors(data: st.DataObject) -> None:
    whole, length = binary(
        {"inputs": [{**IN, "parameters": {"binary_data_size": 8}}, {**IN, "name": "J", "data": [1.0, 2.0]}]},
        b"12345678",
    )
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(GatewayError):
        decode(whole[:cut], length)
    with pytest.raises(GatewayError):
        decode(whole[: min(cut, int(length) - 1)])


def test_a_kept_traceback_does_not_spoil_the_parser() -> None:
    codec = Codec(LIMITS)
    bad = json.dumps(json_input([*MANY, "x"])).encode()
    with pytest.raises(GatewayError) as kept:
        codec.decode(bad, None, "m", "", RAW)
    good = json.dumps(json_input(MANY)).encode()
    assert codec.decode(good, None, "m", "", RAW)[0].inputs["IN"].array[-1] == MANY[-1]
    assert kept.value.http == 500


# --- shared memory


def test_tensors_in_shared_memory_have_places_and_no_data() -> None:
    """A header that was met before says the same, and the binary inputs beside it are found."""
    document = {
        "inputs": [
            {**IN, "parameters": {**SHARED, "shared_memory_offset": 16}},
            {**IN, "name": "SENT", "parameters": {"binary_data_size": 8}},
        ],
        "outputs": [{"name": "OUT", "parameters": SHARED}],
    }
    body, length = binary(document, b"12345678")
    codec = Codec(LIMITS)
    for _ in range(2):
        request, _ = codec.decode(body, length, "m", "", RAW)
        assert request.places == Places({"IN": Place("r", 16, 8)}, {"OUT": Place("r", 0, 8)})
        assert list(request.inputs) == ["IN", "SENT"]
        assert bytes(request.inputs["SENT"].wire) == b"12345678"


@pytest.mark.parametrize("plan", [BINARY, JSON, ResponsePlan(binary=True, listed={"A": False, "B": True})])
def test_outputs_that_went_to_shared_memory_are_described(plan: ResponsePlan) -> None:
    outputs = {"A": Tensor(DataType.FP32, (1, 2), b""), "B": Tensor(DataType.BYTES, (2,), b"")}
    headers, body = encode(InferResponse("m", "1", outputs, placed=("A", "B")), plan)
    assert headers == [("content-type", "application/json")]
    assert json.loads(body)["outputs"] == [
        {"name": "A", "datatype": "FP32", "shape": [1, 2]},
        {"name": "B", "datatype": "BYTES", "shape": [2]},
    ]
