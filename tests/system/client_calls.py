"""Every call that tritonclient offers, made of a gateway that serves `tests.client_models`: run by any Python that has one.

`python client_calls.py KIND HTTP_PORT GRPC_PORT VERSION_FOLDER` makes the calls of one client: http, grpc, http.aio or
grpc.aio. It prints one line of JSON: {"client": its version, "checks": {name: null or what went wrong}, "left": the
client's public methods that no check called}. Imports nothing of this project: the client may be of any version.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
import inspect
import json
import queue
import secrets
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.utils.shared_memory as shm
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import (
    InferenceServerException,
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    serialize_byte_tensor,
    serialized_byte_size,
)

KINDS = ("http", "grpc", "http.aio", "grpc.aio")
FIRST = np.arange(16, dtype=np.int32).reshape(1, 16)
SECOND = np.ones((1, 16), np.int32)
CHECKS: dict[str, Any] = {}


def check(*kinds: str) -> Any:
    """What these clients can do, or all of them."""

    def add(function: Any) -> Any:
        CHECKS[function.__name__] = (function, kinds or KINDS)
        return function

    return add


class Client:
    """One of tritonclient's clients: each call blocks, whichever it is, and is remembered by its name."""

    def __init__(self, kind: str, ports: dict[str, str], folder: str, runner: asyncio.Runner) -> None:
        self.kind, self.folder = kind, Path(folder)
        self.wire, _, aio = kind.partition(".")
        self.aio = bool(aio)
        self.url = f"127.0.0.1:{ports[self.wire]}"
        self.grpc_url = f"127.0.0.1:{ports['grpc']}"
        self.module = importlib.import_module(f"tritonclient.{kind}")
        self.runner = runner
        self.called: set[str] = set()
        self.old = importlib.metadata.version("tritonclient").startswith("2.41.")

    def open(self, **options: Any) -> Any:
        async def make() -> Any:
            return self.module.InferenceServerClient(self.url, **options)

        return self.runner.run(make()) if self.aio else self.module.InferenceServerClient(self.url, **options)

    @contextlib.contextmanager
    def opened(self, **options: Any) -> Any:
        real = self.open(**options)
        before, self.real = getattr(self, "real", None), real
        try:
            yield self
        finally:
            self.call("close")
            self.real = before

    def call(self, name: str, *args: Any, **named: Any) -> Any:
        self.called.add(name)
        result = getattr(self.real, name)(*args, **named)
        return self.runner.run(wait(result)) if inspect.isawaitable(result) else result

    def told(self, name: str, *args: Any, **named: Any) -> Any:
        """The answer as the HTTP client gives it: plain values."""
        return self.call(name, *args, **named, **({"as_json": True} if self.wire == "grpc" else {}))

    def input(self, name: str, values: np.ndarray, datatype: str = "", **how: Any) -> Any:
        made = self.module.InferInput(name, list(values.shape), datatype or np_to_triton_dtype(values.dtype))
        made.set_data_from_numpy(values, **(how if self.wire == "http" else {}))
        return made

    def output(self, name: str, **how: Any) -> Any:
        if self.wire == "grpc":
            how.pop("binary_data", None)
        return self.module.InferRequestedOutput(name, **how)

    def pair(self, **how: Any) -> list[Any]:
        return [self.input("INPUT0", FIRST, **how), self.input("INPUT1", SECOND, **how)]

    def outputs(self, **how: Any) -> list[Any]:
        return [self.output("OUTPUT0", **how), self.output("OUTPUT1", **how)]

    def infer(self, model: str = "simple", inputs: Any = None, **more: Any) -> Any:
        return self.call("infer", model, inputs or self.pair(), **more)


async def wait(result: Any) -> Any:
    return await result


def same(found: Any, wanted: Any) -> None:
    assert found == wanted, f"{found!r} is not {wanted!r}"


def right(result: Any, first: np.ndarray = FIRST, second: np.ndarray = SECOND) -> None:
    """The sum and the difference."""
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), first + second)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), first - second)


def refused(call: Any, text: str, status: int | str = "", code: str = "") -> None:
    """The call is refused with this text, and this status of HTTP or code of gRPC."""
    try:
        answer = call()
    except InferenceServerException as problem:
        error = problem
    else:
        raise AssertionError(f"not refused but {answer!r}")
    assert text in error.message(), error.message()
    given = error.status() or ""
    assert not status or given in {str(status), f"StatusCode.{code}"}, given


def as_text(values: np.ndarray) -> np.ndarray:
    return np.array([str(each).encode() for each in values.ravel()], object).reshape(values.shape)


# --- the server and its models


@check()
def health(client: Client) -> None:
    assert client.call("is_server_live", headers={"test": "1", "dummy": "2"})
    assert client.call("is_server_ready")
    assert client.call("is_model_ready", "simple")
    assert client.call("is_model_ready", "simple", "1", headers={"test": "1"})
    assert not client.call("is_model_ready", "nonesuch")
    assert not client.call("is_model_ready", "simple", "7")


