"""PROTOCOL.md section 3: binary tensor data, and the JSON that stands beside it."""

from __future__ import annotations

import gzip
import json
from typing import Any

import numpy as np

from gateway.types import DataType
from tests.api.protocol.facts import GRPC, HTTP, Grpc, Http, Section, raw, tensor

SECTION = Section("3")
fact = SECTION.fact
HEADER = "Header **`Inference-Header-Content-Length`**"
RANGE = "Range check"
PACKED = "With `Content-Encoding: gzip|deflate`"
TYPES = "tritonclient HTTP sends **no Content-Type**"
ONE_OF = "Input must have exactly one of"
ORDER = "Order of blobs"
CHOICE = "Output choice"
CLIENT = "tritonclient: no outputs given"
RESPONSE = "Response: header only present"
BYTES = "BYTES: 4-byte **little-endian** length"
HALF = "FP16/BF16 in JSON"
NAN = "NaN/Infinity"
BOOL = "BOOL in JSON"
IN = tensor("IN", [[1, 2]])
JSON_IN = {"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
LENGTH = "inference-header-content-length"


def body(*inputs: dict[str, Any], blob: bytes = b"", **more: Any) -> tuple[bytes, dict[str, str]]:
    """A body with a JSON head, and its header."""
    text = json.dumps({"inputs": inputs, **more}).encode()
    return text + blob, {"Inference_Header_Content_Length": str(len(text))}


def sized(size: int, **more: Any) -> dict[str, Any]:
    """The input IN of [1, 2] with so many bytes."""
    return {"name": "IN", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": size}, **more}


@fact(HEADER, "without the header the whole body is JSON", HTTP)
def _(on: Http) -> None:
    told = on.post("/v2/models/m/infer", {"inputs": [JSON_IN]})
    assert told.head == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [{"name": "OUT", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}],
    }


@fact(HEADER, "the header is the length of the JSON part", HTTP)
def _(on: Http) -> None:
    sent, headers = body(sized(8), blob=raw(IN))
    assert on.post("/v2/models/m/infer", sent, **headers).arrays["OUT"].tolist() == [[1, 2]]


def _raw(on: Http, model: str, data: bytes) -> Any:
    return on.post(f"/v2/models/{model}/infer", data, Inference_Header_Content_Length="0")


@fact(HEADER, "a raw request has its shape from the configuration and its answer is binary", HTTP)
def _(on: Http) -> None:
    told = _raw(on, "raw", np.arange(6, dtype="<f4").tobytes())
    assert told.headers["content-type"] == "application/octet-stream"
    assert told.arrays["OUT"].tolist() == [[0, 1, 2], [3, 4, 5]]


@fact(HEADER, "a raw request is a batch of one", HTTP)
def _(on: Http) -> None:
    assert _raw(on, "raw_batched", np.arange(6, dtype="<f4").tobytes()).arrays["OUT"].shape == (1, 6)


@fact(HEADER, "a raw request needs a model of one input", HTTP)
def _(on: Http) -> None:
    _raw(on, "pair", bytes(8)).refuses(
        400, "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'pair' model configuration"
    )


@fact(HEADER, "a raw request has at most one open dimension", HTTP)
def _(on: Http) -> None:
    _raw(on, "raw_two", bytes(8)).refuses(
        400,
        "The shape of the raw input 'IN' can not be deduced because there are more than one variable-sized dimension",
    )


@fact(HEADER, "a raw string is one element and the server adds its length", HTTP)
def _(on: Http) -> None:
    assert _raw(on, "raw_text", b"hello").arrays["OUT"].tolist() == [b"hello"]


@fact(HEADER, "a raw string needs the shape of one element", HTTP)
def _(on: Http) -> None:
    _raw(on, "raw_texts", b"hello").refuses(
        400, "For BYTE datatype raw input 'IN', the model must have input shape [1]"
    )


@fact(RANGE, "a header beyond the body is refused with the range", HTTP)
def _(on: Http) -> None:
    sent, _ = body(JSON_IN)
    for length in (len(sent) + 1, -1):
        told = on.post("/v2/models/m/infer", sent, Inference_Header_Content_Length=str(length))
        told.refuses(400, f"inference header size should be in range (0, {len(sent)}), got: {length}")


@fact(RANGE, "a header as long as the body is its JSON", HTTP)
def _(on: Http) -> None:
    sent, headers = body(JSON_IN)
    assert on.post("/v2/models/m/infer", sent, **headers).ok


@fact(RANGE, "a header beyond 32 bits or that is no number is refused", HTTP)
def _(on: Http) -> None:
    sent, _ = body(JSON_IN)
    for length in (str(1 << 31), str(1 << 63), "9" * 40, "x", ""):
        assert on.post("/v2/models/m/infer", sent, Inference_Header_Content_Length=length).code == "400"


@fact(PACKED, "with a content encoding the header counts what is unpacked", HTTP)
def _(on: Http) -> None:
    sent, headers = body(sized(8), blob=raw(IN))
    told = on.post("/v2/models/m/infer", gzip.compress(sent), Content_Encoding="gzip", **headers)
    assert told.arrays["OUT"].tolist() == [[1, 2]]


@fact(TYPES, "the content type is never looked at", HTTP)
def _(on: Http) -> None:
    sent, headers = body(sized(8), blob=raw(IN))
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/octet-stream", "multipart/form-data"):
        assert on.post("/v2/models/m/infer", sent, Content_Type=kind, **headers).ok
        assert on.post("/v2/models/m/infer", {"inputs": [JSON_IN]}, Content_Type=kind).ok
        assert on.post("/v2/repository/index", {"ready": True}, Content_Type=kind).ok
        assert on.post("/v2/logging", {"log_verbose_level": 0}, Content_Type=kind).ok


@fact(ONE_OF, "an input has its data in one place", HTTP)
def _(on: Http) -> None:
    text = "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    both, headers = body(sized(8, data=[1, 2]), blob=bytes(8))
    on.post("/v2/models/m/infer", both, **headers).refuses(400, text)
    on.post("/v2/models/m/infer", {"inputs": [{key: JSON_IN[key] for key in ("name", "datatype", "shape")}]}).refuses(
        400, text
    )


@fact(ONE_OF, "an input in shared memory has no data beside", HTTP)
def _(on: Http) -> None:
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    on.post("/v2/models/m/infer", {"inputs": [{**JSON_IN, "parameters": place}]}).refuses(
        400, "Input must set only one of the following fields: "
    )


@fact(ONE_OF, "an input of no bytes is legal")
def _(on: Http | Grpc) -> None:
    told = on.infer("open", tensor("IN", np.zeros((1, 0))))
    assert told.ok, told
    assert told.head["outputs"][0]["shape"] == [1, 0]


@fact(ONE_OF, "bytes that are left over are refused", HTTP)
def _(on: Http) -> None:
    sent, headers = body(sized(8), blob=bytes(9))
    on.post("/v2/models/m/infer", sent, **headers).refuses(400, "unexpected additional input data for model 'm'")


@fact(ONE_OF, "bytes that are missing are counted", HTTP)
def _(on: Http) -> None:
    sent, headers = body(sized(8), blob=bytes(5))
    on.post("/v2/models/m/infer", sent, **headers).refuses(
        400, "unexpected size for input 'IN', expecting 3 additional bytes for model 'm'"
    )


@fact(ORDER, "blobs stand in the order of the inputs")
def _(on: Http | Grpc) -> None:
    told = on.infer("pair", tensor("B", [[3, 4]]), tensor("A", [[1, 2]]))
    assert told.arrays["OUT"].tolist() == [[1, 2]]


@fact(ORDER, "inputs as JSON and as bytes may stand together", HTTP)
def _(on: Http) -> None:
    for order in ((0, 1), (1, 0)):
        inputs = [{**JSON_IN, "name": "A"}, {**sized(8), "name": "B"}]
        sent, headers = body(*[inputs[at] for at in order], blob=bytes(8))
        assert on.post("/v2/models/pair/infer", sent, **headers).arrays["OUT"].tolist() == [[1.0, 2.0]]


def _form(on: Http, outputs: list[dict[str, Any]], **parameters: Any) -> dict[str, str]:
    asked = {"inputs": [JSON_IN], "parameters": parameters, **({"outputs": outputs} if outputs else {})}
    told = on.post("/v2/models/two_outputs/infer", asked)
    return {each["name"]: "data" if "data" in each else "binary" for each in told.head["outputs"]}


@fact(CHOICE, "a listed output is binary if it says so, else JSON", HTTP)
def _(on: Http) -> None:
    binary = {"name": "OUT", "parameters": {"binary_data": True}}
    assert _form(on, [binary, {"name": "MORE"}]) == {"OUT": "binary", "MORE": "data"}


@fact(CHOICE, "a listed output is JSON even if binary_data_output is true", HTTP)
def _(on: Http) -> None:
    assert _form(on, [{"name": "OUT"}], binary_data_output=True) == {"OUT": "data"}


@fact(CHOICE, "binary_data_output is for outputs that are not listed", HTTP)
def _(on: Http) -> None:
    assert _form(on, [], binary_data_output=True) == {"OUT": "binary", "MORE": "binary"}
    assert _form(on, []) == {"OUT": "data", "MORE": "data"}


@fact(CHOICE, "only the listed outputs come back")
def _(on: Http | Grpc) -> None:
    told = on.infer("two_outputs", IN, outputs=["MORE"])
    assert [each["name"] for each in told.head["outputs"]] == ["MORE"]


@fact(CHOICE, "without a list all outputs come back")
def _(on: Http | Grpc) -> None:
    assert [each["name"] for each in on.infer("two_outputs", IN).head["outputs"]] == ["OUT", "MORE"]


@fact(CLIENT, "both forms that tritonclient sends are understood", HTTP)
def _(on: Http) -> None:
    assert on.infer("m", IN).arrays["OUT"].dtype == np.float32
    assert on.infer("m", IN, outputs=["OUT"]).arrays["OUT"].dtype == np.float32


@fact(RESPONSE, "a binary answer has the header and is application octet-stream", HTTP)
def _(on: Http) -> None:
    told = on.infer("m", IN)
    assert told.headers["content-type"] == "application/octet-stream"
    assert int(told.headers[LENGTH]) + 8 == len(told.body)
    assert told.head["outputs"][0]["parameters"] == {"binary_data_size": 8}


@fact(RESPONSE, "an answer without bytes is JSON without the header and says size 0", HTTP)
def _(on: Http) -> None:
    told = on.infer("open", tensor("IN", np.zeros((1, 0))))
    assert told.headers["content-type"] == "application/json"
    assert LENGTH not in told.headers
    assert told.head["outputs"] == [
        {"name": "OUT", "datatype": "FP32", "shape": [1, 0], "parameters": {"binary_data_size": 0}}
    ]


@fact(RESPONSE, "the order of the members is id model_name model_version parameters outputs", HTTP)
def _(on: Http) -> None:
    told = on.infer("parameters", IN, id="7")
    assert list(told.head) == ["id", "model_name", "model_version", "parameters", "outputs"]
    assert list(on.post("/v2/models/m/infer", {"inputs": [JSON_IN]}).head) == ["model_name", "model_version", "outputs"]


@fact(RESPONSE, "each output is name datatype shape and then parameters or data", HTTP)
def _(on: Http) -> None:
    assert list(on.infer("m", IN).head["outputs"][0]) == ["name", "datatype", "shape", "parameters"]
    told = on.post("/v2/models/m/infer", {"inputs": [JSON_IN]})
    assert list(told.head["outputs"][0]) == ["name", "datatype", "shape", "data"]


@fact(RESPONSE, "the version is a string")
def _(on: Http | Grpc) -> None:
    assert on.infer("m", IN).head["model_version"] == "1"


@fact(RESPONSE, "an empty id is left out", HTTP)
def _(on: Http) -> None:
    assert b'"id"' not in on.infer("m", IN, id="").body
    assert b'"id"' not in on.infer("m", IN).body


@fact(RESPONSE, "JSON data is flat whatever the shape", HTTP)
def _(on: Http) -> None:
    nested = {"name": "IN", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2], [3, 4]]}
    told = on.post("/v2/models/m/infer", {"inputs": [nested]})
    assert told.head["outputs"][0] == {
        "name": "OUT", "datatype": "FP32", "shape": [2, 2], "data": [1.0, 2.0, 3.0, 4.0],
    }  # fmt: skip


