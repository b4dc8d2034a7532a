"""Tensors in clients' shared memory: inputs are read from it, and outputs written to it. A wrapper `Infer -> Infer`.

It is the outermost of them: all others, the queue and the workers see a request like any other.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import NamedTuple

from msgspec.structs import replace

from gateway import errors
from gateway.shm import Memory, Regions
from gateway.shm.errors import output_too_large
from gateway.types import Infer, InferRequest, InferResponse, Place, Places, Responses, Tensor


class Limits(NamedTuple):
    """How many bytes are read from shared memory for one request, and for all that run. One alone is always let in."""

    request: int
    inflight: int


def shared_memory(
    infer: Infer, regions: Regions | None, limits: Limits, check_model: Callable[[str, str], object]
) -> Infer:
    """Wrap an endpoint. Without `regions` a request that needs them is answered `Unsupported`, with the remedy.

    `check_model(model, version)` raises for a model that does not answer, which is said before anything else.
    """
    reading = 0

    def admit(size: int) -> None:
        if size > limits.request:
            raise errors.InvalidArgument(
                f"the request's inputs in shared memory have {size} bytes, more than the limit of {limits.request}; "
                "send less at a time, or raise --max-request-bytes"
            )
        if reading and reading + size > limits.inflight:
            raise errors.too_many_bytes(
                f"{reading} bytes of shared memory are in use as inputs and the limit is {limits.inflight}"
            )

    def endpoint(request: InferRequest) -> Responses:
        # Nearly every request brings its data, and need not pay for another generator.
        return infer(request) if request.places is None else placed(request, request.places)

    async def placed(request: InferRequest, places: Places) -> AsyncGenerator[InferResponse, None]:
        nonlocal reading
        check_model(request.model_name, request.model_version)
        if regions is None:
            raise errors.shared_memory_disabled()
        size = sum(place.size for place in places.inputs.values())
        with regions.using((*places.inputs.values(), *places.outputs.values())) as used:
            admit(size)
            reading += size
            try:
                await _read(request, places.inputs, used)
                async with aclosing(infer(request)) as responses:
                    async for response in responses:
                        yield await _write(response, places.outputs, used)
            finally:
                reading -= size

    return endpoint


async def _read(request: InferRequest, places: Mapping[str, Place], used: Mapping[str, Memory]) -> None:
    for name, place in places.items():
        region, tensor = used[place.region], request.inputs[name]
        request.inputs[name] = Tensor(tensor.datatype, tensor.shape, await region.load(place))


async def _write(response: InferResponse, places: Mapping[str, Place], used: Mapping[str, Memory]) -> InferResponse:
    outputs = dict(response.outputs)
    placed = [name for name in places if name in outputs]
    for name in placed:
        place, tensor = places[name], outputs[name]
        region, data = used[place.region], tensor.wire
        if len(data) > place.size:
            raise output_too_large(name, place.size, len(data))
        await region.store(place, data)
        outputs[name] = Tensor(tensor.datatype, tensor.shape, b"")
    return replace(response, outputs=outputs, placed=placed)
