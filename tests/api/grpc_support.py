"""A gRPC server over a real service and queue, with a model whose runs the test can hold."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from gateway import errors
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.queues.base import Job, Lane, PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from gateway.transport.auth import Header
from gateway.transport.grpc import GrpcOptions, GrpcServer
from gateway.types import Infer, InferRequest, InferResponse
from tests.support import answer, background

IMPLEMENTATIONS = ("grpcio", "native")
CONFIG = """
name: "m"  backend: "fake"  max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: -1 }
output { name: "OUT" data_type: TYPE_FP32 dims: -1 }
dynamic_batching {}
"""


@dataclass
class Model:
    """The worker's side: echoes IN as OUT, or keeps the jobs for the test while `hold` is set."""

    queue: MemoryQueue
    hold: bool = False
    held: asyncio.Queue[Job] = field(default_factory=asyncio.Queue)

    async def run(self) -> None:
        consumer = self.queue.consumer([Lane("m", "1")])
        while True:
            for job in await consumer.take(8):
                if self.hold:
                    self.held.put_nowait(job)
                else:
                    self.echo(job)

    def echo(self, job: Job) -> None:
        if "explode" in job.request.parameters:
            job.fail(errors.Internal("the model fell over"))
        else:
            job.reply(answer(job.request, OUT=job.request.inputs["IN"]))


@dataclass
class Running:
    """A started server, its parts, and clients of it."""

    server: GrpcServer
    service: Service
    model: Model
    ended: asyncio.Queue[str]  # ids of requests as their endpoints are closed, however they ended
    stop: asyncio.Event  # set it to stop the server
    task: asyncio.Task[None]  # the server's life

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        async with triton.InferenceServerClient(self.url) as client:
            yield client

    @asynccontextmanager
    async def channel(self, **options: Any) -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(self.url, **options) as channel:
            yield channel

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        async with self.channel() as channel:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@asynccontextmanager
async def serving(
    implementation: str,
    *,
    infer: Callable[[Service], Infer] = lambda service: service.infer,
    authenticate: Callable[[Header], str] = lambda _: "",
    **options: Any,
) -> AsyncIterator[Running]:
    """Serve model "m", version 1, on a free port."""
    queue = MemoryQueue()
    config = build(parse_text(Source("config.pbtxt", CONFIG)), Source("config.pbtxt", CONFIG))
    queue.publish(PoolState("m", (VersionState("1", "READY", config=config),)))

    async def names() -> list[str]:
        return ["m", "sleeping"]

    service = Service(queue, Statistics(), names, ServiceOptions())
    service.start()
    model = Model(queue)
    ended: asyncio.Queue[str] = asyncio.Queue()
    endpoint = infer(service)

    async def watched(request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        try:
            async with aclosing(endpoint(request)) as responses:
                async for response in responses:
                    yield response
        finally:
            ended.put_nowait(request.id)

    chosen = GrpcOptions(**{"port": 0, "native": implementation == "native", "grace": 10.0, **options})
    started: asyncio.Future[GrpcServer] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def live() -> None:
        try:
            async with GrpcServer(service, watched, authenticate, chosen) as server:
                started.set_result(server)
                await stop.wait()
        except OSError as problem:
            started.set_exception(problem)

    task = asyncio.create_task(live())
    server = await started
    async with background(model.run()):
        try:
            yield Running(server, service, model, ended, stop, task)
        finally:
            stop.set()
            await asyncio.wait({task})
    if not task.cancelled():
        task.result()


def inputs(value: float = 1.0, size: int = 4) -> list[Any]:
    tensor = triton.InferInput("IN", [1, size], "FP32")
    tensor.set_data_from_numpy(np.full((1, size), value, np.float32))
    return [tensor]


def message(request_id: str = "", *, model: str = "m", **parameters: bool) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id=request_id, raw_input_contents=[bytes(8)])
    request.inputs.add(name="IN", datatype="FP32", shape=[1, 2])
    for key, value in parameters.items():
        request.parameters[key].bool_param = value
    return request


async def failure(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()
