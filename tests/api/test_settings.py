"""Log and trace settings as unmodified clients read and change them: HTTP, gRPC and their asyncio twins."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http.aio as http_aio
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from gateway import telemetry
from gateway.config.trace import read_trace_config
from gateway.queues.base import PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Service
from gateway.service.controls import Controls
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.transport.grpc import GrpcOptions, GrpcServer
from gateway.transport.http import HttpApp, HttpServer
from tests.support import model_config

LOGS = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
LOG_FILE = "log file location can not be updated through network protocol"
TRACE_FILE = "trace file location can not be updated through network protocol"


@dataclass
class Served:
    """A gateway by its controls and the clients that talk to it, which give and take plain values."""

    controls: Controls
    http: http_aio.InferenceServerClient
    grpc: grpc_aio.InferenceServerClient
    url: str
    traces: dict[str, Any]  # the trace settings at the start


class Wire:
    """What one wire's client says, as HTTP says it."""

    def __init__(self, served: Served, name: str) -> None:
        self._client: Any = getattr(served, name)
        self._grpc = name == "grpc"

    async def logs(self, **news: Any) -> dict[str, Any]:
        told = await (self._client.update_log_settings(news) if news else self._client.get_log_settings())
        if not self._grpc:
            return told
        return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in told.settings.items()}

    async def traces(self, model: str | None = None, **news: Any) -> dict[str, Any]:
        client = self._client
        told = await (client.update_trace_settings(model, news) if news else client.get_trace_settings(model))
        if not self._grpc:
            return told
        settings = json_format.MessageToDict(told)["settings"]
        return {
            name: value["value"] if name == "trace_level" else value["value"][0] for name, value in settings.items()
        }


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Served]:
    queue = MemoryQueue()
    queue.publish(PoolState("m", (VersionState("1", "READY", config=model_config()),)))

    async def names() -> list[str]:
        return ["m"]

    file = str(folder / "trace.json")
    config = read_trace_config([f"triton,file={file}", "rate=1", "level=TIMESTAMPS"])
    controls = Controls(traces=config)
    service = Service(queue, Statistics(), names, ServiceOptions(), controls=controls)
    service.start()
    app = HttpApp(service, service.infer)
    grpc_server = GrpcServer(service, service.infer, None, GrpcOptions(port=0))
    async with app, HttpServer(app, "127.0.0.1", 0) as server, grpc_server as rpc_server:
        http = http_aio.InferenceServerClient(f"127.0.0.1:{server.port}")
        rpc = grpc_aio.InferenceServerClient(f"127.0.0.1:{rpc_server.port}")
        first = {
            "trace_level": ["TIMESTAMPS"],
            "trace_rate": "1",
            "trace_count": "-1",
            "log_frequency": "0",
            "trace_file": file,
            "trace_mode": "triton",
        }
        async with http, rpc:
            yield Served(controls, http, rpc, f"http://127.0.0.1:{server.port}", first)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    logger = logging.getLogger("gateway")
    level = logger.level
    async with serving(tmp_path) as running:
        yield running
    telemetry.switch_logging(info=True, warning=True, error=True, verbose=0)
    logger.setLevel(level)


@pytest.fixture(params=["http", "grpc"])
def wire(request: pytest.FixtureRequest, served: Served) -> Wire:
    return Wire(served, request.param)


async def failure(call: Any) -> str:
    with pytest.raises(InferenceServerException) as raised:
        await call
    return raised.value.message()


# --- logging


async def test_log_settings_are_read_and_changed(served: Served, wire: Wire) -> None:
    assert await wire.logs() == LOGS
    news = {"log_info": False, "log_verbose_level": 2, "log_format": "ISO8601"}
    assert await wire.logs(**news) == LOGS | news
    assert await Wire(served, "http").logs() == await Wire(served, "grpc").logs() == LOGS | news