@check()
def metadata(client: Client) -> None:
    server = client.told("get_server_metadata")
    same(server["name"], "triton")
    for extension in ("classification", "sequence", "model_repository", "statistics", "trace", "logging"):
        assert extension in server["extensions"], extension
    assert server["version"]
    model = client.told("get_model_metadata", "simple", headers={"test": "1"})
    same((model["name"], model["versions"], model["platform"]), ("simple", ["1"], "onnxruntime_onnx"))
    same([each["name"] for each in model["inputs"]], ["INPUT0", "INPUT1"])
    same([[int(dim) for dim in each["shape"]] for each in model["outputs"]], [[-1, 16], [-1, 16]])
    unknown = "Request for unknown model: 'wrong_model_name' is not found"
    refused(lambda: client.call("get_model_metadata", "wrong_model_name"), unknown, 404, "NOT_FOUND")
    refused(lambda: client.call("get_model_metadata", "simple", "7"), "version 7 is not found", 404, "NOT_FOUND")


@check()
def configuration(client: Client) -> None:
    told = client.told("get_model_config", "simple")
    config = told["config"] if client.wire == "grpc" else told
    same((config["name"], config["max_batch_size"]), ("simple", 8))
    same([each["data_type"] for each in config["input"]], ["TYPE_INT32"] * 2)
    refused(lambda: client.call("get_model_config", "nope"), "Request for unknown model", 404, "NOT_FOUND")
    if client.wire == "grpc":
        same(client.call("get_model_config", "simple", "1").config.input[0].dims, [16])


@check()
def statistics(client: Client) -> None:
    def count() -> dict[str, int]:
        (entry,) = client.told("get_inference_statistics", "batched")["model_stats"]
        stats = entry["inference_stats"]
        return {
            "inferences": int(entry.get("inference_count", 0)),
            **{
                name: int(stats.get(name, {}).get("count", 0)) for name in ("success", "fail", "queue", "compute_infer")
            },
        }

    before = count()
    rows = [client.input(name, np.ones((3, 16), np.int32)) for name in ("INPUT0", "INPUT1")]
    client.infer("batched", rows)
    after = count()
    grown = {name: after[name] - before[name] for name in after}
    same(grown, {"inferences": 3, "success": 1, "fail": 0, "queue": 1, "compute_infer": 1})
    same(len(client.told("get_inference_statistics", "simple", "1")["model_stats"]), 1)
    names = {each["name"] for each in client.told("get_inference_statistics")["model_stats"]}
    assert {"simple", "batched", "simple_string"} <= names, names
    text = "requested model 'nope' is not available"
    refused(lambda: client.call("get_inference_statistics", "nope"), text, 400, "INVALID_ARGUMENT")


@check()
def model_control(client: Client) -> None:
    index = client.told("get_model_repository_index")
    index = index["models"] if client.wire == "grpc" else index
    named = {each["name"]: each for each in index}
    same((named["simple"]["state"], named["simple"]["version"]), ("READY", "1"))
    client.call("unload_model", "simple_int8")
    assert not client.call("is_model_ready", "simple_int8")
    client.call("load_model", "simple_int8")
    assert client.call("is_model_ready", "simple_int8")
    wrong = '"parameters": {"config": {{"max_batch_size": "16"}}}'
    refused(lambda: client.call("load_model", "simple_int8", config=wrong), "failed to load", 500, "INTERNAL")
    client.call("load_model", "simple_int8", config='{"max_batch_size":"16"}', headers={"test": "1"})
    told = client.told("get_model_config", "simple_int8")
    same((told["config"] if client.wire == "grpc" else told)["max_batch_size"], 16)
    refused(lambda: client.call("load_model", "wrong_model_name"), "failed to load", 500, "INTERNAL")


@check()
def model_control_with_files(client: Client) -> None:
    data = (client.folder / "model.onnx").read_bytes()
    config = {"backend": "onnxruntime", "max_batch_size": 8}
    if client.kind == "http.aio" and client.old:
        return  # it forgot to import base64, too
    long = {"file:" + "A" * 256: b"a"}
    refused(lambda: client.call("load_model", "from_a_file", config="{}", files=long), "Invalid file path")
    assert client.call("is_server_ready")
    files = {"file:1/model.onnx": data}
    text = "Load parameter 'config' must be specified for model file override"
    refused(lambda: client.call("load_model", "from_a_file", files=files), text, 500, "INTERNAL")
    client.call("load_model", "from_a_file", config=json.dumps(config), files=files)
    right(client.infer("from_a_file"))
    client.call("unload_model", "from_a_file", unload_dependents=True)
    assert not client.call("is_model_ready", "from_a_file")


