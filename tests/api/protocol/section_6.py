"""PROTOCOL.md section 6: metadata, configurations, statistics, the index, model control, logging, traces, shared memory."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from gateway.config import tritonserver
from gateway.config.arguments import parse_args
from gateway.engines.fake import Gate
from tests.api.protocol.facts import GRPC, HTTP, Grpc, Http, Section, tensor
from tests.api.protocol.world import identity

SECTION = Section("6")
fact = SECTION.fact
SERVER = "`GET /v2` →"
MODEL = "`GET /v2/models/m` →"
CONFIG = "`GET /v2/models/m/config` →"
NORMAL = "Normalised values appear"
STATISTICS = "Statistics `GET /v2/models"
INDEX = "Index: **POST**"
LOAD = "Load: POST"
LOGGING = "Logging GET/POST"
SHM = "shm: GET"
IN = tensor("IN", [[1, 2]])
ORDER = [
    "classification", "sequence", "model_repository", "model_repository(unload_dependents)", "schedule_policy",
    "model_configuration", "system_shared_memory", "cuda_shared_memory", "binary_tensor_data", "parameters",
    "statistics", "trace", "logging",
]  # fmt: skip


# --- the server and its models


@fact(SERVER, "the server is called triton")
def _(on: Http | Grpc) -> None:
    assert on.server()["name"] == "triton"


@fact(SERVER, "the members are name version extensions and no other", HTTP)
def _(on: Http) -> None:
    told = on.server()
    assert list(told) == ["name", "version", "extensions"]
    assert re.match(r"\d+\.\d+", told["version"])


@fact(SERVER, "extensions stand in Triton's order and are those that work")
def _(on: Http | Grpc) -> None:
    listed = list(on.server()["extensions"])
    assert [each for each in listed if each in ORDER] == [each for each in ORDER if each in listed]
    assert {"classification", "sequence", "statistics", "system_shared_memory", "binary_tensor_data"} <= set(listed)


@fact(SERVER, "shared memory is no extension where it is not allowed", needs="strict")
def _(on: Http | Grpc) -> None:
    assert "system_shared_memory" not in on.server()["extensions"]


@fact(MODEL, "metadata are name versions platform inputs outputs")
def _(on: Http | Grpc) -> None:
    told = {key: value for key, value in on.metadata("m").items() if key not in ("parameters", "properties")}
    batched = [{"name": "IN", "datatype": "FP32", "shape": [-1, 2]}]
    assert told == {
        "name": "m",
        "versions": ["1"],
        "platform": "fake",
        "inputs": batched,
        "outputs": [{**batched[0], "name": "OUT"}],
    }


@fact(MODEL, "a shape begins with -1 where there are batches")
def _(on: Http | Grpc) -> None:
    assert on.metadata("open")["inputs"][0]["shape"] == [-1, -1]
    assert on.metadata("raw")["inputs"][0]["shape"] == [2, -1]


@fact(MODEL, "strings are BYTES")
def _(on: Http | Grpc) -> None:
    assert on.metadata("echo_BYTES")["inputs"][0]["datatype"] == "BYTES"


@fact(MODEL, "the platform is the configuration's and else its backend")
def _(on: Http | Grpc) -> None:
    assert on.metadata("platform")["platform"] == "any_platform"
    assert on.metadata("auto")["platform"] == "onnxruntime_onnx"
    assert on.metadata("ensemble")["platform"] == "ensemble"
    assert on.metadata("repeat")["platform"] == "python"


@fact(MODEL, "reshape is not applied")
def _(on: Http | Grpc) -> None:
    assert on.metadata("reshaped")["inputs"][0]["shape"] == [-1, 1]
    assert on.infer("reshaped", tensor("IN", [[5]])).arrays["OUT"].tolist() == [[5]]


@fact(MODEL, "only versions that are ready are listed")
def _(on: Http | Grpc) -> None:
    assert on.metadata("every")["versions"] == ["1", "2", "3"]
    assert on.metadata("latest")["versions"] == ["2", "3"]
    assert on.metadata("specific")["versions"] == ["1"]


@fact(MODEL, "a version's metadata are at its path", HTTP)
def _(on: Http) -> None:
    assert on.get("/v2/models/every/versions/2")["name"] == "every"
    assert on.request("GET", "/v2/models/latest/versions/1").status_code == 404


@fact(SERVER, "the server's name may be chosen", needs="", queues=("memory",))
def _(_: Any) -> None:
    words = tritonserver.translate(["--model-repository=/x", "--id=edge"])
    assert parse_args(words).server_id == "edge"


# --- configurations

FULL: dict[str, Any] = {
    "name": "m", "platform": "", "backend": "fake", "runtime": "",
    "version_policy": {"latest": {"num_versions": 1}},
    "max_batch_size": 8,
    "input": [{
        "name": "IN", "data_type": "TYPE_FP32", "format": "FORMAT_NONE", "dims": [2], "is_shape_tensor": False,
        "allow_ragged_batch": False, "optional": False, "is_non_linear_format_io": False,
    }],
    "output": [{
        "name": "OUT", "data_type": "TYPE_FP32", "dims": [2], "label_filename": "", "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }],
    "batch_input": [], "batch_output": [],
    "optimization": {
        "priority": "PRIORITY_DEFAULT", "input_pinned_memory": {"enable": True}, "output_pinned_memory": {"enable": True},
        "gather_kernel_buffer_threshold": 0, "eager_batching": False,
    },
    "dynamic_batching": {
        "preferred_batch_size": [8], "max_queue_delay_microseconds": 0, "preserve_ordering": False,
        "priority_levels": 0, "default_priority_level": 0, "priority_queue_policy": {},
    },
    "instance_group": [{
        "name": "m_0", "kind": "KIND_CPU", "count": 1, "gpus": [], "secondary_devices": [], "profile": [],
        "passive": False, "host_policy": "",
    }],
    "default_model_filename": "", "cc_model_filenames": {}, "metric_tags": {}, "parameters": {}, "model_warmup": [],
}  # fmt: skip


def _config(on: Http | Grpc, model: str) -> Any:
    """A configuration without what this server tells beside it."""
    told = on.config(model)
    told["parameters"].pop("gateway_instances", None)
    return told


@fact(CONFIG, "a whole configuration is spelled as Triton does")
def _(on: Http | Grpc) -> None:
    assert _config(on, "m") == FULL


@fact(CONFIG, "members stand in the order of the schema", HTTP)
def _(on: Http) -> None:
    names = [each.name for each in pb.ModelConfigResponse.DESCRIPTOR.fields_by_name["config"].message_type.fields]
    told = list(on.config("levels"))
    assert told == [name for name in names if name in told]


@fact(CONFIG, "numbers of 64 bits are numbers and no strings", HTTP)
def _(on: Http) -> None:
    batching = on.config("levels")["dynamic_batching"]
    assert batching["priority_levels"] == 2
    assert batching["max_queue_delay_microseconds"] == 0
    assert type(batching["priority_levels"]) is int
    assert on.config("specific")["version_policy"] == {"specific": {"versions": [1]}}
    assert on.config("reshaped")["input"][0]["reshape"] == {"shape": []}
    assert on.config("oldest")["sequence_batching"]["max_sequence_idle_microseconds"] == 1_000_000
    policy = on.config("timed")["dynamic_batching"]["default_queue_policy"]
    assert policy == {
        "timeout_action": "REJECT", "default_timeout_microseconds": 1000, "allow_timeout_override": False,
        "max_queue_size": 0,
    }  # fmt: skip


@fact(CONFIG, "enumerations are names")
def _(on: Http | Grpc) -> None:
    told = on.config("echo_BYTES")
    assert (told["input"][0]["data_type"], told["instance_group"][0]["kind"]) == ("TYPE_STRING", "KIND_CPU")


@fact(CONFIG, "the keys of priority_queue_policy are strings", HTTP)
def _(on: Http) -> None:
    policies = on.config("levels")["dynamic_batching"]["priority_queue_policy"]
    assert list(policies) == ["1"]
    assert policies["1"]["max_queue_size"] == 99


@fact(CONFIG, "the numbers of warm-up samples are numbers", HTTP)
def _(on: Http) -> None:
    assert on.config("field_warmup")["model_warmup"] == [
        {
            "name": "w", "batch_size": 2, "count": 0,
            "inputs": {"IN": {"data_type": "TYPE_FP32", "dims": [2], "zero_data": True}},
        }
    ]  # fmt: skip


@fact(CONFIG, "a version's configuration is at its path", HTTP)
def _(on: Http) -> None:
    assert on.get("/v2/models/every/versions/2/config")["name"] == "every"
    assert on.request("GET", "/v2/models/every/versions/9/config").status_code == 404


@fact(CONFIG, "gRPC gives the message itself", GRPC)
def _(on: Grpc) -> None:
    config = on.ask("ModelConfig", pb.ModelConfigRequest(name="levels")).config
    assert config.dynamic_batching.priority_queue_policy[1].max_queue_size == 99


@fact(NORMAL, "the version policy is the latest one")
def _(on: Http | Grpc) -> None:
    assert on.config("m")["version_policy"] == {"latest": {"num_versions": 1}}


@fact(NORMAL, "dynamic batching without sizes prefers the largest")
def _(on: Http | Grpc) -> None:
    assert on.config("m")["dynamic_batching"]["preferred_batch_size"] == [8]


@fact(NORMAL, "memory is pinned both ways")
def _(on: Http | Grpc) -> None:
    told = on.config("raw")["optimization"]
    assert (told["input_pinned_memory"], told["output_pinned_memory"]) == ({"enable": True}, {"enable": True})


@fact(NORMAL, "an instance group is filled in")
def _(on: Http | Grpc) -> None:
    (group,) = on.config("auto")["instance_group"]
    assert (group["name"], group["kind"]) == ("auto", "KIND_CPU")
    assert group["count"] >= 1


@fact(NORMAL, "a sequence may be idle for a second")
def _(on: Http | Grpc) -> None:
    assert on.config("oldest")["sequence_batching"]["max_sequence_idle_microseconds"] == 1_000_000


# --- statistics


@fact(STATISTICS, "an entry has Triton's members", HTTP)
def _(on: Http) -> None:
    on.infer("m", IN)
    (entry,) = on.statistics("m")
    assert set(entry) == {
        "name", "version", "last_inference", "inference_count", "execution_count", "inference_stats",
        "response_stats", "batch_stats", "memory_usage",
    }  # fmt: skip
    assert set(entry["inference_stats"]) == {
        "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
    }  # fmt: skip
    for each in entry["inference_stats"].values():
        assert list(each) == ["count", "ns"]
        assert type(each["count"]) is type(each["ns"]) is int
    assert set(entry["batch_stats"][0]) == {"batch_size", "compute_input", "compute_infer", "compute_output"}
    assert entry["response_stats"] == {}
    assert isinstance(entry["memory_usage"], list)


@fact(STATISTICS, "last_inference is in milliseconds since 1970")
def _(on: Http | Grpc) -> None:
    on.infer("m", IN)
    (entry,) = on.statistics("m")
    assert 1_700_000_000_000 < entry["last_inference"] < 10_000_000_000_000


def _counts(on: Http | Grpc, model: str) -> dict[str, int]:
    (entry,) = on.statistics(model)
    counted = {name: each["count"] for name, each in entry["inference_stats"].items()}
    batches = {f"batch_{each['batch_size']}": each["compute_infer"]["count"] for each in entry["batch_stats"]}
    return {
        "inferences": entry["inference_count"], "executions": entry["execution_count"], **counted, **batches,
    }  # fmt: skip


def _rise(on: Http | Grpc, model: str, ask: Any) -> dict[str, int]:
    before = _counts(on, model)
    ask()
    after = _counts(on, model)
    return {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}


@fact(STATISTICS, "inferences are rows, executions batches and successes requests")
def _(on: Http | Grpc) -> None:
    rows = tensor("IN", np.ones((5, 2)))
    assert _rise(on, "m", lambda: on.infer("m", rows)) == {
        "inferences": 5, "executions": 1, "success": 1, "queue": 1, "compute_input": 1, "compute_infer": 1,
        "compute_output": 1, "batch_5": 1,
    }  # fmt: skip


@fact(STATISTICS, "a request that fails counts as a failure and in nothing else")
def _(on: Http | Grpc) -> None:
    assert _rise(on, "m", lambda: on.infer("m", tensor("IN", [[1]]))) == {"fail": 1}


@fact(STATISTICS, "a hit of the cache is a success and a queue entry and no compute")
def _(on: Http | Grpc) -> None:
    asked = tensor("IN", [[7, 7 if isinstance(on, Http) else 8]])
    first = _rise(on, "cached", lambda: on.infer("cached", asked))
    assert first["cache_miss"] == 1
    assert first["compute_infer"] == first["success"] == first["inferences"] == 1
    second = _rise(on, "cached", lambda: on.infer("cached", asked))
    assert second == {"success": 1, "queue": 1, "cache_hit": 1}


@fact(STATISTICS, "all models have theirs at one path and each version at its own")
def _(on: Http | Grpc) -> None:
    everything = {(each["name"], each["version"]) for each in on.statistics()}
    assert {("m", "1"), ("every", "1"), ("every", "2"), ("every", "3")} <= everything
    assert [(each["name"], each["version"]) for each in on.statistics("every")] == [
        ("every", "1"), ("every", "2"), ("every", "3"),
    ]  # fmt: skip
    assert [(each["name"], each["version"]) for each in on.statistics("every", "2")] == [("every", "2")]


# --- index and model control


@fact(INDEX, "the index is a bare array of entries", HTTP)
def _(on: Http) -> None:
    for body in (b"", {}, {"ready": False}):
        told = on.request("POST", "/v2/repository/index", body).json()
        assert isinstance(told, list)
        assert {"name": "m", "version": "1", "state": "READY"} in told


@fact(INDEX, "a model that was never loaded has a name only")
def _(on: Http | Grpc) -> None:
    assert {"name": "unloaded"} in on.index()


@fact(INDEX, "a broken model is UNAVAILABLE and its reason is told")
def _(on: Http | Grpc) -> None:
    (entry,) = [each for each in on.index() if each["name"] == "wrong"]
    assert (entry["version"], entry["state"]) == ("1", "UNAVAILABLE")
    assert entry["reason"]


@fact(INDEX, "only models that are ready are listed if asked for")
def _(on: Http | Grpc) -> None:
    told = on.index(ready=True)
    assert {each["state"] for each in told} == {"READY"}
    assert "wrong" not in {each["name"] for each in told}


@fact(INDEX, "each version has an entry")
def _(on: Http | Grpc) -> None:
    assert [each["version"] for each in on.index() if each["name"] == "every"] == ["1", "2", "3"]


@fact(INDEX, "ready of another type is refused", HTTP)
def _(on: Http) -> None:
    for value in (1, "true", None, []):
        on.post("/v2/repository/index", {"ready": value}).refuses(400, "Invalid value for 'ready': expected a boolean")


@fact(INDEX, "GET is no method of the index", HTTP)
def _(on: Http) -> None:
    assert on.request("GET", "/v2/repository/index").status_code == 405


@fact(LOAD, "a model is loaded and unloaded, and its reason is then unloaded")
def _(on: Http | Grpc) -> None:
    assert on.load("reload").ok
    assert on.ready("reload")
    assert on.unload("reload").ok
    gone = {"name": "reload", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
    until(lambda: [each for each in on.index() if each["name"] == "reload"] == [gone])
    on.infer("reload", IN).refuses(404, "Request for unknown model: 'reload' has no available versions")
    assert on.load("reload").ok
    assert on.infer("reload", IN).ok


def until(holds: Callable[[], bool]) -> None:
    """Ask again and again, for five seconds at most."""
    end = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@fact(LOAD, "an unload returns before the model is gone, and what was accepted is answered")
def _(on: Http | Grpc) -> None:
    path = Path(on.config("leaving")["parameters"]["gate"]["string_value"])
    asyncio.run(asyncio.wait_for(_unloaded_at_work(on, Gate(path)), 15))
    assert on.load("leaving").ok


async def _unloaded_at_work(on: Http | Grpc, gate: Gate) -> None:
    rows = tensor("IN", np.ones((3, 2)))
    async with gate:
        asked = asyncio.create_task(asyncio.to_thread(on.infer, "leaving", rows))
        while (run := await gate.arrival()).rows != 3:  # those that measure come here too
            run.release()
        told = await asyncio.to_thread(on.unload, "leaving")
        assert told.ok, told
        entries = await asyncio.to_thread(on.index)
        assert [each["state"] for each in entries if each["name"] == "leaving"] == ["UNLOADING"]
        refused = await asyncio.to_thread(on.infer, "leaving", IN)
        refused.refuses(404, "Request for unknown model: 'leaving' has no available versions")
        run.release()
        answer = await asked
        assert answer.arrays["OUT"].tolist() == [[1, 1]] * 3


@fact(LOAD, "an ensemble brings its models, and takes them away if told to")
def _(on: Http | Grpc) -> None:
    assert on.load("implying").ok
    assert on.ready("implied")
    assert on.unload("implying", dependents=False).ok
    assert on.ready("implied")
    assert on.load("implying").ok
    assert on.unload("implying", dependents=True).ok
    until(lambda: not on.ready("implied"))
    on.unload("implied")


@fact(LOAD, "where changes are polled loads and unloads are refused", needs="lenient")
def _(on: Http | Grpc) -> None:
    text = "explicit model load / unload is not allowed if polling is enabled"
    on.load("good").refuses(503, text)
    on.unload("good").refuses(503, text)


def _changed(on: Http | Grpc, **changes: Any) -> str:
    config = on.http.config("auto_one")
    config["parameters"].pop("gateway_instances", None)
    return json.dumps(config | changes)


@fact(LOAD, "a configuration as a parameter takes the place of the file's")
def _(on: Http | Grpc) -> None:
    assert on.load("auto_one", config=_changed(on, max_batch_size=16, dynamic_batching={})).ok
    assert on.config("auto_one")["max_batch_size"] == 16
    assert on.load("auto_one").ok
    assert on.config("auto_one")["max_batch_size"] == 1


@fact(LOAD, "numbers in the configuration may be strings")
def _(on: Http | Grpc) -> None:
    assert on.load("auto_one", config='{"max_batch_size": "16"}').ok
    assert on.config("auto_one")["max_batch_size"] == 16
    assert on.load("auto_one").ok


@fact(LOAD, "a configuration that is no JSON is refused and what is loaded goes on")
def _(on: Http | Grpc) -> None:
    on.load("auto_one", config="no").refuses(500, "failed to load 'auto_one', failed to poll from model repository")
    assert on.infer("auto_one", tensor("IN", [[1, 2, 3]])).ok


@fact(LOAD, "a file without a configuration beside it is refused and what is loaded goes on")
def _(on: Http | Grpc) -> None:
    assert not on.load("auto_one", **{"file:1/model.onnx": identity(["rows", 3])}).ok
    assert on.infer("auto_one", tensor("IN", [[1, 2, 3]])).ok


@fact(LOAD, "a file may be sent with a configuration")
def _(on: Http | Grpc) -> None:
    files = {"file:1/model.onnx": identity(["rows", 5])}
    config = '{"backend": "onnxruntime", "max_batch_size": 1}'
    told = on.load("auto_one", config=config, **files)
    assert told.ok, told
    assert on.metadata("auto_one")["inputs"][0]["shape"] == [-1, 5]
    assert on.load("auto_one").ok
    assert on.metadata("auto_one")["inputs"][0]["shape"] == [-1, 3]


@fact(LOAD, "other parameters of a load are refused")
def _(on: Http | Grpc) -> None:
    told = on.load("auto_one", nonsense="x")
    assert told.code in ("400", "INVALID_ARGUMENT"), told


@fact(LOAD, "an unload of a model that nobody knows is no error or says that it is unknown")
def _(on: Http | Grpc) -> None:
    told = on.unload("foo")
    assert told.ok or "foo" in told.text


@fact(LOAD, "unload_dependents is a boolean")
def _(on: Http | Grpc) -> None:
    if isinstance(on, Http):
        told = on.post("/v2/repository/models/brief/unload", {"parameters": {"unload_dependents": "yes"}})
    else:
        request = pb.RepositoryModelUnloadRequest(model_name="brief")
        request.parameters["unload_dependents"].string_param = "yes"
        told = on.ask("RepositoryModelUnload", request)
    assert told.code in ("400", "INVALID_ARGUMENT"), told
    assert on.ready("brief")


# --- logging and traces


@fact(LOGGING, "log settings are read")
def _(on: Http | Grpc) -> None:
    assert dict(on.logging().head) == {
        "log_file": "", "log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0,
        "log_format": "default",
    }  # fmt: skip


@fact(LOGGING, "log settings are changed one by one and told back")
def _(on: Http | Grpc) -> None:
    for name, new, old in (
        ("log_info", False, True), ("log_verbose_level", 2, 0), ("log_format", "ISO8601", "default"),
    ):  # fmt: skip
        assert on.logging(**{name: new}).head[name] == new
        assert on.logging().head[name] == new
        assert on.logging(**{name: old}).head[name] == old


@fact(LOGGING, "log_file cannot be changed and that is 501")
def _(on: Http | Grpc) -> None:
    on.logging(log_file="x").refuses(501, "log file location can not be updated through network protocol")


@fact(LOGGING, "a log setting of another type is refused")
def _(on: Http | Grpc) -> None:
    assert on.logging(log_info="x").code in ("500", "INVALID_ARGUMENT")
    assert on.logging(log_verbose_level="x").code in ("500", "INVALID_ARGUMENT")


@fact(LOGGING, "log_verbose_level is uint32_param", GRPC)
def _(on: Grpc) -> None:
    found = on.ask("LogSettings", pb.LogSettingsRequest())
    assert found.settings["log_verbose_level"].WhichOneof("parameter_choice") == "uint32_param"


@fact(LOGGING, "trace settings are strings and the level is an array of them")
def _(on: Http | Grpc) -> None:
    told = on.tracing().head
    assert told["trace_level"] == ["OFF"]
    assert all(type(value) is str for name, value in told.items() if name != "trace_level")
    assert {"trace_rate", "trace_count", "log_frequency", "trace_file", "trace_mode"} <= set(told)


@fact(LOGGING, "trace settings are changed for all and for a model and null clears")
def _(on: Http | Grpc) -> None:
    try:
        assert on.tracing(trace_rate="7").head["trace_rate"] == "7"
        assert on.tracing("m").head["trace_rate"] == "7"
        assert on.tracing("m", trace_rate="8").head["trace_rate"] == "8"
        assert on.tracing().head["trace_rate"] == "7"
        assert on.tracing("m", trace_rate=None).head["trace_rate"] == "7"
    finally:
        assert on.tracing(trace_rate=None).head["trace_rate"] == "1000"


@fact(LOGGING, "trace settings of an unknown model are refused")
def _(on: Http | Grpc) -> None:
    told = on.tracing("foo")
    assert told.code in ("400", "404", "INVALID_ARGUMENT", "NOT_FOUND"), told
    assert "foo" in told.text


@fact(LOGGING, "trace values that are no numbers are refused")
def _(on: Http | Grpc) -> None:
    on.tracing(trace_rate="x").refuses(400, "Unable to parse 'trace_rate', got: x")


# --- shared memory


@contextmanager
def memory(size: int) -> Iterator[shared_memory.SharedMemory]:
    """An object of POSIX shared memory; its key is its name with a slash."""
    made = shared_memory.SharedMemory(create=True, size=size, name=f"gw{secrets.token_hex(4)}")
    try:
        yield made
    finally:
        made.close()
        made.unlink()


@contextmanager
def region(on: Http | Grpc, name: str, size: int = 64, **more: Any) -> Iterator[shared_memory.SharedMemory]:
    """A registered region."""
    with memory(size) as made:
        told = on.region("register", name, key=f"/{made.name}", byte_size=size - more.get("offset", 0), **more)
        assert told.ok, told
        try:
            yield made
        finally:
            assert on.region("unregister", name).ok


def place(name: str, size: int, offset: int | None = None) -> dict[str, Any]:
    """The parameters of a tensor that lies in a region."""
    told = {"shared_memory_region": name, "shared_memory_byte_size": size}
    return told if offset is None else {**told, "shared_memory_offset": offset}


@fact(SHM, "status is an array of what is registered")
def _(on: Http | Grpc) -> None:
    assert on.region("status").head[""] == []
    with region(on, "r", offset=8) as made:
        wanted = [{"name": "r", "key": f"/{made.name}", "offset": 8, "byte_size": 56}]
        assert on.region("status").head[""] == wanted
        assert on.region("status", "r").head[""] == wanted
    assert on.region("status").head[""] == []


@fact(SHM, "the status of an unknown region is not found")
def _(on: Http | Grpc) -> None:
    on.region("status", "x").refuses(404, "Unable to find system shared memory region: 'x'")


@fact(SHM, "a name is registered once")
def _(on: Http | Grpc) -> None:
    with region(on, "r") as made:
        told = on.region("register", "r", key=f"/{made.name}", byte_size=8)
        assert told.code in ("400", "ALREADY_EXISTS")
        assert told.text == "shared memory region 'r' already in manager"


@fact(SHM, "inputs are read and outputs written there")
def _(on: Http | Grpc) -> None:
    with region(on, "r") as made:
        made.buf[8:16] = np.array([3, 4], "<f4").tobytes()
        given = {"name": "IN", "datatype": "FP32", "shape": [1, 2], "parameters": place("r", 8, 8)}
        told = on.infer("m", given, outputs=[{"name": "OUT", "parameters": place("r", 8, 16)}])
        assert told.ok, told
        assert bytes(made.buf[16:24]) == bytes(made.buf[8:16])
        (output,) = told.head["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("OUT", "FP32", [1, 2])
        assert "data" not in output


@fact(SHM, "an output that does not fit is 500")
def _(on: Http | Grpc) -> None:
    with region(on, "r"):
        told = on.infer("m", IN, outputs=[{"name": "OUT", "parameters": place("r", 4)}])
        told.refuses(
            500,
            "shared memory size specified with the request for output 'OUT' (4 bytes) should be at least 8 bytes "
            "to hold the results",
        )


@fact(SHM, "unregister without a region forgets all")
def _(on: Http | Grpc) -> None:
    with memory(64) as made:
        for name in ("a", "b"):
            assert on.region("register", name, key=f"/{made.name}", byte_size=8).ok
        assert on.region("unregister").ok
        assert on.region("status").head[""] == []


@fact(SHM, "a key with the reserved prefix is refused")
def _(on: Http | Grpc) -> None:
    key = "/triton_python_backend_shm_region_x"
    on.region("register", "r", key=key, byte_size=8).refuses(
        400, f"cannot register shared memory region 'r' with key '{key}' as the key contains the reserved prefix"
    )


@fact(SHM, "without CUDA the status is empty, unregister is fine and register is UNAVAILABLE")
def _(on: Http | Grpc) -> None:
    assert on.region("status", kind="cuda").head[""] == []
    assert on.region("unregister", kind="cuda").ok
    assert on.region("unregister", "c", kind="cuda").ok
    body: Any = {"raw_handle": {"b64": "aGFuZGxl"}} if isinstance(on, Http) else {"raw_handle": b"handle"}
    on.region("register", "c", kind="cuda", device_id=0, byte_size=64, **body).refuses(
        503, "failed to register CUDA shared memory region: 'c'"
    )


@fact(SHM, "without permission all of it is 501", needs="strict")
def _(on: Http | Grpc) -> None:
    text = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
    for kind in ("system", "cuda"):
        on.region("status", kind=kind).refuses(501, text)
        on.region("unregister", kind=kind).refuses(501, text)
    on.region("register", "r", key="/x", byte_size=8).refuses(501, text)
    given = {"name": "IN", "datatype": "FP32", "shape": [1, 2], "parameters": place("r", 8)}
    on.infer("m", given).refuses(501, text)
