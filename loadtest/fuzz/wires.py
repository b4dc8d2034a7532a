"""Sends requests every way there is: JSON and typed contents as written in `messages.py`, all else by NVIDIA's clients.

The shared memory is one region, registered once, of which each request gets bytes of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Self

import aiohttp
import grpc
import ml_dtypes
import numpy as np
import tritonclient.grpc.aio as triton_grpc
import tritonclient.http.aio as triton_http
from numpy.random import Generator
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from loadtest.fuzz import messages
from loadtest.fuzz.messages import NOT_JSON, Message, Part, from_wire, to_wire
from loadtest.fuzz.models import Model
from loadtest.fuzz.requests import Array, Request

WIRES = (
    "http json", "http binary", "http gzip", "http raw", "http shm", "grpc raw", "grpc contents", "grpc stream", "grpc shm",
)  # fmt: skip
REGION = "fuzz"
ROOM = 64 << 20  # bytes of the region
TIMEOUT = 30.0
_LIMITS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]  # as NVIDIA's client has them
Outputs = dict[str, tuple[str, Array]]
"""Datatype and array by name."""


class Failed(Exception):
    """The gateway answered with an error. `status` is HTTP's number or gRPC's word."""

    def __init__(self, status: int | str, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the gateway listens on this machine."""

    http: int
    grpc: int


