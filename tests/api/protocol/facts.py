"""What a fact of PROTOCOL.md is as a test, and the wires that facts are asked on."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import grpc
import numpy as np
import requests
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from tests.system.process import GatewayProcess

HTTP, GRPC = ("http",), ("grpc",)
BOTH = ("http", "grpc")
QUEUES = ("memory", "embedded")
CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    429: "RESOURCE_EXHAUSTED",
    504: "DEADLINE_EXCEEDED",
}
"""The gRPC code of a row of Triton's table, by its HTTP status."""

Check: TypeAlias = Callable[[Any], None]


class Fact(NamedTuple):
    """One fact: the section and the beginning of the line that say it, the fact in words, and what checks it.

    `needs` is the gateway that it is asked of, see `world.py`; none for what is no gateway's answer.
    """

    section: str
    line: str
    words: str
    wires: tuple[str, ...]
    queues: tuple[str, ...]
    needs: str
    check: Check

    @property
    def slug(self) -> str:
        """The words as a part of a test's id."""
        return f"{self.section}-" + re.sub(r"[^a-z0-9]+", "-", self.words.lower()).strip("-")


@dataclass
class Section:
    """A section of PROTOCOL.md and its facts. Lines that are no fact of a server's have their reason in `beyond`."""

    number: str
    facts: list[Fact] = field(default_factory=list)
    beyond: dict[str, str] = field(default_factory=dict)

    def fact(
        self,
        line: str,
        words: str,
        wires: tuple[str, ...] = BOTH,
        *,
        queues: tuple[str, ...] = QUEUES,
        needs: str = "main",
    ) -> Callable[[Check], Check]:
        """Mark a check as that of a fact; it is given a `Wire`."""

        def add(check: Check) -> Check:
            self.facts.append(Fact(self.number, line, words, wires, queues, needs, check))
            return check

        return add


class Answer(NamedTuple):
    """What came back. `code` is HTTP's status or gRPC's name of one; `head` is the JSON part of a result."""

    code: str
    text: str = ""
    head: Mapping[str, Any] = {}
    arrays: Mapping[str, Any] = {}
    headers: Mapping[str, str] = {}
    body: bytes = b""

    @property
    def ok(self) -> bool:
        """Whether it is a result."""
        return self.code in ("200", "OK")

    def refuses(self, status: int, text: str) -> None:
        """It is an error with HTTP's `status`, or gRPC's for that, whose text has this `text`, `…` for anything."""
        code = str(status) if self.code.isdigit() else CODES[status]
        assert self.code == code, self
        assert re.search(re.escape(text).replace("…", ".*"), self.text), self


def tensor(name: str, values: Any, datatype: str = "FP32", **more: Any) -> dict[str, Any]:
    """An input as JSON describes it; `values` are nested as its shape is."""
    array = np.array(values, triton_to_np_dtype(datatype) if datatype != "BF16" else np.float32)
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array, **more}


def raw(each: Mapping[str, Any]) -> bytes:
    """The bytes of an input's data on the wire."""
    array = each["data"]
    if each["datatype"] == "BYTES":
        packed = serialize_byte_tensor(array.astype(object))
        return bytes(packed.item()) if packed.size else b""
    return bytes(array.tobytes())


def unpacked(datatype: str, shape: Sequence[int], data: bytes) -> Any:
    """The array of an output's bytes."""
    if datatype == "BYTES":
        return deserialize_bytes_tensor(data).reshape(shape)
    if datatype == "BF16":
        return np.frombuffer(data, "<u2").reshape(shape)
    return np.frombuffer(data, triton_to_np_dtype(datatype)).reshape(shape)


class Wire:
    """One gateway, asked over one wire. What only one wire has are methods of the subclasses."""

    name = ""

    def __init__(self, gateways: Mapping[str, GatewayProcess], needs: str, token: str = "") -> None:
        self.gateways = gateways
        self.process = gateways[needs] if needs else None
        self.token = token

    @property
    def http(self) -> Http:
        """The same gateway over HTTP, for what a fact needs besides."""
        return Http(self.gateways, self._needs, self.token)

    @property
    def _needs(self) -> str:
        return next(name for name, each in self.gateways.items() if each is self.process)

    def port(self, name: str) -> int:
        """A port of the gateway."""
        assert self.process is not None
        return self.process.ports[name]


