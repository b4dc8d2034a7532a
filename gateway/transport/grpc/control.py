"""Every call of Triton's service but inference: health, metadata, configuration, statistics, model control.

One method per RPC, from its request message to its response message. Authentication, error statuses and
transport are the servicer's.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb

from gateway import errors
from gateway.config.model import TensorConfig
from gateway.service import Service
from gateway.service.log_settings import FORMATS, LOG_NAMES
from gateway.service.shared_regions import SharedRegions
from gateway.transport.grpc import shared_memory
from gateway.transport.grpc.codec import check_version
from gateway.transport.instances import configuration
from gateway.transport.traceable import require_traceable

OPEN = frozenset({"ServerLive", "ServerReady"})
"""RPCs that need no token, so that probes work."""

_PIECE = 3 << 18  # bytes of a file that are written in base64 at once

_LOG_KINDS = {"log_verbose_level": ("int32", "uint32_param"), "log_format": ("string", "string_param")}


class Control:
    """The unary RPCs by name, answered from `Service`; the methods raise `GatewayError`."""

    def __init__(self, service: Service, regions: SharedRegions | None) -> None:
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
            "TraceSetting": self._trace_setting,
            "LogSettings": self._log_settings,
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
        parameters = await asyncio.to_thread(_load_parameters, request)
        await self._service.load(request.model_name, parameters)
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any) -> Any:
        _refuse_repository(request)
        await self._service.unload(request.model_name, dependents=_unload_dependents(request.parameters))
        return pb.RepositoryModelUnloadResponse()

    async def _trace_setting(self, request: Any) -> Any:
        require_traceable(self._service, request.model_name)
        traces = self._service.controls.traces
        if request.settings:
            news = {name: [*setting.value] or None for name, setting in request.settings.items()}
            settings = await traces.change(request.model_name, news)
        else:
            settings = await traces.read(request.model_name)
        answer = pb.TraceSettingResponse()
        for name, value in settings.items():
            answer.settings[name].value.extend([value] if isinstance(value, str) else value)
        return answer

    async def _log_settings(self, request: Any) -> Any:
        logs = self._service.controls.logs
        news = {name: _log_value(name, value) for name, value in request.settings.items() if name in LOG_NAMES}
        answer = pb.LogSettingsResponse()
        for name, value in (await logs.change(news)).items():
            kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(answer.settings[name], kind, value)
        return answer


def _tensor_metadata(tensor: TensorConfig, batch: tuple[int, ...]) -> Any:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype.name, shape=(*batch, *tensor.dims)
    )


def _refuse_repository(request: Any) -> None:
    if request.repository_name:
        raise errors.repository_name()


def _load_parameters(request: Any) -> dict[str, str]:
    return {key: _load_parameter(key, value) for key, value in request.parameters.items()}


def _load_parameter(key: str, parameter: Any) -> str:
    """A load parameter as the HTTP API carries it: a file's bytes as base64."""
    kind = parameter.WhichOneof("parameter_choice")
    if key.startswith("file:") and kind == "bytes_param":
        data = parameter.bytes_param
        # By pieces, each of which holds up the event loop, in whole groups of three.
        return "".join(base64.b64encode(data[at : at + _PIECE]).decode() for at in range(0, len(data), _PIECE))
    if key == "config" and kind == "string_param":
        return str(parameter.string_param)
    expected = {"config": "string_param", "file": "bytes_param"}.get(key.partition(":")[0])
    if expected is None:
        raise errors.InvalidArgument(f"unexpected load parameter '{key}', expected 'config' or 'file:<path>'")
    raise errors.InvalidArgument(f"invalid value type for load parameter '{key}', expected {expected}.")


def _log_value(name: str, value: Any) -> Any:
    if name == "log_file":
        raise errors.Unsupported("log file location can not be updated through network protocol")
    word, kind = _LOG_KINDS.get(name, ("boolean", "bool_param"))
    if value.WhichOneof("parameter_choice") != kind:
        raise errors.InvalidArgument(f"expect {word} for '{name}'")
    told = getattr(value, kind)
    if name == "log_format" and told not in FORMATS:
        raise errors.InvalidArgument(f"invalid argument for log_format, got: {told}")
    return told


def _unload_dependents(parameters: Any) -> bool:
    if "unload_dependents" not in parameters:
        return False
    found = parameters["unload_dependents"]
    if found.WhichOneof("parameter_choice") != "bool_param":
        raise errors.InvalidArgument("invalid value type for 'unload_dependents' parameter, expected bool_param.")
    return bool(found.bool_param)
