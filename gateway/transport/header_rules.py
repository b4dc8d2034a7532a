"""What headers and gRPC metadata decide beyond who calls: which APIs may be used, and what becomes a request parameter.

`--http-restricted-api` and `--grpc-restricted-protocol` name groups of APIs and the header, with its value, that their
requests must have. `--http-header-forward-pattern` and `--grpc-header-forward-pattern` say whose values go to the model.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from gateway.config.restricted import read_restricted
from gateway.errors import PermissionDenied, Unavailable
from gateway.transport.auth import Header
from gateway.types import NO_CONTEXT, RESERVED, Parameter

_GRPC_PREFIX = "triton-grpc-protocol-"
_CONTEXT = ("traceparent", "tracestate")
_MODELS = "/v2/models/"
_OF_MODELS = {
    "ready": "health",
    "infer": "inference",
    "generate": "inference",
    "generate_stream": "inference",
    "config": "model-config",
    "stats": "statistics",
    "explain": "statistics",
    "trace/setting": "trace",
}
_OF_PATHS = {
    "health": "health",
    "repository": "model-repository",
    "jobs": "inference",
    "logging": "logging",
    "trace": "trace",
}
_OF_RPCS = {
    "ServerLive": "health",
    "ServerReady": "health",
    "ModelReady": "health",
    "ServerMetadata": "metadata",
    "ModelMetadata": "metadata",
    "ModelInfer": "inference",
    "ModelStreamInfer": "inference",
    "ModelConfig": "model-config",
    "ModelStatistics": "statistics",
    "RepositoryIndex": "model-repository",
    "RepositoryModelLoad": "model-repository",
    "RepositoryModelUnload": "model-repository",
    "TraceSetting": "trace",
    "LogSettings": "logging",
}


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """The rules of one listener; `restricted` has the header, lower-case, and its value for each group of APIs."""

    restricted: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    forward: re.Pattern[str] | None = None
    traced: bool = False  # whether the W3C trace context is read

    @classmethod
    def of(cls, restricted: Iterable[str], pattern: str, *, grpc: bool = False, traced: bool = False) -> HeaderRules:
        """From the settings. A pattern is looked for anywhere in a name, in any case unless it begins with `(?-i)`."""
        prefix = _GRPC_PREFIX if grpc else ""
        rules = {api: (prefix + key.lower(), value) for api, (key, value) in read_restricted(restricted).items()}
        case = pattern.startswith("(?-i)")
        compiled = re.compile(pattern.removeprefix("(?-i)"), 0 if case else re.IGNORECASE) if pattern else None
        return cls(rules, compiled, traced)

    def check_path(self, path: str, header: Header) -> None:
        """Raise `PermissionDenied` for an HTTP request that lacks what its API demands."""
        if (name := self._lacks(_api_of_path(path), header)) is not None:
            raise PermissionDenied(f"This API is restricted, expecting header '{name}'")

    def check_rpc(self, rpc: str, header: Header) -> None:
        """Raise `Unavailable`, as Triton has it, for a gRPC call that lacks what its protocol demands."""
        api = _OF_RPCS.get(rpc, "shared-memory")
        if (name := self._lacks(api, header)) is not None:
            raise Unavailable(f"This protocol is restricted, expecting header '{name}'")

    def forwarded(self, headers: Iterable[tuple[str, str | bytes]]) -> dict[str, Parameter]:
        """The parameters that these headers become; what the protocol has a use for comes with the request only."""
        forward = self.forward
        if forward is None:
            return {}
        return {
            key: value
            for key, value in headers
            if isinstance(value, str) and forward.search(key) and key not in RESERVED and not key.startswith("triton_")
        }

    def context(self, header: Header) -> Mapping[str, str]:
        """The W3C trace context of a request, as it came."""
        if not self.traced:
            return NO_CONTEXT
        return {name: value for name in _CONTEXT if (value := header(name)) is not None}

    def _lacks(self, api: str, header: Header) -> str | None:
        rule = self.restricted.get(api)
        if rule is None:
            return None
        name, value = rule
        given = header(name)
        known = given is not None and hmac.compare_digest(given.encode(errors="replace"), value.encode())
        return None if known else name


NO_RULES = HeaderRules()


@lru_cache(1024)
def _api_of_path(path: str) -> str:
    """The group that a path belongs to; `metadata` for what is in no other, so that nothing is in none."""
    if path == "/v2/models/stats":
        return "statistics"
    if path.startswith(_MODELS):
        _, *rest = path[len(_MODELS) :].split("/")
        return _OF_MODELS.get("/".join(rest[2:] if rest[:1] == ["versions"] else rest), "metadata")
    word = path.removeprefix("/v2/").partition("/")[0]
    return "shared-memory" if word.endswith("sharedmemory") else _OF_PATHS.get(word, "metadata")
