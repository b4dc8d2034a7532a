"""Protobuf bytes to requests and responses to protobuf bytes: rules, texts, and what arbitrary bytes may do."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tritonclient.grpc import service_pb2 as pb

from gateway import errors
from gateway.transport.grpc import codec
from gateway.transport.grpc.wire import length, split
from gateway.types import DataType, InferResponse, Place, Places, RequestedOutput, Tensor

TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127, 0]),
    "INT16": ("int_contents", [-32768, 32767]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1, -1, 300]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1, -1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 65535]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [1.5, float("-inf")]),
    "FP64": ("fp64_contents", [1e300, -0.0]),
    "BYTES": ("bytes_contents", [b"", b"\xff\x00", b"abc" * 100]),
}


def message(raw: bytes | None = b"\x00" * 8, **fields) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", **fields)
    request.inputs.add(name="IN", datatype="FP32", shape=[1, 2])
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


def decode(request: pb.ModelInferRequest):
    return codec.decode(request.SerializeToString())


def refused(request: pb.ModelInferRequest | bytes) -> errors.GatewayError:
    payload = request if isinstance(request, bytes) else request.SerializeToString()
    with pytest.raises(errors.GatewayError) as caught:
        codec.decode(payload)
    return caught.value


# --- requests


def test_every_field_of_a_request_is_read():
    request = message(np.array([1.5, -2], "<f4").tobytes(), model_version="03", id="über")
    request.outputs.add(name="A")
    request.outputs.add(name="B").parameters["classification"].int64_param = 3
    request.parameters["s"].string_param = "x"
    request.parameters["i"].int64_param = -5
    request.parameters["u"].uint64_param = 2**64 - 1
    request.parameters["b"].bool_param = False
    request.parameters["d"].double_param = 0.5
    decoded = decode(request)
    assert (decoded.model_name, decoded.model_version, decoded.id) == ("m", "3", "über")
    assert decoded.outputs == (RequestedOutput("A"), RequestedOutput("B", 3))
    assert decoded.parameters == {"s": "x", "i": -5, "u": 2**64 - 1, "b": False, "d": 0.5}
    assert decoded.parameters["b"] is False
    assert decoded.inputs["IN"].datatype is DataType.FP32
    assert decoded.inputs["IN"].array.tolist() == [[1.5, -2.0]]


def test_a_raw_tensor_is_a_view_of_the_message():
    payload = message(b"\x01" * 8192).SerializeToString()
    for _ in range(2):  # parsed, and then read by its layout
        wire = codec.decode(payload).inputs["IN"].wire
        assert isinstance(wire, memoryview)
        assert wire.obj is payload


def test_requests_of_a_kind_share_nothing_a_caller_could_change():
    first = message()
    first.parameters["p"].int64_param = 1
    one, two = decode(first), decode(first)
    assert one.parameters == two.parameters
    assert one.parameters is not two.parameters
    assert one.inputs is not two.inputs


def test_ids_differ_where_all_else_is_equal():
    assert [decode(message(id=each)).id for each in ("a", "b", "")] == ["a", "b", ""]


def test_fields_may_come_in_any_order():
    whole = message(b"\x02" * 8, id="x")
    tensor = pb.ModelInferRequest(raw_input_contents=[b"\x02" * 8]).SerializeToString()
    whole.ClearField("raw_input_contents")
    decoded = codec.decode(tensor + whole.SerializeToString())
    assert bytes(decoded.inputs["IN"].wire) == b"\x02" * 8
    assert (decoded.model_name, decoded.id) == ("m", "x")


def test_unknown_fields_are_ignored():
    unknown_varint, unknown_two_byte_tag = b"\xf8\x01\x07", b"\xa2\x06\x01z"
    decoded = codec.decode(unknown_varint + message().SerializeToString() + unknown_two_byte_tag)
    assert decoded.inputs["IN"].nbytes == 8


@pytest.mark.parametrize("name", TYPED)
def test_typed_contents_of_every_datatype(name):
    field, values = TYPED[name]
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="IN", datatype=name, shape=[len(values)])
    getattr(tensor.contents, field).extend(values)
    array = decode(request).inputs["IN"].array
    assert array.dtype == DataType[name].dtype
    assert array.tolist() == values


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_varints_of_every_length(values):
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="IN", datatype="INT64", shape=[len(values)]).contents.int64_contents.extend(values)
    assert decode(request).inputs["IN"].array.tolist() == values


def test_contents_without_elements_are_an_empty_tensor():
    request = message(None)
    request.inputs[0].contents.SetInParent()
    assert decode(request).inputs["IN"].nbytes == 0


@pytest.mark.parametrize(
    ("version", "expected"), [("", ""), ("1", "1"), ("007", "7"), ("x", None), ("-1", None), ("1.0", None), ("٣", None)]
)
def test_versions(version, expected):
    if expected is not None:
        assert codec.check_version(version) == expected
        return
    assert refused(message(model_version=version)).message == (
        f"failed to get model version from specified version string '{version}' (details: stol), "
        "version should be an integral value > 0"
    )


def test_a_version_of_absurd_length_is_refused():
    assert isinstance(refused(message(model_version="9" * 5000)), errors.InvalidArgument)


# --- refusals


def test_typed_and_raw_contents_together():
    request = message()
    request.inputs[0].contents.fp32_contents.append(1)
    assert refused(request).message == (
        "contents field must not be specified when using raw_input_contents for 'IN' for model 'm'"
    )


def test_an_input_without_data():
    assert refused(message(None)).message == "unable to find data for input tensor 'IN' for model 'm' in request."


def test_an_input_without_data_beside_one_with_typed_contents():
    request = message(None)
    request.inputs.add(name="B", datatype="FP32", shape=[1]).contents.fp32_contents.append(1)
    assert refused(request).message == "unable to find data for input tensor 'IN' for model 'm' in request."


def test_more_raw_tensors_than_inputs():
    request = message()
    request.raw_input_contents.append(b"")
    assert "expected 1 raw_input_contents, one for each input, but got 2" in refused(request).message


def test_typed_contents_of_another_type():
    request = message(None)
    request.inputs[0].contents.int64_contents.append(1)
    assert refused(request).message == (
        "unexpected explicit tensor data for input tensor 'IN' for model 'm' of type 'INT64', expected datatype 'FP32'"
    )


def test_typed_contents_of_two_types():
    request = message(None)
    request.inputs[0].contents.fp32_contents.append(1)
    request.inputs[0].contents.int64_contents.append(1)
    assert refused(request).message.endswith("binary data was already supplied.")


@pytest.mark.parametrize("name", ["FP16", "BF16"])
def test_half_floats_travel_raw_only(name):
    request = message(None)
    request.inputs[0].datatype = name
    request.inputs[0].contents.fp32_contents.append(1)
    assert refused(request).message.endswith(f"of type 'FP32', expected datatype '{name}'")


def test_an_unknown_datatype():
    request = message()
    request.inputs[0].datatype = "FLOAT"
    assert refused(request).message.startswith("inference input 'IN' for model 'm' has unknown data-type 'FLOAT'")


@pytest.mark.parametrize("shape", [[-1, 2], [-1, -2], [1] * 65])
def test_shapes_that_no_data_has(shape):
    request = message()
    del request.inputs[0].shape[:]
    request.inputs[0].shape.extend(shape)
    assert isinstance(refused(request), errors.InvalidArgument)


def test_an_input_named_twice():
    request = message()
    request.inputs.add(name="IN", datatype="FP32", shape=[1])
    assert refused(request).message == "input 'IN' already exists in request"


def in_region(tensor, size=8, offset=0):
    tensor.parameters["shared_memory_region"].string_param = "r"
    tensor.parameters["shared_memory_byte_size"].int64_param = size
    if offset:
        tensor.parameters["shared_memory_offset"].int64_param = offset


def test_shared_memory():
    """Raw tensors are counted without the inputs in shared memory, and a message that comes again says the same."""
    request = message()
    request.inputs.insert(0, pb.ModelInferRequest.InferInputTensor(name="SHM", datatype="FP32", shape=[2]))
    in_region(request.inputs[0], 8, 16)
    request.outputs.add(name="OUT")
    in_region(request.outputs[0], 4)
    for _ in range(2):
        decoded = codec.decode(request.SerializeToString())
        assert list(decoded.inputs) == ["SHM", *(each.name for each in message().inputs)]
        assert decoded.places == Places({"SHM": Place("r", 16, 8)}, {"OUT": Place("r", 0, 4)})
        for each, raw in zip(message().inputs, message().raw_input_contents, strict=True):
            assert bytes(decoded.inputs[each.name].wire) == raw
    request.raw_input_contents.append(b"")
    assert "raw_input_contents" in refused(request).message


@pytest.mark.parametrize(
    ("key", "kind", "value", "text"),
    [
        ("shared_memory_region", "int64_param", 1,
         "invalid value type for 'shared_memory_region' parameter for tensor 'OUT', expected string_param."),
        ("shared_memory_offset", "string_param", "1",
         "invalid value type for 'shared_memory_offset' parameter for tensor 'OUT', expected int64_param."),
        ("shared_memory_byte_size", "uint64_param", 1,
         "invalid value type for 'shared_memory_byte_size' parameter for tensor 'OUT', expected int64_param."),
        ("classification", "int64_param", 1, "output can't set both 'shared_memory_region' and 'classification'"),
    ],
)  # fmt: skip
def test_shared_memory_is_described_in_the_right_types(key, kind, value, text):
    request = message()
    in_region(request.outputs.add(name="OUT"))
    setattr(request.outputs[0].parameters[key], kind, value)
    assert refused(request).message == text


def test_shared_memory_is_described_completely():
    request = message()
    output = request.outputs.add(name="OUT")
    output.parameters["shared_memory_offset"].int64_param = 1
    without = "can not be specified without 'shared_memory_region' parameter for tensor 'OUT'"
    assert refused(request).message == f"'shared_memory_offset' {without}"
    output.parameters["shared_memory_region"].string_param = "r"
    needed = "must be specified along with 'shared_memory_region' parameter for tensor 'OUT'"
    assert refused(request).message == f"'shared_memory_byte_size' {needed}"


def test_contents_and_shared_memory_exclude_each_other():
    request = message()
    in_region(request.inputs[0])
    request.inputs[0].contents.fp32_contents.append(1.0)
    text = "unexpected 'content' provided when using shared memory for input tensor"
    assert refused(request).message.startswith(text)


@pytest.mark.parametrize(
    ("key", "kind", "value", "text"),
    [
        ("priority", "string_param", "1", "invalid value type for 'priority' parameter"),
        ("priority", "int64_param", -1, "invalid value for 'priority', expected value >= 0."),
        ("timeout", "uint64_param", 1, "invalid value type for 'timeout' parameter, expected int64_param."),
        ("sequence_start", "int64_param", 1, "expected bool_param."),
        ("sequence_id", "bool_param", True, "expected int64_param, uint64_param or string_param."),
    ],
)
def test_parameters_of_the_wrong_kind(key, kind, value, text):
    request = message()
    setattr(request.parameters[key], kind, value)
    assert text in refused(request).message


def test_a_parameter_without_a_value():
    request = message()
    request.parameters["p"].SetInParent()
    assert "invalid value type for 'p' parameter" in refused(request).message


@pytest.mark.parametrize(("kind", "value"), [("int64_param", 0), ("int64_param", -2), ("string_param", "3")])
def test_classification_wants_a_positive_int64(kind, value):
    request = message()
    setattr(request.outputs.add(name="OUT").parameters["classification"], kind, value)
    assert "'classification' parameter" in refused(request).message


def test_a_flood_of_fields_is_refused_before_it_is_parsed():
    # Each of these is two bytes on the wire and a Python object once parsed.
    assert "at most 16384 are accepted" in refused(b"\x3a\x00" * 20_000).message


# --- any bytes


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_gateway_error(payload):
    try:
        codec.decode(payload)
    except errors.GatewayError:
        codec.request_id(payload)


@given(st.data())
def test_damaged_requests_raise_nothing_but_gateway_errors(data):
    payload = bytearray(message(b"\x00" * 40, id="id").SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    try:
        codec.decode(damaged)
    except errors.GatewayError:
        codec.request_id(damaged)


@given(st.binary(max_size=300))
def test_taking_apart_agrees_with_protobuf(payload):
    try:
        expected = pb.ModelInferRequest.FromString(payload)
    except DecodeError:
        return
    parts = split(payload)
    assert [bytes(each) for each in parts.raw] == list(expected.raw_input_contents)
    assert parts.id == expected.id
    head = pb.ModelInferRequest.FromString(parts.head)
    expected.ClearField("raw_input_contents")
    expected.ClearField("id")
    assert head == expected


@given(st.integers(0, 2**64 - 1))
def test_lengths_are_varints(size):
    message = pb.InferParameter(uint64_param=size).SerializeToString()
    assert message[1:] == length(size)


# --- responses


def sent(response: InferResponse) -> pb.ModelInferResponse:
    return pb.ModelInferResponse.FromString(codec.encode(response))


arrays = st.sampled_from([each for each in DataType if each is not DataType.BYTES]).flatmap(
    lambda datatype: st.tuples(
        st.just(datatype), npst.arrays(datatype.dtype, npst.array_shapes(min_dims=0, min_side=0, max_dims=4))
    )
)


@given(arrays)
def test_every_datatype_survives_the_way_out_and_in(drawn):
    datatype, array = drawn
    response = sent(InferResponse("m", "1", {"OUT": Tensor.from_array(datatype, array)}))
    assert response.outputs[0].datatype == datatype.value
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=response.raw_output_contents)
    request.inputs.add(name="IN", datatype=response.outputs[0].datatype, shape=response.outputs[0].shape)
    back = decode(request).inputs["IN"]
    assert back.shape == array.shape
    assert bytes(back.wire) == array.tobytes()


@given(npst.arrays(object, npst.array_shapes(max_dims=2), elements=st.binary(max_size=200)))
def test_bytes_survive_the_way_out_and_in(array):
    response = sent(InferResponse("m", "1", {"OUT": Tensor.from_array(DataType.BYTES, array)}))
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=response.raw_output_contents)
    request.inputs.add(name="IN", datatype="BYTES", shape=array.shape)
    assert decode(request).inputs["IN"].array.tolist() == array.tolist()


def test_every_field_of_a_response_is_written():
    tensors = {"B": Tensor(DataType.INT8, (2,), b"\x01\x02"), "A": Tensor(DataType.BYTES, (0,), b"")}
    parameters = {"s": "x", "b": True, "i": -1, "u": 2**64 - 1, "f": 0.5}
    response = sent(InferResponse("m", "3", tensors, id="ü", parameters=parameters))
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "ü")
    assert [(each.name, each.datatype, list(each.shape)) for each in response.outputs] == [
        ("B", "INT8", [2]),
        ("A", "BYTES", [0]),
    ]
    assert list(response.raw_output_contents) == [b"\x01\x02", b""]
    kinds = {key: value.WhichOneof("parameter_choice") for key, value in response.parameters.items()}
    assert {key: getattr(response.parameters[key], kind) for key, kind in kinds.items()} == parameters
    assert (kinds["b"], kinds["i"], kinds["u"]) == ("bool_param", "int64_param", "uint64_param")


def test_a_response_parameter_beyond_64_bits_is_an_error():
    with pytest.raises(errors.Internal):
        codec.encode(InferResponse("m", "1", {}, parameters={"p": 2**64}))


@pytest.mark.parametrize("final", [True, False])
def test_a_streamed_response_says_whether_it_is_the_last(final):
    wire = codec.encode_streamed(InferResponse("m", "1", {}, id="x", parameters={"p": 1}, final=final))
    message = pb.ModelStreamInferResponse.FromString(wire)
    assert message.error_message == ""
    assert message.infer_response.id == "x"
    assert message.infer_response.parameters["triton_final_response"].bool_param is final
    assert message.infer_response.parameters["p"].int64_param == 1


def test_a_streamed_error_names_its_request():
    message = pb.ModelStreamInferResponse.FromString(codec.encode_streamed_error("no", "x"))
    assert (message.error_message, message.infer_response.id) == ("no", "x")


def test_the_id_of_a_broken_request_is_found_if_it_can_be():
    assert codec.request_id(message(None, id="x").SerializeToString()) == "x"
    assert codec.request_id(b"\xff") == ""


def test_outputs_that_went_to_shared_memory_are_empty():
    outputs = {"A": Tensor(DataType.FP32, (1, 2), b""), "B": Tensor(DataType.FP32, (1, 2), b"12345678")}
    answer = pb.ModelInferResponse.FromString(codec.encode(InferResponse("m", "1", outputs, placed=("A",))))
    assert [(each.name, list(each.shape)) for each in answer.outputs] == [("A", [1, 2]), ("B", [1, 2])]
    assert list(answer.raw_output_contents) == [b"", b"12345678"]