class Http(Wire):
    """HTTP, by plain requests: what is sent is what stands here."""

    name = "http"
    _session = requests.Session()

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> requests.Response:
        """Send it as it is; what is neither bytes nor nothing goes as JSON. Header names have `_` for `-`."""
        assert self.process is not None
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        told = {key.replace("_", "-"): value for key, value in headers.items()}
        if self.token:
            told.setdefault("authorization", f"Bearer {self.token}")
        told.setdefault("accept-encoding", "identity")
        return self._session.request(method, self.process.url(path), data=data, headers=told, timeout=20)

    def get(self, path: str, **headers: str) -> Any:
        """The JSON there, which must be."""
        answer = self.request("GET", path, **headers)
        assert answer.status_code == 200, (answer.status_code, answer.text)
        return answer.json()

    def post(self, path: str, body: Any = b"", **headers: str) -> Answer:
        """The answer to a POST, with its JSON as `head` where it has any."""
        return answered(self.request("POST", path, body, **headers))

    def infer(
        self, model: str, *inputs: Mapping[str, Any], outputs: Sequence[Any] = (), version: str = "", **more: Any
    ) -> Answer:
        """Infer with binary inputs and, unless `outputs` says otherwise, binary outputs."""
        parameters = dict(more.pop("parameters", {}))
        headers = more.pop("headers", {})
        described = [
            {key: value for key, value in each.items() if key != "data"}
            | {"parameters": {**each.get("parameters", {}), "binary_data_size": len(raw(each))}}
            if "data" in each
            else dict(each)
            for each in inputs
        ]
        wanted = [{"name": each} if isinstance(each, str) else dict(each) for each in outputs]
        for each in wanted:
            given = each["parameters"] = {"binary_data": True, **each.get("parameters", {})}
            if "shared_memory_region" in given:
                del given["binary_data"]
        head = {**more, "inputs": described, "parameters": {"binary_data_output": True, **parameters}}
        text = json.dumps(head | ({"outputs": wanted} if wanted else {})).encode()
        blobs = b"".join(raw(each) for each in inputs if "data" in each)
        where = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        return self.post(where, text + blobs, Inference_Header_Content_Length=str(len(text)), **headers)

    def metadata(self, model: str) -> Any:
        """A model's metadata as JSON."""
        return self.get(f"/v2/models/{model}")

    def config(self, model: str) -> Any:
        """A model's configuration as JSON."""
        return self.get(f"/v2/models/{model}/config")

    def statistics(self, model: str = "", version: str = "") -> Any:
        """The list `model_stats`."""
        where = f"/v2/models{f'/{model}' if model else ''}{f'/versions/{version}' if version else ''}/stats"
        return self.get(where)["model_stats"]

    def server(self) -> Any:
        """The server's metadata."""
        return self.get("/v2")

    def index(self, ready: bool = False) -> Any:
        """The repository's index."""
        answer = self.request("POST", "/v2/repository/index", {"ready": True} if ready else {})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def load(self, model: str, **parameters: str | bytes) -> Answer:
        """Load a model; bytes are files."""
        given = {
            key: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for key, value in parameters.items()
        }
        return self.post(f"/v2/repository/models/{model}/load", {"parameters": given} if given else b"")

    def unload(self, model: str, *, dependents: bool | None = None) -> Answer:
        """Unload a model."""
        body = b"" if dependents is None else {"parameters": {"unload_dependents": dependents}}
        return self.post(f"/v2/repository/models/{model}/unload", body)

    def ready(self, model: str, version: str = "") -> bool:
        """Whether a model is."""
        where = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/ready"
        return self.request("GET", where).status_code == 200

    def server_ready(self) -> bool:
        """Whether the server is."""
        return self.request("GET", "/v2/health/ready").status_code == 200

    def server_live(self) -> bool:
        """Whether the server lives."""
        return self.request("GET", "/v2/health/live").status_code == 200

    def logging(self, **news: Any) -> Answer:
        """The log settings, or a change of them."""
        return self.post("/v2/logging", news) if news else answered(self.request("GET", "/v2/logging"))

    def tracing(self, model: str = "", **news: Any) -> Answer:
        """The trace settings, or a change of them."""
        where = f"/v2{f'/models/{model}' if model else ''}/trace/setting"
        return self.post(where, news) if news else answered(self.request("GET", where))

    def region(self, action: str, name: str = "", kind: str = "system", **body: Any) -> Answer:
        """Act on regions of shared memory: status, register, unregister."""
        where = f"/v2/{kind}sharedmemory{f'/region/{name}' if name else ''}/{action}"
        answer = self.request("GET" if action == "status" else "POST", where, None if action == "status" else body)
        return answered(answer)


def answered(response: requests.Response) -> Answer:
    """A response as an `Answer`, a V2 result taken apart."""
    code, headers = str(response.status_code), response.headers
    length = headers.get("inference-header-content-length")
    body = response.content
    if length is not None:
        return _taken_apart(code, headers, body, int(length))
    found: Any = {}
    if body and headers.get("content-type", "").startswith("application/json"):
        found = response.json()
    if response.status_code != 200:
        assert set(found) == {"error"}, (code, body)
        return Answer(code, found["error"], headers=headers, body=body)
    head = found if isinstance(found, dict) else {"": found}
    arrays = {
        each["name"]: np.array(each["data"], object).reshape(each["shape"])
        for each in head.get("outputs", ())
        if isinstance(each, dict) and "data" in each
    }
    return Answer(code, "", head, arrays, headers, body)