@fact(BYTES, "strings are a little-endian length and their bytes, row by row")
def _(on: Http | Grpc) -> None:
    values = np.array([[b"a", b"", b"\x00\xff"], [b"bcd", b"e", b"f"]], object)
    told = on.infer("echo_BYTES", tensor("IN", values, "BYTES"))
    assert told.arrays["OUT"].tolist() == values.tolist()
    if isinstance(on, Http):
        wire = b"".join(len(each).to_bytes(4, "little") + each for each in values.ravel())
        assert told.body.endswith(wire)
        assert told.head["outputs"][0]["parameters"]["binary_data_size"] == len(wire)


@fact(BYTES, "strings as JSON are strings both ways", HTTP)
def _(on: Http) -> None:
    asked = {"name": "IN", "datatype": "BYTES", "shape": [1, 2], "data": ["über", ""]}
    assert on.post("/v2/models/echo_BYTES/infer", {"inputs": [asked]}).head["outputs"][0]["data"] == ["über", ""]


@fact(BYTES, "an output that is no text is refused as JSON and told to be asked for as bytes", HTTP)
def _(on: Http) -> None:
    told = on.post("/v2/models/bad_text/infer", {"inputs": [{**JSON_IN, "shape": [1, 2]}]})
    told.refuses(400, "Please use the binary data format for output OUT")