@check()
def trace_settings(client: Client) -> None:
    def setting(told: dict[str, Any], name: str) -> Any:
        if client.wire == "grpc":
            found = told["settings"][name].get("value", [])
            return found if name == "trace_level" else found[0]
        return told[name]

    start = client.told("get_trace_settings")
    told = client.told("update_trace_settings", settings={"trace_rate": "500", "trace_level": ["TIMESTAMPS"]})
    same((setting(told, "trace_rate"), setting(told, "trace_level")), ("500", ["TIMESTAMPS"]))
    told = client.told("update_trace_settings", "simple", settings={"trace_rate": "7"}, headers={"test": "1"})
    same(setting(told, "trace_rate"), "7")
    same(setting(client.told("get_trace_settings", "simple"), "trace_rate"), "7")
    same(setting(client.told("get_trace_settings"), "trace_rate"), "500")
    client.call("update_trace_settings", "simple", settings={"trace_rate": None})
    same(setting(client.told("get_trace_settings", "simple"), "trace_rate"), "500")
    client.call("update_trace_settings", settings={"trace_rate": None, "trace_level": None})
    same(client.told("get_trace_settings"), start)


@check()
def log_settings(client: Client) -> None:
    def level(told: dict[str, Any]) -> int:
        return (
            told["settings"]["log_verbose_level"].get("uint32_param", 0)
            if client.wire == "grpc"
            else told["log_verbose_level"]
        )

    same(level(client.told("update_log_settings", {"log_verbose_level": 1, "log_info": True})), 1)
    same(level(client.told("get_log_settings")), 1)
    same(level(client.told("update_log_settings", {"log_verbose_level": 0}, headers={"test": "1"})), 0)
    refused(lambda: client.call("update_log_settings", {"log_file": "x"}), "log file location can not be updated")


# --- inference


@check()
def infer(client: Client) -> None:
    right(client.infer())
    right(client.infer(outputs=client.outputs(), model_version="1"))
    only = client.infer(outputs=[client.output("OUTPUT1")])
    np.testing.assert_array_equal(only.as_numpy("OUTPUT1"), FIRST - SECOND)
    assert only.as_numpy("OUTPUT0") is None
    assert only.get_output("OUTPUT0") is None
    result = client.infer(request_id="my id", priority=1, timeout=5_000_000, headers={"test": "1"})
    response = result.get_response(**({"as_json": True} if client.wire == "grpc" else {}))
    same((response["id"], response["model_name"], response["model_version"]), ("my id", "simple", "1"))
    output = result.get_output("OUTPUT0")
    same(output["datatype"] if client.wire == "http" else output.datatype, "INT32")
    if client.wire == "http":
        right(client.infer(query_params={"test_1": 1, "test_2": 2}))
        mixed = [client.input("INPUT0", FIRST, binary_data=False), client.input("INPUT1", SECOND, binary_data=True)]
        asked = [client.output("OUTPUT0", binary_data=True), client.output("OUTPUT1", binary_data=False)]
        right(client.infer(inputs=mixed, outputs=asked))
        right(client.infer(inputs=client.pair(binary_data=False), outputs=client.outputs(binary_data=False)))
    else:
        right(client.infer(client_timeout=10))


@check()
def errors_in_tritons_words(client: Client) -> None:
    unknown = "Request for unknown model: 'wrong_model_name' is not found"
    refused(lambda: client.infer("wrong_model_name"), unknown, 404, "NOT_FOUND")
    refused(
        lambda: client.infer(inputs=client.pair()[:1]), "expected 2 inputs but got 1 inputs", 400, "INVALID_ARGUMENT"
    )
    wide = [client.input(f"INPUT{n}", np.zeros((9, 16), np.int32)) for n in range(2)]
    refused(lambda: client.infer(inputs=wide), "batch-size must be <= 8 for 'simple'", 400, "INVALID_ARGUMENT")
    other = [client.input("INPUT0", FIRST.astype(np.float32)), client.pair()[1]]
    refused(lambda: client.infer(inputs=other), "data-type is 'FP32', but model 'simple' expects 'INT32'")
    refused(lambda: client.infer(outputs=[client.output("Z")]), "unexpected inference output 'Z' for model 'simple'")
    text = "doesn't support models with decoupled transaction policy"
    square = [client.input("IN", np.array([2], np.int32))]
    refused(lambda: client.infer("square_int32", square), text, 501, "UNIMPLEMENTED")


@check()
def datatypes(client: Client) -> None:
    names = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")
    for name in names:
        dtype = {"BOOL": bool, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64}.get(name, name.lower())
        values = np.array([[0, 1], [1, 0]]).astype(dtype)
        result = client.infer(f"echo_{name}", [client.input("IN", values)]).as_numpy("OUT")
        same(result.dtype, values.dtype)
        np.testing.assert_array_equal(result, values)
    try:
        from ml_dtypes import bfloat16 as kind
    except ImportError:
        kind = np.float32  # what clients took before they knew ml_dtypes
    values = np.array([[1.5, -2.0], [0.0, 3.0]], kind)
    try:
        given = client.input("IN", values, "BF16")
    except (
        InferenceServerException
    ):  # a client that knows ml_dtypes where that is not installed wants it; others do not
        given = client.input("IN", values.astype(np.float32), "BF16")
    result = client.infer("echo_BF16", [given]).as_numpy("OUT")
    np.testing.assert_array_equal(result.astype(np.float32), values.astype(np.float32))
    empty = client.infer("echo_empty", [client.input("IN", np.empty((1, 0), np.float32))]).as_numpy("OUT")
    same(empty.shape, (1, 0))


