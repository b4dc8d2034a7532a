"""PROTOCOL.md section 12: what perf_analyzer needs of a server."""

from __future__ import annotations

from typing import Any

import requests

from tests.api.protocol.facts import HTTP, Grpc, Http, Section, tensor
from tests.api.protocol.section_6 import memory, place

SECTION = Section("12")
fact = SECTION.fact
IN = tensor("IN", [[1, 2]])
SECTION.beyond = {
    "On Debian 12 a plain": "how to install perf_analyzer",
    "situation | result": "the heading of a table",
    '"statistics" not advertised': "it is: section 6",
    "dims \N{MINUS SIGN}1 without": "the client's",
    "`-b N` with max_batch_size 0": "the client's",
    "model_version not given and no version's queue": "the row of the queue's count",
    "unstable latency": "the client's",
}


@fact("Call order (HTTP)", "the calls before the first request are answered in its order")
def _(on: Http | Grpc) -> None:
    assert on.metadata("m")["name"] == "m"
    assert on.config("m")["name"] == "m"
    assert "statistics" in on.server()["extensions"]
    assert on.infer("m", IN, id="").ok
    assert on.statistics("m")[0]["inference_stats"]["success"]["count"] >= 1


@fact("config endpoint missing", "a configuration has all that it reads")
def _(on: Http | Grpc) -> None:
    told = on.config("m")
    assert told["max_batch_size"] == 8
    assert (told["input"][0]["optional"], told["input"][0]["is_shape_tensor"]) == (False, False)
    listed = {each["name"] for each in on.metadata("m")["outputs"]}
    assert {each["name"] for each in told["output"]} == listed
    assert "dynamic_batching" in told
    assert "sequence_batching" not in told
    assert "dynamic_batching" not in on.config("raw")


@fact('"statistics" advertised but queue.count', "the queue's count grows with each request")
def _(on: Http | Grpc) -> None:
    def count() -> int:
        return int(on.statistics("m")[0]["inference_stats"]["queue"]["count"])

    before = count()
    for _ in range(3):
        on.infer("m", IN)
    assert count() == before + 3


@fact("cache_hit/cache_miss missing", "hits and misses of the cache are always there")
def _(on: Http | Grpc) -> None:
    for each in ("cache_hit", "cache_miss"):
        assert on.statistics("m")[0]["inference_stats"][each] == {"count": 0, "ns": 0}


@fact("version in stats not an integer string", "the version in the statistics is an integer as a string")
def _(on: Http | Grpc) -> None:
    assert [each["version"] for each in on.statistics("every")] == ["1", "2", "3"]


@fact('`"id":""` refused', "an empty id is no error with each request", HTTP)
def _(on: Http) -> None:
    asked = {"id": "", "inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    assert on.post("/v2/models/m/infer", asked).ok


@fact("`--shared-memory system`", "regions are forgotten of both kinds, then registered and used")
def _(on: Http | Grpc) -> None:
    assert on.region("unregister").ok
    assert on.region("unregister", kind="cuda").ok
    with memory(64) as given, memory(64) as made:
        assert on.region("register", "IN", key=f"/{given.name}", offset=0, byte_size=64).ok
        assert on.region("register", "OUT", key=f"/{made.name}", offset=0, byte_size=64).ok
        asked = {"name": "IN", "datatype": "FP32", "shape": [1, 2], "parameters": place("IN", 8)}
        assert on.infer("m", asked, outputs=[{"name": "OUT", "parameters": place("OUT", 8)}]).ok
        assert on.region("unregister").ok


@fact('`platform == "ensemble"`', "an ensemble's steps are told by name and version")
def _(on: Http | Grpc) -> None:
    told = on.config("ensemble")
    assert told["platform"] == "ensemble"
    (step,) = told["ensemble_scheduling"]["step"]
    assert (step["model_name"], step["model_version"]) == ("m", -1)
    assert on.infer("ensemble", IN).ok
    assert {"ensemble", "m"} <= {each["name"] for each in on.statistics()}


@fact("`response_cache` present", "response_cache and model_transaction_policy are objects with a boolean", HTTP)
def _(on: Http) -> None:
    assert on.config("cached")["response_cache"] == {"enable": True}
    assert on.config("repeat")["model_transaction_policy"] == {"decoupled": True}
    assert "response_cache" not in on.config("m")


@fact("metrics (`--collect-metrics`)", "metrics are at /metrics of their own port", HTTP)
def _(on: Http) -> None:
    answer: Any = requests.get(f"http://127.0.0.1:{on.port('metrics')}/metrics", timeout=20)
    assert answer.status_code == 200
    assert 'nv_inference_request_success{model="m",version="1"}' in answer.text
