"""Small makers of real objects for tests: configurations, requests, answers and running things."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, Self

import numpy as np

from gateway.config.model import Batching, InstanceGroup, ModelConfig, TensorConfig, Warmup
from gateway.errors import GatewayError
from gateway.queues.base import Job, Lane, Queue
from gateway.queues.memory import MemoryQueue
from gateway.types import DataType, InferRequest, InferResponse, RequestedOutput, Tensor

LANE = Lane("m", "1")
_TURNS = 200


def tensor_config(name: str = "IN", datatype: DataType = DataType.FP32, dims: tuple[int, ...] = (2,), **more: Any):
    return TensorConfig(name, datatype, dims, **more)


def model_config(
    *,
    name: str = "m",
    inputs: tuple[TensorConfig, ...] = (),
    outputs: tuple[TensorConfig, ...] = (),
    max_batch_size: int = 8,
    batching: Batching | None = Batching(),  # noqa: B008 - frozen
    warmup: tuple[Warmup, ...] = (),
    instances: int = 1,
    parameters: dict[str, str] | None = None,
    decoupled: bool = False,
) -> ModelConfig:
    """A model of the fake backend with one FP32 input IN and output OUT of two elements, unless said otherwise."""
    return ModelConfig(
        name=name,
        backend="fake",
        platform="",
        max_batch_size=max_batch_size,
        inputs=inputs or (tensor_config("IN"),),
        outputs=outputs or (tensor_config("OUT"),),
        instance_groups=(InstanceGroup("cpu", instances),),
        batching=batching,
        warmup=warmup,
        default_model_filename="",
        parameters=parameters or {},
        execution_providers=(),
        decoupled=decoupled,
        proto=None,
    )


def tensor(values: Any, datatype: DataType = DataType.FP32) -> Tensor:
    return Tensor.from_array(datatype, np.asarray(values, datatype.dtype))


def request(value: float = 0.0, *, rows: int = 1, outputs: tuple[str, ...] = (), **more: Any) -> InferRequest:
    """A request to the model of `model_config()`: `rows` rows filled with `value`."""
    inputs = more.pop("inputs", None) or {"IN": tensor(np.full((rows, 2), value))}
    wanted = tuple(RequestedOutput(name) for name in outputs)
    return InferRequest(more.pop("model_name", "m"), inputs, rows=rows, outputs=wanted, **more)


def answer(of: InferRequest, *, final: bool = True, **outputs: Tensor) -> InferResponse:
    return InferResponse(of.model_name, "1", outputs, id=of.id, final=final)


async def ask(queue: Queue, of: InferRequest, lane: Lane = LANE) -> InferResponse:
    """Submit and return the one answer."""
    async with aclosing(queue.submit(lane, of)) as answers:
        responses = [response async for response in answers]
    assert len(responses) == 1
    return responses[0]


async def refusal(call: Awaitable[Any]) -> GatewayError:
    """The error that the call raises; it must raise one."""
    try:
        result = await call
    except GatewayError as error:
        return error
    raise AssertionError(f"expected an error, got {result}")


async def settle() -> None:
    """Let everything that is ready on the event loop run, and what that makes ready."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until this is true; the test's own time limit ends a wait in vain."""
    turns = 0
    while not condition():
        # What takes longer than this many turns happens on another thread or in another process, which wants the core.
        await asyncio.sleep(0 if turns < _TURNS else 0.001)
        turns += 1


@asynccontextmanager
async def background(*coroutines: Coroutine[Any, Any, Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Run these beside the block and cancel what is left of them at its end."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
        yield tasks
        for task in tasks:
            task.cancel()


def soon(seconds: float = 0.01) -> float:
    return time.monotonic() + seconds


class Callers:
    """Callers at a queue, each a task whose result is its response or its error. A context manager."""

    def __init__(self, queue: Queue | None = None, lane: Lane = LANE) -> None:
        self.queue: Queue = queue or MemoryQueue()
        self._lane = lane
        self._tasks: list[asyncio.Task[InferResponse | GatewayError]] = []

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        self.consumer = self.queue.consumer([self._lane])
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(*error)

    def ask(self, of: InferRequest) -> asyncio.Task[InferResponse | GatewayError]:
        async def call() -> InferResponse | GatewayError:
            try:
                return await ask(self.queue, of, self._lane)
            except GatewayError as error:
                return error

        self._tasks.append(self._group.create_task(call()))
        return self._tasks[-1]

    async def jobs(self, *requests: InferRequest) -> list[Job]:
        """Ask for each of these, and take them as jobs."""
        for each in requests:
            self.ask(each)
        await settle()
        return await self.consumer.take(len(requests))

    async def leave(self, index: int) -> None:
        """The caller of this number gives up."""
        self._tasks[index].cancel()
        await asyncio.wait([self._tasks[index]])