def _taken_apart(code: str, headers: Mapping[str, str], body: bytes, length: int) -> Answer:
    head = json.loads(body[:length])
    arrays, at = {}, length
    for each in head["outputs"]:
        if "data" in each:
            arrays[each["name"]] = np.array(each["data"], object).reshape(each["shape"])
        elif (size := each.get("parameters", {}).get("binary_data_size")) is not None:
            arrays[each["name"]] = unpacked(each["datatype"], each["shape"], body[at : at + size])
            at += size
    assert at == len(body)
    return Answer(code, "", head, arrays, headers, body)


class Grpc(Wire):
    """gRPC, by the messages of Triton's service."""

    name = "grpc"

    def __init__(self, gateways: Mapping[str, GatewayProcess], needs: str, token: str = "") -> None:
        super().__init__(gateways, needs, token)
        self.channel: Any = _channels.setdefault(self.port("grpc"), _channel(self.port("grpc"))) if needs else None
        self.stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self.channel) if needs else None
        self.metadata_sent = (("authorization", f"Bearer {token}"),) if token else ()

    def ask(self, call: str, message: Any, *metadata: tuple[str, str]) -> Any:
        """The response, or the `Answer` that is an error."""
        sent = (*self.metadata_sent, *metadata)
        try:
            return getattr(self.stub, call)(message, timeout=20, metadata=sent)
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details())

    def told(self, call: str, message: Any) -> Any:
        """The response as JSON would have it; it must be one."""
        found = self.ask(call, message)
        assert not isinstance(found, Answer), found
        return _json(found)

    def message(self, model: str, *inputs: Mapping[str, Any], **more: Any) -> Any:
        """The ModelInferRequest; `parameters` are typed by Python's types, a tuple names the field itself."""
        version, request_id = more.get("version", ""), more.get("id", "")
        request = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
        for each in inputs:
            made = request.inputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
            _set(made.parameters, each.get("parameters", {}))
            if "data" in each:
                request.raw_input_contents.append(raw(each))
        for wanted in more.get("outputs", ()):
            named = {"name": wanted} if isinstance(wanted, str) else wanted
            _set(request.outputs.add(name=named["name"]).parameters, named.get("parameters", {}))
        _set(request.parameters, more.get("parameters", {}))
        return request

    def infer(self, model: str, *inputs: Mapping[str, Any], **more: Any) -> Answer:
        """Infer with raw inputs."""
        headers = more.pop("headers", {})
        sent = [(key.replace("_", "-").lower(), value) for key, value in headers.items()]
        found = self.ask("ModelInfer", self.message(model, *inputs, **more), *sent)
        return found if isinstance(found, Answer) else result(found)

    def metadata(self, model: str) -> Any:
        """A model's metadata as JSON has it."""
        return self.told("ModelMetadata", pb.ModelMetadataRequest(name=model))

    def config(self, model: str) -> Any:
        """A model's configuration as JSON has it."""
        return self.told("ModelConfig", pb.ModelConfigRequest(name=model))["config"]

    def statistics(self, model: str = "", version: str = "") -> Any:
        """The list `model_stats`."""
        return self.told("ModelStatistics", pb.ModelStatisticsRequest(name=model, version=version))["model_stats"]

    def server(self) -> Any:
        """The server's metadata."""
        return self.told("ServerMetadata", pb.ServerMetadataRequest())

    def index(self, ready: bool = False) -> Any:
        """The repository's index, empty members left out."""
        found = self.told("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready))["models"]
        return [{key: value for key, value in each.items() if value} for each in found]

    def load(self, model: str, **parameters: str | bytes) -> Answer:
        """Load a model; bytes are files."""
        request = pb.RepositoryModelLoadRequest(model_name=model)
        for key, value in parameters.items():
            setattr(request.parameters[key], "bytes_param" if isinstance(value, bytes) else "string_param", value)
        return _done(self.ask("RepositoryModelLoad", request))

    def unload(self, model: str, *, dependents: bool | None = None) -> Answer:
        """Unload a model."""
        request = pb.RepositoryModelUnloadRequest(model_name=model)
        if dependents is not None:
            request.parameters["unload_dependents"].bool_param = dependents
        return _done(self.ask("RepositoryModelUnload", request))

    def ready(self, model: str, version: str = "") -> bool:
        """Whether a model is; the call must go well."""
        found = self.ask("ModelReady", pb.ModelReadyRequest(name=model, version=version))
        assert not isinstance(found, Answer), found
        return bool(found.ready)

    def server_ready(self) -> bool:
        """Whether the server is; the call must go well."""
        return bool(self.stub.ServerReady(pb.ServerReadyRequest(), timeout=20).ready)

    def server_live(self) -> bool:
        """Whether the server lives."""
        return bool(self.stub.ServerLive(pb.ServerLiveRequest(), timeout=20).live)

    def logging(self, **news: Any) -> Answer:
        """The log settings, or a change of them."""
        request = pb.LogSettingsRequest()
        for key, value in news.items():
            kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(request.settings[key], kind, value)
        found = self.ask("LogSettings", request)
        if isinstance(found, Answer):
            return found
        head = {key: getattr(each, each.WhichOneof("parameter_choice")) for key, each in found.settings.items()}
        return Answer("OK", head=head)

    def tracing(self, model: str = "", **news: Any) -> Answer:
        """The trace settings, or a change of them; those of one value as that value, but for the level."""
        request = pb.TraceSettingRequest(model_name=model)
        for key, value in news.items():
            given = [] if value is None else [value] if isinstance(value, str) else value
            request.settings[key].value.extend(given)
        found = self.ask("TraceSetting", request)
        if isinstance(found, Answer):
            return found
        head = {
            key: list(each.value) if key == "trace_level" else each.value[0] for key, each in found.settings.items()
        }
        return Answer("OK", head=head)

    def region(self, action: str, name: str = "", kind: str = "system", **body: Any) -> Answer:
        """Act on regions of shared memory: status, register, unregister."""
        call = f"{kind.title()}SharedMemory{action.title()}"
        found = self.ask(call, getattr(pb, f"{call}Request")(name=name, **body))
        if isinstance(found, Answer):
            return found
        regions = [*_json(found)["regions"].values()] if action == "status" else []
        return Answer("OK", head={"": regions})

    def stream(self, *messages: Any, **metadata: str) -> tuple[list[Any], str]:
        """All answers of a ModelStreamInfer call to these, and the status that it ended with."""
        sent = (*self.metadata_sent, *metadata.items())
        found, code = [], "OK"
        try:
            found.extend(self.stub.ModelStreamInfer(iter(messages), timeout=20, metadata=sent))
        except grpc.RpcError as error:
            code = error.code().name
        return found, code


WIRES: dict[str, Callable[..., Http | Grpc]] = {"http": Http, "grpc": Grpc}
_channels: dict[int, AbstractContextManager[Any]] = {}


def _channel(port: int) -> Any:
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)])


