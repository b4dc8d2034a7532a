"""KServe V2 over HTTP/1.1 with Triton's binary tensors, as a client (httpx).

Tensors are sent from where they lie, behind a JSON head, and read from where they came. A server that answers in JSON
although asked for binary is understood too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import numpy as np

from gateway import errors
from gateway.config.model import ModelConfigProto
from gateway.config.parse import parse_json
from gateway.engines.remote.client import WAY, Payload, Question
from gateway.engines.remote.failures import Failure, of_http, unreachable
from gateway.engines.remote.options import Address, Options
from gateway.types import Array, Buffer, DataType, Tensor, element_count

_HEAD = "inference-header-content-length"
_KEPT_SECONDS = 20.0  # an idle connection; servers usually close theirs later
_ONE = httpx.Limits(max_connections=1, keepalive_expiry=_KEPT_SECONDS)
_SMALL = 64 * 1024  # bytes; joined and written at once


class HttpClient:
    """See `Client`."""

    def __init__(self, address: Address, options: Options) -> None:
        self._model = options.name
        self._patience = options.connect_timeout
        self._path = _model_path(options) + "/infer"
        self._settings = _settings(address, options)
        self._timeout = httpx.Timeout(None, connect=options.connect_timeout)
        self._idle: list[httpx.AsyncClient] = []  # the last used is the next
        self._closed = False

    def encode(self, question: Question) -> Payload:
        """See `Client`."""
        wires: list[Buffer] = []
        inputs: list[dict[str, Any]] = []
        for name, tensor in question.inputs.items():
            wires.append(tensor.wire)
            size = {"binary_data_size": len(tensor.wire)}
            inputs.append({"name": name, "shape": tensor.shape, "datatype": tensor.datatype.name, "parameters": size})
        parameters = {**question.parameters, "binary_data_output": True}
        if question.seconds is not None:
            parameters["timeout"] = max(1, int(question.seconds * 1e6))
        head: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
        if question.id:
            head["id"] = question.id
        if question.outputs:
            head["outputs"] = [{"name": name} for name in question.outputs]
        document = msgspec.json.encode(head)
        return Payload((document, *wires), len(document))

    async def send(self, payload: Payload, seconds: float) -> httpx.Response:
        """See `Client`."""
        size = sum(map(len, payload.parts))
        headers = {
            "content-length": str(size),
            "content-type": "application/octet-stream",
            _HEAD: str(payload.head),
            "x-request-timeout-ms": f"{max(seconds - WAY, 0.001) * 1e3:.3f}",
        }
        content = _pieces(payload) if size > _SMALL else b"".join(payload.parts)
        async with self._connection() as client:
            response = await client.post(self._path, content=content, headers=headers)
        if response.status_code != 200:
            raise _failure(self._model, response)
        return response

    def size(self, raw: httpx.Response) -> int:
        """See `Client`."""
        return len(raw.content)

    def decode(self, raw: httpx.Response) -> dict[str, Array]:
        """See `Client`."""
        content = memoryview(raw.content)
        head = int(raw.headers.get(_HEAD, len(content)))
        at, outputs = head, {}
        try:
            answer = msgspec.json.decode(content[:head])
            for output in answer["outputs"]:
                size = output.get("parameters", {}).get("binary_data_size")
                datatype, shape = DataType(output["datatype"]), tuple(output["shape"])
                if size is None:
                    outputs[output["name"]] = _from_json(output["data"], datatype, shape)
                else:
                    outputs[output["name"]] = Tensor(datatype, shape, content[at : at + size]).array
                    at += size
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"no inference response: {problem}") from problem
        return outputs

    async def live(self) -> None:
        """See `Client`."""
        async with self._connection() as client:
            await client.get("/v2/health/live", timeout=self._patience)

    async def renew(self) -> None:
        """See `Client`: a connection whose answer was not waited for is closed already."""

    async def close(self) -> None:
        """See `Client`."""
        self._closed = True
        while self._idle:
            await self._idle.pop().aclose()

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[httpx.AsyncClient, None]:
        """A client that has one connection to itself, kept if all goes well.

        httpx looks at every connection of a client, with a system call each, for every request: at 16 that was most of
        the time that a request took.
        """
        client = (
            self._idle.pop() if self._idle else httpx.AsyncClient(**self._settings, limits=_ONE, timeout=self._timeout)
        )
        kept = False
        try:
            yield client
            kept = not self._closed
        except httpx.TransportError as problem:
            raise unreachable(self._model, f"{type(problem).__name__} {problem}".strip()) from problem
        finally:
            if kept:
                self._idle.append(client)
            else:
                await client.aclose()


def fetch(address: Address, options: Options) -> ModelConfigProto:
    """The configuration of the model there. Blocking. Raises `Failure`."""
    settings = _settings(address, options)
    try:
        with httpx.Client(**settings, timeout=options.connect_timeout) as client:
            response = client.get(_model_path(options) + "/config")
    except httpx.TransportError as problem:
        raise unreachable(options.name, f"{type(problem).__name__} {problem}".strip()) from problem
    if response.status_code != 200:
        raise _failure(options.name, response)
    try:
        return parse_json(response.text)
    except errors.GatewayError as problem:
        raise Failure("gone", problem, f"its configuration cannot be read: {problem.message}") from problem


def _settings(address: Address, options: Options) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {options.token}"} if options.token else {}
    host = f"[{address.host}]" if ":" in address.host else address.host
    return {
        "base_url": f"{address.scheme}://{host}:{address.port}{address.path}",
        "headers": headers,
        "verify": options.certificates.context or False,
        "trust_env": False,  # what a gateway does, its settings say
    }


def _model_path(options: Options) -> str:
    version = f"/versions/{options.version}" if options.version else ""
    return f"/v2/models/{quote(options.model)}{version}"


def _failure(model: str, response: httpx.Response) -> Failure:
    try:
        text = str(msgspec.json.decode(response.content)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        text = response.reason_phrase
    return of_http(model, response.status_code, text, _retry_after(response))


def _retry_after(response: httpx.Response) -> float | None:
    for name, unit in (("retry-after-ms", 1e3), ("retry-after", 1.0)):
        text = response.headers.get(name, "")
        if text.isdecimal():
            return int(text) / unit
    return None  # or a date, which nobody needs who serves inference


async def _pieces(payload: Payload) -> AsyncGenerator[bytes, None]:
    for part in payload.parts:
        if len(part):
            yield part if isinstance(part, bytes) else bytes(part)


def _from_json(data: Any, datatype: DataType, shape: tuple[int, ...]) -> Array:
    flat = data
    while flat and isinstance(flat[0], list):
        flat = list(chain.from_iterable(flat))
    if datatype is not DataType.BYTES:
        return np.array(flat, datatype.dtype).reshape(shape)
    array = np.empty(element_count(shape), object)
    array[:] = [text.encode() for text in flat]
    return array.reshape(shape)