@fact(BYTES, "a length beyond the data is refused")
def _(on: Http | Grpc) -> None:
    asked = {"name": "IN", "datatype": "BYTES", "shape": [1, 1]}
    wire = (9).to_bytes(4, "little") + b"short"
    if isinstance(on, Http):
        sent, headers = body({**asked, "parameters": {"binary_data_size": len(wire)}}, blob=wire)
        told = on.post("/v2/models/echo_BYTES/infer", sent, **headers)
    else:
        message = on.message("echo_BYTES", asked)
        message.raw_input_contents.append(wire)
        told = on.ask("ModelInfer", message)
    assert told.code in ("400", "INVALID_ARGUMENT"), told
    assert "for inference input 'IN'" in told.text


def _half(kind: str) -> None:
    @fact(HALF, f"{kind} as JSON is refused as an input", HTTP)
    def _(on: Http) -> None:
        asked = {"name": "IN", "datatype": kind, "shape": [1, 1], "data": [1]}
        on.post(f"/v2/models/echo_{kind}/infer", {"inputs": [asked]}).refuses(
            400, f"receiving {kind} data via JSON is not supported. Please use the binary data format for input IN"
        )

    @fact(HALF, f"{kind} as JSON is refused as an output", HTTP)
    def _(on: Http) -> None:
        asked = {"name": "IN", "datatype": kind, "shape": [1, 1], "parameters": {"binary_data_size": 2}}
        sent, headers = body(asked, blob=bytes(2))
        on.post(f"/v2/models/echo_{kind}/infer", sent, **headers).refuses(
            400, f"sending {kind} data via JSON is not supported. Please use the binary data format for output OUT"
        )


