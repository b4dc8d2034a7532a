"""A storm of cancelled requests over HTTP and gRPC: at any moment of its life, from its first byte to its answer.

    storm = asyncio.run(rage(ports, requests=10_000))

The models answer with their input, so each answer that does come shows whose it is.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from loadtest.bench.servers import Ports
from loadtest.flat_requests import HOST

_AT_ONCE = 200  # requests under way
_PATIENCE = 30.0  # seconds for an answer that is waited for
_STAYING = 0.2  # of the callers wait for their answer
_HASTE = 0.15  # seconds until the last of the others has gone


@dataclass(slots=True)
class Storm:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)  # "http cancelled", "grpc answered", ...
    wrong: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)  # of those that were waited for
    errors: Counter[str] = field(default_factory=Counter)


async def rage(
    ports: Sequence[Ports], model: str, *, requests: int, elements: int = 1, staying: float = _STAYING
) -> Storm:
    """Send so many requests of so many INT64 elements to all gateways in turn; only this share waits for an answer."""
    chance, storm = random.Random(1), Storm()
    turns = iter(range(requests))
    channels = [grpc.aio.insecure_channel(f"{HOST}:{each.grpc}") for each in ports]

    async def work() -> None:
        for number in turns:
            patience = _PATIENCE if chance.random() < staying else chance.uniform(0.0, _HASTE)
            numbers = [number, *range(number, number + elements - 1)]
            which = number // 2 % len(ports)
            if number % 2:
                await _http(storm, ports[which].http, model, numbers, patience)
            else:
                await _grpc(storm, channels[which], model, numbers, patience)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(work())
    finally:
        for channel in channels:
            await channel.close()
    return storm


async def _http(storm: Storm, port: int, model: str, numbers: list[int], patience: float) -> None:
    body = struct.pack(f"<{len(numbers)}q", *numbers)
    tensor = {
        "name": "IN", "shape": [1, len(numbers)], "datatype": "INT64", "parameters": {"binary_data_size": len(body)}
    }  # fmt: skip
    document = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    head = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(document)}\r\nContent-Length: {len(document) + len(body)}\r\n\r\n"
    ).encode()
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(head + document + body)
            await writer.drain()
            answer = await reader.readuntil(b"\r\n\r\n")
            lines = [line.split(": ", 1) for line in answer.decode().lower().splitlines()[1:] if line]
            data = await reader.readexactly(int(dict(lines)["content-length"]))
        _answered(storm, "http", numbers, data[-len(body) :] if b" 200 " in answer[:16] else None, data)
    except TimeoutError:
        _gone(storm, "http", numbers, patience)
    except (OSError, asyncio.IncompleteReadError) as problem:
        storm.errors[f"http {type(problem).__name__}"] += 1
    finally:
        if writer is not None:
            writer.transport.abort()


async def _grpc(storm: Storm, channel: grpc.aio.Channel, model: str, numbers: list[int], patience: float) -> None:
    body = struct.pack(f"<{len(numbers)}q", *numbers)
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="IN", datatype="INT64", shape=[1, len(numbers)])
    request = service_pb2.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[body])
    call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    try:
        async with asyncio.timeout(patience):
            answer = await call
        _answered(storm, "grpc", numbers, answer.raw_output_contents[0], b"")
    except TimeoutError:
        call.cancel()
        with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await call
        _gone(storm, "grpc", numbers, patience)
    except grpc.aio.AioRpcError as problem:
        storm.errors[f"grpc {problem.code().name} {problem.details()}"] += 1


def _answered(storm: Storm, way: str, numbers: list[int], data: bytes | None, text: bytes) -> None:
    if data is None:
        storm.errors[f"{way} {text[:200]!r}"] += 1
        return
    storm.counts[f"{way} answered"] += 1
    if data != struct.pack(f"<{len(numbers)}q", *numbers):
        storm.wrong.append(f"{way} {numbers[0]}")


def _gone(storm: Storm, way: str, numbers: list[int], patience: float) -> None:
    storm.counts[f"{way} cancelled"] += 1
    if patience == _PATIENCE:
        storm.unanswered.append(f"{way} {numbers[0]}")
