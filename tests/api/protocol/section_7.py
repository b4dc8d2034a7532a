"""PROTOCOL.md section 7: gRPC."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.config.settings import Settings
from gateway.errors import InvalidArgument
from gateway.transport.grpc.calls import sendable
from gateway.transport.grpc.options import INT32_MAX, Keepalive
from tests.api.protocol.facts import GRPC, HTTP, Answer, Grpc, Http, Section, tensor
from tests.system.process import ROOT

SECTION = Section("7")
fact = SECTION.fact
PACKAGE = "Package `inference`"
MESSAGE = "`max message`"
KEEPALIVE = "Keepalive defaults"
DATA = "Tensor data: either all"
STREAM = "ModelStreamInfer: errors go"
RESTRICTED = "Restricted protocols use metadata"
IN = tensor("IN", [[1, 2]])
FINAL = "triton_final_response"


@fact(PACKAGE, "every call of Triton's service is answered", GRPC)
def _(on: Grpc) -> None:
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == "inference.GRPCInferenceService"
    for method in service.methods:
        if method.name == "ModelStreamInfer":
            continue
        request = getattr(pb, method.input_type.name)()
        answer = on.ask(method.name, request)
        assert not isinstance(answer, Answer) or answer.code != "UNIMPLEMENTED", method.name


@fact(PACKAGE, "metadata have no field that Triton's message has not", GRPC)
def _(on: Grpc) -> None:
    found = on.channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")(
        pb.ModelMetadataRequest(name="m").SerializeToString(), timeout=20
    )
    parsed = pb.ModelMetadataResponse.FromString(found)
    again = pb.ModelMetadataResponse()
    again.CopyFrom(parsed)
    again.DiscardUnknownFields()
    assert again.SerializeToString(deterministic=True) == parsed.SerializeToString(deterministic=True)


@fact(MESSAGE, "messages beyond grpc's own default of 4 MiB go through", GRPC)
def _(on: Grpc) -> None:
    rows = tensor("IN", np.zeros((8, 1_000_000), np.float32))
    told = on.infer("open", rows)
    assert told.ok, told
    assert told.arrays["OUT"].shape == (8, 1_000_000)


@fact(MESSAGE, "the limit is that of a signed number of 32 bits", GRPC, needs="", queues=("memory",))
def _(_: Any) -> None:
    assert INT32_MAX == (1 << 31) - 1
    assert Settings.model_fields["max_request_bytes"].default == INT32_MAX


@fact(MESSAGE, "a response beyond the limit is INVALID_ARGUMENT", GRPC, needs="", queues=("memory",))
def _(_: Any) -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return INT32_MAX + 1

    with pytest.raises(InvalidArgument):
        sendable(Long())


@fact(KEEPALIVE, "keepalive and connection ages have Triton's defaults", GRPC, needs="", queues=("memory",))
def _(_: Any) -> None:
    assert Keepalive() == Keepalive(
        time_ms=7_200_000, timeout_ms=20_000, permit_without_calls=False, max_pings_without_data=2,
        min_recv_ping_interval_without_data_ms=300_000, max_ping_strikes=2, max_connection_age_ms=0,
        max_connection_age_grace_ms=0,
    )  # fmt: skip
    given = Settings(model_repository=(ROOT,))
    assert (given.grpc_keepalive_time, given.grpc_keepalive_timeout) == (7_200_000, 20_000)
    assert (given.grpc_http2_max_pings_without_data, given.grpc_http2_max_ping_strikes) == (2, 2)
    assert given.grpc_http2_min_recv_ping_interval_without_data == 300_000


@fact(KEEPALIVE, "ports are 8000, 8001 and 8002", needs="", queues=("memory",))
def _(_: Any) -> None:
    given = Settings(model_repository=(ROOT,))
    assert (given.http_port, given.grpc_port, given.metrics_port) == (8000, 8001, 8002)


TYPED: dict[str, tuple[str, list[Any]]] = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-3, 4]),
    "INT16": ("int_contents", [-300, 4]),
    "INT32": ("int_contents", [-(1 << 31), 4]),
    "INT64": ("int64_contents", [-(1 << 63), 4]),
    "UINT8": ("uint_contents", [3, 255]),
    "UINT16": ("uint_contents", [3, 65535]),
    "UINT32": ("uint_contents", [3, (1 << 32) - 1]),
    "UINT64": ("uint64_contents", [3, (1 << 64) - 1]),
    "FP32": ("fp32_contents", [0.5, -1.5]),
    "FP64": ("fp64_contents", [0.1, -1.5]),
    "BYTES": ("bytes_contents", [b"a", b"\xff\x00"]),
}


def typed(on: Grpc, datatype: str) -> Any:
    """A request whose input travels in its typed field."""
    field, values = TYPED[datatype]
    message = on.message(f"echo_{datatype}", {"name": "IN", "datatype": datatype, "shape": [1, 2]})
    getattr(message.inputs[0].contents, field).extend(values)
    return message


def _typed(datatype: str) -> None:
    @fact(DATA, f"{datatype} travels in {TYPED[datatype][0]} and comes back raw", GRPC)
    def _(on: Grpc) -> None:
        found = on.ask("ModelInfer", typed(on, datatype))
        assert not isinstance(found, Answer), found
        assert not found.outputs[0].HasField("contents")
        assert on.infer(f"echo_{datatype}", tensor("IN", [TYPED[datatype][1]], datatype)).arrays["OUT"].tolist() == [
            TYPED[datatype][1]
        ]
        assert (
            found.raw_output_contents[0]
            == on.ask(
                "ModelInfer", on.message(f"echo_{datatype}", tensor("IN", [TYPED[datatype][1]], datatype))
            ).raw_output_contents[0]
        )


for each in TYPED:
    _typed(each)


@fact(DATA, "FP16 and BF16 are raw only", GRPC)
def _(on: Grpc) -> None:
    for kind in ("FP16", "BF16"):
        message = on.message(f"echo_{kind}", {"name": "IN", "datatype": kind, "shape": [1, 2]})
        message.inputs[0].contents.fp32_contents.extend([1, 2])
        told = on.ask("ModelInfer", message)
        assert isinstance(told, Answer)
        assert told.code == "INVALID_ARGUMENT", told


@fact(DATA, "typed and raw data together are refused", GRPC)
def _(on: Grpc) -> None:
    message = typed(on, "FP32")
    message.raw_input_contents.append(bytes(8))
    on.ask("ModelInfer", message).refuses(
        400,
        "contents field must not be specified when using raw_input_contents for 'IN' for model 'echo_FP32'",
    )


@fact(DATA, "an input without data is refused", GRPC)
def _(on: Grpc) -> None:
    told = on.ask("ModelInfer", on.message("m", {"name": "IN", "datatype": "FP32", "shape": [1, 2]}))
    assert told.code == "INVALID_ARGUMENT"


@fact(DATA, "raw contents are counted without tensors in shared memory", GRPC)
def _(on: Grpc) -> None:
    from tests.api.protocol.section_6 import place, region

    with region(on, "r") as made:
        made.buf[:8] = np.array([3, 4], "<f4").tobytes()
        given = {"name": "A", "datatype": "FP32", "shape": [1, 2], "parameters": place("r", 8)}
        told = on.infer("pair", given, tensor("B", [[1, 2]]))
        assert told.ok, told
        assert told.arrays["OUT"].tolist() == [[3, 4]]


@fact(DATA, "an output in shared memory has an empty raw entry", GRPC)
def _(on: Grpc) -> None:
    from tests.api.protocol.section_6 import place, region

    with region(on, "r"):
        message = on.message(
            "two_outputs", IN, outputs=[{"name": "OUT", "parameters": place("r", 8)}, {"name": "MORE"}]
        )
        found = on.ask("ModelInfer", message)
        assert [each.name for each in found.outputs] == ["OUT", "MORE"]
        assert [len(each) for each in found.raw_output_contents] == [0, 8]


def _ids(found: list[Any]) -> list[str]:
    return [each.infer_response.id for each in found]


def _final(each: Any) -> bool:
    parameter = each.infer_response.parameters[FINAL]
    assert parameter.WhichOneof("parameter_choice") == "bool_param"
    return bool(parameter.bool_param)


@fact(STREAM, "every response says whether it is the last", GRPC)
def _(on: Grpc) -> None:
    found, code = on.stream(on.message("m", IN, id="1"), on.message("m", IN, id="2"))
    assert code == "OK"
    assert sorted(_ids(found)) == ["1", "2"]
    assert [_final(each) for each in found] == [True, True]


@fact(STREAM, "a request that fails is answered in its message and the stream goes on", GRPC)
def _(on: Grpc) -> None:
    found, code = on.stream(on.message("foo", IN, id="bad"), on.message("m", IN, id="good"))
    told = {each.infer_response.id: each.error_message for each in found}
    assert code == "OK"
    assert told == {"bad": "Request for unknown model: 'foo' is not found", "good": ""}


@fact(STREAM, "with triton_grpc_error the stream ends with the status", GRPC)
def _(on: Grpc) -> None:
    found, code = on.stream(on.message("foo", IN, id="bad"), triton_grpc_error="true")
    assert (found, code) == ([], "NOT_FOUND")
    found, code = on.stream(on.message("foo", IN, id="bad"), triton_grpc_error="false")
    assert code == "OK"


def repeat(on: Grpc, count: int, name: str = "r", value: float = 1, **parameters: Any) -> Any:
    """A request that a decoupled model answers so many times."""
    return on.message("repeat", tensor("IN", [value]), id=name, parameters={"count": count, **parameters})


@fact(STREAM, "responses of one request keep their order", GRPC)
def _(on: Grpc) -> None:
    found, code = on.stream(repeat(on, 5))
    assert code == "OK"
    values = [np.frombuffer(each.infer_response.raw_output_contents[0], "<f4")[0] for each in found]
    assert values == [1, 2, 3, 4, 5]
    assert not any(_final(each) for each in found)


@fact(STREAM, "a model may end without a response, told if the request asks for it", GRPC)
def _(on: Grpc) -> None:
    assert on.stream(repeat(on, 0)) == ([], "OK")
    found, code = on.stream(repeat(on, 2, triton_enable_empty_final_response=True))
    assert code == "OK"
    assert [_final(each) for each in found] == [False, False, True]
    assert (len(found[-1].infer_response.outputs), found[-1].infer_response.id) == (0, "r")


@fact(STREAM, "requests of one stream may interleave and each keeps its order", GRPC)
def _(on: Grpc) -> None:
    found, code = on.stream(*[repeat(on, 4, name=str(number), value=number * 10) for number in range(3)])
    assert code == "OK"
    by_id: dict[str, list[float]] = {}
    for each in found:
        value = np.frombuffer(each.infer_response.raw_output_contents[0], "<f4")[0]
        by_id.setdefault(each.infer_response.id, []).append(float(value))
    assert by_id == {str(number): [number * 10 + step for step in range(4)] for number in range(3)}


@fact(STREAM, "an error after responses is told after them", GRPC)
def _(on: Grpc) -> None:
    found, code = on.stream(repeat(on, 2, value=13))
    assert code == "OK"
    assert [bool(each.error_message) for each in found] == [False, False, True]
    assert (found[-1].error_message, found[-1].infer_response.id) == ("thirteen", "r")


@fact(STREAM, "a model that is not decoupled streams one response", GRPC)
def _(on: Grpc) -> None:
    found, _ = on.stream(on.message("m", IN, id="1", parameters={"triton_enable_empty_final_response": True}))
    assert [_final(each) for each in found] == [True]
    assert len(found[0].infer_response.outputs) == 1


@fact(STREAM, "ModelInfer of a decoupled model is UNIMPLEMENTED", GRPC)
def _(on: Grpc) -> None:
    on.infer("repeat", tensor("IN", [1])).refuses(
        501, "ModelInfer RPC doesn't support models with decoupled transaction policy"
    )


@fact(RESTRICTED, "a restricted protocol wants its metadata, else it is UNAVAILABLE", GRPC, needs="strict")
def _(on: Grpc) -> None:
    request = pb.ModelStatisticsRequest(name="m")
    on.ask("ModelStatistics", request).refuses(
        503, "This protocol is restricted, expecting header 'triton-grpc-protocol-key'"
    )
    assert not isinstance(on.ask("ModelStatistics", request, ("triton-grpc-protocol-key", "word")), Answer)
    assert isinstance(on.ask("ModelStatistics", request, ("triton-grpc-protocol-key", "other")), Answer)
    assert isinstance(on.ask("LogSettings", pb.LogSettingsRequest()), Answer)
    assert on.infer("m", IN).ok


@fact(RESTRICTED, "on HTTP the header has no prefix", HTTP, needs="strict")
def _(on: Http) -> None:
    assert on.request("GET", "/v2/logging", key="word").status_code == 200
    assert on.request("GET", "/v2/logging", triton_grpc_protocol_key="word").status_code == 403