_half("FP16")
_half("BF16")


@fact(HALF, "BF16 is two bytes little-endian, the upper half of FP32")
def _(on: Http | Grpc) -> None:
    asked = {"name": "IN", "datatype": "BF16", "shape": [1, 2]}
    wire = np.array([1.5, -2], "<f4").view("<u2")[1::2].tobytes()
    if isinstance(on, Http):
        sent, headers = body(
            {**asked, "parameters": {"binary_data_size": 4}}, blob=wire, parameters={"binary_data_output": True}
        )
        assert on.post("/v2/models/echo_BF16/infer", sent, **headers).body.endswith(wire)
    else:
        message = on.message("echo_BF16", asked)
        message.raw_input_contents.append(wire)
        assert on.ask("ModelInfer", message).raw_output_contents[0] == wire


def _every(datatype: DataType) -> None:
    values = {"BOOL": [[True, False]], "BYTES": [[b"a", b"bc"]]}.get(datatype.value, [[1, 2]])

    @fact(ORDER, f"{datatype.value} goes in and out as bytes")
    def _(on: Http | Grpc) -> None:
        given = tensor("IN", values, datatype.value)
        told = on.infer(f"echo_{datatype.value}", given)
        assert told.head["outputs"][0]["datatype"] == datatype.value
        assert told.arrays["OUT"].tolist() == given["data"].tolist()


