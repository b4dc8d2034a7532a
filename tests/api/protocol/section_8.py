"""PROTOCOL.md section 8: classification."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.api.protocol.facts import GRPC, HTTP, Answer, Grpc, Http, Section, tensor
from tests.api.protocol.section_6 import place, region
from tests.api.protocol.world import REST

SECTION = Section("8")
fact = SECTION.fact
LINE = "`outputs[i].parameters.classification = k`"
VALUES = [[0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.0], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]


def classes(on: Http | Grpc, model: str, given: Any, count: int = 2, **more: Any) -> Answer:
    """The classes of OUT; on HTTP as JSON has them."""
    wanted = {"name": "OUT", "parameters": {"classification": count, **more}}
    return on.infer(model, given, outputs=[wanted])


@fact(LINE, "an output becomes BYTES of batch and classes, value and index and label")
def _(on: Http | Grpc) -> None:
    told = classes(on, "labels", tensor("IN", VALUES), 3)
    assert (told.head["outputs"][0]["datatype"], told.head["outputs"][0]["shape"]) == ("BYTES", [2, 3])
    assert told.arrays["OUT"].tolist() == [
        [b"0.900000:1:l1", b"0.800000:8:l8", b"0.700000:7:l7"],
        [b"9.000000:0:l0", b"8.000000:1:l1", b"7.000000:2:l2"],
    ]


@fact(LINE, "a class without a label has none")
def _(on: Http | Grpc) -> None:
    last = np.zeros((1, REST))
    last[0, REST - 1] = 1
    assert classes(on, "labels", tensor("IN", last), 1).arrays["OUT"].tolist() == [[f"1.000000:{REST - 1}".encode()]]


@fact(LINE, "there are no more classes than elements")
def _(on: Http | Grpc) -> None:
    assert classes(on, "labels", tensor("IN", VALUES), 99).head["outputs"][0]["shape"] == [2, REST]


@fact(LINE, "a model without batches has no batch dimension")
def _(on: Http | Grpc) -> None:
    told = classes(on, "flat_labels", tensor("IN", VALUES[0]))
    assert told.head["outputs"][0]["shape"] == [2]
    assert told.arrays["OUT"].tolist() == [b"0.900000:1", b"0.800000:8"]


@fact(LINE, "integers are printed plainly")
def _(on: Http | Grpc) -> None:
    assert classes(on, "INT32_labels", tensor("IN", [[-5, 7]], "INT32")).arrays["OUT"].tolist() == [[b"7:1", b"-5:0"]]
    assert classes(on, "UINT8_labels", tensor("IN", [[255, 1]], "UINT8")).arrays["OUT"].tolist() == [[b"255:0", b"1:1"]]


@fact(LINE, "classes as JSON are strings", HTTP)
def _(on: Http) -> None:
    told = classes(on, "labels", tensor("IN", VALUES[:1]), 1, binary_data=False)
    assert told.head["outputs"][0] == {
        "name": "OUT", "datatype": "BYTES", "shape": [1, 1], "data": ["0.900000:1:l1"],
    }  # fmt: skip


@fact(LINE, "values of FP16, BF16, BOOL and BYTES have no classes")
def _(on: Http | Grpc) -> None:
    upper = {"name": "IN", "datatype": "BF16", "shape": [1, 1], "data": np.zeros((1, 1), "<u2")}
    given = [tensor("IN", values, kind) for kind, values in (("FP16", [[1]]), ("BOOL", [[True]]), ("BYTES", [[b"a"]]))]
    for each in (upper, *given):
        kind = each["datatype"]
        classes(on, f"{kind}_labels", each).refuses(
            400, f"class result not available for output due to unsupported type '{kind}'"
        )


@fact(LINE, "more than a million elements have no classes")
def _(on: Http | Grpc) -> None:
    assert classes(on, "open", tensor("IN", np.zeros((1, 1_000_001), np.float32))).code in ("400", "INVALID_ARGUMENT")


@fact(LINE, "classes and shared memory exclude each other")
def _(on: Http | Grpc) -> None:
    with region(on, "r"):
        told = classes(on, "labels", tensor("IN", VALUES), 2, **place("r", 64))
        assert told.code in ("400", "INVALID_ARGUMENT"), told
        assert "'shared_memory_region' and 'classification'" in told.text


@fact(LINE, "the number of classes is an int64_param above 0", GRPC)
def _(on: Grpc) -> None:
    for value in ("2", True, 2.0, ("uint64_param", 2)):
        told = on.infer(
            "labels", tensor("IN", VALUES), outputs=[{"name": "OUT", "parameters": {"classification": value}}]
        )
        told.refuses(400, "invalid value type for 'classification' parameter, expected int64_param")
    classes(on, "labels", tensor("IN", VALUES), 0).refuses(
        400, "invalid value for 'classification' parameter, expected > 0"
    )


@fact(LINE, "a negative number of classes is refused")
def _(on: Http | Grpc) -> None:
    assert classes(on, "labels", tensor("IN", VALUES), -1).code in ("400", "500", "INVALID_ARGUMENT")
