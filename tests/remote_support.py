"""Servers that say what a test wants, over HTTP and gRPC, and engines that ask them or real gateways."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from tritonclient.grpc import service_pb2

from gateway import engines
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines.base import Engine, EngineSpec
from gateway.types import Array, Batch, BatchResult, InferRequest

CONFIG = """backend: "{backend}" max_batch_size: 8 dynamic_batching {{}}
input {{ name: "IN" data_type: TYPE_FP32 dims: 2 }} output {{ name: "OUT" data_type: TYPE_FP32 dims: 2 }}
"""
SCHEMES = ("grpc", "http")


@dataclass
class Said:
    """One request as a scripted server got it."""

    parameters: dict[str, Any]
    metadata: dict[str, str]
    rows: int
    id: str
    seconds: float | None = None  # the call's own deadline, where there is such a thing


@dataclass
class Refusal:
    """An answer that is an error, by its HTTP status; gRPC has the code of the same meaning."""

    status: int
    text: str = "no"
    retry_after_ms: int | None = None
    details: bool = False  # gRPC: say when to try again in `google.rpc.RetryInfo` only


CODES = {400: 3, 404: 5, 429: 8, 500: 13, 503: 14, 504: 4, 501: 12, 401: 16}


@dataclass
class Script:
    """A server whose answers are `answers`, one after the other, and then its request's input.

    Requests wait for `release`, which is set unless a test clears it.
    """

    scheme: str
    answers: deque[Refusal] = field(default_factory=deque)
    got: list[Said] = field(default_factory=list)
    config: str = CONFIG.format(backend="fake")
    binary: bool = True  # False: tensors come back as numbers
    port: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # twice whether it is live
    pings: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.release.set()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Script]:
        async with AsyncExitStack() as stack:
            if self.scheme == "http":
                server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
                self.port = server.sockets[0].getsockname()[1]
                stack.callback(server.close)
            else:
                rpc = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
                rpc.add_generic_rpc_handlers((_Handler(self),))
                self.port = rpc.add_insecure_port(f"127.0.0.1:{self.port}")
                await rpc.start()
                stack.push_async_callback(rpc.stop, None)
            yield self

    # --- HTTP

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                headers = {}
                while (text := await reader.readline()) not in (b"\r\n", b""):
                    name, _, value = text.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                writer.write(await self._http(line.split()[1].decode(), headers, body))
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _http(self, path: str, headers: dict[str, str], body: bytes) -> bytes:
        if path.endswith("/live"):
            self._pinged()
            return _http_answer(200, b"{}")
        if path.endswith("/config"):
            from gateway.config.parse import config_json

            return _http_answer(200, json.dumps(config_json(parse_text(Source("", self.config)))).encode())
        size = int(headers["inference-header-content-length"])
        head = json.loads(body[:size])
        array = np.frombuffer(body[size:], "<f4").reshape(head["inputs"][0]["shape"])
        self.got.append(Said(head["parameters"], headers, len(array), head.get("id", "")))
        await self.release.wait()
        if self.answers:
            refusal = self.answers.popleft()
            more = "" if refusal.retry_after_ms is None else f"retry-after-ms: {refusal.retry_after_ms}\r\n"
            return _http_answer(refusal.status, json.dumps({"error": refusal.text}).encode(), more)
        output: dict[str, Any] = {"name": "OUT", "datatype": "FP32", "shape": array.shape}
        if not self.binary:
            output["data"] = array.tolist()
            return _http_answer(200, json.dumps({"outputs": [output]}).encode())
        output["parameters"] = {"binary_data_size": array.nbytes}
        document = json.dumps({"outputs": [output]}).encode()
        return _http_answer(200, document + array.tobytes(), f"inference-header-content-length: {len(document)}\r\n")

    # --- gRPC

    async def grpc_infer(self, payload: bytes, context: Any) -> bytes:
        request = service_pb2.ModelInferRequest.FromString(payload)
        array = np.frombuffer(request.raw_input_contents[0], "<f4").reshape(request.inputs[0].shape)
        parameters = {
            key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in request.parameters.items()
        }
        metadata = dict(context.invocation_metadata())
        self.got.append(Said(parameters, metadata, len(array), request.id, context.time_remaining()))
        await self.release.wait()
        if self.answers:
            refusal = self.answers.popleft()
            await context.abort(_STATUSES[CODES[refusal.status]], refusal.text, _trailers(refusal))
        answer = service_pb2.ModelInferResponse()
        output = answer.outputs.add(name="OUT", datatype="FP32", shape=array.shape)
        if self.binary:
            answer.raw_output_contents.append(array.tobytes())
        else:
            output.contents.fp32_contents.extend(array.reshape(-1).tolist())
        return answer.SerializeToString()

    async def grpc_config(self, _: bytes, __: Any) -> bytes:
        return service_pb2.ModelConfigResponse(config=parse_text(Source("", self.config))).SerializeToString()

    async def grpc_live(self, _: bytes, __: Any) -> bytes:
        self._pinged()
        return b""

    def _pinged(self) -> None:
        self.pings += 1
        if self.pings > 1:
            self.asked.set()


_STATUSES = {status.value[0]: status for status in grpc.StatusCode}


def _trailers(refusal: Refusal) -> tuple[tuple[str, str | bytes], ...]:
    if refusal.retry_after_ms is None:
        return ()
    if not refusal.details:
        return (("retry-after-ms", str(refusal.retry_after_ms)),)
    said = status_pb2.Status(code=CODES[refusal.status], message=refusal.text)
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(refusal.retry_after_ms)
    said.details.add().Pack(retry)
    return (("grpc-status-details-bin", said.SerializeToString()),)


def _http_answer(status: int, body: bytes, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, script: Script) -> None:
        self._methods = {
            "ModelInfer": script.grpc_infer,
            "ModelConfig": script.grpc_config,
            "ServerLive": script.grpc_live,
        }

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._methods[details.method.rpartition("/")[2]])


# --- engines


def config(*urls: str, name: str = "m", text: str = "", **parameters: str) -> Any:
    """The configuration of a remote model."""
    source = Source("m/config.pbtxt", text or CONFIG.format(backend="remote"))
    proto = parse_text(source)
    proto.name = name
    for key, value in {"url": ",".join(urls), **parameters}.items():
        proto.parameters[f"remote.{key}"].string_value = value
    return build(proto, source)


@asynccontextmanager
async def asking(*urls: str, **more: Any) -> AsyncIterator[Engine]:
    """An engine that asks these servers."""
    (engine,) = await engines.create(EngineSpec(config(*urls, **more), "1", Path(), "remote"), 1)
    try:
        yield engine
    finally:
        await engine.close()


async def ask(engine: Engine, *requests: InferRequest, inner: tuple[int, ...] = (2,)) -> BatchResult:
    """The answer to a batch of these requests, or of one that nobody sent; `inner` is a row's shape as the engine has it."""
    rows = sum(request.rows for request in requests) or 1
    values = np.arange(2 * rows, dtype="<f4").reshape(rows, 2)

    def stack() -> dict[str, Array]:
        return {"IN": values.reshape(rows, *inner)}

    results = [result async for result in engine.run(Batch(rows, stack, requests=requests))]
    assert len(results) == 1
    assert results[0].outputs["OUT"].tolist() == values.tolist()
    return results[0]
