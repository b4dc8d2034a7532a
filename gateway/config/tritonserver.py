"""The command line of NVIDIA's `tritonserver`, turned into that of `gateway serve`: one table of all its flags.

Each flag is mapped to a setting, or refused by name with what to do instead; a value that asks for what this server
does anyway is taken. None is ignored. Flags that are not Triton's are passed on, so that every setting can be given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gateway.config.settings import Settings
from gateway.errors import InvalidArgument

DEFAULTS = {
    "http_address": "0.0.0.0",  # noqa: S104 - Triton's own default
    "grpc_address": "0.0.0.0",  # noqa: S104
    "insecure": "true",
    "exit_on_error": "true",
    "allow_python_models": "true",
    "startup_table": "triton",
}
"""Triton's defaults where ours are others, by setting; a flag or a variable goes first."""

OPEN = (
    "tritonserver: as Triton does it listens on all addresses, and whoever reaches it may use it; name the callers in a file "
    "and set GATEWAY_TOKEN_FILE, or give --http-address and --grpc-address 127.0.0.1 and GATEWAY_INSECURE=false"
)
"""What an operator is told who has not said who may call."""

_ON, _OFF = ("true", "on", "1"), ("false", "off", "0")


class Flag(NamedTuple):
    """A flag of tritonserver: the `setting` it sets, or the values that it `takes` and what to do instead of others."""

    setting: str = ""
    takes: tuple[str, ...] = ()
    remedy: str = ""
    kind: str = "text"  # "bool", "switch" (no value), "level" (of a log) or "whole" (a number that may have a fraction)


def _same(name: str, kind: str = "text") -> tuple[str, Flag]:
    return name, Flag(name.replace("-", "_"), kind=kind)


def _only(name: str, takes: tuple[str, ...], remedy: str) -> tuple[str, Flag]:
    return name, Flag(takes=takes, remedy=remedy)


_THREADS = "remove it; one event loop serves each process, and --workers and --http-workers with --queue embedded add processes"
_POOL = "remove it; tensors are not staged in a pool of this kind"
_PLUGIN = "remove it; nothing is loaded from shared libraries"
_TRACE = "remove it, and give it as --trace-config: triton,file=PATH, level=L, rate=N, count=N, triton,log-frequency=N"
_SAGEMAKER = (
    "remove it; put a proxy that maps /ping and /invocations to /v2/health/ready and /v2/models/MODEL/infer in front"
)
_VERTEX = "remove it; put a proxy that maps Vertex AI's routes to /v2/health/ready and /v2/models/MODEL/infer in front"