@check()
def strings(client: Client) -> None:
    forms = [{"binary_data": True}, {"binary_data": False}] if client.wire == "http" else [{}]
    for form in forms:
        pair = [client.input("INPUT0", as_text(FIRST), **form), client.input("INPUT1", as_text(SECOND), **form)]
        result = client.infer("simple_string", pair, outputs=client.outputs(**form))
        same([int(each) for each in result.as_numpy("OUTPUT0").ravel()], (FIRST + SECOND).ravel().tolist())
        same([int(each) for each in result.as_numpy("OUTPUT1").ravel()], (FIRST - SECOND).ravel().tolist())
        null = np.array([b"he\x00llo", b"", "\N{SNOWMAN}".encode(), b"\x00\x01\x02\x03"], object).reshape(1, 4)
        result = client.infer(
            "simple_identity", [client.input("INPUT0", null, **form)], outputs=[client.output("OUTPUT0", **form)]
        )
        found = [each if isinstance(each, bytes) else each.encode() for each in result.as_numpy("OUTPUT0").ravel()]
        same(found, null.ravel().tolist())
        fixed = np.array([b"\x00\x01\x02\x03"] * 16, np.bytes_).reshape(1, 16)
        result = client.infer("simple_identity", [client.input("INPUT0", fixed, "BYTES", **form)])
        same(result.as_numpy("OUTPUT0").ravel().tolist(), fixed.ravel().tolist())


@check()
def compression(client: Client) -> None:
    if client.wire == "grpc":
        right(client.infer(compression_algorithm="gzip"))
        return
    # tritonclient 2.41 forgot to import gzip and zlib where its asyncio client wants them.
    for asked in (None,) if client.aio and client.old else ("gzip", "deflate", None):
        for answered in ("gzip", "deflate", None):
            for form in (True, False):
                result = client.infer(
                    inputs=client.pair(binary_data=form), outputs=client.outputs(binary_data=form),
                    request_compression_algorithm=asked, response_compression_algorithm=answered,
                )  # fmt: skip
                right(result)


@check()
def parameters_and_headers(client: Client) -> None:
    given = {"text": "a b", "number": 7, "yes": True}
    if client.wire == "http" or not client.old:
        given["half"] = 0.5  # tritonclient 2.41 knows no doubles on gRPC
    value = client.input("INPUT", np.array([[3]], np.int32))
    result = client.infer("parameters", [value], parameters=given, headers={"x-forwarded-test": "v"})
    found = json.loads(result.as_numpy("PARAMETERS").ravel()[0])
    same(found, {**given, "x-forwarded-test": "v"})
    same(result.as_numpy("OUTPUT").tolist(), [[3]])


@check()
def plugins(client: Client) -> None:
    auth = importlib.import_module(f"tritonclient.{client.kind}.auth")
    plugin = auth.BasicAuth("user", "word")
    with client.opened():
        client.call("register_plugin", plugin)
        assert client.call("plugin") is plugin
        refused(lambda: client.call("register_plugin", plugin), "A plugin is already registered")
        value = client.input("INPUT", np.array([[3]], np.int32))
        found = client.infer("parameters", [value], headers={"x-forwarded-test": "v"}).as_numpy("PARAMETERS")
        same(json.loads(found.ravel()[0]), {"authorization": "Basic dXNlcjp3b3Jk", "x-forwarded-test": "v"})
        assert client.call("is_server_live")
        client.call("unregister_plugin")
        assert client.call("plugin") is None
        same(json.loads(client.infer("parameters", [value]).as_numpy("PARAMETERS").ravel()[0] or b"{}"), {})


@check()
def classification(client: Client) -> None:
    picture = client.input("data_0", np.ones((1, 3, 224, 224), np.float32))
    result = client.infer("densenet_onnx", [picture], outputs=[client.output("fc6_1", class_count=3)])
    top = result.as_numpy("fc6_1")
    same(top.shape, (1, 3))
    values = [float(each.decode().split(":")[0]) for each in top[0]]
    same(values, sorted(values, reverse=True))
    for each in top[0]:
        _, index, label = each.decode().split(":")
        same(label, f"label {index}")


