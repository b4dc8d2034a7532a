"""PROTOCOL.md section 5: request parameters."""

from __future__ import annotations

import json
from typing import Any

from tests.api.protocol.facts import GRPC, HTTP, Grpc, Http, Section, tensor

SECTION = Section("5")
fact = SECTION.fact
ID = "`id`: string"
PRIORITY = "`priority`: JSON unsigned"
TIMEOUT = "`timeout`: µs"
SEQUENCE = "`sequence_id`: uint64 or string"
OTHER = "Other keys: string, int, bool, double"
HEADERS = "Header forwarding flags"
IN = tensor("IN", [[1, 2]])
RESERVED = "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."


@fact(ID, "an empty id is none")
def _(on: Http | Grpc) -> None:
    told = on.infer("m", IN, id="")
    assert told.ok
    assert not told.head.get("id")


@fact(ID, "an id comes back")
def _(on: Http | Grpc) -> None:
    for name in ("7", "über/1", "x" * 300):
        assert on.infer("m", IN, id=name).head["id"] == name


@fact(ID, "an id that is no string is refused", HTTP)
def _(on: Http) -> None:
    on.infer("m", IN, id=7).refuses(500, "Unable to parse 'id': attempt to access JSON non-string as string")


@fact(PRIORITY, "any priority is taken, 0 and those beyond the levels too")
def _(on: Http | Grpc) -> None:
    for level in (0, 1, 2, 3, 1 << 40):
        assert on.infer("levels", IN, parameters={"priority": level}).ok, level


@fact(PRIORITY, "gRPC takes it signed and unsigned", GRPC)
def _(on: Grpc) -> None:
    for kind in ("int64_param", "uint64_param"):
        assert on.infer("levels", IN, parameters={"priority": (kind, 1)}).ok
    on.infer("levels", IN, parameters={"priority": -1}).refuses(
        400, "invalid value for 'priority', expected value >= 0"
    )
    on.infer("levels", IN, parameters={"priority": "1"}).refuses(400, "invalid value type for 'priority' parameter")


@fact(PRIORITY, "a priority that is no unsigned number is refused", HTTP)
def _(on: Http) -> None:
    for value in (-1, "1", 1.5, True):
        told = on.infer("levels", IN, parameters={"priority": value})
        told.refuses(500, "Unable to parse 'priority': attempt to access JSON non-unsigned-integer as unsigned-integer")


@fact(TIMEOUT, "a timeout is honoured whatever the model's queue policy")
def _(on: Http | Grpc) -> None:
    on.infer("slow", IN, parameters={"timeout": 10_000}).refuses(504, "")
    assert on.infer("slow", IN, parameters={"timeout": 5_000_000}).ok


@fact(TIMEOUT, "a timeout that is no unsigned number is refused", HTTP)
def _(on: Http) -> None:
    for value in (-1, "1", 1.5, True):
        told = on.infer("m", IN, parameters={"timeout": value})
        told.refuses(500, "Unable to parse 'timeout': attempt to access JSON non-unsigned-integer as unsigned-integer")


@fact(TIMEOUT, "a timeout of 0 is none")
def _(on: Http | Grpc) -> None:
    assert on.infer("m", IN, parameters={"timeout": 0}).ok


@fact(TIMEOUT, "gRPC's timeout is an int64_param", GRPC)
def _(on: Grpc) -> None:
    for kind, value in (("uint64_param", 5), ("string_param", "5"), ("double_param", 5.0), ("bool_param", True)):
        on.infer("m", IN, parameters={"timeout": (kind, value)}).refuses(
            400, "invalid value type for 'timeout' parameter, expected int64_param"
        )


@fact(SEQUENCE, "a model without sequences takes an id of one and has no use for it")
def _(on: Http | Grpc) -> None:
    for value in (0, 7, "", "name"):
        parameters = {"sequence_id": value, "sequence_start": True, "sequence_end": True}
        assert on.infer("m", IN, parameters=parameters).ok, value


