"""The bodies of the control paths: what a `Service` knows, as Triton's JSON. No web framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import json

from gateway.config.model import TensorConfig
from gateway.config.parse import config_json
from gateway.errors import Internal, InvalidArgument, Unavailable, Unsupported, stopping
from gateway.service import Service
from gateway.service.log_settings import FORMATS, LOG_NAMES, LogValue
from gateway.service.service import IndexEntry
from gateway.transport.explanation import merged
from gateway.transport.http.replies import JSON, Reply
from gateway.transport.instances import configuration
from gateway.transport.traceable import require_traceable

_LOG_KINDS: dict[str, tuple[str, type[Any]]] = {
    "log_verbose_level": ("unsigned-integer", int),
    "log_format": ("string", str),
}


def health(service: Service, word: str) -> Reply:
    """The reply to `GET /v2/health/{word}`, live or ready: 200 or, as Triton has it, 400.

    What runs on another engine than it should is ready, and is told in `degraded`.
    """
    healthy = service.live() if word == "live" else service.ready()
    told: dict[str, Any] = {word: healthy}
    if word == "ready" and (degraded := service.degraded()):
        told["degraded"] = degraded
    return 200 if healthy else 400, [JSON], json.encode(told)


def server_metadata(service: Service) -> dict[str, Any]:
    """The body of `GET /v2`."""
    name, version, extensions = service.server_metadata()
    return {"name": name, "version": version, "extensions": list(extensions)}


async def model_metadata(service: Service, name: str, version: str) -> dict[str, Any]:
    """The body of `GET /v2/models/{name}`; shapes are the API's, batch dimension included."""
    config = service.model_config(name, version)

    def tensors(configs: tuple[TensorConfig, ...]) -> list[dict[str, Any]]:
        batch = [-1] if config.max_batch_size else []
        return [{"name": t.name, "datatype": t.datatype.value, "shape": [*batch, *t.dims]} for t in configs]

    instances = service.instances(name, version)
    return {
        "name": config.name,
        "versions": [version] if version else service.ready_versions(name),
        "platform": config.platform or config.backend,
        "inputs": tensors(config.inputs),
        "outputs": tensors(config.outputs),
        **({"parameters": {"instances": instances}} if instances else {}),
    }


async def model_ready(service: Service, name: str, version: str) -> dict[str, Any]:
    """The body of `GET /v2/models/{name}/ready`. Raises what `infer` would when the model is not."""
    if not service.model_ready(name, version):
        raise stopping()
    return {"name": name, "ready": True}


async def model_config(service: Service, name: str, version: str) -> Any:
    """The body of `GET /v2/models/{name}/config`."""
    return config_json(configuration(service, name, version))


async def model_statistics(service: Service, name: str = "", version: str = "") -> dict[str, Any]:
    """The body of `GET /v2/models/stats` and `/v2/models/{name}/stats`."""
    return {"model_stats": await service.statistics(name, version)}


async def model_explanation(service: Service, name: str, version: str) -> Mapping[str, Any]:
    """The body of `GET /v2/models/{name}/explain`."""
    return merged(await service.explain(name, version))


async def repository_index(service: Service, body: dict[str, Any]) -> list[dict[str, str]]:
    """The body of `POST /v2/repository/index`; absent members are left out."""
    ready = body.get("ready", False)
    if type(ready) is not bool:
        raise InvalidArgument("Invalid value for 'ready': expected a boolean")
    return [_entry(entry) for entry in await service.index(ready=ready)]


async def log_settings(service: Service, body: dict[str, Any] | None) -> dict[str, Any]:
    """The body of `GET` and, with what to change, `POST /v2/logging`; members that are null change nothing."""
    if body is None:
        return {**await service.controls.logs.read()}
    news = {name: _log_value(name, value) for name, value in body.items() if name in LOG_NAMES and value is not None}
    return {**await service.controls.logs.change(news)}


def _log_value(name: str, value: Any) -> LogValue:
    if name == "log_file":
        raise Unsupported("log file location can not be updated through network protocol")
    wanted, kind = _LOG_KINDS.get(name, ("boolean", bool))
    if type(value) is not kind or (name == "log_verbose_level" and not 0 <= value < 1 << 32):
        raise Internal(f"attempt to access JSON non-{wanted} as {wanted}")
    if name == "log_format" and value not in FORMATS:
        raise Unavailable(f"invalid argument for --log_format, got: {value}")
    return value  # type: ignore[no-any-return]


async def trace_settings(service: Service, model: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """The body of `GET` and, with what to change, `POST /v2/trace/setting` and `/v2/models/{model}/trace/setting`."""
    require_traceable(service, model)
    if body is None:
        return {**await service.controls.traces.read(model)}
    return {**await service.controls.traces.change(model, {name: _trace_value(name, body[name]) for name in body})}


def _trace_value(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    many = name == "trace_level"
    if many and not isinstance(value, list):
        raise Internal("attempt to access JSON non-array as array")
    values = value if many else [value]
    if not all(type(each) is str for each in values):
        raise Internal("attempt to access JSON non-string as string")
    return values


def load_parameters(body: dict[str, Any]) -> dict[str, str]:
    """The `parameters` of a load request."""
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict) or not all(isinstance(value, str) for value in parameters.values()):
        raise InvalidArgument("'parameters' of a load request must be an object of strings: 'config', 'file:<path>'")
    return parameters


def unload_dependents(body: dict[str, Any]) -> bool:
    """The parameter `unload_dependents` of an unload request."""
    parameters = body.get("parameters", {})
    found = parameters.get("unload_dependents", False) if isinstance(parameters, dict) else None
    if type(found) is not bool:
        raise InvalidArgument("Unable to parse 'unload_dependents': expected a boolean in 'parameters'")
    return found


def _entry(entry: IndexEntry) -> dict[str, str]:
    members = {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
    return {key: value for key, value in members.items() if value}