FLAGS: dict[str, Flag] = dict(
    (
        # server
        ("id", Flag("server_id")),
        _same("exit-timeout-secs"),
        # logging
        _same("log-verbose", "level"),
        _same("log-info", "bool"),
        _same("log-warning", "bool"),
        _same("log-error", "bool"),
        _only("log-format", ("default", "ISO8601"), "use ISO8601, or GATEWAY_LOG_FORMAT=json"),
        _same("log-file"),
        # model repository
        ("model-store", Flag("model_repository")),
        _same("model-repository"),
        _same("exit-on-error", "bool"),
        ("disable-auto-complete-config", Flag("disable_auto_complete_config", kind="switch")),
        _same("strict-readiness", "bool"),
        _same("model-control-mode"),
        _same("repository-poll-secs"),
        _same("load-model"),
        _same("model-config-name"),
        _same("model-load-thread-count"),
        _only(
            "model-load-retry-count", ("0",), "use 0; a model that failed is loaded again on request or in poll mode"
        ),
        _only("model-namespacing", _OFF, "use false and give every model a name of its own"),
        _only("enable-peer-access", _OFF, "use false; nothing is copied from GPU to GPU"),
        _same("allow-client-shm", "bool"),
        # HTTP
        _same("allow-http", "bool"),
        _same("http-address"),
        _same("http-port"),
        ("reuse-http-port", Flag("share_ports", kind="bool")),
        _same("http-header-forward-pattern"),
        _only("http-thread-count", (), _THREADS),
        _same("http-restricted-api"),
        _same("http-max-input-size"),
        # gRPC
        _same("allow-grpc", "bool"),
        _same("grpc-address"),
        _same("grpc-port"),
        ("reuse-grpc-port", Flag("share_ports", kind="bool")),
        _same("grpc-header-forward-pattern"),
        _only("grpc-infer-thread-count", (), _THREADS),
        _only(
            "grpc-infer-allocation-pool-size",
            (),
            "remove it; requests are not pooled. --max-inflight-bytes bounds them",
        ),
        _only("grpc-max-response-pool-size", (), "remove it; a stream's responses wait for its client"),
        _same("grpc-use-ssl", "bool"),
        _same("grpc-use-ssl-mutual", "bool"),
        _same("grpc-server-cert"),
        _same("grpc-server-key"),
        _same("grpc-root-cert"),
        _same("grpc-infer-response-compression-level"),
        _same("grpc-keepalive-time"),
        _same("grpc-keepalive-timeout"),
        _same("grpc-keepalive-permit-without-calls", "bool"),
        _same("grpc-http2-max-pings-without-data"),
        _same("grpc-http2-min-recv-ping-interval-without-data"),
        _same("grpc-http2-max-ping-strikes"),
        _same("grpc-max-connection-age"),
        _same("grpc-max-connection-age-grace"),
        _same("grpc-restricted-protocol"),
        # clouds
        _only("allow-sagemaker", _OFF, _SAGEMAKER),
        _only("sagemaker-port", (), _SAGEMAKER),
        _only("sagemaker-safe-port-range", (), _SAGEMAKER),
        _only("sagemaker-thread-count", (), _SAGEMAKER),
        _only("allow-vertex-ai", _OFF, _VERTEX),
        _only("vertex-ai-port", (), _VERTEX),
        _only("vertex-ai-thread-count", (), _VERTEX),
        _only("vertex-ai-default-model", (), _VERTEX),
        # metrics
        _same("allow-metrics", "bool"),
        _same("allow-gpu-metrics", "bool"),
        _same("allow-cpu-metrics", "bool"),
        _same("metrics-address"),
        _same("metrics-port"),
        _same("metrics-interval-ms", "whole"),
        _only(
            "metrics-config",
            ("counter_latencies=true", "summary_latencies=false"),
            "remove it; /metrics has Triton's counters, and histograms of ours",
        ),
        # tracing
        _same("trace-config"),
        _only("trace-file", (), _TRACE),
        _only("trace-level", ("OFF",), _TRACE),
        _only("trace-rate", (), _TRACE),
        _only("trace-count", (), _TRACE),
        _only("trace-log-frequency", (), _TRACE),
        # response cache
        ("cache-config", Flag("response_cache_bytes")),
        ("response-cache-byte-size", Flag("response_cache_bytes")),
        _only("cache-directory", ("/opt/tritonserver/caches",), _PLUGIN + "; --cache-config local,size=N needs none"),
        # rate limiter
        _same("rate-limit"),
        _same("rate-limit-resource"),
        # memory and devices
        _only("pinned-memory-pool-byte-size", ("0",), _POOL),
        _only(
            "cuda-memory-pool-byte-size",
            (),
            _POOL + "; gpu_mem_limit in a model's execution accelerator bounds its memory",
        ),
        _only("cuda-virtual-address-size", (), "remove it; the state of sequences does not grow in place"),
        _only(
            "min-supported-compute-capability", (), "remove it, and hide GPUs that are too old by CUDA_VISIBLE_DEVICES"
        ),
        _only("buffer-manager-thread-count", ("0",), _POOL),
        _only("host-policy", (), "remove it, and give a model the parameter cpu_affinity"),
        _only("model-load-gpu-limit", (), "remove it, and set gpu_mem_limit in a model's execution accelerator"),
        # backends
        _only("backend-directory", ("/opt/tritonserver/backends",), _PLUGIN),
        ("backend-config", Flag("default_max_batch_size")),
        _only("repoagent-directory", ("/opt/tritonserver/repoagents",), _PLUGIN),
        # deprecated
        ("strict-model-config", Flag("disable_auto_complete_config", kind="bool")),
    )
)
"""Every flag of tritonserver (server/src/command_line_parser.cc), in its order."""


