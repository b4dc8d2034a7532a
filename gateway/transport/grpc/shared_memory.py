"""The calls about clients' shared memory. There is no CUDA memory: none is registered, and so none is there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from gateway import errors
from gateway.service.shared_regions import SharedRegions
from gateway.shm.errors import no_cuda_regions, unknown_region_of


def answers(regions: SharedRegions | None) -> dict[str, Callable[[Any], Awaitable[Any]]]:
    """The unary RPCs by name; without `regions` all of them raise `Unsupported`."""
    if regions is None:
        return dict.fromkeys(_CALLS, _disabled)
    calls = _Calls(regions)
    return {name: getattr(calls, method) for name, method in _CALLS.items()}


_CALLS = {
    "SystemSharedMemoryStatus": "status",
    "SystemSharedMemoryRegister": "register",
    "SystemSharedMemoryUnregister": "unregister",
    "CudaSharedMemoryStatus": "cuda_status",
    "CudaSharedMemoryRegister": "cuda_register",
    "CudaSharedMemoryUnregister": "cuda_unregister",
}


async def _disabled(_: Any) -> Any:
    raise errors.shared_memory_disabled()


class _Calls:
    """From request message to response message; the methods raise `GatewayError`."""

    def __init__(self, regions: SharedRegions) -> None:
        self._regions = regions

    async def status(self, request: Any) -> Any:
        response = pb.SystemSharedMemoryStatusResponse()
        for region in await self._regions.status(request.name):
            told = response.regions[region.name]
            told.name, told.key, told.offset, told.byte_size = region.name, region.key, region.offset, region.byte_size
        return response

    async def register(self, request: Any) -> Any:
        await self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def unregister(self, request: Any) -> Any:
        await self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def cuda_status(self, request: Any) -> Any:
        if request.name:
            raise unknown_region_of("cuda", request.name)
        return pb.CudaSharedMemoryStatusResponse()

    async def cuda_register(self, request: Any) -> Any:
        raise no_cuda_regions(request.name)

    async def cuda_unregister(self, _: Any) -> Any:
        return pb.CudaSharedMemoryUnregisterResponse()