def close() -> None:
    """Close what is kept open between facts."""
    for channel in _channels.values():
        channel.close()  # type: ignore[attr-defined]
    _channels.clear()


def result(found: Any) -> Answer:
    """A ModelInferResponse as an `Answer`, its head as HTTP's JSON has it."""
    arrays = {}
    if found.raw_output_contents:
        arrays = {
            each.name: unpacked(each.datatype, tuple(each.shape), data) if data else None
            for each, data in zip(found.outputs, found.raw_output_contents, strict=True)
        }
    head = {
        "id": found.id,
        "model_name": found.model_name,
        "model_version": found.model_version,
        "parameters": {key: getattr(each, each.WhichOneof("parameter_choice")) for key, each in found.parameters.items()},
        "outputs": [
            {"name": each.name, "datatype": each.datatype, "shape": [*each.shape]} for each in found.outputs
        ],
    }  # fmt: skip
    return Answer("OK", "", {key: value for key, value in head.items() if value}, arrays)


def _set(parameters: Any, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        field_name, told = value if isinstance(value, tuple) else (_KINDS[type(value)], value)
        setattr(parameters[key], field_name, told)


_KINDS = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}


def _done(found: Any) -> Answer:
    return found if isinstance(found, Answer) else Answer("OK")


def _json(message: Any) -> Any:
    told = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _numbers(told, message.DESCRIPTOR)


def _numbers(value: Any, descriptor: Any) -> Any:
    """The same with 64-bit integers as numbers, which protobuf's JSON writes as strings."""
    for each in descriptor.fields:
        if each.name not in value:
            continue
        found, kind = value[each.name], each.message_type
        if kind is not None and kind.GetOptions().map_entry:
            inner = kind.fields_by_name["value"].message_type
            for key in found if inner is not None else ():
                _numbers(found[key], inner)
        elif kind is not None:
            for one in found if isinstance(found, list) else [found]:
                _numbers(one, kind)
        elif each.cpp_type in {each.CPPTYPE_INT64, each.CPPTYPE_UINT64}:
            value[each.name] = [int(one) for one in found] if isinstance(found, list) else int(found)
    return value
