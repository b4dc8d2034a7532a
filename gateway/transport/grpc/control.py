"""Every call of Triton's service but inference: health, metadata, configuration, statistics, model control.

One method per RPC, from its request message to its response message. Authentication, error statuses and
transport are the servicer's.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb

from gateway import errors
from gateway.config.model import TensorConfig
from gateway.service import Service
from gateway.shm import Regions
from gateway.transport.grpc import shared_memory
from gateway.transport.grpc.codec import check_version
from gateway.transport.instances import configuration

OPEN = frozenset({"ServerLive", "ServerReady"})
"""RPCs that need no token, so that probes work."""


class Control:
    """The unary RPCs by name, answered from `Service`; the methods raise `GatewayError`."""

    def __init__(self, service: Service, regions: Regions | None) -> None:
        self._service = service
        self.answers: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            **shared_memory.answers(regions),
            "TraceSetting": _no_trace,
            "LogSettings": _no_log_settings,
        }

    async def _server_live(self, _: Any) -> Any:
        return pb.ServerLiveResponse(live=self._service.live())

    async def _server_ready(self, _: Any) -> Any:
        return pb.ServerReadyResponse(ready=self._service.ready())

    async def _server_metadata(self, _: Any) -> Any:
        name, version, extensions = self._service.server_metadata()
        return pb.ServerMetadataResponse(name=name, version=version, extensions=extensions)

    async def _model_ready(self, request: Any) -> Any:
        version = check_version(request.version)
        try:
            ready = self._service.model_ready(request.name, version)
        except (errors.NotFound, errors.Unavailable):
            # Triton's own examples read `ready` and take an error status for a broken server.
            ready = False
        return pb.ModelReadyResponse(ready=ready)

    async def _model_metadata(self, request: Any) -> Any:
        config = self._service.model_config(request.name, check_version(request.version))
        batch = (-1,) if config.max_batch_size else ()
        return pb.ModelMetadataResponse(
            name=config.name,
            versions=self._service.ready_versions(request.name),
            platform=config.platform or config.backend,
            inputs=[_tensor_metadata(tensor, batch) for tensor in config.inputs],
            outputs=[_tensor_metadata(tensor, batch) for tensor in config.outputs],
        )

    async def _model_config(self, request: Any) -> Any:
        config = configuration(self._service, request.name, check_version(request.version))
        return pb.ModelConfigResponse(config=config)

    async def _model_statistics(self, request: Any) -> Any:
        entries = await self._service.statistics(request.name, check_version(request.version))
        return json_format.ParseDict({"model_stats": entries}, pb.ModelStatisticsResponse())

    async def _repository_index(self, request: Any) -> Any:
        _refuse_repository(request)
        index = pb.RepositoryIndexResponse()
        for entry in await self._service.index(ready=request.ready):
            index.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return index

    async def _load(self, request: Any) -> Any:
        _refuse_repository(request)
        parameters = {key: _load_parameter(key, value) for key, value in request.parameters.items()}
        await self._service.load(request.model_name, parameters)
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any) -> Any:
        _refuse_repository(request)
        await self._service.unload(request.model_name, dependents=_unload_dependents(request.parameters))
        return pb.RepositoryModelUnloadResponse()


def _tensor_metadata(tensor: TensorConfig, batch: tuple[int, ...]) -> Any:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype.name, shape=(*batch, *tensor.dims)
    )


def _refuse_repository(request: Any) -> None:
    if request.repository_name:
        raise errors.repository_name()


def _load_parameter(key: str, parameter: Any) -> str:
    """A load parameter as the HTTP API carries it: a file's bytes as base64."""
    kind = parameter.WhichOneof("parameter_choice")
    if key.startswith("file:") and kind == "bytes_param":
        return base64.b64encode(parameter.bytes_param).decode()
    if key == "config" and kind == "string_param":
        return str(parameter.string_param)
    expected = {"config": "string_param", "file": "bytes_param"}.get(key.partition(":")[0])
    if expected is None:
        raise errors.InvalidArgument(f"unexpected load parameter '{key}', expected 'config' or 'file:<path>'")
    raise errors.InvalidArgument(f"invalid value type for load parameter '{key}', expected {expected}.")


def _unload_dependents(parameters: Any) -> bool:
    if "unload_dependents" not in parameters:
        return False
    found = parameters["unload_dependents"]
    if found.WhichOneof("parameter_choice") != "bool_param":
        raise errors.InvalidArgument("invalid value type for 'unload_dependents' parameter, expected bool_param.")
    return bool(found.bool_param)


async def _no_trace(_: Any) -> Any:
    raise errors.Unsupported("trace settings cannot be changed on this server yet; start it without them")


async def _no_log_settings(_: Any) -> Any:
    raise errors.Unsupported(
        "log settings cannot be read or changed on a running server; start it with --log-verbose and --log-format"
    )