class Wires:
    """Connections to one gateway. A context manager."""

    def __init__(self, ports: Ports) -> None:
        self._url = f"http://127.0.0.1:{ports.http}"
        self._ports = ports
        self._stack = AsyncExitStack()
        self._memory = SharedMemory(create=True, size=ROOM)
        self._used = 0

    async def __aenter__(self) -> Self:
        """Connect and register the region."""
        timeout = aiohttp.ClientTimeout(TIMEOUT)
        self.session = await self._stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        self.http = await self._stack.enter_async_context(
            triton_http.InferenceServerClient(f"127.0.0.1:{self._ports.http}", conn_timeout=TIMEOUT)
        )
        address = f"127.0.0.1:{self._ports.grpc}"
        self.grpc = await self._stack.enter_async_context(triton_grpc.InferenceServerClient(address))
        self._channel = await self._stack.enter_async_context(grpc.aio.insecure_channel(address, _LIMITS))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        await self.http.register_system_shared_memory(REGION, self._memory.name, ROOM)
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close all, and the memory."""
        with suppress(Exception):  # the gateway may be gone, and what was wrong before says more
            await self.http.unregister_system_shared_memory(REGION)
        await self._stack.aclose()
        self._memory.close()
        self._memory.unlink()

    def place(self, data: bytes | int, rng: Generator) -> dict[str, Any]:
        """Room in the region for these bytes, or so many, at any offset; its parameters. What was there is overwritten."""
        size = data if isinstance(data, int) else len(data)
        self._used += int(rng.integers(0, 16))
        if self._used + size > ROOM:
            self._used = 0
        at = self._used
        self._used += size
        self._memory.buf[at : at + size] = bytes(size) if isinstance(data, int) else data
        return {"shared_memory_region": REGION, "shared_memory_offset": at, "shared_memory_byte_size": size}

    async def post(self, model: str, head: bytes, blobs: bytes, header_length: str = "") -> Outputs:
        """An infer request of these parts. Raises `Failed`, and ValueError for an answer that cannot be read."""
        headers = {}
        if blobs or header_length:
            headers["Inference-Header-Content-Length"] = header_length or str(len(head))
        url = f"{self._url}/v2/models/{model}/infer"
        async with self.session.post(url, data=head + blobs, headers=headers) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise Failed(answer.status, _error(body))
            return messages.read_http(body, answer.headers.get("Inference-Header-Content-Length"))

    async def call(self, message: Any) -> Outputs:
        """A ModelInfer of this message, which may be its bytes. Raises `Failed`."""
        try:
            if isinstance(message, bytes):
                method = self._channel.unary_unary(
                    "/inference.GRPCInferenceService/ModelInfer",
                    response_deserializer=pb.ModelInferResponse.FromString,
                )
                return messages.read_grpc(await method(message, timeout=TIMEOUT))
            return messages.read_grpc(await self._stub.ModelInfer(message, timeout=TIMEOUT))
        except grpc.RpcError as error:
            raise Failed(error.code().name, error.details() or "") from None

    async def send(
        self, wire: str, model: Model, request: Request, want: Mapping[str, Array], rng: Generator
    ) -> Outputs:
        """The answer to a request sent this way; `want` tells how large outputs in shared memory are. Raises `Failed`."""
        kinds = {each.name: each.datatype for each in (*model.inputs, *model.outputs)}
        async with asyncio.timeout(TIMEOUT):
            match wire:
                case "http json":
                    return await self.post(
                        model.name, *messages.http(_json(model, request, kinds), nested=rng.random() < 0.5)
                    )
                case "grpc contents" if not set(NOT_JSON) & {kinds[name] for name in request.inputs}:
                    return await self.call(messages.grpc(_json(model, request, kinds)))
                case "http raw" if _fits_raw(model, request):
                    (array,) = request.inputs.values()
                    body = to_wire(array)[4 * (array.dtype == object) :]
                    return await self.post(model.name, b"", body, "0")
                case "grpc stream":
                    return await self._stream(messages.grpc(_binary(model, request, kinds)))
                case "http shm" | "grpc shm":
                    return await self._shared(wire, model, request, want, rng)
                case _:
                    return await self._triton(wire, model, request, kinds)

    async def _stream(self, message: Any) -> Outputs:
        """The one answer to one request of a ModelStreamInfer."""

        async def requests() -> AsyncIterator[Any]:
            yield message

        found = [answer async for answer in self._stub.ModelStreamInfer(requests(), timeout=TIMEOUT)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} answers to one request")
        if found[0].error_message:
            raise Failed("INVALID_ARGUMENT", found[0].error_message)
        if not found[0].infer_response.parameters["triton_final_response"].bool_param:
            raise ValueError("the only answer is not the last")
        return messages.read_grpc(found[0].infer_response)

    async def _triton(self, wire: str, model: Model, request: Request, kinds: Mapping[str, str]) -> Outputs:
        http = wire.startswith("http")
        module: Any = triton_http if http else triton_grpc
        inputs = []
        for name, array in request.inputs.items():
            given = module.InferInput(name, list(array.shape), kinds[name])
            given.set_data_from_numpy(array.view(ml_dtypes.bfloat16) if kinds[name] == "BF16" else array)
            inputs.append(given)
        outputs = [module.InferRequestedOutput(name) for name in request.outputs] or None
        more = {"request_compression_algorithm": "gzip", "response_compression_algorithm": "deflate"}
        try:
            client: Any = self.http if http else self.grpc
            result = await client.infer(model.name, inputs, outputs=outputs, **(more if wire == "http gzip" else {}))
        except InferenceServerException as error:
            raise Failed(_status(error), error.message()) from None
        response = result.get_response()
        told = response["outputs"] if http else response.outputs
        found: Outputs = {}
        for each in told:
            name, datatype = (each["name"], each["datatype"]) if http else (each.name, each.datatype)
            array = result.as_numpy(name)
            found[name] = datatype, array.view(np.uint16) if datatype == "BF16" else array
        return found

    async def _shared(
        self, wire: str, model: Model, request: Request, want: Mapping[str, Array], rng: Generator
    ) -> Outputs:
        """Inputs in the region, and outputs too, as long as their size is known."""
        kinds = {each.name: each.datatype for each in (*model.inputs, *model.outputs)}
        parts = [
            Part(name, kinds[name], list(array.shape), place=self.place(to_wire(array), rng))
            for name, array in request.inputs.items()
        ]
        names = request.outputs or tuple(each.name for each in model.outputs)
        places = {name: self.place(len(to_wire(want[name])), rng) for name in names if name in want}
        message = Message(model.name, parts, [(name, places.get(name, {"binary_data": True})) for name in names])
        if wire == "http shm":
            return await self._shared_http(message, places)
        answer = await self._model_infer(messages.grpc(message))
        return {
            each.name: (each.datatype, self._read(places[each.name], each.datatype, each.shape))
            for each in answer.outputs
        }

    async def _shared_http(self, message: Message, places: Mapping[str, dict[str, Any]]) -> Outputs:
        head, _ = messages.http(message)
        async with self.session.post(f"{self._url}/v2/models/{message.model}/infer", data=head) as answer:
            if answer.status != 200:
                raise Failed(answer.status, _error(await answer.read()))
            told = (await answer.json(content_type=None))["outputs"]
        return {
            each["name"]: (each["datatype"], self._read(places[each["name"]], each["datatype"], each["shape"]))
            for each in told
        }

    async def _model_infer(self, message: Any) -> Any:
        try:
            return await self._stub.ModelInfer(message, timeout=TIMEOUT)
        except grpc.RpcError as error:
            raise Failed(error.code().name, error.details() or "") from None

    def _read(self, place: Mapping[str, Any], datatype: str, shape: Any) -> Array:
        start = place["shared_memory_offset"]
        data = bytes(self._memory.buf[start : start + place["shared_memory_byte_size"]])
        return from_wire(data, datatype, shape)


def _fits_raw(model: Model, request: Request) -> bool:
    """Whether a body of nothing but the tensor tells all: one input, one row, every output."""
    (first, *more) = model.inputs
    one = not more and not request.outputs and first.dims.count(-1) < 2
    array = next(iter(request.inputs.values()))
    return one and (not model.batch or array.shape[0] == 1) and (first.datatype != "BYTES" or first.dims == (1,))


def _binary(model: Model, request: Request, kinds: Mapping[str, str]) -> Message:
    parts = [Part(name, kinds[name], list(array.shape), to_wire(array)) for name, array in request.inputs.items()]
    return Message(model.name, parts, [(name, {}) for name in request.outputs])


def _json(model: Model, request: Request, kinds: Mapping[str, str]) -> Message:
    """All that can be is JSON, and outputs are named only where some cannot."""
    parts = []
    for name, array in request.inputs.items():
        part = Part(name, kinds[name], list(array.shape), to_wire(array))
        if kinds[name] not in NOT_JSON:
            part.typed = messages.typed(array)
        parts.append(part)
    names = request.outputs
    if set(NOT_JSON) & {each.datatype for each in model.outputs}:
        names = names or tuple(each.name for each in model.outputs)
    return Message(model.name, parts, [(name, {"binary_data": kinds[name] in NOT_JSON}) for name in names])


def _error(body: bytes) -> str:
    try:
        told = json.loads(body)
    except ValueError:
        return f"no JSON: {body[:200]!r}"
    return str(told["error"]) if isinstance(told, dict) and list(told) == ["error"] else f"no error: {body[:200]!r}"


def _status(error: InferenceServerException) -> int | str:
    word = str(error.status())
    return int(word) if word.isdecimal() else word.removeprefix("StatusCode.")