@check()
def reuse_of_objects(client: Client) -> None:
    """The same InferInput and InferRequestedOutput with memory, without, and with it again; other values and shapes."""
    inputs, outputs = client.pair(), client.outputs()
    with regions(client, in0=64, in1=64, out0=64, out1=64) as held:
        shm.set_shared_memory_region(held["in0"], [FIRST])
        shm.set_shared_memory_region(held["in1"], [SECOND])
        for shared in (True, False, True, False):
            values = SECOND if shared else 2 * SECOND
            for n, each in enumerate((FIRST, values)):
                if shared:
                    inputs[n].set_shared_memory(f"{client.kind}_in{n}", 64)
                    outputs[n].set_shared_memory(f"{client.kind}_out{n}", 64)
                else:
                    inputs[n].set_data_from_numpy(each)
                    outputs[n].unset_shared_memory()
            result = client.infer(inputs=inputs, outputs=outputs)
            if shared:
                for n, wanted in enumerate((FIRST + values, FIRST - values)):
                    found = shm.get_contents_as_numpy(held[f"out{n}"], np.int32, [1, 16])
                    np.testing.assert_array_equal(found, wanted)
            else:
                right(result, FIRST, values)
    rows = np.repeat(FIRST, 3, axis=0)
    for each in inputs:
        each.set_shape(rows.shape)
        each.set_data_from_numpy(rows)
    same((inputs[0].name(), inputs[0].datatype(), list(inputs[0].shape())), ("INPUT0", "INT32", [3, 16]))
    same(outputs[1].name(), "OUTPUT1")
    right(client.infer(inputs=inputs, outputs=outputs), rows, rows)


@check("http", "grpc")
def asynchronous(client: Client) -> None:
    if client.wire == "http":
        with client.opened(concurrency=4):
            handles = [client.call("async_infer", "simple", client.pair(), request_id=str(n)) for n in range(8)]
            for n, handle in enumerate(handles):
                result = handle.get_result(block=True, timeout=30)
                right(result)
                same(result.get_response()["id"], str(n))
            wrong = client.call("async_infer", "wrong_model_name", client.pair())
            refused(wrong.get_result, "Request for unknown model: 'wrong_model_name' is not found", 404)
        return
    answers: queue.Queue[Any] = queue.Queue()
    take = partial(lambda into, result, error: into.put((result, error)), answers)
    for n in range(8):
        client.call("async_infer", "simple", client.pair(), take, request_id=str(n), client_timeout=30)
    for _ in range(8):
        result, error = answers.get(timeout=30)
        assert error is None, error
        right(result)
    client.call("async_infer", "wrong_model_name", client.pair(), take)
    result, error = answers.get(timeout=30)
    same((result, error.status()), (None, "StatusCode.NOT_FOUND"))
    value = [client.input("INPUT", np.array([[3]], np.int32))]
    call = client.call("async_infer", "slow", value, take)
    call.cancel()
    result, error = answers.get(timeout=30)
    same((result, error.status()), (None, "StatusCode.CANCELLED"))


@check("http.aio", "grpc.aio")
def side_by_side(client: Client) -> None:
    async def many() -> list[Any]:
        return await asyncio.gather(*(client.real.infer("simple", client.pair(), request_id=str(n)) for n in range(8)))

    for n, result in enumerate(client.runner.run(many())):
        right(result)
        response = result.get_response()
        same(response["id"] if client.wire == "http" else response.id, str(n))


@check("grpc", "grpc.aio")
def time_limits(client: Client) -> None:
    value = [client.input("INPUT", np.array([[3]], np.int32))]
    # Whoever sees it first, the client or the server, says so in words of its own.
    refused(lambda: client.infer("slow", value, client_timeout=0.05), "", "-", "DEADLINE_EXCEEDED")
    assert client.call("is_server_live", client_timeout=10)
    assert client.call("is_model_ready", "simple", client_timeout=10)