def translate(argv: Sequence[str]) -> list[str]:
    """The arguments of `gateway serve` that do what this command line asks of tritonserver.

    As in Triton a flag may be shortened as far as it is clear. Raises `InvalidArgument` naming the flag and a remedy.
    """
    arguments: list[str] = []
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name = _full(word)
        if name is None:
            arguments.append(word)
            continue
        flag = FLAGS[name]
        value = _value(name, flag, word, words)
        given[name] = value
        if flag.setting in Settings.model_fields:
            arguments += [f"--{flag.setting.replace('_', '-')}", _setting_value(name, value)]
        elif value not in flag.takes:
            raise _refusal(name, flag)
    _together(given)
    if given.get("grpc-use-ssl-mutual") == "true":  # as in Triton it does not need the other flag
        arguments += ["--grpc-use-ssl", "true"]
    return [*_defaults(), *arguments]


def usage() -> str:
    """All flags: those that set something, then those that do not, each with what to do instead."""
    lines = ["usage: tritonserver --model-repository DIR [options]", "", "options (see gateway serve --help for more):"]
    lines += [f"  --{name}" for name, flag in FLAGS.items() if flag.setting in Settings.model_fields]
    lines += ["", "refused:"]
    for name, flag in FLAGS.items():
        if flag.setting not in Settings.model_fields:
            takes = f" (takes: {', '.join(flag.takes)})" if flag.takes else ""
            lines.append(f"  --{name}{takes}: {flag.remedy}")
    return "\n".join(lines) + "\n"


def _full(word: str) -> str | None:
    """The flag that a word names, in full or shortened; None for another word."""
    if not word.startswith("--"):
        return None
    name = word[2:].partition("=")[0]
    if name in FLAGS:
        return name
    if name.replace("-", "_") in Settings.model_fields:
        return None
    clear = [known for known in FLAGS if name and known.startswith(name)]
    if len(clear) > 1:
        raise InvalidArgument(f"option '--{name}' is ambiguous; it may be {', '.join('--' + each for each in clear)}")
    return clear[0] if clear else None


def _value(name: str, flag: Flag, word: str, words: Iterator[str]) -> str:
    _, given, value = word.partition("=")
    if flag.kind == "switch":
        if given:
            raise InvalidArgument(f"option '--{name}' takes no value")
        return "true"
    if not given:
        following = next(words, None)
        if following is None:
            raise InvalidArgument(f"option '--{name}' needs a value")
        value = following
    return _plain(name, flag, value)


def _plain(name: str, flag: Flag, value: str) -> str:
    """The value in one spelling."""
    word = value.lower()
    if flag.kind == "bool" or flag.takes in (_ON, _OFF):
        if word not in _ON + _OFF:
            raise InvalidArgument(f"--{name}: invalid value '{value}' for a boolean; use true or false")
        return "true" if word in _ON else "false"
    if flag.kind == "level":
        return {"true": "1", "false": "0"}.get(word, value)
    if flag.kind == "whole" and value.replace(".", "", 1).isdecimal():
        return str(round(float(value)))
    return value


def _setting_value(name: str, value: str) -> str:
    if name != "backend-config":
        return value
    backend, _, setting = value.rpartition(",")
    key, _, number = setting.partition("=")
    if key == "default-max-batch-size" and backend in ("", "onnxruntime", "tensorrt"):
        return number
    raise InvalidArgument(
        f"--backend-config={value} is not supported; only default-max-batch-size=N is. Put settings of a backend into "
        "parameters or optimization of each config.pbtxt"
    )


def _refusal(name: str, flag: Flag) -> InvalidArgument:
    return InvalidArgument(f"--{name} is not supported by this server; {flag.remedy}")


def _together(given: dict[str, str]) -> None:
    """Ports are shared all or none."""
    shared = {name: given.get(name, "false") for name in ("reuse-http-port", "reuse-grpc-port")}
    if len(set(shared.values())) > 1:
        raise InvalidArgument(
            "--reuse-http-port and --reuse-grpc-port must be equal; this server shares all its ports or none"
        )


def _defaults() -> Iterator[str]:
    for name, value in DEFAULTS.items():
        # Whoever gave tokens has decided who may call.
        decided = name == "insecure" and "GATEWAY_TOKEN_FILE" in os.environ
        if f"GATEWAY_{name.upper()}" not in os.environ and not decided:
            yield from (f"--{name.replace('_', '-')}", value)