for each in DataType:
    if each is not DataType.BF16:
        _every(each)


@fact(NAN, "NaN and infinities are read as words", HTTP)
def _(on: Http) -> None:
    for word, value in (
        ("NaN", np.nan),
        ("Infinity", np.inf),
        ("-Infinity", -np.inf),
        ("Inf", np.inf),
        ("-Inf", -np.inf),
    ):
        text = f'{{"inputs":[{{"name":"IN","datatype":"FP32","shape":[1,2],"data":[{word},1]}}]}}'.encode()
        told = on.post("/v2/models/m/infer", text)
        assert told.ok, (word, told.text)
        assert np.float32(told.head["outputs"][0]["data"][0]).tobytes() == np.float32(value).tobytes()


@fact(NAN, "NaN and infinities are written as words", HTTP)
def _(on: Http) -> None:
    told = on.post("/v2/models/odd/infer", {"inputs": [JSON_IN]})
    assert b'"data":[NaN,Infinity,-Infinity,0.1]' in told.body


@fact(NAN, "numbers are written as short as they can be read back", HTTP)
def _(on: Http) -> None:
    text = b'{"inputs":[{"name":"IN","datatype":"FP32","shape":[1,5],"data":[0.1,1e-7,16777216,1e30,-0.0]}]}'
    data = on.post("/v2/models/open/infer", text).head["outputs"][0]["data"]
    assert np.array(data, np.float32).tobytes() == np.array([0.1, 1e-7, 16777216, 1e30, -0.0], np.float32).tobytes()


@fact(BOOL, "BOOL wants true and false and no numbers", HTTP)
def _(on: Http) -> None:
    asked = {"name": "IN", "datatype": "BOOL", "shape": [1, 2], "data": [True, False]}
    told = on.post("/v2/models/echo_BOOL/infer", {"inputs": [asked]})
    assert told.head["outputs"][0]["data"] == [True, False]
    on.post("/v2/models/echo_BOOL/infer", {"inputs": [{**asked, "data": [1, 0]}]}).refuses(
        500, "Unable to parse 'data': attempt to access JSON non-boolean as boolean"
    )


@fact(BOOL, "integers beyond their type wrap", HTTP)
def _(on: Http) -> None:
    for kind, given, wrapped in (
        ("INT8", 200, -56),
        ("UINT8", 257, 1),
        ("INT16", 40000, -25536),
        ("INT32", 1 << 31, -(1 << 31)),
    ):
        asked = {"name": "IN", "datatype": kind, "shape": [1, 1], "data": [given]}
        told = on.post(f"/v2/models/echo_{kind}/infer", {"inputs": [asked]})
        assert told.head["outputs"][0]["data"] == [wrapped], kind


@fact(BOOL, "FP32 takes integers", HTTP)
def _(on: Http) -> None:
    assert on.post("/v2/models/m/infer", {"inputs": [JSON_IN]}).head["outputs"][0]["data"] == [1.0, 2.0]


@fact(BOOL, "integers do not take fractions or words", HTTP)
def _(on: Http) -> None:
    for data in ([1.5], ["1"], [None], [True]):
        asked = {"name": "IN", "datatype": "INT32", "shape": [1, 1], "data": data}
        assert on.post("/v2/models/echo_INT32/infer", {"inputs": [asked]}).code == "500", data


@fact(BOOL, "64 bits are kept", HTTP)
def _(on: Http) -> None:
    for kind, value in (("INT64", -(1 << 63)), ("INT64", (1 << 63) - 1), ("UINT64", (1 << 64) - 1)):
        asked = {"name": "IN", "datatype": kind, "shape": [1, 1], "data": [value]}
        told = on.post(f"/v2/models/echo_{kind}/infer", {"inputs": [asked]})
        assert told.head["outputs"][0]["data"] == [value]


@fact(RESPONSE, "an output of no bytes is an empty entry", GRPC)
def _(on: Grpc) -> None:
    found = on.ask("ModelInfer", on.message("empty", tensor("IN", [[1]])))
    assert list(found.raw_output_contents) == [b""]
    assert list(found.outputs[0].shape) == [1, 0]