@fact(SEQUENCE, "0 and an empty string are no sequence", queues=("memory", "embedded"))
def _(on: Http | Grpc) -> None:
    for value in (0, ""):
        on.infer("direct", tensor("IN", [[1]]), parameters={"sequence_id": value, "sequence_start": True}).refuses(
            400, "inference request to model 'direct' must specify a non-zero or non-empty correlation ID"
        )


@fact(SEQUENCE, "an id may be a number of 64 bits or a string")
def _(on: Http | Grpc) -> None:
    large: Any = ("uint64_param", (1 << 64) - 1) if isinstance(on, Grpc) else (1 << 64) - 1
    for value in (5, "five", large):
        ends = {"sequence_id": value, "sequence_start": True, "sequence_end": True}
        told = on.infer("oldest", tensor("IN", [[5]]), parameters=ends)
        assert told.ok, told
        assert told.arrays["OUT"].tolist() == [[5]]


@fact(SEQUENCE, "start and end are booleans")
def _(on: Http | Grpc) -> None:
    for name in ("sequence_start", "sequence_end"):
        told = on.infer("direct", tensor("IN", [[1]]), parameters={"sequence_id": 7, name: 1})
        assert told.code in ("400", "INVALID_ARGUMENT"), told


GIVEN = {"text": "a", "number": 7, "yes": True, "no": False, "half": 0.5}


@fact(OTHER, "strings, integers, booleans and doubles reach the model")
def _(on: Http | Grpc) -> None:
    told = on.infer("parameters", IN, parameters=GIVEN)
    assert told.ok, told
    assert json.loads(told.arrays["OUT"].flat[0]) == GIVEN


@fact(OTHER, "a response's parameters come back")
def _(on: Http | Grpc) -> None:
    assert on.infer("parameters", IN).head["parameters"] == {"text": "a", "number": 7, "yes": True}


@fact(OTHER, "parameters of another kind are refused", HTTP)
def _(on: Http) -> None:
    for value in ([1], {"a": 1}, None):
        on.infer("m", IN, parameters={"x": value}).refuses(
            400, "parameter 'x' has invalid type. It should be either 'int', 'bool', 'string' or 'double'"
        )


@fact(OTHER, "keys that begin with triton_ are refused")
def _(on: Http | Grpc) -> None:
    for key in ("triton_x", "triton_final_response", "triton_"):
        on.infer("m", IN, parameters={key: True}).refuses(400, RESERVED)


@fact(OTHER, "HTTP does not take triton_enable_empty_final_response", HTTP)
def _(on: Http) -> None:
    on.infer("m", IN, parameters={"triton_enable_empty_final_response": True}).refuses(400, RESERVED)


@fact(OTHER, "gRPC takes triton_enable_empty_final_response", GRPC)
def _(on: Grpc) -> None:
    assert on.infer("m", IN, parameters={"triton_enable_empty_final_response": True}).ok
    on.infer("m", IN, parameters={"triton_enable_empty_final_response": "yes"}).refuses(
        400, "invalid value type for 'triton_enable_empty_final_response' parameter, expected bool_param"
    )


@fact(OTHER, "keys that the protocol has a use for do not reach the model")
def _(on: Http | Grpc) -> None:
    reserved = {"sequence_id": 0, "sequence_start": False, "sequence_end": False, "priority": 0, "timeout": 0}
    told = on.infer("parameters", IN, parameters={**reserved, "own": "x"})
    assert told.ok, told
    assert json.loads(told.arrays["OUT"].flat[0]) == {"own": "x"}


@fact(HEADERS, "no header takes the place of what the protocol has a use for")
def _(on: Http | Grpc) -> None:
    headers = {"priority": "u=1", "sequence_id": "x", "forward_me": "y"}
    told = on.infer("parameters", IN, headers=headers, parameters={"priority": 1})
    assert json.loads(told.arrays["OUT"].flat[0]) == {"forward-me": "y"}
    assert on.infer("levels", IN, headers=headers).ok


@fact(HEADERS, "headers that match become string parameters")
def _(on: Http | Grpc) -> None:
    told = on.infer("parameters", IN, headers={"forward_me": "a b", "other": "c"}, parameters={"own": 1})
    assert json.loads(told.arrays["OUT"].flat[0]) == {"own": 1, "forward-me": "a b"}
