"""PROTOCOL.md section 1: status codes. The rows of its tables are in test_protocol_errors.py, word for word."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.api.protocol.facts import GRPC, HTTP, Grpc, Http, Section, tensor

SECTION = Section("1")
fact = SECTION.fact
ROWS = (Path(__file__).parents[2] / "data" / "protocol_errors.md").read_text().splitlines()
SECTION.beyond = {
    "Triton code → HTTP": "the heading of a table",
    **{row.lstrip("-| "): "test_protocol_errors.py" for row in ROWS if not row.startswith("|--")},
}
OURS = "These are Triton's codes. Ours differ in one place"
BODY = 'Error body is always `{"error":"<text>"}`'
PREFIX = "Every validation message from the request carries the prefix"
IN = tensor("IN", [[1, 2]])


@fact(OURS, "a request's own deadline that passes is 504 and DEADLINE_EXCEEDED")
def _(on: Http | Grpc) -> None:
    on.infer("slow", IN, parameters={"timeout": 20_000}).refuses(504, "")


@fact(OURS, "what the scheduler cannot do in time is 429 and RESOURCE_EXHAUSTED")
def _(on: Http | Grpc) -> None:
    started = threading.Barrier(7)

    def crowd() -> set[str]:
        started.wait()
        return {on.infer("slow", IN).code for _ in range(2)}

    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(crowd) for _ in range(6)]
        started.wait()
        told = on.infer("slow", IN, parameters={"timeout": 250_000})
        while not all(each.done() for each in others) and told.code not in ("429", "RESOURCE_EXHAUSTED"):
            told = on.infer("slow", IN, parameters={"timeout": 250_000})  # until one comes as a run has just begun
        assert set().union(*[each.result() for each in others]) <= {"200", "OK"}
    told.refuses(429, "")


@fact(OURS, "a queue policy's timeout is 503 and UNAVAILABLE in Triton's words")
def _(on: Http | Grpc) -> None:
    started = threading.Barrier(4)

    def ask() -> Any:
        started.wait()
        return on.infer("timed", IN)

    with ThreadPoolExecutor(4) as pool:
        told = [each.result() for each in [pool.submit(ask) for _ in range(4)]]
    refused = [each for each in told if not each.ok]
    assert refused
    for each in refused:
        each.refuses(503, "Request timeout expired")


@fact(OURS, "a missing token is 401 and UNAUTHENTICATED", needs="strict")
def _(on: Http | Grpc) -> None:
    on.token = ""
    if isinstance(on, Grpc):
        on.metadata_sent = ()
    assert on.infer("m", IN).code in ("401", "UNAUTHENTICATED")


@fact(OURS, "a token that is not known is 401 and UNAUTHENTICATED", needs="strict")
def _(on: Http | Grpc) -> None:
    on.token = "x" * 16
    if isinstance(on, Grpc):
        on.metadata_sent = (("authorization", f"Bearer {on.token}"),)
    assert on.infer("m", IN).code in ("401", "UNAUTHENTICATED")


@fact("restricted API without header", "a restricted API without its header is 403", HTTP, needs="strict")
def _(on: Http) -> None:
    answer = on.request("GET", "/v2/models/m/stats")
    assert (answer.status_code, answer.json()) == (403, {"error": "This API is restricted, expecting header 'key'"})
    assert on.request("GET", "/v2/models/m/stats", key="word").status_code == 200
    assert on.request("GET", "/v2/logging", key="other").status_code == 403


@fact("shm region unknown / duplicate", "a tensor in an unknown region is not found")
def _(on: Http | Grpc) -> None:
    place = {"shared_memory_region": "x", "shared_memory_byte_size": 8}
    given = {"name": "IN", "datatype": "FP32", "shape": [1, 2], "parameters": place}
    on.infer("m", given).refuses(404, "Unable to find shared memory region: 'x'")


@fact(BODY, "errors of every path are one member and nothing else", HTTP)
def _(on: Http) -> None:
    for method, path, body in (
        ("GET", "/", None),
        ("GET", "/v2/", None),
        ("GET", "/v2/models/foo", None),
        ("GET", "/v2/models/m/versions/x", None),
        ("GET", "/v2/models/m/versions/99/config", None),
        ("PUT", "/v2/models/m", b""),
        ("POST", "/v2/models/m/infer", b"{"),
        ("POST", "/v2/models/m/infer", {"inputs": 1}),
        ("POST", "/v2/models/m/infer", {"inputs": [{"name": 1}]}),
        ("POST", "/v2/models/m/generate", [1]),
        ("POST", "/v2/models/m/generate_stream", [1]),
        ("POST", "/v2/repository/index", {"ready": 1}),
        ("POST", "/v2/repository/models/m/load", {"parameters": 1}),
        ("POST", "/v2/repository/models/m/unload", {"parameters": 1}),
        ("POST", "/v2/logging", {"log_info": "x"}),
        ("POST", "/v2/trace/setting", {"trace_rate": "x"}),
        ("POST", "/v2/systemsharedmemory/region/x/register", {"key": 1}),
        ("GET", "/v2/systemsharedmemory/region/nothing/status", None),
    ):
        answer = on.request(method, path, body)
        assert answer.status_code in (400, 404, 405, 500, 501), (path, answer.text)
        assert list(answer.json()) == ["error"], (path, answer.text)
        assert isinstance(answer.json()["error"], str)
        assert answer.headers["content-type"] == "application/json", path


@fact(PREFIX, "messages about a request's content begin with its id")
def _(on: Http | Grpc) -> None:
    wrong = tensor("IN", [[1, 2, 3]])
    on.infer("m", wrong).refuses(400, "[request id: <id_unknown>] unexpected shape for input 'IN'")
    on.infer("m", wrong, id="a/7").refuses(400, "[request id: a/7] unexpected shape for input 'IN'")
    for each in (
        on.infer("m", tensor("Z", [[1, 2]]), id="b"),
        on.infer("m", tensor("IN", [[1, 2]], "FP64"), id="b"),
        on.infer("m", IN, outputs=["Z"], id="b"),
        on.infer("pair", tensor("A", [[1, 2]]), id="b"),
    ):
        each.refuses(400, "[request id: b] ")


@fact("Error body is always", "errors of a stream name their request", GRPC)
def _(on: Grpc) -> None:
    found, code = on.stream(on.message("m", tensor("IN", [[1]]), id="7"), on.message("foo", IN, id="8"))
    told = {each.infer_response.id: each.error_message for each in found}
    assert code == "OK"
    assert told["7"].startswith("[request id: 7] unexpected shape")
    assert told["8"] == "Request for unknown model: 'foo' is not found"