async def test_the_log_file_and_unknown_formats_are_refused(wire: Wire) -> None:
    assert LOG_FILE in await failure(wire.logs(log_file="/tmp/x"))
    assert "log_format, got: xml" in await failure(wire.logs(log_format="xml"))
    assert await wire.logs() == LOGS


async def test_a_switched_off_level_is_not_written(
    served: Served, wire: Wire, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        telemetry.configure_logging("text", 0)
        await wire.logs(log_warning=False)
        telemetry.log_event("hidden", logging.WARNING)
        telemetry.log_event("seen", logging.ERROR)
        await wire.logs(log_warning=True)
        telemetry.log_event("back", logging.WARNING)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    written = capsys.readouterr().err
    assert "hidden" not in written
    assert "seen" in written
    assert "back" in written


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"log_info": 1}, 500, "attempt to access JSON non-boolean as boolean"),
        ({"log_verbose_level": -1}, 500, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        ({"log_file": "x"}, 501, LOG_FILE),
        ({"log_format": "x"}, 503, "invalid argument for --log_format, got: x"),
    ],
)
async def test_bad_log_settings_over_http(served: Served, body: Any, status: int, text: str) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client:
        answer = await client.post("/v2/logging", json=body)
        assert (answer.status_code, answer.json()) == (status, {"error": text})
        assert (await client.post("/v2/logging", json={"log_info": None, "other": 1})).json() == LOGS
        assert (await client.delete("/v2/logging")).status_code == 405


async def test_bad_log_settings_over_grpc(served: Served) -> None:
    async def refused(name: str, **value: Any) -> tuple[grpc.StatusCode, str]:
        request = pb.LogSettingsRequest()
        request.settings[name].CopyFrom(pb.LogSettingsRequest.SettingValue(**value))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.grpc._client_stub.LogSettings(request)
        return raised.value.code(), raised.value.details()

    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert await refused("log_info", uint32_param=1) == (invalid, "expect boolean for 'log_info'")
    assert await refused("log_verbose_level", bool_param=True) == (invalid, "expect int32 for 'log_verbose_level'")
    assert await refused("log_format", bool_param=True) == (invalid, "expect string for 'log_format'")
    assert await refused("log_file", string_param="x") == (grpc.StatusCode.UNIMPLEMENTED, LOG_FILE)


# --- tracing


async def test_trace_settings_are_global_or_a_models_own(served: Served, wire: Wire) -> None:
    assert await wire.traces() == await wire.traces("m") == served.traces
    own = served.traces | {"trace_rate": "7"}
    assert await wire.traces("m", trace_rate="7") == own
    everywhere = {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "3", "log_frequency": "5"}
    assert await wire.traces(**everywhere) == served.traces | everywhere
    assert await wire.traces("m") == served.traces | everywhere | {"trace_rate": "7"}
    assert await wire.traces("m", trace_rate=None) == served.traces | everywhere
    assert await wire.traces(**dict.fromkeys(everywhere)) == served.traces
    assert await wire.traces(trace_level=["OFF"]) == served.traces | {"trace_level": ["OFF"]}
    assert not served.controls.traces.on


async def test_bad_trace_settings_are_refused(served: Served, wire: Wire) -> None:
    assert await failure(wire.traces("none")) == "Request for unknown model : none"
    assert await failure(wire.traces(trace_file="x")) == TRACE_FILE
    assert await failure(wire.traces(trace_rate="x")) == "Unable to parse 'trace_rate', got: x"
    assert "Expecting value >= -1" in await failure(wire.traces(trace_count="-2"))
    assert "value is out of range" in await failure(wire.traces(log_frequency="99999999999999"))
    assert await failure(wire.traces(trace_level=["OFF", "TENSORS"])) == (
        "Expect only one trace level 'OFF' is specified"
    )
    assert "sample rate must be non-zero" in await failure(wire.traces(trace_rate="0"))
    assert await wire.traces() == served.traces


async def test_the_extensions_are_told(served: Served) -> None:
    extensions = (await served.http.get_server_metadata())["extensions"]
    assert extensions[-2:] == ["trace", "logging"]
