"""PROTOCOL.md section 9: the generate extension."""

from __future__ import annotations

import json
from typing import Any

from tests.api.protocol.facts import HTTP, Http, Section

SECTION = Section("9")
fact = SECTION.fact
LINE = "POST `/v2/models/m[/versions/v]/generate`"
SSE = "text/event-stream; charset=utf-8"


def events(on: Http, body: Any, model: str = "repeat") -> tuple[int, list[Any]]:
    """Status and events of generate_stream."""
    answer = on.request("POST", f"/v2/models/{model}/generate_stream", body)
    assert answer.headers["content-type"] == SSE, answer.text
    *parts, rest = answer.text.split("\n\n")
    assert rest == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return answer.status_code, [json.loads(part.removeprefix("data: ")) for part in parts]


@fact(LINE, "members are tensors and parameters and the answer is one object", HTTP)
def _(on: Http) -> None:
    told = on.post("/v2/models/m/generate", {"IN": [1, 2]})
    assert told.head == {"model_name": "m", "model_version": "1", "OUT": [1.0, 2.0]}
    assert on.post("/v2/models/m/versions/1/generate", {"IN": [1, 2]}).ok


@fact(LINE, "an id comes back and one element stands without its array", HTTP)
def _(on: Http) -> None:
    told = on.post("/v2/models/open/generate", {"id": "7", "IN": 5})
    assert told.head == {"id": "7", "model_name": "open", "model_version": "1", "OUT": 5.0}
    assert list(told.head) == ["id", "model_name", "model_version", "OUT"]


@fact(LINE, "the innermost open dimension takes the rest", HTTP)
def _(on: Http) -> None:
    assert on.post("/v2/models/raw/generate", {"IN": [1, 2, 3, 4, 5, 6]}).head["OUT"] == [1, 2, 3, 4, 5, 6]
    on.post("/v2/models/raw/generate", {"IN": [1, 2, 3]}).refuses(
        400, "The schema can not convert input 'IN' to tensor with proper shape"
    )


@fact(LINE, "other members are request parameters", HTTP)
def _(on: Http) -> None:
    told = on.post("/v2/models/parameters/generate", {"IN": 1, "a": 1, "b": True, "c": "x"})
    assert json.loads(told.head["OUT"]) == {"a": 1, "b": True, "c": "x"}


@fact(LINE, "the object parameters is flattened by one level", HTTP)
def _(on: Http) -> None:
    told = on.post("/v2/models/parameters/generate", {"parameters": {"a": 1, "IN": 1}})
    assert json.loads(told.head["OUT"]) == {"a": 1}
    on.post("/v2/models/parameters/generate", {"IN": 1, "parameters": {"a": {"b": 1}}}).refuses(
        400, "Converting keyword: 'parameters': parameter 'a' has invalid type."
    )


@fact(LINE, "each response is an event and there is no DONE", HTTP)
def _(on: Http) -> None:
    status, told = events(on, {"IN": 5, "count": 3})
    assert status == 200
    assert [each["OUT"] for each in told] == [5.0, 6.0, 7.0]
    assert told[0] == {"model_name": "repeat", "model_version": "1", "OUT": 5.0}


@fact(LINE, "a later error is an event of its own", HTTP)
def _(on: Http) -> None:
    status, told = events(on, {"IN": 13, "count": 1})
    assert status == 200
    assert [list(each) for each in told] == [["model_name", "model_version", "OUT"], ["error"]]
    assert told[-1] == {"error": "thirteen"}


@fact(LINE, "an error in place of the first response sets the status", HTTP)
def _(on: Http) -> None:
    status, told = events(on, {"IN": 13, "count": 0})
    assert (status, told) == (500, [{"error": "thirteen"}])


@fact(LINE, "generate wants exactly one response", HTTP)
def _(on: Http) -> None:
    for count in (0, 2):
        told = on.post("/v2/models/repeat/generate", {"IN": 1, "count": count})
        told.refuses(500, "generate expects model to produce exactly 1 response")
    assert on.post("/v2/models/repeat/generate", {"IN": 1, "count": 1}).head["OUT"] == 1.0


@fact(LINE, "an error before the first response is JSON", HTTP)
def _(on: Http) -> None:
    for word in ("generate", "generate_stream"):
        for body in (b"{", {"IN": "x"}, {"none": 1}, {"IN": [1, 2, 3]}):
            told = on.post(f"/v2/models/m/{word}", body)
            assert told.code in ("400", "500"), (word, body)
            assert told.headers["content-type"] == "application/json"
        assert on.post(f"/v2/models/foo/{word}", {"IN": 1}).code == "404"


@fact(LINE, "a model that is not decoupled streams one event", HTTP)
def _(on: Http) -> None:
    assert events(on, {"IN": [1, 2]}, "m") == (200, [{"model_name": "m", "model_version": "1", "OUT": [1.0, 2.0]}])


@fact(LINE, "only POST generates", HTTP)
def _(on: Http) -> None:
    for word in ("generate", "generate_stream"):
        assert on.request("GET", f"/v2/models/m/{word}").status_code == 405


@fact(LINE, "infer of a decoupled model is refused", HTTP)
def _(on: Http) -> None:
    on.post("/v2/models/repeat/infer", {"inputs": []}).refuses(
        501, "HTTP end point doesn't support models with decoupled transaction policy"
    )