@check("http", "http.aio")
def bodies_by_hand(client: Client) -> None:
    """What a caller with an HTTP library of its own uses."""
    import urllib.request

    body, length = client.call("generate_request_body", client.pair(), outputs=client.outputs(), request_id="1")
    headers = {"Inference-Header-Content-Length": str(length)} if length is not None else {}
    request = urllib.request.Request(f"http://{client.url}/v2/models/simple/infer", body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = answer.headers.get("Inference-Header-Content-Length")
        right(client.call("parse_response_body", answer.read(), header_length=int(found)))


@check("grpc", "grpc.aio")
def channel_options(client: Client) -> None:
    options = client.module.KeepAliveOptions(
        keepalive_time_ms=10_000, keepalive_timeout_ms=5_000, keepalive_permit_without_calls=True,
        http2_max_pings_without_data=0,
    )  # fmt: skip
    with client.opened(keepalive_options=options):
        right(client.infer())
        assert client.call("is_server_ready")
    arguments = [
        ("grpc.max_send_message_length", 1024 * 1024), ("grpc.max_receive_message_length", 1024 * 1024),
        ("grpc.keepalive_time_ms", 2**31 - 1), ("grpc.keepalive_timeout_ms", 20000),
        ("grpc.keepalive_permit_without_calls", False), ("grpc.http2.max_pings_without_data", 2),
        ("grpc.dns_enable_srv_queries", 1),
    ]  # fmt: skip
    with client.opened(channel_args=arguments):
        right(client.infer(headers={"test": "1"}))


@check()
def a_talkative_client(client: Client) -> None:
    with client.opened(verbose=True):
        right(client.infer(request_id="1"))
        client.call("get_inference_statistics", "simple")


# --- shared memory


@contextlib.contextmanager
def regions(client: Client, **sizes: int) -> Any:
    """Shared memory that the server knows, each named KIND_NAME."""
    held, keys = {}, {}
    try:
        for name, size in sizes.items():
            keys[name] = f"/{client.kind}_{name}_{secrets.token_hex(4)}"
            held[name] = shm.create_shared_memory_region(f"{client.kind}_{name}", keys[name], size)
            client.call("register_system_shared_memory", f"{client.kind}_{name}", keys[name], size)
        yield held
    finally:
        for name in sizes:
            client.call("unregister_system_shared_memory", f"{client.kind}_{name}")
        for each in held.values():
            shm.destroy_shared_memory_region(each)


def region_names(told: Any) -> list[str]:
    return sorted(told.get("regions", {})) if isinstance(told, dict) else sorted(each["name"] for each in told)


def place(made: Any, region: str, size: int, offset: int = 0) -> Any:
    made.set_shared_memory(region, size, offset)
    return made


@check()
def shared_memory(client: Client) -> None:
    client.call("unregister_system_shared_memory")
    client.call("unregister_cuda_shared_memory")
    ours = [f"{client.kind}_input", f"{client.kind}_output"]
    with regions(client, input=128, output=128) as held:
        told = client.told("get_system_shared_memory_status")
        same(region_names(told), ours)
        same(region_names(client.told("get_system_shared_memory_status", ours[0])), ours[:1])
        shm.set_shared_memory_region(held["input"], [FIRST])
        shm.set_shared_memory_region(held["input"], [SECOND], offset=64)
        inputs = [place(client.module.InferInput(f"INPUT{n}", [1, 16], "INT32"), ours[0], 64, 64 * n) for n in range(2)]
        outputs = [place(client.output(f"OUTPUT{n}", binary_data=True), ours[1], 64, 64 * n) for n in range(2)]
        result = client.infer(inputs=inputs, outputs=outputs)
        for n, wanted in enumerate((FIRST + SECOND, FIRST - SECOND)):
            found = shm.get_contents_as_numpy(held["output"], np.int32, [1, 16], offset=64 * n)
            np.testing.assert_array_equal(found, wanted)
            output = result.get_output(f"OUTPUT{n}")
            kind = output["datatype"] if client.wire == "http" else output.datatype
            same(kind, "INT32")
        again = partial(client.call, "register_system_shared_memory", ours[0], "/another", 64)
        refused(again, f"shared memory region '{ours[0]}' already in manager", 400, "ALREADY_EXISTS")
        small = [place(client.output("OUTPUT0"), ours[1], 8)]
        refused(lambda: client.infer(outputs=small), "should be at least 64 bytes to hold the results", 500, "INTERNAL")
    unknown = f"Unable to find system shared memory region: '{ours[0]}'"
    refused(lambda: client.call("get_system_shared_memory_status", ours[0]), unknown, 404, "NOT_FOUND")
    same(region_names(client.told("get_system_shared_memory_status")), [])


@check()
def shared_memory_of_strings(client: Client) -> None:
    values = [as_text(FIRST), as_text(SECOND), as_text(FIRST + SECOND), as_text(FIRST - SECOND)]
    data = [serialize_byte_tensor(each) for each in values]
    sizes = [serialized_byte_size(each) for each in data]
    names = ("in0", "in1", "out0", "out1")
    with regions(client, **dict(zip(names, sizes, strict=True))) as held:
        inputs, outputs = [], []
        for n in range(2):
            shm.set_shared_memory_region(held[f"in{n}"], [data[n]])
            made = client.module.InferInput(f"INPUT{n}", [1, 16], "BYTES")
            inputs.append(place(made, f"{client.kind}_in{n}", sizes[n]))
            outputs.append(place(client.output(f"OUTPUT{n}"), f"{client.kind}_out{n}", sizes[2 + n]))
        client.infer("simple_string", inputs, outputs=outputs)
        for n in range(2):
            found = shm.get_contents_as_numpy(held[f"out{n}"], np.object_, [1, 16])
            same(found.ravel().tolist(), values[2 + n].ravel().tolist())


@check()
def cuda_shared_memory_without_cuda(client: Client) -> None:
    client.call("unregister_cuda_shared_memory")
    client.call("unregister_cuda_shared_memory", "nonesuch")
    same(region_names(client.told("get_cuda_shared_memory_status")), [])
    handle = b"AAAA" * 16
    refused(lambda: client.call("register_cuda_shared_memory", "x", handle, 0, 64), "", 503, "UNAVAILABLE")


# --- sequences and streams


def numbers(client: Client, model: str, of: int | str, values: list[int]) -> list[dict[str, Any]]:
    """What `infer` and the streams want for each request of a sequence."""
    return [
        {
            "model_name": model, "inputs": [client.input("INPUT", np.full((1, 1), value, np.int32))],
            "outputs": [client.output("OUTPUT")], "request_id": f"{of}_{n}", "sequence_id": of,
            "sequence_start": n == 0, "sequence_end": n == len(values) - 1,
        }
        for n, value in enumerate(values)
    ]  # fmt: skip


SEQUENCES = (
    ("simple_sequence", 1000, [0, 11, 7, 5], [1, 11, 7, 5]),
    ("simple_sequence", "8e03978e-40d5-43dd-bc93-6894a57f9324", [20, -11, -7], [21, -11, -7]),
    ("simple_dyna_sequence", 1001, [100, -11, 1], [101, -11, 1002]),
    ("simple_string_dyna_sequence", "1002", [20, -11, 1], [20, 9, 10 + 1002]),
)


@check()
def sequences(client: Client) -> None:
    for model, of, values, wanted in SEQUENCES:
        results = [client.call("infer", **each) for each in numbers(client, model, of, values)]
        same([int(each.as_numpy("OUTPUT")[0, 0]) for each in results], wanted)
    # The sequence has ended: what comes under its number must begin anew.
    late = numbers(client, "simple_sequence", 1000, [1, 2])[1]
    refused(
        lambda: client.call("infer", **late),
        "must specify the START flag on the first request",
        400,
        "INVALID_ARGUMENT",
    )


def streamed(client: Client, requests: list[dict[str, Any]], count: int, **options: Any) -> list[tuple[Any, Any]]:
    """The answers to these requests on one stream."""
    if client.aio:

        async def stream() -> list[tuple[Any, Any]]:
            client.called.add("stream_infer")

            async def give() -> Any:
                for each in requests:
                    yield each

            return [each async for each in client.real.stream_infer(give(), **options)]

        return client.runner.run(stream())
    answers: queue.Queue[Any] = queue.Queue()
    client.call("start_stream", lambda result, error: answers.put((result, error)), **options)
    for each in requests:
        client.call("async_stream_infer", **each)
    found = [answers.get(timeout=30) for _ in range(count)]
    client.call("stop_stream")
    assert answers.empty()
    return found


@check("grpc", "grpc.aio")
def streams(client: Client) -> None:
    for options in (
        {},
        {"stream_timeout": 30, "headers": {"test": "1"}},
        {"compression_algorithm": "gzip"},
        {"compression_algorithm": "deflate"},
    ):
        wanted: dict[str, list[int]] = {}
        requests = []
        for model, of, values, answers in SEQUENCES:
            wanted[str(of)] = answers
            requests += numbers(client, model, of, values)
        found: dict[str, list[int]] = {}
        for result, error in streamed(client, requests, len(requests), **options):
            assert error is None, error
            name = result.get_response().id.rpartition("_")[0]
            found.setdefault(name, []).append(int(result.as_numpy("OUTPUT")[0, 0]))
        same(found, wanted)


@check("grpc", "grpc.aio")
def errors_in_streams(client: Client) -> None:
    good = {"model_name": "simple", "inputs": client.pair(), "request_id": "good"}
    bad = {"model_name": "wrong_model_name", "inputs": client.pair(), "request_id": "bad"}
    answers = streamed(client, [bad, good], 2)
    errors = [error for _, error in answers if error is not None]
    (result,) = [result for result, _ in answers if result is not None]
    same([each.message() for each in errors], ["Request for unknown model: 'wrong_model_name' is not found"])
    right(result)


@check("grpc", "grpc.aio")
def many_answers(client: Client) -> None:
    """A decoupled model: as many answers as it says, with an empty last one if that is asked for."""
    values = np.arange(100, 110, dtype=np.int32)
    repeat = {
        "model_name": "repeat_int32", "outputs": [client.output("OUT")],
        "inputs": [
            client.input("IN", values), client.input("DELAY", np.zeros(10, np.uint32)),
            client.input("WAIT", np.zeros(1, np.uint32)),
        ],
    }  # fmt: skip
    results = [result for result, error in streamed(client, [repeat], 10) if error is None]
    same([result.as_numpy("OUT").tolist() for result in results], [[value] for value in values])
    if client.aio:
        return  # this client has no way to ask for it
    answers = streamed(client, [{**repeat, "enable_empty_final_response": True}], 11)
    finals = [result.get_response().parameters["triton_final_response"].bool_param for result, _ in answers]
    same(finals, [False] * 10 + [True])
    same(answers[-1][0].get_response().outputs, [])
    none = {"model_name": "square_int32", "inputs": [client.input("IN", np.zeros(1, np.int32))]}
    (answer,) = streamed(client, [{**none, "enable_empty_final_response": True}], 1)
    assert answer[0].get_response().parameters["triton_final_response"].bool_param
    plain = {"model_name": "simple", "inputs": client.pair(), "enable_empty_final_response": True}
    (answer,) = streamed(client, [plain], 1)
    assert answer[0].get_response().parameters["triton_final_response"].bool_param
    right(answer[0])


@check("grpc", "grpc.aio")
def streams_that_are_left(client: Client) -> None:
    value = [client.input("INPUT", np.array([[3]], np.int32))]
    if client.aio:

        async def leave() -> None:
            forever = asyncio.Event()

            async def give() -> Any:
                yield {"model_name": "slow", "inputs": value}
                await forever.wait()

            stream = client.real.stream_infer(give())
            stream.cancel()
            try:
                await stream.__anext__()
            except (asyncio.CancelledError, InferenceServerException):
                return
            raise AssertionError("the stream went on")

        client.runner.run(leave())
    else:
        answers: queue.Queue[Any] = queue.Queue()
        client.call("start_stream", lambda result, error: answers.put((result, error)))
        client.call("async_stream_infer", "slow", value)
        client.call("stop_stream", cancel_requests=True)
        result, error = answers.get(timeout=30)
        same((result, error.status()), (None, "StatusCode.CANCELLED"))
    right(client.infer())


# --- explicit contents: the stub itself


@check("grpc")
def explicit_contents(client: Client) -> None:
    kinds = {
        "simple": ("INT32", "int_contents", np.int32), "simple_int8": ("INT8", "int_contents", np.int8),
        "simple_string": ("BYTES", "bytes_contents", None),
    }  # fmt: skip
    with grpc.insecure_channel(client.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for model, (datatype, field, dtype) in kinds.items():
            request = service_pb2.ModelInferRequest(model_name=model)
            for name, values in (("INPUT0", FIRST), ("INPUT1", SECOND)):
                tensor = request.inputs.add(name=name, datatype=datatype, shape=[1, 16])
                given = values.ravel().tolist() if dtype else as_text(values).ravel().tolist()
                getattr(tensor.contents, field).extend(given)
            for name in ("OUTPUT0", "OUTPUT1"):
                request.outputs.add(name=name)
            response = stub.ModelInfer(request, timeout=30)
            read = partial(np.frombuffer, dtype=dtype) if dtype else deserialize_bytes_tensor
            found = [[int(each) for each in read(raw)] for raw in response.raw_output_contents]
            same(found, [(FIRST + SECOND).ravel().tolist(), (FIRST - SECOND).ravel().tolist()])
        both = service_pb2.ModelInferRequest(model_name="simple", raw_input_contents=[FIRST.tobytes()])
        both.inputs.add(name="INPUT0", datatype="INT32", shape=[1, 16]).contents.int_contents.extend(range(16))
        both.inputs.add(name="INPUT1", datatype="INT32", shape=[1, 16]).contents.int_contents.extend(range(16))
        text = "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'"
        try:
            stub.ModelInfer(both, timeout=30)
        except grpc.RpcError as problem:
            same((problem.code(), text in problem.details()), (grpc.StatusCode.INVALID_ARGUMENT, True))
        else:
            raise AssertionError("both were taken")
        contents = {
            "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
            "UINT64": "uint64_contents", "INT16": "int_contents", "INT64": "int64_contents", "FP32": "fp32_contents",
            "FP64": "fp64_contents",
        }  # fmt: skip
        for datatype, field in contents.items():
            request = service_pb2.ModelInferRequest(model_name=f"echo_{datatype}")
            tensor = request.inputs.add(name="IN", datatype=datatype, shape=[1, 2])
            getattr(tensor.contents, field).extend([1, 0])
            response = stub.ModelInfer(request, timeout=30)
            request.ClearField("inputs")
            dtype = {"BOOL": bool, "FP32": np.float32, "FP64": np.float64}.get(datatype, datatype.lower())
            same(np.frombuffer(response.raw_output_contents[0], dtype).tolist(), [1, 0])


# --- all of it


def report(kind: str, http: str, grpc_port: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with asyncio.Runner() as runner:
        client = Client(kind, {"http": http, "grpc": grpc_port}, folder, runner)
        for name, (function, kinds) in CHECKS.items():
            if kind in kinds:
                try:
                    with client.opened(), contextlib.redirect_stdout(sys.stderr):
                        function(client)
                    found[name] = None
                except Exception:  # noqa: BLE001 - whatever it was, it is told
                    found[name] = traceback.format_exc(limit=-4)
        public = {name for name in dir(client.module.InferenceServerClient) if not name.startswith("_")}
    version = importlib.metadata.version("tritonclient")
    return {"client": version, "checks": found, "left": sorted(public - client.called)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report(*sys.argv[1:])))
